"""
Token rewards of one stream to group-relative advantages.

Conventions of this module: groups are consecutive blocks of G rows; `rewards_NT` holds NaN where no reward is given;
completions are packed, their loss tokens first (see [`~trl_grpo_ext.aggregation.process_advantages`]); standard
deviations have ddof 1; a set without spread, or of one completion, gets advantage exactly 0.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


SCALES = ("group", "batch", "none")
BASELINES = ("all", "active")

# PURE's softmax temperature over step rewards
SOFT_MINIMUM_TEMPERATURE = 0.1

# Tokens per block of a scan, and tokens scanned at once: what the processor's cache holds
_SCAN_BLOCK = 32
_SCAN_TOKENS = 2**19

# Spread below this share of the largest value is rounding: two float32 units in the last place
_RELATIVE_SPREAD = 2.4e-7
_ABSOLUTE_SPREAD = 1e-14


def discounted_returns(
    rewards_NT: torch.Tensor, gamma: float, step_ends_NT: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Discounted sum of this and all later rewards, at every token.

    `R_t = r_t + g_t R_{t+1}`, `R_T = 0`, with `g_t = gamma` at every token, or, given step ends, `gamma` where a step
    ends and 1 elsewhere. A parallel scan in `O(log T)` tensor operations. Nothing is divided by a power of gamma,
    which may underflow.

    Args:
        rewards_NT (`torch.Tensor` of shape `(N, T)`):
            Rewards, 0 where none is given.
        gamma (`float`):
            Discount in `[0, 1]`.
        step_ends_NT (`torch.Tensor` of shape `(N, T)`, *optional*):
            True at each step's last token.

    Returns:
        `torch.Tensor` of shape `(N, T)`: returns.
    """
    if rewards_NT.ndim != 2 or (step_ends_NT is not None and step_ends_NT.shape != rewards_NT.shape):
        ends_shape = None if step_ends_NT is None else tuple(step_ends_NT.shape)
        raise ValueError(f"expected rewards and step ends (N, T); got {tuple(rewards_NT.shape)} and {ends_shape}.")
    returns_NT, every_token = torch.empty_like(rewards_NT), rewards_NT.new_full((1, rewards_NT.size(1)), gamma)
    rows = max(1, _SCAN_TOKENS // max(1, rewards_NT.size(1)))
    for some in (slice(start, start + rows) for start in range(0, len(rewards_NT), rows)):
        discounts = every_token if step_ends_NT is None else every_token.where(step_ends_NT[some].bool(), 1.0)
        returns_NT[some] = _backward_scan(rewards_NT[some], discounts)
    return returns_NT


def _backward_scan(values_NT: torch.Tensor, factors_NT: torch.Tensor) -> torch.Tensor:
    """
    `R_t = v_t + f_t R_{t+1}`, in all blocks of `_SCAN_BLOCK` tokens at once, then over the blocks in the same way.

    `factors_NT` may have a single row.
    """
    length = values_NT.size(1)
    padding = -length % _SCAN_BLOCK
    # (block's token, N, blocks), so that one token of all blocks lies together; both are new memory
    values, factors = (
        F.pad(x, (0, padding))
        .unflatten(1, (-1, _SCAN_BLOCK))
        .permute(2, 0, 1)
        .clone(memory_format=torch.contiguous_format)
        for x in (values_NT, factors_NT)
    )
    for t in range(_SCAN_BLOCK - 2, -1, -1):
        values[t].addcmul_(factors[t], values[t + 1])
        factors[t].mul_(factors[t + 1])
    if values.size(2) > 1:
        # What a block's last token gets from the blocks after it
        after = F.pad(_backward_scan(values[0], factors[0])[:, 1:], (0, 1))
        values.addcmul_(factors, after)
    return values.permute(1, 2, 0).flatten(1)[:, :length]


class Moments(NamedTuple):
    """Mean, standard deviation (ddof 1) and whether there is any spread, over some axes that are kept with size 1."""

    mean: torch.Tensor
    std: torch.Tensor
    has_spread: torch.Tensor


def weighted_moments(values: torch.Tensor, weights: torch.Tensor, dim: tuple[int, ...]) -> Moments:
    r"""
    `n = sum w`, `mean = sum w x / n`, `std = sqrt(sum w (x - mean)^2 / (n - 1))`, in two passes.

    There is no spread where `n <= 1` or `std` is no larger than the rounding of the values. Entries with weight 0 are
    never read.
    """
    values = values.where(weights > 0, 0.0)
    count = weights.sum(dim, keepdim=True)
    mean = (weights * values).sum(dim, keepdim=True) / count.clamp(min=torch.finfo(values.dtype).tiny)
    squares = (weights * (values - mean) ** 2).sum(dim, keepdim=True)
    # Weights 1 / L of a completion's tokens add up to 1 only to rounding
    several = count > 1.5
    std = (squares / (count - 1).where(several, 1.0)).sqrt().where(several, 0.0)
    tolerance = (values.abs().amax(dim, keepdim=True) * _RELATIVE_SPREAD).clamp(min=_ABSOLUTE_SPREAD)
    return Moments(mean, std, several & (std > tolerance))


def _standardize(
    values_PGT: torch.Tensor,
    weights_PGT: torch.Tensor,
    group_dims: tuple[int, ...],
    *,
    scale: str,
    eps: float,
    baseline: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `(x - baseline) / (std + eps)`, with the group's mean as the baseline unless one is given.

    `scale` takes the std over the group (`"group"`), over the same set of all groups (`"batch"`), or none (`"none"`).
    """
    group = weighted_moments(values_PGT, weights_PGT, group_dims)
    counted = group.has_spread & (weights_PGT > 0)
    centred = values_PGT - (group.mean if baseline is None else baseline)
    if scale == "group":
        centred = centred / (group.std + eps)
    elif scale == "batch":
        batch = weighted_moments(values_PGT, weights_PGT, (0, *group_dims))
        centred, counted = centred / (batch.std + eps), counted & batch.has_spread
    return centred.where(counted, 0.0)


def position_advantages(
    returns_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    judged_N: torch.Tensor,
    group_size: int,
    *,
    baseline: str,
    scale: str,
    eps: float,
) -> torch.Tensor:
    r"""
    Returns normalised across the group at each token index, the seed document's order: return, then normalise.

    `A_{i,t} = (R_{i,t} - mean_j R_{j,t}) / (std_j R_{j,t} + eps)` over the judged completions j of i's group, where
    completions that ended before t count as return 0 (`baseline="all"`) or not at all (`"active"`).

    Reduces to TRL's advantages for one token per completion.
    """
    counted_NT = judged_N[:, None] & (mask_NT if baseline == "active" else torch.ones_like(mask_NT))
    values_PGT, weights_PGT = _grouped(group_size, returns_NT.where(mask_NT, 0.0), counted_NT.to(returns_NT))
    return _standardize(values_PGT, weights_PGT, (1,), scale=scale, eps=eps).flatten(0, 1).where(mask_NT, 0.0)


def pooled_rewards(rewards_NT: torch.Tensor, group_size: int, *, scale: str, eps: float) -> torch.Tensor:
    r"""
    Step rewards normalised over all step rewards of the group; NaN where there is none.

    `r~ = (r - mean(R)) / (std(R) + eps)` with R the rewards of all completions of the group (DeepSeekMath, arXiv
    2402.03300, section 4.1.3). A group with fewer than two judged completions has nothing to compare and gets 0.

    Reduces to TRL's advantages for one reward per completion.
    """
    given_NT = ~rewards_NT.isnan()
    several_P = given_NT.any(1).view(-1, group_size).sum(1) > 1
    values_PGT, weights_PGT = _grouped(group_size, rewards_NT.nan_to_num(), given_NT.to(rewards_NT))
    normalised_PGT = _standardize(values_PGT, weights_PGT, (1, 2), scale=scale, eps=eps)
    return normalised_PGT.where(several_P[:, None, None], 0.0).flatten(0, 1).where(given_NT, torch.nan)


def step_rewards(rewards_NT: torch.Tensor, group_size: int, *, scale: str, eps: float) -> torch.Tensor:
    r"""
    Step rewards normalised among the k-th steps of the group, for each k; NaN where there is none.

    `r~_{i,k} = (r_{i,k} - mean_j r_{j,k}) / (std_j r_{j,k} + eps)` over the completions j that have a k-th step, as in
    LightRFT. A k-th step that only one completion has gets 0.
    """
    given_NT = ~rewards_NT.isnan()
    order_NT = pack_order(given_NT)
    packed_NT, has_NT = rewards_NT.gather(1, order_NT).nan_to_num(), given_NT.gather(1, order_NT)
    values_PGT, weights_PGT = _grouped(group_size, packed_NT, has_NT.to(rewards_NT))
    normalised_NT = _standardize(values_PGT, weights_PGT, (1,), scale=scale, eps=eps).flatten(0, 1)
    return torch.zeros_like(rewards_NT).scatter(1, order_NT, normalised_NT).where(given_NT, torch.nan)


def soft_minimum_rewards(rewards_NT: torch.Tensor, temperature: float = SOFT_MINIMUM_TEMPERATURE) -> torch.Tensor:
    r"""
    Step rewards weighted towards the completion's worst step; NaN where there is none.

    `r*_k = r_k softmax_k(-r_k / temperature)`, so that their sum approaches `min_k r_k` (PURE, arXiv 2504.15275).
    """
    given_NT = ~rewards_NT.isnan()
    logits_NT = (-rewards_NT / temperature).where(given_NT, -torch.inf)
    return (torch.softmax(logits_NT, dim=1) * rewards_NT).where(given_NT, torch.nan)


def leave_one_out_advantages(
    returns_NT: torch.Tensor, mask_NT: torch.Tensor, judged_N: torch.Tensor, group_size: int, *, scale: str, eps: float
) -> torch.Tensor:
    r"""
    Returns against the mean token return of the group's other completions.

    `A_{i,t} = R_{i,t} - 1/(n-1) sum_{j != i} m_j`, `m_j = 1/L_j sum_t R_{j,t}` over the n judged completions, divided
    by the std of the token returns, each completion counting once, unless `scale` is `"none"`. PURE (arXiv 2504.15275;
    the verl branch of its code) divides the sums of the others' returns by the padded length instead of by their own,
    so that its baseline depends on the padding.

    Reduces to RLOO for outcome rewards at gamma = 1 and `scale="none"`.
    """
    weights_NT = completion_weights(mask_NT, judged_N, returns_NT.dtype)
    values_PGT, weights_PGT = _grouped(group_size, returns_NT.where(mask_NT, 0.0), weights_NT)
    means_PG1 = (weights_PGT * values_PGT).sum(2, keepdim=True)
    others_PG1 = judged_N.view(-1, group_size, 1).sum(1, keepdim=True).to(returns_NT) - 1
    baseline_PG1 = (means_PG1.sum(1, keepdim=True) - means_PG1) / others_PG1.clamp(min=1)
    advantages_PGT = _standardize(values_PGT, weights_PGT, (1, 2), scale=scale, eps=eps, baseline=baseline_PG1)
    return advantages_PGT.flatten(0, 1)


def completion_weights(mask_NT: torch.Tensor, judged_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`1 / L_i` on the loss tokens of judged completions, 0 elsewhere: every judged completion counts 1."""
    counted_NT = (mask_NT & judged_N[:, None]).to(dtype)
    return counted_NT / mask_NT.sum(1, keepdim=True).clamp(min=1)


def pack_order(mask_NT: torch.Tensor) -> torch.Tensor:
    """Column order that brings each row's True entries to the front and keeps the order among them."""
    return torch.argsort((~mask_NT).to(torch.uint8), dim=1, stable=True)


def _grouped(group_size: int, *tensors_NT: torch.Tensor) -> list[torch.Tensor]:
    return [tensor_NT.unflatten(0, (-1, group_size)) for tensor_NT in tensors_NT]
