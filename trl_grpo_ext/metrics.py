"""
What is logged about rewards and advantages, from the tensors that were trained on.

Of rewards, each completion has a few numbers, from which the metrics of a batch follow: a process has to know no more
of the completions of others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .advantages.combine import row_blocks
from .advantages.normalization import Moments, merged, weighted_moments
from .rewards.turns import turn_indices


# Later turns of a completion have no metric of their own
TURNS_LOGGED = 10

# A mean of equal numbers differs from them by no more than this share
_ROUNDING = 1e-6


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """
    Metrics as plain numbers: a tensor in the log could not be written to a checkpoint.

    Raises:
        TypeError: a metric that is not one number.
    """
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"the metric {name!r} is {value!r}, which is not one number.") from error
    return numbers


class RewardStats(NamedTuple):
    """
    What metrics need to know of the rewards of each completion.

    Args:
        count_NK (`torch.Tensor` of shape `(N, K)`):
            The number of rewards of a source on loss tokens.
        mean_NK (`torch.Tensor` of shape `(N, K)`):
            Their mean; 0 where there is none.
        squares_NK (`torch.Tensor` of shape `(N, K)`):
            The sum of their squared deviations from it.
        largest_NK (`torch.Tensor` of shape `(N, K)`):
            The largest of their sizes.
        tokens_NK (`torch.Tensor` of shape `(N, K)`):
            The number of loss tokens up to the last of them.
    """

    count_NK: torch.Tensor
    mean_NK: torch.Tensor
    squares_NK: torch.Tensor
    largest_NK: torch.Tensor
    tokens_NK: torch.Tensor

    @property
    def scores_KN(self) -> torch.Tensor:
        """The mean reward of each completion, NaN where there is none."""
        return self.mean_NK.where(self.count_NK > 0, torch.nan).T


class TurnStats(NamedTuple):
    """
    What metrics need to know of the turns of each completion, U of which have metrics of their own.

    Args:
        turns_N (`torch.Tensor` of shape `(N,)`):
            The number of turns.
        tokens_N (`torch.Tensor` of shape `(N,)`):
            The number of loss tokens.
        rewards_NKU (`torch.Tensor` of shape `(N, K, U)`):
            The sum of each source's rewards in each of the first turns, NaN where there is none.
    """

    turns_N: torch.Tensor
    tokens_N: torch.Tensor
    rewards_NKU: torch.Tensor


def reward_stats(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor) -> RewardStats:
    """
    Count, mean and spread of each completion's rewards, and where the last one is.

    Args:
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Rewards on loss tokens, NaN where there is none.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            Loss mask.
    """
    parts = [_stats_of_rows(rewards_KNT[:, rows], mask_NT[rows]) for rows in row_blocks(mask_NT.shape)]
    return RewardStats(*[torch.cat(one) for one in zip(*parts, strict=True)])


def _stats_of_rows(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor) -> RewardStats:
    tokens_so_far_NT = mask_NT.cumsum(1)
    of_sources = []
    for rewards_NT in rewards_KNT:
        given_NT = ~rewards_NT.isnan()
        moments = weighted_moments(rewards_NT, given_NT.to(rewards_NT.dtype), (1,))
        tokens_N1 = (tokens_so_far_NT * given_NT).amax(1, keepdim=True)
        of_sources.append((*moments, tokens_N1))
    return RewardStats(*[torch.cat(of_each, dim=1) for of_each in zip(*of_sources, strict=True)])


def turn_stats(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor) -> TurnStats:
    """The turns of each completion, and what each source gives to the first of them; as for [`reward_stats`]."""
    parts = [_turns_of_rows(rewards_KNT[:, rows], mask_NT[rows]) for rows in row_blocks(mask_NT.shape)]
    return TurnStats(*[torch.cat(one) for one in zip(*parts, strict=True)])


def _turns_of_rows(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor) -> TurnStats:
    turns_NT = turn_indices(mask_NT)
    sums = []
    for rewards_NT in rewards_KNT:
        given_NT = (turns_NT >= 0) & (turns_NT < TURNS_LOGGED) & ~rewards_NT.isnan()
        # What is in no turn of these goes to a column that is dropped
        places_NT = turns_NT.where(given_NT, TURNS_LOGGED)
        empty = rewards_NT.new_zeros(len(rewards_NT), TURNS_LOGGED + 1)
        sums_NU = empty.scatter_add(1, places_NT, rewards_NT.nan_to_num())
        counts_NU = empty.scatter_add(1, places_NT, given_NT.to(rewards_NT.dtype))
        sums.append(sums_NU.where(counts_NU > 0, torch.nan)[:, :TURNS_LOGGED])
    return TurnStats(turns_NT.amax(1) + 1, mask_NT.sum(1), torch.stack(sums, dim=1))


def step_metrics(names: Sequence[str], stats: RewardStats, has_steps_K: Sequence[bool]) -> dict[str, float]:
    r"""
    Each process source's token and step rewards: mean, std (ddof 1), number per completion, and length of a step.

    The number of steps is a mean over the completions that the source judges. The length of a completion's steps is in
    loss tokens, with `t_i` the index of its last reward among its loss tokens and `n_i` its number of rewards:

        tokens_per_step = mean_i (t_i + 1) / n_i

    Args:
        names (`Sequence[str]` of length K):
            Names of the sources; where two share one, TRL's log averages them.
        stats ([`RewardStats`]):
            Of all completions.
        has_steps_K (`Sequence[bool]` of length K):
            Which sources reward steps or tokens; the others are left out.

    Returns:
        `dict[str, float]`: NaN for a mean of nothing or a std of one.
    """
    metrics: dict[str, float] = {}
    of_all = merged(Moments(stats.count_NK, stats.mean_NK, stats.squares_NK, stats.largest_NK))
    for k, (name, has_steps) in enumerate(zip(names, has_steps_K, strict=True)):
        if not has_steps:
            continue
        counts_N = stats.count_NK[:, k]
        has_any_N = counts_N > 0
        rewards = of_all.number[0, k].item()
        metrics[f"rewards/{name}/step_mean"] = of_all.mean[0, k].item() if rewards else float("nan")
        metrics[f"rewards/{name}/step_std"] = of_all.std[0, k].item() if rewards > 1 else float("nan")
        metrics[f"rewards/{name}/steps"] = counts_N[has_any_N].mean().item()
        metrics[f"rewards/{name}/tokens_per_step"] = (stats.tokens_NK[:, k] / counts_N)[has_any_N].mean().item()
    return metrics


def turn_metrics(names: Sequence[str], stats: TurnStats, has_steps_K: Sequence[bool]) -> dict[str, float]:
    """
    Turns per completion, loss tokens per turn, and what each source gives the completions' first, second, ... turn.

    Args:
        names, has_steps_K:
            As for [`step_metrics`].
        stats ([`TurnStats`]):
            Of all completions.

    Returns:
        `dict[str, float]`: NaN for a mean of nothing. `rewards/{source}/turn_{k}` is the mean, over
        the completions whose k-th turn the source rewards, of the sum of its rewards there; k counts from 1.
    """
    turns_N = stats.turns_N
    most = int(turns_N.max())
    metrics = {
        # A completion that is masked as truncated has none
        "turns/per_completion": turns_N[turns_N > 0].double().mean().item(),
        "turns/tokens": (stats.tokens_N.sum() / turns_N.sum()).item(),
    }
    for k, (name, has_steps) in enumerate(zip(names, has_steps_K, strict=True)):
        for turn in range(min(most, TURNS_LOGGED) if has_steps else 0):
            metrics[f"rewards/{name}/turn_{turn + 1}"] = stats.rewards_NKU[:, k, turn].nanmean().item()
    return metrics


def turn_sums(advantages_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the advantages of the k-th turns' loss tokens, and the number of these tokens, `(TURNS_LOGGED, 2)`."""
    turns_BT = turn_indices(mask_BT)
    of_turns = [turns_BT == turn for turn in range(TURNS_LOGGED)]
    return torch.stack([torch.stack([advantages_BT[own].sum(), own.sum()]) for own in of_turns]).float()


