"""Several reward sources, weighted, with missing judgements, to one advantage per token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .estimators import (
    BASELINES,
    leave_one_out_advantages,
    pooled_rewards,
    position_advantages,
    soft_minimum_rewards,
    step_rewards,
)
from .normalization import SCALES, completion_weights, pack_order, weighted_moments
from .returns import discounted_returns


ESTIMATORS = ("position", "pooled", "step", "min")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
GAMMA_UNITS = ("token", "step")


def process_advantages(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    *,
    estimator: str,
    gamma: float | Sequence[float],
    gamma_unit: str = "token",
    baseline: str = "all",
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    eps: float = 1e-4,
) -> torch.Tensor:
    r"""
    Group-relative advantages of every loss token, from the token rewards of K sources.

    A completion is the sequence of its loss tokens: rewards elsewhere are ignored, and tokens elsewhere neither
    discount nor shift the ones that count. Source k judges completion i if it puts a reward on at least one of i's
    loss tokens. A completion that no source judges gets 0 and is absent from every mean and std.

    - `aggregation="sum_then_normalize"`: `"position"` and `"min"` normalise the weighted sum of the sources' returns;
      `"pooled"` and `"step"` normalise the weighted sum of their step rewards, then discount it.
    - `"normalize_then_sum"`: `A = sum_k w_k A^k`, each source by itself with its group's std, then
      `(A - mean A) / (std A + eps)` over the batch, every judged completion counting 1, as TRL does for scalars. That
      mean is not 0 for ragged completions, and is subtracted in groups without spread as well.

    Reduces to TRL's advantages for completions of one token, in both orders and all three scales (`"min"`, whose
    baseline leaves the completion out, up to the factor `n / (n - 1)`).

    Args:
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Reward of each source on each token, NaN where it gives none.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            Loss mask.
        weights_K (`torch.Tensor` of shape `(K,)`):
            Weight of each source.
        group_size (`int`):
            Completions per prompt, in consecutive rows.
        estimator (`str`):
            `"position"`, `"pooled"`, `"step"` or `"min"`, see [`~trl_grpo_ext.advantages`].
        gamma (`float` or `Sequence[float]`):
            Discount, one for all sources or one each.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            Discount at every loss token, or only at those that carry a reward (`"step"`).
        baseline (`str`, *optional*, defaults to `"all"`):
            For `"position"`: ended completions count as return 0 (`"all"`) or not at all (`"active"`).
        scale (`str`, *optional*, defaults to `"group"`):
            TRL's `scale_rewards`: `"group"`, `"batch"` or `"none"`. As in TRL, `"normalize_then_sum"` ignores it.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to every standard deviation that is divided by.

    Returns:
        `torch.Tensor` of shape `(N, T)`: advantages, 0 outside the loss mask.

    Raises:
        ValueError: shapes that do not fit, unknown names, or several gammas where the sources are summed first.
    """
    _check_shapes(rewards_KNT, mask_NT, weights_K, group_size)
    gammas = [float(gamma)] * len(weights_K) if isinstance(gamma, (int, float)) else [float(g) for g in gamma]
    _check_options(estimator, gammas, len(weights_K), gamma_unit, baseline, aggregation, scale)

    order_NT = pack_order(mask_NT.bool())
    packed_mask_NT = mask_NT.bool().gather(1, order_NT)
    packed_KNT = rewards_KNT.gather(2, order_NT.expand_as(rewards_KNT)).where(packed_mask_NT, torch.nan)
    sources = _Sources(packed_KNT, packed_mask_NT, weights_K.to(rewards_KNT), gammas, gamma_unit == "step", group_size)
    if aggregation == "sum_then_normalize":
        packed_NT = _advantages_of_sum(sources, estimator, baseline=baseline, scale=scale, eps=eps)
    else:
        packed_NT = _sum_of_advantages(sources, estimator, baseline=baseline, eps=eps)
    return torch.zeros_like(packed_NT).scatter(1, order_NT, packed_NT)


class _Sources(NamedTuple):
    """Reward sources over packed completions; any subset of them is again one."""

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    weights_K: torch.Tensor
    gammas: list[float]
    discount_by_step: bool
    group_size: int

    @property
    def judged_N(self) -> torch.Tensor:
        return (~self.rewards_KNT.isnan()).any(2).any(0)

    def single(self, k: int) -> "_Sources":
        return self._replace(
            rewards_KNT=self.rewards_KNT[k : k + 1],
            weights_K=torch.ones_like(self.weights_K[k : k + 1]),
            gammas=self.gammas[k : k + 1],
        )

    def returns(self, rewards_NT: torch.Tensor, k: int) -> torch.Tensor:
        step_ends_NT = ~rewards_NT.isnan() if self.discount_by_step else None
        return discounted_returns(rewards_NT.nan_to_num(), self.gammas[k], step_ends_NT)


def _advantages_of_sum(sources: _Sources, estimator: str, *, baseline: str, scale: str, eps: float) -> torch.Tensor:
    """Add the weighted sources up, normalise once."""
    rewards_KNT, weights_K, group_size = sources.rewards_KNT, sources.weights_K, sources.group_size
    if estimator in ("pooled", "step"):
        normalize = pooled_rewards if estimator == "pooled" else step_rewards
        summed_NT = (weights_K[:, None, None] * rewards_KNT).nansum(0)
        summed_NT = summed_NT.where((~rewards_KNT.isnan()).any(0), torch.nan)
        return sources.returns(normalize(summed_NT, group_size, scale=scale, eps=eps), 0)
    shape = soft_minimum_rewards if estimator == "min" else torch.clone
    returns_KNT = torch.stack([sources.returns(shape(rewards_NT), k) for k, rewards_NT in enumerate(rewards_KNT)])
    returns_NT = (weights_K[:, None, None] * returns_KNT).sum(0)
    shared = (returns_NT, sources.mask_NT, sources.judged_N, group_size)
    if estimator == "min":
        return leave_one_out_advantages(*shared, scale=scale, eps=eps)
    return position_advantages(*shared, baseline=baseline, scale=scale, eps=eps)


def _sum_of_advantages(sources: _Sources, estimator: str, *, baseline: str, eps: float) -> torch.Tensor:
    """Normalise each source by itself, add them up weighted, then TRL's normalisation over the batch."""
    options = {"baseline": baseline, "scale": "group", "eps": eps}
    advantages_KNT = torch.stack(
        [_advantages_of_sum(sources.single(k), estimator, **options) for k in range(len(sources.gammas))]
    )
    summed_NT = (sources.weights_K[:, None, None] * advantages_KNT).sum(0)
    weights_NT = completion_weights(sources.mask_NT, sources.judged_N, summed_NT.dtype)
    batch = weighted_moments(summed_NT, weights_NT, (0, 1))
    return ((summed_NT - batch.mean) / (batch.std + eps)).where(batch.has_spread & (weights_NT > 0), 0.0)


