"""
Scores fixed completions by the reward models of `tests/reward_models/test_distributed.py`, in one process or in each
of those that `tests/support/two_processes.py` runs in, and saves what each process saw.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from tests.support.tiny_models import save_tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, fixed_completions, on_cpu, shard_all
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, ProcessRewardModel
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.readings import LogRatio, TokenPair
from trl_grpo_ext.reward_models.renderings import Bare, Tagged
from trl_grpo_ext.steps.segmentation import Segmentation


# Of two processes the first has the short ones
LENGTHS = [4, 9, 3, 7, 29, 25, 31, 18]
LINES = Segmentation(by="newline")
TAGGED = Tagged(tag=";", between="\n")
PAIR = Preset("pair", "process", TAGGED, TokenPair("+", "-"), segmentation=LINES)
RATIO = Preset("ratio", "process", Bare(between="\n"), LogRatio(beta=1.0), segmentation=LINES)


def save_models(folder: Path) -> None:
    """A policy, a model with a head of labels, two causal ones, one of them with tied embeddings, and an adapter."""
    for name, tied, deviation in (("policy", False, 0.2), ("causal", True, 0.4), ("reference", False, 0.3)):
        save_tiny_model(folder / name, tie_word_embeddings=tied, initializer_range=deviation)
    save_tiny_model(folder / "labels", LlamaForTokenClassification, LlamaConfig, num_labels=2)
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "causal"), LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")


def completions() -> Any:
    """Characters; every fourth one is a newline."""
    rows = fixed_completions(LENGTHS, vocabulary=40)
    newline = tiny_tokenizer().convert_tokens_to_ids("\n")
    for ids in rows.completion_ids:
        ids[3:-1:4] = [newline] * len(ids[3:-1:4])
    return rows


@contextmanager
def recorded_calls() -> Iterator[dict[ProcessRewardModel, Any]]:
    """What each process reward model returned last, while the block runs."""
    returned: dict[ProcessRewardModel, Any] = {}
    call = ProcessRewardModel.__call__

    def recording(self: ProcessRewardModel, *args: Any, **columns: Any) -> Any:
        returned[self] = call(self, *args, **columns)
        return returned[self]

    with patch.object(ProcessRewardModel, "__call__", recording):
        yield returned


def score(models: Path, output: Path) -> dict[str, Any]:
    """Rewards that the trainer got, and scores of other numbers of completions in each process."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    args = GRPOExtConfig(
        str(output),
        supervision="process",
        **on_cpu(),
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=len(LENGTHS) // processes,
        reward_batch_tokens=80,
        # Adam's own kernels are built when they are first used
        optim="sgd",
    )
    shard_all(args)
    pair = ProcessRewardModel.from_pretrained(str(models / "causal"), preset=PAIR)
    adapted = ProcessRewardModel.from_pretrained(str(models / "adapter"), preset=PAIR, weights_of=pair)
    ratio = ProcessRewardModel.from_pretrained(
        str(models / "causal"), preset=RATIO, weights_of=pair, log_ratio_model=str(models / "reference")
    )
    trainer = GRPOExtTrainer(
        str(models / "policy"),
        [str(models / "labels"), pair, adapted, ratio],
        args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 6}),
        rollout_func=completions(),
    )
    with recorded_calls() as returned:
        trainer.train()
    seen = {"trainer": [[reward.values for reward in returned[source]] for source in trainer.reward_funcs]}
    rows = [(f"{n}+{n}=", [f"{n}" * (1 + n), "a+b-c" * n or "d"]) for n in range(7)]
    # Of two processes, the second has most of the rows; without any, a process still takes part
    for name, share in (("uneven", [rows[:1], rows[1:]]), ("none", [[], rows])):
        own = rows if processes == 1 else share[rank]
        problems = [problem for problem, _ in own]
        solutions = [steps for _, steps in own]
        seen[name] = [source.score_steps(problems, solutions) for source in trainer.reward_funcs]
    backbones = [source.scorer.backbone for source in trainer.reward_funcs]
    weights = [w for backbone in backbones for name, w in backbone.named_parameters() if "lora" not in name]
    seen["sharded"] = all(weight.numel() == 0 for weight in weights)
    return seen


def main(models: Path, output: Path, sharding: str = "none") -> None:
    torch.save(score(models, output), output / f"rank{os.environ.get('RANK', '0')}.pt")
