"""The sum that makes an advantage, source by source: what each one earns, what that is compared with, what it adds."""

from typing import NamedTuple

import torch

from ..advantages.combine import counted_in_sum, inputs_of_sum, moments_over_completions
from ..advantages.comparisons import EstimatorInputs, statistics_on_tokens
from ..advantages.estimators import Estimator
from ..advantages.normalization import Comparison
from ..advantages.settings import AdvantageSettings
from ..advantages.sources import PackedSources, make_sources


class Decomposition(NamedTuple):
    r"""
    An advantage as a sum over the reward sources, on loss tokens; NaN where there is nothing, or nothing is known.

        A_t = offset + sum_k share^k_t

    An estimator that normalises returns:

        return^k_t = r^k_t + g_t return^k_{t+1}
        share^k_t  = w_k (return^k_t - mean^k_t) / divisor^k_t / batch_divisor

    An estimator that normalises step rewards, whose returns are of normalised rewards:

        z^k_t      = (r^k_t - mean^k_t) / divisor^k_t    on tokens with a reward
        return^k_t = z^k_t + g_t return^k_{t+1}
        share^k_t  = w_k return^k_t / batch_divisor

    z and the share are 0 where the divisor is NaN: what is compared has no spread. `batch_divisor` is 1 and `offset` 0
    except with `"normalize_then_sum"`, where the sum over the sources is normalised once more, over the batch.

    Args:
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            r: rewards as the estimator shapes them.
        returns_KNT (`torch.Tensor` of shape `(K, N, T)`):
            Returns, of one source each.
        mean_KNT, std_KNT, divisor_KNT (`torch.Tensor` of shape `(K, N, T)`):
            What a source is compared with. With `"sum_then_normalize"` the std and the divisor are those of the
            weighted sum, the same for all sources.
        shares_KNT (`torch.Tensor` of shape `(K, N, T)`):
            What each source adds to the advantage.
        offset_N (`torch.Tensor` of shape `(N,)`):
            Added to the shares; 0 for a completion that is not judged.
        batch_divisor (`float`):
            What the sum over the sources is divided by.
    """

    rewards_KNT: torch.Tensor
    returns_KNT: torch.Tensor
    mean_KNT: torch.Tensor
    std_KNT: torch.Tensor
    divisor_KNT: torch.Tensor
    shares_KNT: torch.Tensor
    offset_N: torch.Tensor
    batch_divisor: float

    @property
    def advantages_NT(self) -> torch.Tensor:
        """The sum, `(N, T)`; NaN where it is not known, and outside the loss mask."""
        return self.shares_KNT.sum(0) + self.offset_N[:, None]


# Fields of a decomposition that are `(K, N, T)`
_OF_TOKENS = ("rewards_KNT", "returns_KNT", "mean_KNT", "std_KNT", "divisor_KNT", "shares_KNT")


def decompose(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    settings: AdvantageSettings,
) -> Decomposition:
    """
    The sums that [`~trl_grpo_ext.advantages.combine.process_advantages`] adds up; takes its arguments.

    A source of weight 0 has its rewards, adds 0 and is compared with nothing. Of an estimator of the user's own that
    does not say what it compares, rewards are known, and returns if it normalises these; nothing else.

    Returns:
        [`Decomposition`] whose `advantages_NT` are those advantages up to rounding, or NaN where they are not known.
    """
    row = settings.row
    sources = make_sources(rewards_KNT, mask_NT, weights_K, group_size, settings)
    everything = sources.packed(rewards_KNT.dtype)
    packed = _of_no_source(everything, row)
    counted = [k for k, weight in enumerate(weights_K.tolist()) if weight != 0]
    if counted:
        explain = _explain_sum if settings.aggregation == "sum_then_normalize" else _explain_normalized
        explained = explain(everything.chosen(counted), row, scale=settings.std_scale, eps=settings.eps)
        index = torch.tensor(counted, device=rewards_KNT.device)
        of_tokens = {name: _field(packed, name).index_copy(0, index, _field(explained, name)) for name in _OF_TOKENS}
        packed = explained._replace(**of_tokens)
    return _unpacked(packed, everything, mask_NT)


def _field(decomposition: Decomposition, name: str) -> torch.Tensor:
    return decomposition._asdict()[name]