def outcome_correlations(
    names: Sequence[str], scores_KN: torch.Tensor, has_steps_K: Sequence[bool], group_size: int
) -> dict[str, float]:
    r"""
    Pearson correlation of each process source's mean step reward with each outcome source's reward, within groups.

    With `x` and `y` the two sources' scores of the completions that both judge, each minus the mean of its group:

        corr = sum_i x_i y_i / sqrt(sum_i x_i^2 sum_i y_i^2)

    Args:
        names (`Sequence[str]` of length K):
            Names of the sources.
        scores_KN (`torch.Tensor` of shape `(K, N)`):
            The mean reward of each completion, NaN where there is none.
        has_steps_K (`Sequence[bool]` of length K):
            Which sources reward steps or tokens; the others are outcome sources.
        group_size (`int`):
            Completions per prompt, in consecutive rows.

    Returns:
        `dict[str, float]`: NaN where one of the two has no spread in any group.
    """
    process = [k for k, has_steps in enumerate(has_steps_K) if has_steps]
    outcome = [k for k, has_steps in enumerate(has_steps_K) if not has_steps]
    metrics: dict[str, float] = {}
    for k in process:
        for o in outcome:
            both_N = ~(scores_KN[k] + scores_KN[o]).isnan()
            pair_2PG = scores_KN[[k, o]].where(both_N, torch.nan).view(2, -1, group_size)
            deviations_2PG = pair_2PG - pair_2PG.nanmean(-1, keepdim=True)
            # The mean of equal numbers may differ from them by rounding, which would correlate with anything
            has_spread_2PG = deviations_2PG.abs() > _ROUNDING * pair_2PG.abs()
            x, y = deviations_2PG.where(has_spread_2PG, 0.0).flatten(1)[:, both_N]
            metrics[f"rewards/{names[k]}/corr/{names[o]}"] = (x @ y / (x.norm() * y.norm())).item()
    return metrics


