"""Several reward sources, weighted, with missing judgements, to one advantage per token."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .estimators import Estimator, EstimatorInputs, check_choice, find_estimator
from .normalization import SCALES, completion_weights, pack_order, weighted_moments
from .returns import discounted_returns


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
GAMMA_UNITS = ("token", "step")


def process_advantages(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    *,
    estimator: str | Estimator,
    gamma: float | Sequence[float],
    gamma_unit: str = "token",
    options: Mapping[str, Any] | None = None,
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    eps: float = 1e-4,
) -> torch.Tensor:
    r"""
    Group-relative advantages of every loss token, from the token rewards of K sources.

    A completion is the sequence of its loss tokens. Rewards on other tokens are ignored, and other tokens neither
    discount nor shift the ones that count. Source k judges completion i if it puts a reward on at least one of i's
    loss tokens. A completion that no source judges gets 0 and is absent from every mean and standard deviation.
    A source of weight 0 is absent from every formula, and what it alone judges is not judged.

    `aggregation="sum_then_normalize"` normalises once:

    `A = normalize(sum_k w_k returns(r^k))` for estimators that normalise returns,

    `A = returns(normalize(sum_k w_k r^k))` for estimators that normalise step rewards.

    `"normalize_then_sum"` normalises each source by itself with its group's std, then the weighted sum:

    `S = sum_k w_k A^k`, `A = (S - mean S) / (std S + eps)`

    The mean and the std of S are over the batch, every judged completion counting 1, as TRL does for scalars.

    Reduces to TRL's advantages for completions of one token and weights other than 0, in both orders and all three
    scales (`"min"`, whose baseline leaves the completion out, up to the factor `n / (n - 1)`).

    Args:
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Reward of each source on each token, NaN where it gives none.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            Loss mask.
        weights_K (`torch.Tensor` of shape `(K,)`):
            Weight of each source.
        group_size (`int`):
            Completions per prompt, in consecutive rows.
        estimator (`str` or [`~trl_grpo_ext.Estimator`]):
            A key of [`~trl_grpo_ext.ESTIMATORS`], or an estimator that is not in the table.
        gamma (`float` or `Sequence[float]`):
            Discount in `[0, 1]`, one for all sources or one each.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            Discount at every loss token, or only at those that carry a reward (`"step"`).
        options (`Mapping[str, Any]`, *optional*):
            Options of the estimators, such as `{"position_baseline": "active"}`. Those that only other estimators
            read are ignored. Those that are not given keep the defaults of the estimator's function.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            TRL's `multi_objective_aggregation`: `"sum_then_normalize"` or `"normalize_then_sum"`.
        scale (`str`, *optional*, defaults to `"group"`):
            TRL's `scale_rewards`: `"group"`, `"batch"` or `"none"`. As in TRL, `"normalize_then_sum"` ignores it.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to every standard deviation that is divided by, in units of the reward.

    Returns:
        `torch.Tensor` of shape `(N, T)`: advantages, 0 outside the loss mask.

    Raises:
        ValueError: shapes that do not fit, names or values that are unknown, or several gammas where the sources'
            step rewards are summed before they are discounted.
    """
    _check_shapes(rewards_KNT, mask_NT, weights_K, group_size)
    check_choice("gamma_unit", gamma_unit, GAMMA_UNITS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("scale", scale, SCALES)
    bound = find_estimator(estimator).with_options(options or {})
    gammas = _gamma_per_source(gamma, len(weights_K))
    weights_K = weights_K.to(rewards_KNT)
    weighted = [k for k, weight in enumerate(weights_K.tolist()) if weight != 0]
    gammas = [gammas[k] for k in weighted]
    if aggregation == "sum_then_normalize" and bound.normalizes == "step_rewards":
        _check_one_gamma(estimator, gammas)
    if not weighted:
        return torch.zeros_like(mask_NT, dtype=rewards_KNT.dtype)

    # Packed, a completion's loss tokens are adjacent: tool output among them is no distance to a discount, and token
    # indices of different completions can be compared. NaN is the only mark of "no reward" from here on, so that a
    # reward outside the mask cannot be mistaken for one.
    mask_NT = mask_NT.bool()
    order_NT = pack_order(mask_NT)
    packed_mask_NT = mask_NT.gather(1, order_NT)
    rewards_KNT = rewards_KNT[weighted]
    sources = _Sources(
        rewards_KNT=rewards_KNT.gather(2, order_NT.expand_as(rewards_KNT)).where(packed_mask_NT, torch.nan),
        mask_NT=packed_mask_NT,
        weights_K=weights_K[weighted],
        gammas=gammas,
        gamma_unit=gamma_unit,
        group_size=group_size,
    )
    if aggregation == "sum_then_normalize":
        packed_NT = _advantages_of_sum(sources, bound, scale=scale, eps=eps)
    else:
        packed_NT = _sum_of_advantages(sources, bound, eps=eps)
    return torch.zeros_like(packed_NT).scatter(1, order_NT, packed_NT)


class _Sources(NamedTuple):
    """Reward sources over packed completions; any subset of them is again one."""

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    weights_K: torch.Tensor
    gammas: list[float]
    gamma_unit: str
    group_size: int

    @property
    def judged_N(self) -> torch.Tensor:
        return (~self.rewards_KNT.isnan()).any(2).any(0)

    def single(self, k: int) -> "_Sources":
        """Source k alone, with weight 1."""
        return self._replace(
            rewards_KNT=self.rewards_KNT[k : k + 1],
            weights_K=torch.ones_like(self.weights_K[k : k + 1]),
            gammas=self.gammas[k : k + 1],
        )

    def weighted_sum(self, values_KNT: torch.Tensor) -> torch.Tensor:
        """`sum_k w_k x^k`."""
        return (self.weights_K[:, None, None] * values_KNT).sum(0)

    def returns(self, rewards_NT: torch.Tensor, k: int) -> torch.Tensor:
        """Returns with source k's gamma, of rewards that are NaN where none is given."""
        step_ends_NT = ~rewards_NT.isnan() if self.gamma_unit == "step" else None
        return discounted_returns(rewards_NT.nan_to_num(), self.gammas[k], step_ends_NT)


