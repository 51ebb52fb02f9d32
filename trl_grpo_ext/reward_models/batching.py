"""Reward-model forwards cut by a token budget, so that their memory follows the budget and not the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..distributed import gather
from .heads import ReadBatch
from .rendering import Rendered


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """
    Cut completions into batches of at most `max_tokens` padded tokens, longest first.

    Args:
        lengths (`list[int]`):
            Tokens of each sequence.
        max_tokens (`int`):
            Bound on sequences x longest sequence of a batch; a longer sequence makes a batch of its own.

    Returns:
        `list[list[int]]`: indices into `lengths`, each exactly once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # Sorted by length, so the batch's first sequence is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate(rendered: Sequence[Rendered], pad_id: int, mask_reads: bool, device: torch.device) -> ReadBatch:
    """Pad solutions on the right and note where each is read."""
    lengths = torch.tensor([len(one.ids) for one in rendered])
    ids = torch.full((len(rendered), int(lengths.max())), pad_id)
    for row, one in enumerate(rendered):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.tensor([row for row, one in enumerate(rendered) for _ in one.read_positions], dtype=torch.long)
    positions = torch.tensor([position for one in rendered for position in one.read_positions], dtype=torch.long)
    if mask_reads:
        mask[rows, positions] = 0
    prompts = torch.tensor([one.prompt_length for one in rendered])
    return ReadBatch(*(tensor.to(device) for tensor in (ids, mask, rows, positions, prompts)))


class TokenBatchedModel(nn.Module):
    """
    A sequence-classification reward model that scores its batch in [`token_batches`], in the original order.

    Args:
        model (`nn.Module`):
            The reward model, as prepared by accelerate; its inputs must be padded on the right.
        max_tokens (`int`):
            Padded tokens per forward.
        accelerator (`Accelerator`):
            Used to run as many forwards on every process, without which a sharded model would wait for ever.
    """

    def __init__(self, model: nn.Module, max_tokens: int, accelerator: Accelerator):
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens
        self.accelerator = accelerator

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        lengths = attention_mask.sum(1).tolist()
        batches = token_batches(lengths, self.max_tokens)
        counts = gather(self.accelerator, torch.tensor([len(batches)], device=attention_mask.device))
        scored: list[tuple[list[int], Any]] = []
        for number in range(int(counts.max())):
            rows = batches[min(number, len(batches) - 1)]
            width = max(lengths[rows[0]], 1)
            cut = {name: values[rows, :width] for name, values in inputs.items()}
            scored.append((rows, self.model(attention_mask=attention_mask[rows, :width], **cut).logits))
        logits = scored[0][1].new_empty(len(lengths), *scored[0][1].shape[1:])
        for rows, values in scored:
            logits[rows] = values
        return SequenceClassifierOutput(logits=logits)
