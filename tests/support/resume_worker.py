"""
Trains over two epochs with a moving reference, resumes from a checkpoint of that run, and saves what both saw, in one
process or in each of those that `tests/support/two_processes.py` runs in.
"""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from tests.support.adapters import LORA
from tests.support.tiny_models import save_tiny_model
from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.distributed import whole


LENGTHS = [3, 9, 2, 4, 6, 5, 1, 8]
# An epoch has four steps: two updates on each of two generated batches. The run is resumed in the second epoch,
# between the two updates on that epoch's first batch
STEPS, RESUMED = 7, 5
CASES = {"lora": LoraConfig(**LORA), "full": None}


class RecordingPrompts(GRPOExtTrainer):
    """Keeps this process's prompts of each generated batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prompts: list[list[str]] = []

    def _generate_and_score_completions(self, inputs):
        self.prompts.append([example["prompt"] for example in inputs])
        return super()._generate_and_score_completions(inputs)


def save_models(folder: Path) -> None:
    save_tiny_model(folder)


def vowels(completion_ids, **kwargs):
    return [float(sum(token % 5 == 0 for token in ids)) for ids in completion_ids]


def make(model_folder: str, folder: Path, peft_config: Any, steps: int = STEPS) -> RecordingPrompts:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return make_trainer(
        RecordingPrompts,
        model_folder,
        vowels,
        folder,
        trainer_options={"peft_config": peft_config, "rollout_func": fixed_completions(LENGTHS)},
        prompt_repeats=1,
        beta=0.1,
        kl_estimator="exact",
        sync_ref_model=True,
        ref_model_mixup_alpha=0.6,
        ref_model_sync_steps=2,
        num_iterations=2,
        max_steps=steps,
        save_strategy="steps",
        save_steps=RESUMED,
        optim="adamw_torch",
        learning_rate=1e-2,
        per_device_train_batch_size=len(LENGTHS) // processes,
    )


def seen(trainer: RecordingPrompts) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "weights": {name: whole(value) for name, value in model.named_parameters()},
        "reference": {name: whole(value) for name, value in trainer._reference_parameters().items()},
        "log": [entry for entry in trainer.state.log_history if "kl" in entry],
        "step": trainer.state.global_step,
        "prompts": trainer.prompts,
    }


def train(model_folder: str, output: Path, case: str) -> dict[str, Any]:
    """The uninterrupted run and the one that was resumed."""
    checkpoint = output / case / f"checkpoint-{RESUMED}"
    first = make(model_folder, output / case, CASES[case])
    first.train()
    second = make(model_folder, output / f"{case}_resumed", CASES[case])
    second.train(resume_from_checkpoint=str(checkpoint))
    return {"whole": seen(first), "resumed": seen(second)}


def train_without_a_batch(model_folder: str, output: Path, case: str) -> list[list[str]]:
    """Prompts of one update after a checkpoint that has lost the last process's part of the generated batch."""
    checkpoint = output / case / f"checkpoint-{RESUMED}"
    trainer = make(model_folder, output / f"{case}_lost", CASES[case], steps=RESUMED + 1)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        (checkpoint / f"batch_{trainer.accelerator.num_processes - 1}.pt").unlink()
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer.prompts


def main(model: Path, output: Path, sharding: str = "none") -> None:
    runs: dict[str, Any] = {case: train(str(model), output, case) for case in CASES}
    prompts = train_without_a_batch(str(model), output, "lora")
    torch.save({"runs": runs, "prompts without a batch": prompts}, output / f"rank{os.environ.get('RANK', '0')}.pt")
