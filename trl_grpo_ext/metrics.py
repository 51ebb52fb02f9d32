"""What is logged about rewards and advantages, from the tensors that were trained on."""

import math
from collections.abc import Sequence

import torch


_ROUNDING = 1e-6


def step_metrics(names: Sequence[str], rewards_KNT: torch.Tensor, mask_NT: torch.Tensor) -> list[tuple[str, float]]:
    """
    Each source's token and step rewards: mean, std (ddof 1), number per completion that it judges, and length.

    The length of a step, `tokens_per_step`, is in loss tokens: those up to a completion's last reward, divided by its
    number of rewards.

    Args:
        names (`Sequence[str]` of length K):
            Names of the sources; where two share one, TRL's log averages them.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Rewards on loss tokens, NaN where there is none.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            Loss mask.

    Returns:
        `list[tuple[str, float]]`: NaN, which TRL's log leaves out, for a mean of nothing or a std of one.
    """
    metrics = []
    tokens_before_NT = mask_NT.cumsum(1)
    for name, rewards_NT in zip(names, rewards_KNT, strict=True):
        given_NT = ~rewards_NT.isnan()
        steps, counts_N = rewards_NT[given_NT], given_NT.sum(1)
        tokens_N = (tokens_before_NT * given_NT).amax(1)
        metrics += [
            (f"rewards/{name}/step_mean", steps.mean().item()),
            (f"rewards/{name}/step_std", steps.std().item() if len(steps) > 1 else math.nan),
            (f"rewards/{name}/steps", counts_N[counts_N > 0].double().mean().item()),
            (f"rewards/{name}/tokens_per_step", (tokens_N / counts_N)[counts_N > 0].mean().item()),
        ]
    return metrics


def outcome_correlations(
    names: Sequence[str], rewards_KNT: torch.Tensor, process_K: Sequence[bool], group_size: int
) -> list[tuple[str, float]]:
    """
    Pearson correlation, within groups, of each process source's mean step reward with each outcome source's reward.

    Both are taken relative to the mean of their group, as advantages are.

    Args:
        names (`Sequence[str]` of length K):
            Names of the sources.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Rewards on loss tokens, NaN where there is none.
        process_K (`Sequence[bool]` of length K):
            Which sources reward steps or tokens; the others are outcome sources.
        group_size (`int`):
            Completions per prompt, in consecutive rows.

    Returns:
        `list[tuple[str, float]]`: over the completions that both judge; NaN, which TRL's log leaves out, where one of
        the two has no spread in any group.
    """
    scores_KN = rewards_KNT.nanmean(-1)
    metrics = []
    for k in (index for index, is_process in enumerate(process_K) if is_process):
        for o in (index for index, is_process in enumerate(process_K) if not is_process):
            both_N = ~(scores_KN[k] + scores_KN[o]).isnan()
            pair_2PG = scores_KN[[k, o]].where(both_N, math.nan).view(2, -1, group_size)
            deviations_2PG = pair_2PG - pair_2PG.nanmean(-1, keepdim=True)
            # The mean of equal numbers may differ from them by rounding
            has_spread_2PG = deviations_2PG.abs() > _ROUNDING * pair_2PG.abs()
            x, y = deviations_2PG.where(has_spread_2PG, 0.0).flatten(1)[:, both_N]
            metrics.append((f"rewards/{names[k]}/corr/{names[o]}", (x @ y / (x.norm() * y.norm())).item()))
    return metrics


def unjudged_shares(names: Sequence[str], unjudged_NK: torch.Tensor) -> list[tuple[str, float]]:
    """Share of completions without a reward from each source, or with none on a token that is trained on."""
    shares = unjudged_NK.double().mean(0).tolist()
    return [(f"rewards/{name}/unjudged", share) for name, share in zip(names, shares, strict=True)]


def unscored_shares(names: Sequence[str], counts_K2: Sequence[Sequence[float]]) -> list[tuple[str, float]]:
    """Share of a source's steps without a score, from the numbers of these and of all; left out without steps."""
    counts = zip(names, counts_K2, strict=True)
    return [(f"rewards/{name}/unscored", unscored / steps) for name, (unscored, steps) in counts if steps]


def withheld_shares(
    names: Sequence[str], rewards_NK: torch.Tensor, withheld_NK: torch.Tensor
) -> list[tuple[str, float]]:
    """Share of the completions that each source judges whose reward its gate withholds."""
    judged_NK = ~rewards_NK.isnan()
    shares = ((withheld_NK & judged_NK).sum(0) / judged_NK.sum(0)).tolist()
    return [(f"rewards/{name}/withheld", share) for name, share in zip(names, shares, strict=True)]


def completion_means(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean advantage of each completion over its loss tokens, `(B,)`; scalar advantages are their own mean."""
    if advantages.ndim == 1:
        return advantages
    return (advantages * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def positive_counts(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """How many advantages are positive and how many there are, `(2,)`: of loss tokens, or of completions."""
    counted = torch.ones_like(advantages) if advantages.ndim == 1 else mask_BT
    return torch.stack([((advantages > 0) & (counted > 0)).sum(), counted.sum()]).float()
