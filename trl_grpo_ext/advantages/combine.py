"""
Several reward sources, weighted, with missing judgements, to one advantage per token.

- A completion is the sequence of its loss tokens. Rewards on other tokens are ignored, and other tokens neither
  discount nor shift the ones that count.
- A source judges a completion if it puts a reward on at least one of its loss tokens. A completion that no source
  judges gets 0 and is absent from every mean and standard deviation.
- A source of weight 0 is absent from every formula. A completion that only such sources judge is not judged.
- A turn is a maximal run of loss tokens: what the policy wrote between the outputs of tools.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..rewards.turns import turn_ends
from ..tables import check_choice
from .estimators import Estimator, EstimatorInputs, find_estimator
from .normalization import SCALES, Comparison, compare, completion_weights, pack_order
from .returns import discounted_returns


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
GAMMA_UNITS = ("token", "step", "turn")


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
            A key of [`~trl_grpo_ext.ESTIMATORS`], or an estimator that is not in the table; see
            [`~trl_grpo_ext.advantages.estimators.find_estimator`].
        gamma (`float` or `Sequence[float]`):
            Discount in `[0, 1]`, one for all sources or one each.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            Discount at every loss token, only at those that carry a reward (`"step"`), or only where a turn ends
            (`"turn"`).
        options (`Mapping[str, Any]`, *optional*):
            Options of the estimators by name; see [`~trl_grpo_ext.Estimator.with_options`].
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            TRL's `multi_objective_aggregation`: normalise the weighted sum, or each source (`"normalize_then_sum"`).
        scale (`str`, *optional*, defaults to `"group"`):
            TRL's `scale_rewards`: `"group"`, `"batch"` or `"none"`. As in TRL, `"normalize_then_sum"` ignores it.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to every standard deviation that is divided by.

    Returns:
        `torch.Tensor` of shape `(N, T)`: advantages, 0 outside the loss mask.

    Raises:
        ValueError: shapes that do not fit, unknown names or values, or several gammas for one sum of step rewards.
    """
    _check_shapes(rewards_KNT, mask_NT, weights_K, group_size)
    check_choice("gamma_unit", gamma_unit, GAMMA_UNITS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("scale", scale, SCALES)
    row = find_estimator(estimator).with_options(options or {})
    sources = make_sources(rewards_KNT, mask_NT, weights_K, group_size, gamma=gamma, gamma_unit=gamma_unit)
    sources = sources.without_weight_0()
    order_NT = pack_order(sources.mask_NT)
    sources = sources.packed(order_NT)
    if not sources.gammas:
        packed_NT = torch.zeros_like(order_NT, dtype=rewards_KNT.dtype)
    elif aggregation == "sum_then_normalize":
        _check_one_gamma(sources.gammas, row, estimator)
        packed_NT = _advantages_of_sum(sources, row, scale=scale, eps=eps)
    else:
        packed_NT = _sum_of_advantages(sources, row, eps=eps)
    return torch.zeros_like(packed_NT).scatter(1, order_NT, packed_NT)


def check_values(name: str, values_NT: Any, counted_NT: torch.Tensor) -> None:
    """
    Whether what a function that the user may write has returned can be trained on.

    Args:
        name (`str`):
            Of the function, for messages.
        values_NT (`Any`):
            What it has returned.
        counted_NT (`torch.Tensor` of shape `(N, T)`):
            True where a value counts.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, or a value that counts is NaN or infinite.
    """
    if not isinstance(values_NT, torch.Tensor):
        raise TypeError(f"{name} returned a {type(values_NT).__name__}; it has to return a tensor.")
    if values_NT.shape != counted_NT.shape:
        raise ValueError(
            f"{name} returned shape {tuple(values_NT.shape)}; it has to be (completions, tokens), "
            f"{tuple(counted_NT.shape)}."
        )
    # One sum, which NaN and infinity go through; which completion it was is asked only then
    if values_NT.where(counted_NT, 0.0).sum().isfinite():
        return
    bad_N = (~values_NT.isfinite() & counted_NT).any(1)
    if bad_N.any():
        completion = int(bad_N.nonzero()[0, 0])
        raise ValueError(f"{name} returned a value that is not finite, for completion {completion} of the batch.")


class Sources(NamedTuple):
    """Reward sources over the same completions; any subset of them is again one."""

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    weights_K: torch.Tensor
    gammas: list[float]
    gamma_unit: str
    turn_ends_NT: torch.Tensor | None
    group_size: int

    @property
    def given_NT(self) -> torch.Tensor:
        """True on tokens on which any source puts a reward."""
        return (~self.rewards_KNT.isnan()).any(0)

    def without_weight_0(self) -> "Sources":
        """The others; multiplying by 0 would still let a source judge completions and end steps."""
        kept = [k for k, weight in enumerate(self.weights_K.tolist()) if weight != 0]
        if len(kept) == len(self.gammas):
            # Indexing copies
            return self
        return self._replace(
            rewards_KNT=self.rewards_KNT[kept],
            weights_K=self.weights_K[kept],
            gammas=[self.gammas[k] for k in kept],
        )

    def packed(self, order_NT: torch.Tensor) -> "Sources":
        """The same with the loss tokens first in each row, and NaN on all other tokens."""
        # Adjacent loss tokens are neighbours: tool output between them neither discounts nor shifts a token index.
        # With NaN as the only mark of "no reward", no formula below can read a reward outside the mask
        mask_NT = self.mask_NT.gather(1, order_NT)
        rewards_KNT = self.rewards_KNT.gather(2, order_NT.expand_as(self.rewards_KNT))
        turn_ends_NT = None if self.turn_ends_NT is None else self.turn_ends_NT.gather(1, order_NT)
        return self._replace(
            rewards_KNT=rewards_KNT.where(mask_NT, torch.nan), mask_NT=mask_NT, turn_ends_NT=turn_ends_NT
        )

    def single(self, k: int) -> "Sources":
        """Source k alone, with weight 1."""
        return self._replace(
            rewards_KNT=self.rewards_KNT[k : k + 1],
            weights_K=torch.ones_like(self.weights_K[k : k + 1]),
            gammas=self.gammas[k : k + 1],
        )

    def weighted_sum(self, values_KNT: torch.Tensor) -> torch.Tensor:
        """`sum_k w_k x^k`, `(N, T)`."""
        return (self.weights_K[:, None, None] * values_KNT).sum(0)

    def returns(self, rewards_NT: torch.Tensor, k: int) -> torch.Tensor:
        """Returns, with source k's gamma, of rewards that are NaN where there is none."""
        ends_NT = ~rewards_NT.isnan() if self.gamma_unit == "step" else self.turn_ends_NT
        return discounted_returns(rewards_NT.nan_to_num(), self.gammas[k], ends_NT)


def _advantages_of_sum(sources: Sources, row: Estimator, *, scale: str, eps: float) -> torch.Tensor:
    """
    Add the weighted sources up, then normalise once.

    An estimator that normalises returns: `A = normalize(sum_k w_k returns_k(shape(r^k)))`

    An estimator that normalises step rewards: `A = returns(normalize(sum_k w_k shape(r^k)))`
    """
    given_NT = sources.given_NT
    judged_N = given_NT.any(1)

    def normalize(values_NT: torch.Tensor, counted_NT: torch.Tensor) -> torch.Tensor:
        inputs = EstimatorInputs(values_NT, sources.mask_NT, judged_N, sources.group_size, scale, eps)
        normalized_NT = row.function(inputs)
        check_values("the advantage estimator's function", normalized_NT, counted_NT)
        return normalized_NT

    if row.normalizes == "returns":
        # Source by source, so that what a formula holds in between stays in the processor's cache
        returns_KNT = torch.stack(
            [sources.returns(row.shape_rewards(rewards_NT), k) for k, rewards_NT in enumerate(sources.rewards_KNT)]
        )
        counted_NT = sources.mask_NT & judged_N[:, None]
        return normalize(sources.weighted_sum(returns_KNT), counted_NT).where(counted_NT, 0.0)
    # Where some sources give a step reward, the others add 0
    summed_NT = sources.weighted_sum(row.shape_rewards(sources.rewards_KNT).nan_to_num()).where(given_NT, torch.nan)
    # All gammas are equal here
    return sources.returns(normalize(summed_NT, given_NT).where(given_NT, torch.nan), 0)


def _sum_of_advantages(sources: Sources, row: Estimator, *, eps: float) -> torch.Tensor:
    """
    Normalise each source by itself with its group's std, add them up weighted, then normalise over the batch.

    `S = sum_k w_k A^k`

    `A = (S - mean S) / (std S + eps)`

    The second step is TRL's for scalars: the mean and the std are over the batch, each judged completion counting 1.
    """
    alone = [_advantages_of_sum(sources.single(k), row, scale="group", eps=eps) for k in range(len(sources.gammas))]
    summed_NT = sources.weighted_sum(torch.stack(alone))
    batch = compare_with_batch(sources, summed_NT, eps=eps)
    # The mean is not 0 for completions of different lengths: the estimators centre with other weights than 1 / L.
    # TRL's step subtracts it from every completion, so groups without spread do not stay at 0
    return ((summed_NT - batch.mean) / batch.divisor).where(batch.counted, 0.0)


def compare_with_batch(sources: Sources, summed_NT: torch.Tensor, *, eps: float) -> Comparison:
    """What `"normalize_then_sum"` compares the sum of the sources' advantages with: mean and std over the batch."""
    # Tokens have weight 1 / L, so that a long completion counts no more than a short one
    weights_NT = completion_weights(sources.mask_NT, sources.given_NT.any(1), summed_NT.dtype)
    return compare(summed_NT, weights_NT, (0, 1), scale="group", eps=eps)


def make_sources(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    *,
    gamma: float | Sequence[float],
    gamma_unit: str,
) -> Sources:
    """The sources of [`process_advantages`], with its arguments."""
    gammas = gamma_per_source(gamma, len(weights_K))
    mask_NT = mask_NT.bool()
    turn_ends_NT = turn_ends(mask_NT) if gamma_unit == "turn" else None
    return Sources(rewards_KNT, mask_NT, weights_K.to(rewards_KNT), gammas, gamma_unit, turn_ends_NT, group_size)


def gamma_per_source(gamma: float | Sequence[float], num_sources: int) -> list[float]:
    """One discount for each source, of one for all or one each; `ValueError` if they are of another number."""
    gammas = [gamma] * num_sources if isinstance(gamma, (int, float)) else list(gamma)
    if len(gammas) != num_sources:
        raise ValueError(f"{len(gammas)} gammas for {num_sources} reward sources; give one for all, or one each.")
    return [float(value) for value in gammas]


def _check_one_gamma(gammas: list[float], row: Estimator, estimator: str | Estimator) -> None:
    if row.normalizes == "step_rewards" and len(set(gammas)) > 1:
        raise ValueError(
            f"estimator {estimator!r} sums the sources' step rewards before discounting, so it takes one gamma; got "
            f"{gammas}. Give one gamma, or aggregation='normalize_then_sum'."
        )


def _check_shapes(rewards_KNT: torch.Tensor, mask_NT: torch.Tensor, weights_K: torch.Tensor, group_size: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in (rewards_KNT, mask_NT, weights_K)]
    if rewards_KNT.ndim != 3 or shapes[1] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(
            f"expected rewards (K, N, T), mask (N, T) and weights (K,); got {', '.join(map(str, shapes))}."
        )
    if group_size < 1 or rewards_KNT.size(1) % group_size:
        raise ValueError(f"{rewards_KNT.size(1)} completions do not divide into groups of {group_size}.")
