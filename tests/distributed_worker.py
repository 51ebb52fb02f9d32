"""
Trains every case of `tests/test_distributed.py` on fixed completions, in as many processes as it is started in, and
saves what each process saw.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed_worker MODEL_FOLDER OUTPUT
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from tests.training import Recorder, RecordingExtTrainer, fixed_completions, make_trainer, moved_policy
from trl_grpo_ext import StepRewards


# 3 groups of 4. Of two processes each has 6 rows: the second group lies in both, and the first process has the shorter
# completions and fewer steps
LENGTHS = [3, 5, 2, 4, 1, 5, 9, 6, 11, 2, 7, 8]

CASES: dict[str, dict[str, Any]] = {
    "position": {"process_advantage": "position", "loss_type": "dapo"},
    "pooled": {"process_advantage": "pooled", "loss_type": "grpo", "kl_reduction": "token_mean"},
    "step": {"process_advantage": "step", "loss_type": "dr_grpo", "gamma_unit": "step"},
    "min": {"process_advantage": "min", "loss_type": "dapo", "kl_reduction": "token_mean", "gamma": [0.9, 1.0]},
    "normalize_then_sum": {
        "process_advantage": "position",
        "position_baseline": "active",
        "multi_objective_aggregation": "normalize_then_sum",
        "kl_estimator": "k2",
        "loss_type": "dr_grpo",
    },
    "batch_scale": {"process_advantage": "pooled", "scale_rewards": "batch", "kl_estimator": "k3"},
    "outcome": {"supervision": "outcome", "advantage_eps": 1e-8},
    "lora": {"process_advantage": "position"},
    "accumulated": {"process_advantage": "position", "loss_type": "dapo"},
}
# Micro-batches that each of two processes cuts its rows into; one process takes the whole batch
MICRO_BATCHES = {"accumulated": 2}


def steps(completion_ids, row, **kwargs):
    """A step at every third token and at the end; nothing for some rows, all of the last group but one among them."""
    rewards: list[StepRewards | None] = []
    for number, ids in zip(row, completion_ids, strict=True):
        ends = sorted({*range(2, len(ids), 3), len(ids) - 1})
        values = [math.sin(5.0 * number + 2.0 * end) for end in ends]
        rewards.append(None if number in (1, 4, 8, 9, 11) else StepRewards(ends, values))
    return rewards


def outcome(row, **kwargs):
    """Row 4 is judged by no source."""
    return [None if number in (0, 4, 6, 11) else math.cos(3.0 * number) for number in row]


def train(model_folder: str, output: Path, case: str) -> dict[str, Any]:
    """Two iterations over one generated batch of 12 rows; what this process saw of them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches = MICRO_BATCHES.get(case, 1) if processes > 1 else 1
    recorder = Recorder()
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if case == "lora" else None
    trainer_options = {
        "rollout_func": fixed_completions(LENGTHS),
        "callbacks": [recorder],
        "peft_config": lora,
    }
    settings = {"supervision": "process", "kl_estimator": "exact"} | CASES[case]
    trainer = make_trainer(
        RecordingExtTrainer,
        model_folder if lora else moved_policy(model_folder),
        [steps, outcome],
        output / case,
        trainer_options=trainer_options,
        reward_weights=[0.8, 1.5],
        beta=0.3,
        temperature=0.9,
        num_iterations=2,
        max_steps=2,
        learning_rate=0.1,
        per_device_train_batch_size=len(LENGTHS) // processes // micro_batches,
        gradient_accumulation_steps=micro_batches,
        ddp_timeout=60,
        **settings,
    )
    trainer.train()
    (batch,) = trainer.batches
    return {
        "advantages": batch["advantages"],
        "mask": batch["completion_mask"],
        "table": list(trainer._logs["advantages"]),
        "log": trainer.state.log_history[:2],
        "gradients": recorder.gradients,
        "weights": {name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
    }


def main(model_folder: str, output: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    seen = {case: train(model_folder, Path(output), case) for case in CASES}
    torch.save(seen, Path(output) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