def unjudged_shares(names: Sequence[str], unjudged_NK: torch.Tensor) -> dict[str, float]:
    """Share of completions without a reward from each source, or with none on a token that is trained on."""
    shares_K = unjudged_NK.double().mean(0).tolist()
    return {f"rewards/{name}/unjudged": share for name, share in zip(names, shares_K, strict=True)}


def step_shares(
    metric: str, names: Sequence[str], counts_K: Sequence[int], steps_K: Sequence[int]
) -> dict[str, float]:
    """The share of each source's steps that is counted, as `rewards/{source}/{metric}`; none for a source without."""
    triples = zip(names, counts_K, steps_K, strict=True)
    return {f"rewards/{name}/{metric}": count / steps for name, count, steps in triples if steps}


def withheld_shares(names: Sequence[str], unjudged_NK: torch.Tensor, withheld_NK: torch.Tensor) -> dict[str, float]:
    """Share of the completions that each source judges whose reward its gate withholds; NaN where it judges none."""
    judged_NK = ~unjudged_NK
    shares_K = ((withheld_NK & judged_NK).sum(0) / judged_NK.sum(0)).tolist()
    return {f"rewards/{name}/withheld": share for name, share in zip(names, shares_K, strict=True)}


def completion_means(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean advantage of each completion over its loss tokens, `(B,)`; scalar advantages are their own mean."""
    if advantages.ndim == 1:
        return advantages
    return (advantages * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def positive_counts(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """How many advantages are positive and how many there are, `(2,)`: of loss tokens, or of completions."""
    counted = torch.ones_like(advantages) if advantages.ndim == 1 else mask_BT
    return torch.stack([((advantages > 0) & (counted > 0)).sum(), counted.sum()]).float()