def _of_no_source(sources: PackedSources, row: Estimator) -> Decomposition:
    """What is known of sources of weight 0: their rewards, and that they add nothing."""
    unknown = [torch.full_like(sources.rewards_KNT, torch.nan) for _ in range(4)]
    return Decomposition(
        row.shape_rewards(sources.rewards_KNT).clone(),
        *unknown,
        shares_KNT=torch.zeros_like(sources.rewards_KNT),
        offset_N=sources.rewards_KNT.new_zeros(len(sources.mask_NT)),
        batch_divisor=1.0,
    )


def _unpacked(packed: Decomposition, sources: PackedSources, mask_NT: torch.Tensor) -> Decomposition:
    """Loss tokens back at their places, and NaN on all other tokens."""

    def unpack(values_KNT: torch.Tensor) -> torch.Tensor:
        known_KNT = values_KNT.where(sources.mask_NT, torch.nan)
        return sources.unpacked(known_KNT, known_KNT.new_full((len(known_KNT), *mask_NT.shape), torch.nan))

    return packed._replace(**{name: unpack(_field(packed, name)) for name in _OF_TOKENS})


def _explain_sum(sources: PackedSources, row: Estimator, *, scale: str, eps: float) -> Decomposition:
    """
    Of `"sum_then_normalize"`: means are linear, so the mean of the sum is the weighted sum of the sources' means.

    All of them are over the values that count in the sum: those of all sources' judged completions or steps.
    """
    summed = inputs_of_sum(sources, row, scale=scale, eps=eps)
    counted_NT = counted_in_sum(summed, row)
    shaped_KNT = row.shape_rewards(sources.rewards_KNT)
    normalizes_returns = row.normalizes == "returns"
    unknown_KNT = torch.full_like(shaped_KNT, torch.nan)
    if normalizes_returns:
        values_KNT = torch.stack([sources.returns(rewards_NT, k) for k, rewards_NT in enumerate(shaped_KNT)])
    else:
        values_KNT = shaped_KNT.nan_to_num().where(counted_NT, torch.nan)
    offset_N = shaped_KNT.new_zeros(len(counted_NT))
    if not row.compares:
        returns_KNT = values_KNT if normalizes_returns else unknown_KNT
        unknown = [unknown_KNT] * 4
        return Decomposition(shaped_KNT, returns_KNT, *unknown, offset_N=offset_N, batch_divisor=1.0)

    def compared(inputs: EstimatorInputs) -> Comparison:
        return statistics_on_tokens(row.compare(inputs), inputs)

    total = compared(summed)
    differs_NT = counted_NT & total.counted
    mean_KNT = torch.stack([compared(summed._replace(values_NT=values_NT)).mean for values_NT in values_KNT])
    normalized_KNT = ((values_KNT - mean_KNT) / total.divisor).where(differs_NT, 0.0)
    if normalizes_returns:
        returns_KNT = values_KNT
        shares_KNT = normalized_KNT
    else:
        # All gammas are equal here
        returns_KNT = torch.stack([sources.returns(z_NT.where(counted_NT, torch.nan), 0) for z_NT in normalized_KNT])
        shares_KNT = returns_KNT
    return Decomposition(
        shaped_KNT,
        returns_KNT,
        mean_KNT.where(counted_NT, torch.nan),
        total.std.where(counted_NT, torch.nan).expand_as(mean_KNT),
        total.divisor.where(differs_NT, torch.nan).expand_as(mean_KNT),
        sources.weights_K[:, None, None] * shares_KNT,
        offset_N=offset_N,
        batch_divisor=1.0,
    )


def _explain_normalized(sources: PackedSources, row: Estimator, *, scale: str, eps: float) -> Decomposition:
    """Of `"normalize_then_sum"`: each source by itself, and the batch's step."""
    alone = [_explain_sum(sources.single(k), row, scale=scale, eps=eps) for k in range(len(sources.gammas))]
    joined = {name: torch.cat([_field(part, name) for part in alone]) for name in _OF_TOKENS}
    shares_KNT = sources.weights_K[:, None, None] * joined["shares_KNT"]
    judged_N = sources.given_NT.any(1)
    batch = moments_over_completions(shares_KNT.sum(0), sources.mask_NT, judged_N)
    divisor = (batch.std + eps).item()
    counted_NT = sources.mask_NT & judged_N[:, None] & batch.has_spread
    joined["shares_KNT"] = (shares_KNT / divisor).where(counted_NT | shares_KNT.isnan(), 0.0)
    offset_N = (-batch.mean[0] / divisor).expand(len(judged_N)).where(counted_NT.any(1), 0.0)
    return Decomposition(**joined, offset_N=offset_N, batch_divisor=divisor)
