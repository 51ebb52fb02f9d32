"""Means, standard deviations and normalisation over groups of completions."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


SCALES = ("group", "batch", "none")

# Spread below this share of the largest value is rounding: two float32 units in the last place
_RELATIVE_SPREAD = 2.4e-7

_ABSOLUTE_SPREAD = 1e-14

# The weights 1 / L of a completion's L tokens sum to 1 only up to rounding, so that `count > 1` might hold for one
_SEVERAL = 1.5


class Moments(NamedTuple):
    """
    Sums over some axes of weighted values, from which the moments of several such sets together follow.

    Args:
        number (`torch.Tensor`):
            `n`, the sum of the weights; the axes are kept with size 1.
        mean (`torch.Tensor`):
            Of the values.
        squares (`torch.Tensor`):
            The weighted sum of the squared deviations from the mean.
        largest (`torch.Tensor`):
            The largest size of a value.
    """

    number: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor
    largest: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        """The standard deviation with ddof 1, `sqrt(squares / (n - 1))`; 0 where `n` is 0 or 1."""
        several = self.number > _SEVERAL
        return (self.squares / (self.number - 1).where(several, 1.0)).sqrt().where(several, 0.0)

    @property
    def has_spread(self) -> torch.Tensor:
        """False where `n` is 0 or 1, or where the standard deviation is no larger than the rounding of the values."""
        tolerance = (self.largest * _RELATIVE_SPREAD).clamp(min=_ABSOLUTE_SPREAD)
        return (self.number > _SEVERAL) & (self.std > tolerance)

    def padded(self, width: int) -> "Moments":
        """The same with columns in which there is nothing, up to a width."""
        return Moments(*[F.pad(one, (0, width - one.size(-1))) for one in self])

    def first(self, width: int) -> "Moments":
        """Those of the first columns; what is of all columns stays."""
        return Moments(*[one[..., :width] for one in self])


class Comparison(NamedTuple):
    """
    What values are compared with: `(x - mean) / divisor` where they count, else 0. All of it broadcasts against x.

    Args:
        mean (`torch.Tensor`):
            The baseline.
        std (`torch.Tensor`):
            The standard deviation that the scale names; with `"none"` the group's, which nothing is divided by.
        divisor (`torch.Tensor`):
            `std + eps`, or 1.
        counted (`torch.Tensor`, bool):
            False where the result is 0: the value does not count, or the compared values have no spread.
    """

    mean: torch.Tensor
    std: torch.Tensor
    divisor: torch.Tensor
    counted: torch.Tensor


def weighted_moments(values: torch.Tensor, weights: torch.Tensor, dim: tuple[int, ...]) -> Moments:
    r"""
    Weighted count, mean and sum of squared deviations, in two passes.

    `n = sum w`

    `mean = sum w x / n`

    `squares = sum w (x - mean)^2`

    n counts steps or completions, so it is a whole number up to rounding. Entries with weight 0 are never read.
    """
    values = values.where(weights > 0, 0.0)
    count = weights.sum(dim, keepdim=True)
    mean = (weights * values).sum(dim, keepdim=True) / _at_least_tiny(count)
    # In place: of a large group each of these tensors counts
    squares = (values - mean).square_().mul_(weights).sum(dim, keepdim=True)
    return Moments(count, mean, squares, values.abs().amax(dim, keepdim=True))


def merged(parts: Moments) -> Moments:
    r"""
    The moments of several sets together, from those of each.

    `n = sum_b n_b`

    `mean = sum_b n_b mean_b / n`

    `squares = sum_b squares_b + n_b (mean_b - mean)^2`

    No difference of large sums is taken, so nothing is lost where the mean is much larger than the spread.

    Args:
        parts ([`Moments`]):
            The sets b along the first axis, which the result keeps with size 1.
    """
    count = parts.number.sum(0, keepdim=True)
    mean = (parts.number * parts.mean).sum(0, keepdim=True) / _at_least_tiny(count)
    squares = (parts.squares + parts.number * (parts.mean - mean) ** 2).sum(0, keepdim=True)
    return Moments(count, mean, squares, parts.largest.amax(0, keepdim=True))


def _at_least_tiny(count: torch.Tensor) -> torch.Tensor:
    return count.clamp(min=torch.finfo(count.dtype).tiny)


def compare(
    values_PGT: torch.Tensor,
    weights_PGT: torch.Tensor,
    group_dims: tuple[int, ...],
    *,
    scale: str,
    eps: float,
    baseline: torch.Tensor | None = None,
    batch: Moments | None = None,
) -> Comparison:
    """
    What [`standardize`] compares the values with.

    Args:
        values_PGT (`torch.Tensor` of shape `(P, G, T)`):
            x, by group.
        weights_PGT (`torch.Tensor` of shape `(P, G, T)`):
            Weights of the values in means and standard deviations.
        group_dims (`tuple[int, ...]`):
            Axes of a group's values that are compared with each other.
        scale (`str`):
            The std is over these values of the group (`"group"`) or of all groups (`"batch"`), or the division is left
            out (`"none"`).
        eps (`float`):
            Added to the std.
        baseline (`torch.Tensor`, *optional*):
            Broadcasts against the values. By default the group's mean.
        batch ([`Moments`], *optional*):
            Of all groups, where these are not all of them; for the scale `"batch"`.

    Returns:
        [`Comparison`].
    """
    group = weighted_moments(values_PGT, weights_PGT, group_dims)
    mean = group.mean if baseline is None else baseline
    has_spread = group.has_spread
    std = group.std
    if scale == "batch":
        if batch is None:
            batch = weighted_moments(values_PGT, weights_PGT, (0, *group_dims))
        # Spread of one group above the rounding may be below it beside the larger values of the batch
        has_spread = has_spread & batch.has_spread
        std = batch.std
    divisor = torch.ones_like(std) if scale == "none" else std + eps
    return Comparison(mean, std, divisor, has_spread & (weights_PGT > 0))


def standardize(values_PGT: torch.Tensor, compared: Comparison, *, scale: str) -> torch.Tensor:
    r"""
    Values minus a baseline, over a standard deviation; 0 where the weight is 0 or the compared values have no spread.

    `(x - baseline) / (std + eps)`

    Args:
        values_PGT (`torch.Tensor` of shape `(P, G, T)`):
            x, by group.
        compared ([`Comparison`]):
            From [`compare`], with the same values.
        scale (`str`):
            As for [`compare`]; with `"none"` nothing is divided.

    Returns:
        `torch.Tensor` of shape `(P, G, T)`.
    """
    centred_PGT = values_PGT - compared.mean
    if scale != "none":
        centred_PGT /= compared.divisor
    return centred_PGT.where(compared.counted, 0.0)


def mean_of_others(values_PGT: torch.Tensor, weights_PGT: torch.Tensor) -> torch.Tensor:
    r"""
    Mean of the values of the group's other completions, those with weight 0 left out.

    `b_i = sum_{j != i} w_j x_j / sum_{j != i} w_j`

    The weights are 0 or 1. Where there is no other completion, the mean is 0. Entries with weight 0 are never read.
    """
    weighted_PGT = values_PGT.where(weights_PGT > 0, 0.0)
    others_PGT = weights_PGT.sum(1, keepdim=True) - weights_PGT
    return (weighted_PGT.sum(1, keepdim=True) - weighted_PGT) / others_PGT.clamp(min=1)


def completion_weights(mask_NT: torch.Tensor, judged_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`1 / L_i` on the L_i loss tokens of judged completions, 0 elsewhere: every judged completion counts 1."""
    counted_NT = (mask_NT & judged_N[:, None]).to(dtype)
    return counted_NT / mask_NT.sum(1, keepdim=True).clamp(min=1)


def pack_order(mask_NT: torch.Tensor) -> torch.Tensor:
    """Column order that brings each row's True entries to the front and keeps the order among them."""
    return torch.argsort((~mask_NT).to(torch.uint8), dim=1, stable=True)


def grouped(group_size: int, *tensors_NT: torch.Tensor) -> list[torch.Tensor]:
    """Rows as groups: `(N, T)` to `(P, G, T)`."""
    return [tensor_NT.unflatten(0, (-1, group_size)) for tensor_NT in tensors_NT]
