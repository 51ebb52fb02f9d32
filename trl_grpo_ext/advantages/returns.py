"""Discounted returns of token rewards: a plain loop over tokens, and the scan that the package uses."""

import torch
from torch.nn import functional as F


# Tokens per block of a scan
_SCAN_BLOCK = 32

# Tokens scanned at once: as many as a processor's cache holds
_SCAN_TOKENS = 2**19


def plain_discounted_returns(
    rewards_NT: torch.Tensor, gamma: float, ends_NT: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The returns of [`discounted_returns`], from the last token to the first: the readable form, slow for many tokens.

    `R_t = r_t + g_t R_{t+1}`
    """
    discounts_NT = _discounts(rewards_NT, gamma, ends_NT)
    returns_NT = rewards_NT.clone()
    for t in range(rewards_NT.size(1) - 2, -1, -1):
        returns_NT[:, t] += discounts_NT[:, t] * returns_NT[:, t + 1]
    return returns_NT


def discounted_returns(rewards_NT: torch.Tensor, gamma: float, ends_NT: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Discounted sum of this and all later rewards, at every token.

    `R_t = r_t + g_t R_{t+1}`, with `R_T = 0`

    The discount `g_t` is gamma at every token or, given the ends of steps or turns, gamma there and 1 elsewhere.

    Equals [`plain_discounted_returns`] up to rounding, in `O(log T)` tensor operations. Nothing is divided by a power
    of gamma, which may underflow.

    Args:
        rewards_NT (`torch.Tensor` of shape `(N, T)`):
            Rewards, 0 where none is given.
        gamma (`float`):
            Discount in `[0, 1]`.
        ends_NT (`torch.Tensor` of shape `(N, T)`, *optional*):
            True at the last token of each step or turn.

    Returns:
        `torch.Tensor` of shape `(N, T)`: returns, in units of the reward.

    Raises:
        ValueError: shapes that do not fit.
    """
    if rewards_NT.ndim != 2 or (ends_NT is not None and ends_NT.shape != rewards_NT.shape):
        ends_shape = None if ends_NT is None else tuple(ends_NT.shape)
        raise ValueError(f"expected rewards and ends (N, T); got {tuple(rewards_NT.shape)} and {ends_shape}.")
    returns_NT = torch.empty_like(rewards_NT)
    rows_at_once = max(1, _SCAN_TOKENS // max(1, rewards_NT.size(1)))
    for start in range(0, len(rewards_NT), rows_at_once):
        rows = slice(start, start + rows_at_once)
        own_ends_NT = None if ends_NT is None else ends_NT[rows]
        returns_NT[rows] = _backward_scan(rewards_NT[rows], _discounts(rewards_NT, gamma, own_ends_NT))
    return returns_NT


def _discounts(rewards_NT: torch.Tensor, gamma: float, ends_NT: torch.Tensor | None) -> torch.Tensor:
    """`g_t`: one row for all completions, `(1, T)`, or given ends one row each."""
    every_token = rewards_NT.new_full((1, rewards_NT.size(1)), gamma)
    return every_token if ends_NT is None else every_token.where(ends_NT.bool(), 1.0)


def _backward_scan(values_NT: torch.Tensor, factors_NT: torch.Tensor) -> torch.Tensor:
    r"""
    `R_t = v_t + f_t R_{t+1}` in blocks of tokens, so that the loop is over a block's tokens instead of all tokens.

    Let a token t lie in a block whose last token is e. Unrolled to the block's end, the recursion reads

    `R_t = V_t + F_t R_{e+1}`, with `V_t = v_t + f_t V_{t+1}`, `F_t = f_t F_{t+1}`, `V_e = v_e`, `F_e = f_e`

    V is the return if the completion ended with the block, F the discount of all that comes after the block. The scan
    takes three steps:

    1. V and F of every token, by a loop from a block's last token to its first that treats all blocks at once.
    2. R of every block's first token. `R_{e+1}` is the R of the next block's first token, so the formula is the
       recursion itself with a block in the place of a token: values V and factors F of the first tokens. The function
       calls itself on these, 32 times fewer than before.
    3. R of every token, from the formula.

    Args:
        values_NT (`torch.Tensor` of shape `(N, T)`):
            v.
        factors_NT (`torch.Tensor` of shape `(N, T)` or `(1, T)`):
            f.

    Returns:
        `torch.Tensor` of shape `(N, T)`: R.
    """
    length = values_NT.size(1)
    values = _in_blocks(values_NT)
    factors = _in_blocks(factors_NT)
    # Step 1, in place: values become V, factors become F
    for t in range(_SCAN_BLOCK - 2, -1, -1):
        values[t].addcmul_(factors[t], values[t + 1])
        factors[t].mul_(factors[t + 1])
    if values.size(2) > 1:
        first_returns = _backward_scan(values[0], factors[0])
        # Nothing comes after the last block
        returns_after = F.pad(first_returns[:, 1:], (0, 1))
        values.addcmul_(factors, returns_after)
    return values.permute(1, 2, 0).flatten(1)[:, :length]


def _in_blocks(values_NT: torch.Tensor) -> torch.Tensor:
    """A new tensor (token of the block, N, block), so that one token of all blocks is contiguous; 0 after the end."""
    padded = F.pad(values_NT, (0, -values_NT.size(1) % _SCAN_BLOCK))
    return padded.unflatten(1, (-1, _SCAN_BLOCK)).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
