"""One generated batch of all processes with the rewards of every source: what advantages and metrics are made from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ..distributed import gather_tokens, local_rows, total
from .sources import RewardSource, StepCounts
from .types import place_rewards


class ScoredBatch(NamedTuple):
    """
    The completions of all processes, in TRL's gathered order, and what each reward source gives them.

    Under outcome supervision a completion counts as a single token, `T = 1`.

    Args:
        names (`list[str]` of length K):
            Names of the sources.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Reward of each source on each loss token, NaN where the source gives none.
        withheld_NK (`torch.Tensor` of shape `(N, K)`, bool):
            Where a gate keeps the source's rewards from counting.
        mask_NT (`torch.Tensor` of shape `(N, T)`, bool):
            Loss mask.
        steps_K (`list[int]` of length K):
            Number of steps that each source found; 0 for a source of outcome rewards.
        unscored_K (`list[int]` of length K):
            How many of these steps have no value.
        masked_K (`list[int]` of length K):
            How many of these steps have a value on a token outside the loss mask, where it does not count; 0 under
            outcome supervision.
        group_size (`int`):
            Completions per prompt, in consecutive rows.
    """

    names: list[str]
    rewards_KNT: torch.Tensor
    withheld_NK: torch.Tensor
    mask_NT: torch.Tensor
    steps_K: list[int]
    unscored_K: list[int]
    masked_K: list[int]
    group_size: int

    @property
    def counted_KNT(self) -> torch.Tensor:
        """`rewards_KNT` with NaN in place of what is withheld."""
        return self.rewards_KNT.masked_fill(self.withheld_NK.T.unsqueeze(-1), torch.nan)

    @property
    def unjudged_NK(self) -> torch.Tensor:
        """Which completions have no reward of a source on any loss token."""
        return self.rewards_KNT.isnan().all(-1).T


def gather_outcomes(scores_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """As [`gather_token_rewards`] of completions that count as a single token each, `T = 1`."""
    rewards_KN1 = scores_NK.T.unsqueeze(-1)
    return rewards_KN1, torch.ones_like(rewards_KN1[0], dtype=torch.bool), [0] * len(rewards_KN1)


def gather_token_rewards(
    accelerator: Accelerator, sources: Sequence[Any], scores_NK: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    Rewards on the loss tokens of all processes' completions.

    Args:
        accelerator (`Accelerator`):
            To gather with.
        sources (`Sequence` of length K):
            [`RewardSource`] of each function; a model's own score, in `scores_NK`, is its outcome reward.
        scores_NK (`torch.Tensor` of shape `(N, K)`):
            One number per completion and source, NaN where there is none.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            Loss mask of this process.

    Returns:
        Rewards `(K, N, T)`, NaN where there is none, and mask `(N, T)`, bool, with T the longest of all processes; and
        for each source the number of its rewards that lie outside the mask, which are left out.
    """
    scores_KB = local_rows(accelerator, scores_NK).T.tolist()
    placed = []
    for source, scores in zip(sources, scores_KB, strict=True):
        placed.append(place_rewards(source.rewards if isinstance(source, RewardSource) else scores, mask_BT))
    mask_NT = gather_tokens(accelerator, mask_BT.long(), 0).bool()
    rewards_KNT = gather_tokens(accelerator, torch.stack(placed, dim=1), torch.nan).transpose(0, 1)
    # A reward on a token that is not trained on does not count
    masked_K = (~rewards_KNT.isnan() & ~mask_NT).sum((1, 2)).tolist()
    return rewards_KNT.where(mask_NT, torch.nan), mask_NT, masked_K


def count_steps(accelerator: Accelerator, sources: Sequence[Any]) -> list[StepCounts]:
    """The steps that each source found in the batches of all processes."""
    counts_K = [source.count_steps() if isinstance(source, RewardSource) else StepCounts() for source in sources]
    return [StepCounts(*summed) for summed in total(accelerator, torch.tensor(counts_K, device=accelerator.device))]
