"""One generated batch with the rewards of every source: what advantages and metrics are made from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ..advantages.combine import WHOLE_BATCH, Share
from ..distributed import gather, gather_groups, group_rows, local_rows, own_rows, total
from .sources import RewardSource, StepCounts
from .types import place_rewards


class ScoredBatch(NamedTuple):
    """
    The completions of all processes, in TRL's gathered order, and what each reward source gives them.

    That is what a method that a subclass overrides gets. Where no override needs the completions of others, a process
    has those of the groups that its own completions lie in.

    Under outcome supervision a completion counts as a single token, `T = 1`.

    Args:
        names (`list[str]` of length K):
            Names of the sources.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Reward of each source on each loss token, NaN where the source gives none.
        withheld_NK (`torch.Tensor` of shape `(N, K)`, bool):
            Where a gate keeps the source's rewards from counting.
        mask_NT (`torch.Tensor` of shape `(N, T)`, bool):
            Loss mask. T is the longest completion of all processes.
        steps_K (`list[int]` of length K):
            Number of steps that each source found in the completions of all processes; 0 for a source of outcome
            rewards.
        unscored_K (`list[int]` of length K):
            How many of these steps have no value.
        masked_K (`list[int]` of length K):
            How many of these steps have a value on a token outside the loss mask, where it does not count; 0 under
            outcome supervision.
        group_size (`int`):
            Completions per prompt, in consecutive rows.
        own_rows (`slice`):
            The rows of this process's own completions.
        share ([`~trl_grpo_ext.advantages.combine.Share`]):
            How what is found of these completions becomes that of all processes' completions.
    """

    names: list[str]
    rewards_KNT: torch.Tensor
    withheld_NK: torch.Tensor
    mask_NT: torch.Tensor
    steps_K: list[int]
    unscored_K: list[int]
    masked_K: list[int]
    group_size: int
    own_rows: slice
    share: Share

    @property
    def counted_KNT(self) -> torch.Tensor:
        """`rewards_KNT` with NaN in place of what is withheld."""
        return self.rewards_KNT.masked_fill(self.withheld_NK.T.unsqueeze(-1), torch.nan)

    @property
    def unjudged_NK(self) -> torch.Tensor:
        """Which completions have no reward of a source on any loss token."""
        return self.rewards_KNT.isnan().all(-1).T


class BatchRewards(NamedTuple):
    """
    Rewards of some completions, as [`ScoredBatch`] has them.

    Args:
        rewards_KNT, mask_NT, masked_K:
            As there.
        rows (`range`):
            The numbers of the completions in the batch of all processes.
    """

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    masked_K: list[int]
    rows: range


def outcome_rewards(scores_NK: torch.Tensor) -> BatchRewards:
    """Those of completions that count as a single token each, `T = 1`; TRL has gathered their scores."""
    rewards_KN1 = scores_NK.T.unsqueeze(-1)
    mask_N1 = torch.ones_like(rewards_KN1[0], dtype=torch.bool)
    return BatchRewards(rewards_KN1, mask_N1, [0] * len(rewards_KN1), range(len(scores_NK)))


def token_rewards(
    accelerator: Accelerator, sources: Sequence[Any], scores_NK: torch.Tensor, mask_BT: torch.Tensor, group_size: int
) -> BatchRewards:
    """
    Rewards on the loss tokens of the completions of this process's groups.

    Args:
        accelerator (`Accelerator`):
            To gather with, where a group lies in several processes.
        sources (`Sequence` of length K):
            [`RewardSource`] of each function; a model's own score, in `scores_NK`, is its outcome reward.
        scores_NK (`torch.Tensor` of shape `(N, K)`):
            One number per completion of all processes and source, NaN where there is none.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            Loss mask of this process.
        group_size (`int`):
            Completions that are needed together: those of a prompt, or all.
    """
    scores_KB = local_rows(accelerator, scores_NK).T.tolist()
    rewards_BKT = torch.empty((len(mask_BT), len(sources), mask_BT.size(1)), device=mask_BT.device)
    for k, (source, scores) in enumerate(zip(sources, scores_KB, strict=True)):
        rewards = source.rewards if isinstance(source, RewardSource) else scores
        rewards_BKT[:, k] = place_rewards(rewards, mask_BT)
    # A reward on a token that is not trained on does not count
    outside_B1T = ~mask_BT.bool().unsqueeze(1)
    masked_K = total(accelerator, (~rewards_BKT.isnan() & outside_B1T).sum((0, 2)))
    rewards_BKT.masked_fill_(outside_B1T, torch.nan)
    rewards_NKT = gather_groups(accelerator, rewards_BKT, torch.nan, group_size)
    mask_NT = gather_groups(accelerator, mask_BT.to(torch.uint8), 0, group_size).bool()
    rows = group_rows(own_rows(accelerator, len(mask_BT)), group_size)
    return BatchRewards(rewards_NKT.transpose(0, 1), mask_NT, masked_K, rows)


def share_of(accelerator: Accelerator, rows: range, total_rows: int, group_size: int) -> tuple[slice, Share]:
    """
    What a process has of a batch.

    Args:
        accelerator (`Accelerator`):
            Says which process this is, and gathers.
        rows (`range`):
            The completions that this process has.
        total_rows (`int`):
            The number of all processes' completions.
        group_size (`int`):
            As for [`token_rewards`], alike on every process.

    Returns:
        The rows of its own completions among those that it has, and how statistics are shared.
    """
    own = own_rows(accelerator, total_rows // accelerator.num_processes)
    own_slice = slice(own.start - rows.start, own.stop - rows.start)
    if group_size == total_rows:
        return own_slice, WHOLE_BATCH
    return own_slice, Share(own_slice, lambda values: gather(accelerator, values))


def count_steps(accelerator: Accelerator, sources: Sequence[Any]) -> list[StepCounts]:
    """The steps that each source found in the batches of all processes."""
    counts_K = [source.count_steps() if isinstance(source, RewardSource) else StepCounts() for source in sources]
    return [StepCounts(*summed) for summed in total(accelerator, torch.tensor(counts_K, device=accelerator.device))]
