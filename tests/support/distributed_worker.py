"""
Trains cases of `tests/test_distributed.py` on fixed completions, in one process or in each of those that
`tests/support/two_processes.py` runs in, and saves what each process saw.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import save_tiny_model
from tests.support.training import Recorder, RecordingExtTrainer, fixed_completions, make_trainer, moved_policy
from trl_grpo_ext import StepRewards, TurnRewards
from trl_grpo_ext.credit.read import read_credit
from trl_grpo_ext.distributed import whole


# 3 groups of 4. Of two processes each has 6 rows: the second group lies in both, and the first process has the shorter
# completions and fewer steps
LENGTHS = [3, 5, 2, 4, 1, 5, 9, 6, 11, 2, 7, 8]

# The same number of tokens for both: TRL's entropy bonus is a mean over each process's own
BALANCED = [10, 12, 3, 4, 1, 13, 9, 6, 11, 2, 7, 8]


class Case(NamedTuple):
    """A run: settings of the trainer, folders of the policy and of the reference, and how it is cut and adapted."""

    settings: dict[str, Any]
    policy: str = "moved"
    reference: str = "untied"
    lengths: list[int] = LENGTHS
    # Settings of a new adapter on the policy
    lora: dict[str, Any] | None = None
    # Folder of a trained adapter on the policy
    adapter: str | None = None
    # Whether the second token and those after it, up to two, are a tool's where there are more, and turns are rewarded
    tools: bool = False
    # That each of two processes cuts its rows into; one process takes the whole batch
    micro_batches: int = 1


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
CHECKPOINTING = {"gradient_checkpointing": True}

# Ways to make a loss of rewards, which sharding does not see
LOSSES = {
    "position": Case(
        {"advantage_estimator": "position", "loss_type": "dapo", "log_credit": 2, "log_completions": True}
    ),
    "pooled": Case({"advantage_estimator": "pooled", "loss_type": "grpo", "kl_reduction": "token_mean"}),
    "step": Case({"advantage_estimator": "step", "loss_type": "dr_grpo", "gamma_unit": "step"}),
    "min": Case(
        {"advantage_estimator": "min", "loss_type": "dapo", "kl_reduction": "token_mean", "gamma": [0.9, 1.0]}
    ),
    "normalize_then_sum": Case(
        {
            "advantage_estimator": "position",
            "position_baseline": "active",
            "multi_objective_aggregation": "normalize_then_sum",
            "kl_estimator": "k2",
            "loss_type": "dr_grpo",
        }
    ),
    "batch_scale": Case({"advantage_estimator": "pooled", "scale_rewards": "batch", "kl_estimator": "k3"}),
    "outcome": Case({"supervision": "outcome", "advantage_eps": 1e-8}),
    "turns": Case({"advantage_estimator": "step", "gamma": 0.5, "gamma_unit": "turn"}, tools=True),
}
# Ways to hold and use the weights, which are all that it sees
WEIGHTS = {
    "full": Case({"loss_type": "grpo"}, policy="untied"),
    "tied": Case({"loss_type": "dapo"} | CHECKPOINTING, policy="moved_tied", reference="tied"),
    "accumulated": Case({"loss_type": "dapo"}, micro_batches=2),
    # The gradient is not the expected one: the head's second pass
    "entropy": Case({"entropy_coef": 0.5, "loss_type": "dr_grpo"}, lengths=BALANCED),
    "lora": Case({}, policy="untied", lora=LORA),
    "lora_tied": Case(CHECKPOINTING, policy="tied", lora=LORA, micro_batches=2),
    "lora_entropy": Case({"entropy_coef": 0.5}, policy="untied", lengths=BALANCED, lora=LORA),
    # Not of the expected kind either: what a frozen head keeps for any loss
    "lora_any_loss": Case(
        {"importance_sampling_level": "sequence_token", "epsilon": 0.01}, policy="untied", lora=LORA
    ),
    "trained_head": Case({}, policy="untied", lora=LORA | {"modules_to_save": ["lm_head"]}, micro_batches=2),
    "trained_adapter": Case({}, policy="untied", adapter="adapter"),
}
CASES = LOSSES | WEIGHTS

STEPS = 3


def save_models(folder: Path) -> None:
    """Policies with tied and untied embeddings, the same with noise on their weights, and a trained adapter."""
    for name, tied in (("untied", False), ("tied", True)):
        save_tiny_model(folder / name, tie_word_embeddings=tied)
        moved = "moved" if name == "untied" else f"moved_{name}"
        save_tiny_model(folder / moved)
        moved_policy(str(folder / name)).save_pretrained(str(folder / moved))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "untied"), LoraConfig(**LORA))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder / "adapter"))


def steps(completion_ids, row, **kwargs):
    """
    A step at every third token and at the end, a few without a score; nothing for some rows, all of the last group but
    one among them.
    """
    rewards: list[StepRewards | None] = []
    for number, ids in zip(row, completion_ids, strict=True):
        ends = sorted({*range(2, len(ids), 3), len(ids) - 1})
        # Of two processes, the first has one of its 6 steps unscored, the second two of 8
        values = [None if (number + end) % 6 == 0 else math.sin(5.0 * number + 2.0 * end) for end in ends]
        rewards.append(None if number in (1, 4, 8, 9, 11) else StepRewards(ends, values))
    return rewards


def env_mask(lengths: list[int]) -> list[list[int]]:
    return [[1, 0, 0, *[1] * (length - 3)] if length > 3 else [1] * length for length in lengths]


def turns(row, completion_ids, **kwargs):
    """The second turn of some completions, of which the first process has fewer, is not scored."""
    return [
        None if number == 4 else TurnRewards([math.sin(number), None if number % 3 else 1.0][: 1 + (len(ids) > 3)])
        for number, ids in zip(row, completion_ids, strict=True)
    ]


def outcome(row, **kwargs):
    """Row 4 is judged by no source."""
    return [None if number in (0, 4, 6, 11) else math.cos(3.0 * number) for number in row]


def policy(models: Path, case: Case) -> Any:
    """What the trainer is given: a folder, or a model whose reference TRL loads from another folder."""
    if case.policy == case.reference and case.adapter is None or case.lora is not None:
        return str(models / case.policy)
    model = AutoModelForCausalLM.from_pretrained(models / case.policy, dtype=torch.float32)
    if case.adapter is not None:
        return PeftModel.from_pretrained(model, models / case.adapter, is_trainable=True)
    model.config._name_or_path = str(models / case.reference)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights, gathered from the processes that share them."""
    return {
        name: whole(parameter) if is_shared(parameter) else parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def is_shared(parameter: torch.Tensor) -> bool:
    # ZeRO-3 gives parameters an identifier, but when training begins to a model that was there before the trainer
    return isinstance(parameter, DTensor) or "ds_id" in vars(parameter)


def train(models: Path, output: Path, name: str) -> dict[str, Any]:
    """
    Two iterations over one generated batch of 12 rows and the first over another; what this process saw of them.
    """
    case = CASES[name]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches = case.micro_batches if processes > 1 else 1
    trainer = make_trainer(
        RecordingExtTrainer,
        policy(models, case),
        [turns if case.tools else steps, outcome],
        output / name,
        trainer_options={
            "rollout_func": fixed_completions(case.lengths, env_mask=env_mask(case.lengths) if case.tools else None),
            "peft_config": None if case.lora is None else LoraConfig(**case.lora),
        },
        reward_weights=[0.8, 1.5],
        beta=0.3,
        temperature=0.9,
        num_iterations=2,
        max_steps=STEPS,
        learning_rate=0.1,
        per_device_train_batch_size=len(case.lengths) // processes // micro_batches,
        gradient_accumulation_steps=micro_batches,
        **{"supervision": "process", "kl_estimator": "exact", "epsilon": 0.05} | case.settings,
    )
    before = weights(trainer.model)
    sharded = trainer.accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    recorder = Recorder()
    if not sharded:
        trainer.add_callback(recorder)
    trainer.train()
    # Parameters are shared out when training begins
    parameters = list(trainer.model.parameters())
    return {
        "sharding": trainer.accelerator.distributed_type.value,
        "whole": sum(p.numel() > 0 and not isinstance(p, DTensor) for p in parameters),
        "parameters": len(parameters),
        "advantages": [batch["advantages"] for batch in trainer.batches],
        "mask": [batch["completion_mask"] for batch in trainer.batches],
        "table": list(trainer._logs["advantages"]),
        "credit": [step.rows() for step in read_credit(output / name).steps] if trainer.args.log_credit else None,
        "steps": [[line._asdict() for line in lines] for lines, _ in trainer._logged_steps],
        "log": trainer.state.log_history[:STEPS],
        "gradients": recorder.gradients,
        "before": before,
        "after": weights(trainer.model),
    }


def main(models: Path, output: Path, sharding: str = "none") -> None:
    cases = CASES if sharding in ("none", "ddp") else WEIGHTS
    seen = {case: train(models, output, case) for case in cases}
    torch.save(seen, output / f"rank{os.environ.get('RANK', '0')}.pt")
