"""
Trains with a moving reference, resumes from a checkpoint of that run, and saves what both saw, in as many processes as
it is started in.

    accelerate launch --config_file ... -m tests.support.resume_worker MODEL_FOLDER OUTPUT
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from tests.support.adapters import LORA
from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.distributed import whole


LENGTHS = [3, 9, 2, 4, 6, 5, 1, 8]
STEPS, RESUMED = 5, 3
CASES = {"lora": LoraConfig(**LORA), "full": None}


def vowels(completion_ids, **kwargs):
    return [float(sum(token % 5 == 0 for token in ids)) for ids in completion_ids]


def make(model_folder: str, folder: Path, peft_config: Any) -> GRPOExtTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return make_trainer(
        GRPOExtTrainer,
        model_folder,
        vowels,
        folder,
        trainer_options={"peft_config": peft_config, "rollout_func": fixed_completions(LENGTHS)},
        beta=0.1,
        kl_estimator="exact",
        sync_ref_model=True,
        ref_model_mixup_alpha=0.6,
        ref_model_sync_steps=2,
        num_iterations=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        optim="adamw_torch",
        learning_rate=1e-2,
        per_device_train_batch_size=len(LENGTHS) // processes,
    )


def seen(trainer: GRPOExtTrainer) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "weights": {name: whole(value) for name, value in model.named_parameters()},
        "reference": {name: whole(value) for name, value in trainer._reference_parameters().items()},
        "log": [entry for entry in trainer.state.log_history if "kl" in entry],
        "step": trainer.state.global_step,
    }


def train(model_folder: str, output: Path, case: str) -> dict[str, Any]:
    """The uninterrupted run and the one that was resumed."""
    first = make(model_folder, output / case, CASES[case])
    first.train()
    second = make(model_folder, output / f"{case}_resumed", CASES[case])
    second.train(resume_from_checkpoint=str(output / case / f"checkpoint-{RESUMED}"))
    return {"whole": seen(first), "resumed": seen(second)}


def main(model_folder: str, output: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    torch.save({case: train(model_folder, Path(output), case) for case in CASES}, Path(output) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
