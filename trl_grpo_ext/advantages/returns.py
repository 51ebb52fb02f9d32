"""Discounted returns of token rewards."""

import torch
from torch.nn import functional as F


# Tokens per block of a scan, and tokens scanned at once: what the processor's cache holds
_SCAN_BLOCK = 32

_SCAN_TOKENS = 2**19


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
