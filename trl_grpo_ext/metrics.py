"""What is logged about rewards and advantages, from the tensors that were trained on."""

from collections.abc import Sequence

import torch


def step_metrics(names: Sequence[str], rewards_KNT: torch.Tensor) -> list[tuple[str, float]]:
    """
    Mean and std (ddof 1) of each source's token and step rewards, and their number per completion that it judges.

    Args:
        names (`Sequence[str]` of length K):
            Names of the sources; where two share one, TRL's log averages them.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Rewards on loss tokens, NaN where there is none.

    Returns:
        `list[tuple[str, float]]`: NaN, which TRL's log leaves out, for a mean of nothing or a std of one.
    """
    metrics = []
    for name, rewards_NT in zip(names, rewards_KNT, strict=True):
        given_NT = ~rewards_NT.isnan()
        steps = rewards_NT[given_NT]
        metrics += [
            (f"rewards/{name}/step_mean", steps.mean().item()),
            (f"rewards/{name}/step_std", steps.std().item() if len(steps) > 1 else float("nan")),
            (f"rewards/{name}/steps", given_NT.sum(1)[given_NT.any(1)].double().mean().item()),
        ]
    return metrics


def unjudged_shares(names: Sequence[str], unjudged_NK: torch.Tensor) -> list[tuple[str, float]]:
    """Share of completions without a reward from each source, or with none on a token that is trained on."""
    shares = unjudged_NK.double().mean(0).tolist()
    return [(f"rewards/{name}/unjudged", share) for name, share in zip(names, shares, strict=True)]


def completion_means(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean advantage of each completion over its loss tokens, `(B,)`; scalar advantages are their own mean."""
    if advantages.ndim == 1:
        return advantages
    return (advantages * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def positive_counts(advantages: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """How many advantages are positive and how many there are, `(2,)`: of loss tokens, or of completions."""
    counted = torch.ones_like(advantages) if advantages.ndim == 1 else mask_BT
    return torch.stack([((advantages > 0) & (counted > 0)).sum(), counted.sum()]).float()
