"""Means, standard deviations and normalisation over groups of completions."""

from typing import NamedTuple

import torch


SCALES = ("group", "batch", "none")

# Spread below this share of the largest value is rounding: two float32 units in the last place
_RELATIVE_SPREAD = 2.4e-7

_ABSOLUTE_SPREAD = 1e-14


class Moments(NamedTuple):
    """Mean, standard deviation (ddof 1) and whether there is any spread, over some axes that are kept with size 1."""

    mean: torch.Tensor
    std: torch.Tensor
    has_spread: torch.Tensor


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
    Weighted mean and standard deviation, in two passes.

    `n = sum w`

    `mean = sum w x / n`

    `std = sqrt(sum w (x - mean)^2 / (n - 1))`

    n counts steps or completions, so it is a whole number up to rounding. There is no spread where `n` is 0 or 1, or
    where `std` is no larger than the rounding of the values. Entries with weight 0 are never read.
    """
    values = values.where(weights > 0, 0.0)
    count = weights.sum(dim, keepdim=True)
    mean = (weights * values).sum(dim, keepdim=True) / count.clamp(min=torch.finfo(values.dtype).tiny)
    squares = (weights * (values - mean) ** 2).sum(dim, keepdim=True)
    # The weights 1 / L of a completion's L tokens sum to 1 only up to rounding, so that `count > 1` might hold for one
    several = count > 1.5
    std = (squares / (count - 1).where(several, 1.0)).sqrt().where(several, 0.0)
    tolerance = (values.abs().amax(dim, keepdim=True) * _RELATIVE_SPREAD).clamp(min=_ABSOLUTE_SPREAD)
    return Moments(mean, std, several & (std > tolerance))


def compare(
    values_PGT: torch.Tensor,
    weights_PGT: torch.Tensor,
    group_dims: tuple[int, ...],
    *,
    scale: str,
    eps: float,
    baseline: torch.Tensor | None = None,
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

    Returns:
        [`Comparison`].
    """
    group = weighted_moments(values_PGT, weights_PGT, group_dims)
    mean = group.mean if baseline is None else baseline
    has_spread = group.has_spread
    std = group.std
    if scale == "batch":
        batch = weighted_moments(values_PGT, weights_PGT, (0, *group_dims))
        # Spread of one group above the rounding may be below it beside the larger values of the batch
        has_spread = has_spread & batch.has_spread
        std = batch.std
    divisor = torch.ones_like(std) if scale == "none" else std + eps
    return Comparison(mean, std, divisor, has_spread & (weights_PGT > 0))


def standardize(
    values_PGT: torch.Tensor,
    weights_PGT: torch.Tensor,
    group_dims: tuple[int, ...],
    *,
    scale: str,
    eps: float,
    baseline: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Values minus a baseline, over a standard deviation; 0 where the weight is 0 or the compared values have no spread.

    `(x - baseline) / (std + eps)`

    Takes the arguments of [`compare`].

    Returns:
        `torch.Tensor` of shape `(P, G, T)`.
    """
    compared = compare(values_PGT, weights_PGT, group_dims, scale=scale, eps=eps, baseline=baseline)
    centred_PGT = values_PGT - compared.mean
    if scale != "none":
        centred_PGT = centred_PGT / compared.divisor
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
