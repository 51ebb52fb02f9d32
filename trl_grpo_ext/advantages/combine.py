"""
Several reward sources, weighted, with missing judgements, to one advantage per token.

Advantages are computed in blocks of groups, so that what a formula holds in between does not grow with the batch. What
is divided by a standard deviation over the batch takes two passes over the blocks: one for the moments, one to divide.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch

from .comparisons import EstimatorInputs, normalize
from .estimators import Estimator
from .normalization import Moments, completion_weights, merged, weighted_moments
from .settings import AdvantageSettings
from .sources import PackedSources, Sources, make_sources


# Tokens of a block, if a single group does not have more: as many as a processor's cache holds
_BLOCK_TOKENS = 2**18


def _unchanged(values: torch.Tensor) -> torch.Tensor:
    return values


class Share(NamedTuple):
    """
    Whose statistics a process adds to those of the batch, where each process has some of the batch's completions.

    Args:
        own (`slice`):
            The rows that no other process adds; by default all.
        gather (`Callable[[torch.Tensor], torch.Tensor]`):
            Joins the tensors of all processes along the first axis. By default there is one process.
    """

    own: slice = slice(None)
    gather: Callable[[torch.Tensor], torch.Tensor] = _unchanged

    def of_all(self, values_N: torch.Tensor) -> torch.Tensor:
        """Values of each completion of the whole batch, from those of the completions here."""
        return self.gather(values_N[self.own])


WHOLE_BATCH = Share()


def process_advantages(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    settings: AdvantageSettings,
    *,
    share: Share = WHOLE_BATCH,
    dtype: torch.dtype | None = None,
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
        settings ([`~trl_grpo_ext.advantages.settings.AdvantageSettings`]):
            Estimator, discounts and normalisation.
        share ([`Share`], *optional*):
            If these are some of the batch's completions, T the same for all of them. By default they are the batch.
        dtype (`torch.dtype`, *optional*):
            What is computed in, and the result. By default that of the rewards.

    Returns:
        `torch.Tensor` of shape `(N, T)`: advantages, 0 outside the loss mask.

    Raises:
        ValueError: shapes that do not fit, or several gammas for one sum of step rewards.
    """
    sources = make_sources(rewards_KNT, mask_NT, weights_K, group_size, settings)
    advantages_NT = torch.zeros(mask_NT.shape, dtype=dtype or rewards_KNT.dtype, device=mask_NT.device)
    gammas = sources.rows(slice(0)).without_weight_0().gammas
    if not gammas:
        return advantages_NT
    row = settings.row
    # A completion that has ended counts at each later token of the batch
    compares_batch = settings.std_scale == "batch"
    length = mask_NT.size(1) if compares_batch else None
    blocks = _Blocks(sources, advantages_NT.dtype, share, by_group=row.compares, length=length)
    if settings.aggregation == "normalize_then_sum":
        return _sum_of_advantages(blocks, row, settings.eps, advantages_NT)
    _check_one_gamma(gammas, row, settings.estimator)
    batch = None
    if row.compares and compares_batch:
        batch = blocks.joined(
            _moments_of_sum(block, row, own_N, mask_NT.size(1)) for _, block, own_N in blocks.packed()
        )
    for rows, block, _ in blocks.packed():
        packed_NT = _advantages_of_sum(block, row, scale=settings.scale, eps=settings.eps, batch=batch)
        block.unpacked(packed_NT, advantages_NT[rows])
    return advantages_NT


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
    # One sum, which NaN and infinity go through; where they are is asked only then
    if values_NT.sum().isfinite():
        return
    bad_N = (~values_NT.isfinite() & counted_NT).any(1)
    if bad_N.any():
        completion = int(bad_N.nonzero()[0, 0])
        raise ValueError(f"{name} returned a value that is not finite, for completion {completion} of the batch.")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def row_blocks(shape: Sequence[int], group_size: int = 1) -> list[slice]:
    """The rows of blocks of whole groups of a tensor `(N, T)`, each as large as a processor's cache holds."""
    count, length = shape
    size = group_size * max(1, _BLOCK_TOKENS // (group_size * max(1, length)))
    return [slice(start, start + size) for start in range(0, count, size)]


class _Blocks(NamedTuple):
    """The completions in blocks of whole groups, packed and without sources of weight 0; or all of them in one."""

    sources: Sources
    dtype: torch.dtype
    share: Share
    by_group: bool
    # Columns of a block, if not those of its longest completion
    length: int | None

    @property
    def rows(self) -> list[slice]:
        """The rows of each block."""
        shape = self.sources.mask_NT.shape
        return row_blocks(shape, self.sources.group_size) if self.by_group else [slice(0, shape[0])]

    def packed(self) -> Iterator[tuple[slice, PackedSources, torch.Tensor]]:
        """The rows of each block, the block, and which of its completions no other process adds to statistics."""
        own_N = torch.zeros_like(self.sources.mask_NT[:, 0])
        own_N[self.share.own] = True
        for rows in self.rows:
            yield rows, self.sources.rows(rows).without_weight_0().packed(self.dtype, self.length), own_N[rows]

    def joined(self, parts: Iterable[Moments]) -> Moments:
        """The moments of the whole batch, from those of this process's blocks."""
        # Two at a time: there may be one for each token
        own = reduce(lambda *two: merged(Moments(*[torch.cat(one) for one in zip(*two, strict=True)])), parts)
        return merged(Moments(*self.share.gather(torch.stack(own, 1)).unbind(1)))


# ---------------------------------------------------------------------------------------------------------------------
# Add up, then normalise


def inputs_of_sum(sources: PackedSources, row: Estimator, *, scale: str, eps: float) -> EstimatorInputs:
    """
    The weighted sum that the estimator normalises.

    An estimator that normalises returns: `sum_k w_k returns_k(shape(r^k))`

    An estimator that normalises step rewards: `sum_k w_k shape(r^k)`, where some sources give a reward and the others
    add 0
    """
    given_NT = sources.given_NT
    if row.normalizes == "returns":
        values_NT = sources.weighted_sum(lambda k: sources.returns(row.shape_rewards(sources.rewards_KNT[k]), k))
    else:
        summed_NT = sources.weighted_sum(lambda k: row.shape_rewards(sources.rewards_KNT[k]).nan_to_num())
        values_NT = summed_NT.where(given_NT, torch.nan)
    return EstimatorInputs(values_NT, sources.mask_NT, given_NT.any(1), sources.group_size, scale, eps)


def counted_in_sum(inputs: EstimatorInputs, row: Estimator) -> torch.Tensor:
    """True where the estimator's result is read: on loss tokens of judged completions, or on step rewards."""
    if row.normalizes == "returns":
        return inputs.mask_NT & inputs.judged_N[:, None]
    return ~inputs.values_NT.isnan()


def _advantages_of_sum(
    sources: PackedSources, row: Estimator, *, scale: str, eps: float, batch: Moments | None = None
) -> torch.Tensor:
    """
    Add the weighted sources up, then normalise once.

    An estimator that normalises returns: `A = normalize(sum_k w_k returns_k(shape(r^k)))`

    An estimator that normalises step rewards: `A = returns(normalize(sum_k w_k shape(r^k)))`
    """
    inputs = inputs_of_sum(sources, row, scale=scale, eps=eps)
    counted_NT = counted_in_sum(inputs, row)
    if row.compares:
        normalized_NT = normalize(row.compare(inputs), inputs, batch)
    else:
        normalized_NT = row.function(inputs)
        check_values("the advantage estimator's function", normalized_NT, counted_NT)
    if row.normalizes == "returns":
        return normalized_NT.where(counted_NT, 0.0)
    # All gammas are equal here
    return sources.returns(normalized_NT.where(counted_NT, torch.nan), 0)


def _moments_of_sum(sources: PackedSources, row: Estimator, own_N: torch.Tensor, width: int) -> Moments:
    """What the scale `"batch"` divides by, as far as it comes from these completions."""
    compared = row.compare(inputs_of_sum(sources, row, scale="batch", eps=0.0))
    found = compared.batch_moments(own_N)
    return found.padded(width) if compared.is_by_column else found


def _check_one_gamma(gammas: list[float], row: Estimator, estimator: str | Estimator) -> None:
    if row.normalizes == "step_rewards" and len(set(gammas)) > 1:
        raise ValueError(
            f"estimator {estimator!r} sums the sources' step rewards before discounting, so it takes one gamma; got "
            f"{gammas}. Give one gamma, or aggregation='normalize_then_sum'."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Normalise each source, then add up


def _sum_of_advantages(blocks: _Blocks, row: Estimator, eps: float, advantages_NT: torch.Tensor) -> torch.Tensor:
    """
    Normalise each source by itself with its group's std, add them up weighted, then normalise over the batch.

    `S = sum_k w_k A^k`

    `A = (S - mean S) / (std S + eps)`

    The second step is TRL's for scalars: the mean and the std are over the batch, each judged completion counting 1.
    """
    counted_NT = torch.zeros_like(blocks.sources.mask_NT)
    parts = []
    for rows, block, own_N in blocks.packed():
        summed_NT = block.weighted_sum(partial(_advantages_of_one, block, row, eps))
        judged_N = block.given_NT.any(1)
        parts.append(moments_over_completions(summed_NT, block.mask_NT, judged_N & own_N))
        block.unpacked(summed_NT, advantages_NT[rows])
        block.unpacked(block.mask_NT & judged_N[:, None], counted_NT[rows])
    batch = blocks.joined(parts)
    for rows in blocks.rows:
        # The mean is not 0 for completions of different lengths: the estimators centre with other weights than 1 / L.
        # TRL's step subtracts it from every completion, so groups without spread do not stay at 0
        advantages_NT[rows].sub_(batch.mean).div_(batch.std + eps)
        advantages_NT[rows].masked_fill_(~(counted_NT[rows] & batch.has_spread), 0.0)
    return advantages_NT


def _advantages_of_one(sources: PackedSources, row: Estimator, eps: float, k: int) -> torch.Tensor:
    return _advantages_of_sum(sources.single(k), row, scale="group", eps=eps)


def moments_over_completions(values_NT: torch.Tensor, mask_NT: torch.Tensor, counted_N: torch.Tensor) -> Moments:
    """Moments of all tokens, with weight 1 / L, so that a long completion counts no more than a short one."""
    return weighted_moments(values_NT, completion_weights(mask_NT, counted_N, values_NT.dtype), (0, 1))
