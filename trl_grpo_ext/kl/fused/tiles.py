"""
What is computed from a few rows of logits, `(n, V)`: statistics of each token, and their gradient.

Everything works in place and row by row: called on a few rows at a time, a tile stays in the processor's cache from
one pass over it to the next. A trailing underscore says that arguments are overwritten; columns have shape `(n, 1)`.
"""

import math
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Statistics of each row, all columns: the results, then what the gradient needs to compute the row again."""

    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_logp: torch.Tensor
    maximum: torch.Tensor
    log_total: torch.Tensor
    ref_maximum: torch.Tensor
    ref_log_total: torch.Tensor
    mean_log_ratio: torch.Tensor


class Tile(NamedTuple):
    """Statistics of some rows, and the two tiles that their gradient is made from."""

    rows: Rows
    p: torch.Tensor
    log_ratio: torch.Tensor  # 0 where p is 0, which weighs nothing whatever the reference says


def _mean(values: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(values, p).unsqueeze(-1)


def _mass_gap_(log_ratio: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """
    `sum_v (q_v - p_v)` to the precision of the log-ratios rather than of the two sums, a column.

    `q - p = p * expm1(-log_ratio)` loses nothing where the two are close, and `max(q - e p, 0)` adds what the clamp
    cuts off where `q > e p` (there the exponential could overflow, or `p` be 0).
    """
    excess = q.sub_(p, alpha=math.e).clamp_(min=0).sum(-1, keepdim=True)
    return _mean(torch.neg(log_ratio, out=scratch).clamp_(max=1).expm1_(), p) + excess


def statistics_(logits: torch.Tensor, ref_logits: torch.Tensor, target: torch.Tensor, excludes: bool) -> Tile:
    """
    Log-probability of the target, entropy, KL and the reference's log-probability of each row.

    Args:
        logits, ref_logits (`torch.Tensor` of shape `(n, V)`):
            Of policy and reference.
        target (`torch.Tensor` of shape `(n, 1)`):
            Token ids.
        excludes (`bool`):
            Whether logits may be -inf.
    """
    maximum, ref_maximum = logits.amax(-1, keepdim=True), ref_logits.amax(-1, keepdim=True)
    shifted, ref_shifted = logits.sub_(maximum), ref_logits.sub_(ref_maximum)
    p, q = shifted.exp(), ref_shifted.exp()
    total, ref_total = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    p, q, log_total, ref_log_total = p.div_(total), q.div_(ref_total), total.log(), ref_total.log()
    logp, ref_logp = shifted.gather(-1, target) - log_total, ref_shifted.gather(-1, target) - ref_log_total
    impossible = p == 0 if excludes else None
    if impossible is not None:
        shifted.masked_fill_(impossible, 0)
    entropy = log_total - _mean(shifted, p)
    log_ratio = shifted.sub_(ref_shifted).add_(ref_log_total - log_total)
    if impossible is not None:
        log_ratio.masked_fill_(impossible, 0)
    mean = _mean(log_ratio, p)
    # sum_v (q - p) is 0 but for rounding: adding it turns each term into p log(p/q) + q - p >= 0, second order in the
    # log-ratio, so that rounding in the normalisers does not drown (or turn negative) a small KL.
    kl = (mean + _mass_gap_(log_ratio, p, q, scratch=ref_shifted)).clamp_(min=0)
    rows = Rows(logp, entropy, kl, ref_logp, maximum, log_total, ref_maximum, ref_log_total, mean)
    return Tile(rows, p, log_ratio)


def gradient_(tile: Tile, target: torch.Tensor, g_logp: torch.Tensor, g_kl: torch.Tensor) -> torch.Tensor:
    """
    Gradient of `g_logp logp + g_kl kl` with respect to the logits, in the place of `log_ratio`; `g_*` are columns.

    `g_logp (1[v = target] - p_v) + g_kl p_v (log_ratio_v - mean_log_ratio)`. The mean is the one that was summed: p
    sums to 1 only to rounding, and a row's gradient must sum to 0.
    """
    weight = tile.log_ratio.sub_(tile.rows.mean_log_ratio).mul_(g_kl).sub_(g_logp)
    return weight.mul_(tile.p).scatter_add_(-1, target, g_logp)


def recomputed_gradient_(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    rows: Rows,
    target: torch.Tensor,
    g_logp: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_kl: torch.Tensor | None,
    excludes: bool,
) -> torch.Tensor:
    """
    Gradient of `g_logp logp + g_entropy entropy + g_kl kl` with respect to the logits, in their place.

    Adds `- g_entropy p_v (log p_v + entropy)` to that of [`gradient_`]. `g_kl` and `ref_logits` are both None or
    neither.
    """
    logp = logits.sub_(rows.maximum).sub_(rows.log_total)
    p = logp.exp()
    impossible = p == 0 if excludes else None
    if impossible is not None:
        logp.masked_fill_(impossible, 0)
    uncertain = None if g_entropy is None else (logp + rows.entropy).mul_(g_entropy)
    if ref_logits is None or g_kl is None:
        weight = logp.zero_()
    else:
        ref_logp = ref_logits.sub_(rows.ref_maximum).sub_(rows.ref_log_total)
        weight = logp.sub_(ref_logp)
        if impossible is not None:
            weight.masked_fill_(impossible, 0)
        weight.sub_(rows.mean_log_ratio).mul_(g_kl)
    if uncertain is not None:
        weight.sub_(uncertain)
    if g_logp is None:
        return weight.mul_(p)
    return weight.sub_(g_logp).mul_(p).scatter_add_(-1, target, g_logp)