def _advantages_of_sum(sources: _Sources, estimator: Estimator, *, scale: str, eps: float) -> torch.Tensor:
    """Add the weighted sources up, then normalise once."""

    def normalize(values_NT: torch.Tensor) -> torch.Tensor:
        return estimator.function(
            EstimatorInputs(values_NT, sources.mask_NT, sources.judged_N, sources.group_size, scale, eps)
        )

    rewards_KNT = estimator.shape_rewards(sources.rewards_KNT)
    if estimator.normalizes == "step_rewards":
        given_KNT = ~rewards_KNT.isnan()
        given_NT = given_KNT.any(0)
        rewards_NT = sources.weighted_sum(rewards_KNT.where(given_KNT, 0.0)).where(given_NT, torch.nan)
        # A step ends where any source gives a reward
        return sources.returns(normalize(rewards_NT).where(given_NT, torch.nan), 0)
    returns_KNT = torch.stack([sources.returns(rewards_NT, k) for k, rewards_NT in enumerate(rewards_KNT)])
    counted_NT = sources.mask_NT & sources.judged_N[:, None]
    return normalize(sources.weighted_sum(returns_KNT)).where(counted_NT, 0.0)


def _sum_of_advantages(sources: _Sources, estimator: Estimator, *, eps: float) -> torch.Tensor:
    """Normalise each source by itself, add them up weighted, then normalise over the batch as TRL does."""
    advantages_KNT = torch.stack(
        [_advantages_of_sum(sources.single(k), estimator, scale="group", eps=eps) for k in range(len(sources.gammas))]
    )
    summed_NT = sources.weighted_sum(advantages_KNT)
    # Weights 1 / L: a long completion must not count more than a short one. With completions of different lengths
    # the mean is not 0, although the estimators centre: they do not weight tokens like this. It is subtracted in
    # groups without spread as well.
    weights_NT = completion_weights(sources.mask_NT, sources.judged_N, summed_NT.dtype)
    batch = weighted_moments(summed_NT, weights_NT, (0, 1))
    return ((summed_NT - batch.mean) / (batch.std + eps)).where(batch.has_spread & (weights_NT > 0), 0.0)


def _gamma_per_source(gamma: float | Sequence[float], count: int) -> list[float]:
    gammas = [gamma] * count if isinstance(gamma, (int, float)) else list(gamma)
    if len(gammas) != count:
        raise ValueError(f"{len(gammas)} gammas for {count} reward sources.")
    return [float(value) for value in gammas]


def _check_one_gamma(estimator: str | Estimator, gammas: list[float]) -> None:
    if len(set(gammas)) > 1:
        raise ValueError(
            f"estimator {estimator!r} normalises the sum of the sources' step rewards and discounts it afterwards, so "
            f"it takes one gamma; got {gammas}. Use one gamma, or aggregation='normalize_then_sum'."
        )


def _check_shapes(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor, weights_K: torch.Tensor, group_size: int) -> None:
    shapes = tuple(rewards_KNT.shape), tuple(mask_NT.shape), tuple(weights_K.shape)
    if rewards_KNT.ndim != 3 or shapes[1] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(
            f"expected rewards (K, N, T), mask (N, T) and weights (K,); got {', '.join(map(str, shapes))}."
        )
    if group_size < 1 or rewards_KNT.size(1) % group_size:
        raise ValueError(f"{rewards_KNT.size(1)} completions do not divide into groups of {group_size}.")
