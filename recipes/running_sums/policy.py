"""The policy: a Llama of 0.6 million parameters, its supervised warm-up and its evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from running_sums.task import (
    EOS,
    MAX_COMPLETION_LENGTH,
    TOKENIZER,
    right_answer,
    right_steps,
    split_steps,
    text_of,
    worked_solution,
)


WARM_UP_BATCH = 64


def build_policy() -> LlamaForCausalLM:
    """A policy with random weights."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return LlamaForCausalLM(config)


def supervised_loss(
    policy: PreTrainedModel, problems: Sequence[str], solve: Callable[[str], str] = worked_solution
) -> torch.Tensor:
    """Cross-entropy of the solutions, by default the worked ones, given the problems."""
    texts = [problem + solve(problem) + EOS for problem in problems]
    batch = TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, problem in enumerate(problems):
        labels[row, : len(problem)] = -100
    return policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def warm_up(problems: Sequence[str], validation: Sequence[str], stop_at: float) -> LlamaForCausalLM:
    """
    Train a new policy on worked solutions, each problem seen once, until it is right often enough.

    Args:
        problems (`Sequence[str]`):
            Problems to train on, 64 per update.
        validation (`Sequence[str]`):
            Problems whose accuracy ends the training.
        stop_at (`float`):
            That accuracy.
    """
    policy = build_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    batches = [problems[start : start + WARM_UP_BATCH] for start in range(0, len(problems), WARM_UP_BATCH)]
    with tqdm(batches, desc="Warm-up") as bar:
        for update, batch in enumerate(bar, start=1):
            loss = supervised_loss(policy, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # An evaluation costs more than an update, and the accuracy stays near 0 until the loss is this low
            if update % 2 == 0 and loss.item() < 0.15:
                accuracy = evaluate(policy, validation).accuracy
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.2f}")
                if accuracy >= stop_at:
                    break
    return policy


def save(policy: PreTrainedModel, folder: Path) -> None:
    """Save a policy with its tokenizer."""
    policy.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


@torch.no_grad()
def complete(policy: PreTrainedModel, problems: Sequence[str], **generation: Any) -> list[list[int]]:
    """One completion for each problem; `generation` goes to `generate`."""
    batch = TOKENIZER(list(problems), return_tensors="pt", padding=True).to(policy.device)
    output = policy.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        **({"max_new_tokens": MAX_COMPLETION_LENGTH} | generation),
    )
    return [until_eos(ids) for ids in output[:, batch.input_ids.shape[1] :].tolist()]


def until_eos(ids: list[int]) -> list[int]:
    """Generated ids without the padding after the end-of-sequence token."""
    eos = TOKENIZER.eos_token_id
    return ids[: ids.index(eos) + 1] if eos in ids else ids


class Score(NamedTuple):
    """Shares of right answers and of right steps, the second among all steps that were written."""

    accuracy: float
    right_steps: float


def evaluate(policy: PreTrainedModel, problems: Sequence[str]) -> Score:
    """
    Check completions of these problems by exact arithmetic.

    Decoding is greedy. A sampled accuracy would also rise if the policy only became more certain of what it writes.
    """
    answers = []
    steps = []
    for problem, completion in zip(problems, complete(policy, problems, do_sample=False), strict=True):
        answers.append(right_answer(problem, text_of(completion)))
        steps += right_steps(problem, [step.text for step in split_steps(completion)])
    return Score(sum(answers) / len(answers), sum(steps) / len(steps))
