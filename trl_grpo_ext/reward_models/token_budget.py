"""Reward-model forwards cut by a token budget, so that their memory follows the budget and not the batch."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..distributed import gather
from .progress import scoring_bar
from .rendering import Rendered, RenderedBatch


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """
    Cut sequences into batches of few padded tokens, longest first.

        padded tokens = number of sequences * longest sequence <= max_tokens

    Args:
        lengths (`list[int]`):
            Number of tokens of each sequence.
        max_tokens (`int`):
            Bound on the padded tokens of a batch. A sequence that is longer makes a batch by itself.

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


def most_forwards(accelerator: Accelerator, own: int, device: torch.device) -> int:
    """
    The largest number of forwards of all processes, for all of them to run.

    In a process that runs more forwards of a sharded model than another one, the model waits for ever.
    """
    return int(gather(accelerator, torch.tensor([own], device=device)).max())


def collate(solutions: Sequence[Rendered], *, mask_tags: bool, device: torch.device) -> RenderedBatch:
    """
    Pad solutions on the right.

    Args:
        solutions (`Sequence[Rendered]` of length B):
            The solutions, at least one.
        mask_tags (`bool`):
            Whether the score positions are hidden from attention.
        device (`torch.device`):
            Where the tensors go.

    Returns:
        [`~trl_grpo_ext.reward_models.rendering.RenderedBatch`]
    """
    lengths_B = torch.tensor([len(solution.ids) for solution in solutions])
    # Any id does as padding: attention does not see it
    ids_BL = torch.zeros(len(solutions), int(lengths_B.max()), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    for row, solution in enumerate(solutions):
        ids_BL[row, : len(solution.ids)] = torch.tensor(solution.ids)
        rows += [row] * len(solution.score_positions)
        columns += solution.score_positions
    rows_R = torch.tensor(rows, dtype=torch.long)
    columns_R = torch.tensor(columns, dtype=torch.long)
    mask_BL = (torch.arange(ids_BL.shape[1]) < lengths_B[:, None]).long()
    if mask_tags:
        mask_BL[rows_R, columns_R] = 0
    prompt_lengths_B = torch.tensor([solution.prompt_length for solution in solutions])
    batch = RenderedBatch(ids_BL, mask_BL, rows_R, columns_R, prompt_lengths_B)
    return RenderedBatch(*(tensor.to(device) for tensor in batch))


class TokenBatchedModel(nn.Module):
    """
    A sequence-classification reward model that cuts its batch into [`token_batches`].

    Args:
        model (`nn.Module`):
            The reward model, as prepared by accelerate; its inputs must be padded on the right.
        max_tokens (`int`):
            Largest number of padded tokens of a forward.
        accelerator (`Accelerator`):
            Tells how many forwards the other processes run, see [`most_forwards`].
    """

    def __init__(self, model: nn.Module, max_tokens: int, accelerator: Accelerator):
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens
        self.accelerator = accelerator

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        """Logits of the whole batch, in its order."""
        lengths = attention_mask.sum(1).tolist()
        batches = token_batches(lengths, self.max_tokens)
        forwards = most_forwards(self.accelerator, len(batches), attention_mask.device)
        scored: list[tuple[list[int], torch.Tensor]] = []
        with scoring_bar(forwards, "reward model", "batches") as bar:
            for number in range(forwards):
                # Past its own last batch, a process runs that one again
                rows = batches[min(number, len(batches) - 1)]
                width = max(lengths[rows[0]], 1)
                cut = {name: values[rows, :width] for name, values in inputs.items()}
                scored.append((rows, self.model(attention_mask=attention_mask[rows, :width], **cut).logits))
                bar.update()
        logits = scored[0][1].new_empty(len(lengths), *scored[0][1].shape[1:])
        for rows, values in scored:
            logits[rows] = values
        return SequenceClassifierOutput(logits=logits)