def _check_shapes(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor, weights_K: torch.Tensor, group_size: int) -> None:
    shapes = tuple(rewards_KNT.shape), tuple(mask_NT.shape), tuple(weights_K.shape)
    if rewards_KNT.ndim != 3 or shapes[1] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(
            f"expected rewards (K, N, T), mask (N, T) and weights (K,); got {', '.join(map(str, shapes))}."
        )
    if group_size < 1 or rewards_KNT.size(1) % group_size:
        raise ValueError(f"{rewards_KNT.size(1)} completions do not divide into groups of {group_size}.")


def _check_options(
    estimator: str, gammas: list[float], num_sources: int, gamma_unit: str, baseline: str, aggregation: str, scale: str
) -> None:
    for name, value, known in (
        ("estimator", estimator, ESTIMATORS),
        ("gamma_unit", gamma_unit, GAMMA_UNITS),
        ("baseline", baseline, BASELINES),
        ("aggregation", aggregation, AGGREGATIONS),
        ("scale", scale, SCALES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    if len(gammas) != num_sources:
        raise ValueError(f"{len(gammas)} gammas for {num_sources} reward sources.")
    if aggregation == "sum_then_normalize" and estimator in ("pooled", "step") and len(set(gammas)) > 1:
        raise ValueError(f"{estimator!r} sums the sources before discounting, so it takes one gamma; got {gammas}.")
