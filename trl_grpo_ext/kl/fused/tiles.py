"""
The elementwise work on the logits of a few tokens: their statistics, and the gradient with respect to the logits.

A tile is a tensor of shape `(M, V)`, a row for each of a few tokens, and a column is one of shape `(M, 1)`. A small
tile stays in the processor's cache from one operation to the next, so everything works in place. A trailing underscore
says that a function overwrites its arguments.
"""

import torch

from ..divergences import Distributions, Divergence
from .rows import LossGradients, Rows, Statistics


# Of one tile of a block: what the cache holds on a CPU, and enough for a kernel on a GPU
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_ELSEWHERE = 32 * 2**20


def statistics_(
    logits: torch.Tensor, ref_logits: torch.Tensor, target: torch.Tensor, divergence: Divergence, may_exclude: bool
) -> tuple[Statistics, Distributions]:
    """
    Statistics of a few tokens, and what [`gradient_`] needs of the tiles.

    Args:
        logits (`torch.Tensor` of shape `(M, V)`):
            Of the policy.
        ref_logits (`torch.Tensor` of shape `(M, V)`):
            Of the reference.
        target (`torch.Tensor` of shape `(M, 1)`):
            Token ids.
        divergence ([`~trl_grpo_ext.kl.divergences.Divergence`]):
            Which one the statistic `kl` is.
        may_exclude (`bool`):
            Whether logits may be -inf. If not, a few operations are spared.
    """
    maximum = logits.amax(-1, keepdim=True)
    ref_maximum = ref_logits.amax(-1, keepdim=True)
    shifted = logits.sub_(maximum)
    ref_shifted = ref_logits.sub_(ref_maximum)
    p = shifted.exp()
    q = ref_shifted.exp()
    total = p.sum(-1, keepdim=True)
    ref_total = q.sum(-1, keepdim=True)
    p.div_(total)
    q.div_(ref_total)
    log_total = total.log()
    ref_log_total = ref_total.log()
    logp = shifted.gather(-1, target) - log_total
    ref_logp = ref_shifted.gather(-1, target) - ref_log_total
    excluded = p == 0 if may_exclude else None
    entropy = log_total - _mean(shifted if excluded is None else shifted.masked_fill(excluded, 0), p)
    # One subtraction of the tiles: where the models are equal, the result is exactly 0
    log_ratio = shifted.sub_(ref_shifted).add_(ref_log_total - log_total)
    distributions = _weighed_(Distributions(p, q, log_ratio), divergence, excluded)
    mean_score, ref_mean_score = divergence.means_(distributions, ref_shifted)
    kl = (mean_score + ref_mean_score).clamp_(min=0)
    results = (logp, entropy, kl, ref_logp)
    return Statistics(*results, maximum, log_total, ref_maximum, ref_log_total, mean_score), distributions


def _mean(values: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """`sum_v p_v values_v`, a column."""
    return torch.linalg.vecdot(values, p).unsqueeze(-1)


def _weighed_(distributions: Distributions, divergence: Divergence, excluded: torch.Tensor | None) -> Distributions:
    """
    Set the log-ratio to 0 where its weight, which [`Divergence.weight`] names, is 0.

    Args:
        distributions ([`~trl_grpo_ext.kl.divergences.Distributions`]):
            Its log-ratio is overwritten.
        divergence ([`~trl_grpo_ext.kl.divergences.Divergence`]):
            Which one.
        excluded (`torch.Tensor` or `None`):
            Where the policy's p is 0, a tile; `None` where all logits are finite.
    """
    if excluded is not None:
        weightless = excluded if divergence.weight == "policy" else distributions.q == 0
        distributions.log_ratio.masked_fill_(weightless, 0)
    return distributions


def gradient_(
    distributions: Distributions,
    divergence: Divergence,
    mean_score: torch.Tensor,
    target: torch.Tensor,
    g_logp: torch.Tensor,
    g_kl: torch.Tensor,
) -> torch.Tensor:
    """
    Gradient of `g_logp logp + g_kl kl` with respect to the logits, a tile; `g_logp` and `g_kl` are columns.

        g_logp (1[v = target] - p_v) + g_kl p_v (s_v - mean_score)

    `mean_score` is a column of [`Statistics`], the sum over the same rounded p: a row of the gradient must sum to 0.
    """
    gradient = divergence.weighted_score_(distributions).mul_(g_kl)
    gradient.addcmul_(distributions.p, g_logp + g_kl * mean_score, value=-1)
    return gradient.scatter_add_(-1, target, g_logp)


def derivatives_(
    distributions: Distributions, divergence: Divergence, mean_score: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Derivatives of `logp` and of `kl` with respect to the logits, two tiles.

        d logp / d z_v = 1[v = target] - p_v
        d kl / d z_v   = p_v (s_v - mean_score)
    """
    d_kl = divergence.weighted_score_(distributions).addcmul_(distributions.p, mean_score, value=-1)
    d_logp = distributions.p.neg_().scatter_add_(-1, target, torch.ones_like(mean_score))
    return d_logp, d_kl


def recomputed_gradient_(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    statistics: Statistics,
    target: torch.Tensor,
    loss: LossGradients,
    divergence: Divergence,
    may_exclude: bool,
) -> torch.Tensor:
    """
    Gradient of the loss with respect to the logits, a tile, from the logits and the statistics of the first pass.

    The sum of [`gradient_`] and of the entropy's part:

        - g_entropy p_v (log p_v + entropy)

    `ref_logits` may be `None` where the loss does not use the divergence.
    """
    logp = logits.sub_(statistics.maximum).sub_(statistics.log_total)
    p = logp.exp()
    excluded = p == 0 if may_exclude else None
    # What is multiplied by -p: a column without the entropy, a tile with it
    factor = torch.zeros_like(statistics.logp) if loss.logp is None else loss.logp
    if loss.kl is not None:
        factor = factor + loss.kl * statistics.mean_score
    if loss.entropy is not None:
        entropy_score = logp + statistics.entropy
        if excluded is not None:
            entropy_score.masked_fill_(excluded, 0)
        factor = entropy_score.mul_(loss.entropy).add_(factor)
    if ref_logits is None or loss.kl is None:
        gradient = torch.mul(p, factor, out=logp).neg_()
    else:
        ref_logp = ref_logits.sub_(statistics.ref_maximum).sub_(statistics.ref_log_total)
        log_ratio = logp.sub_(ref_logp)
        distributions = _weighed_(Distributions(p, ref_logp.exp_(), log_ratio), divergence, excluded)
        gradient = divergence.weighted_score_(distributions).mul_(loss.kl).addcmul_(p, factor, value=-1)
    return gradient if loss.logp is None else gradient.scatter_add_(-1, target, loss.logp)


def _times_slope_(gradient: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """From the gradient with respect to the logits to that of the product, without a pass where they are the same."""
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


class TileOperations:
    """
    [`~trl_grpo_ext.kl.fused.rows.RowOperations`] by PyTorch's operations on the tiles of one block after the other.

    Args:
        divergence ([`~trl_grpo_ext.kl.divergences.Divergence`]):
            Which one.
    """

    def __init__(self, divergence: Divergence):
        self._divergence = divergence

    def block_bytes(self, device: torch.device) -> int:
        return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)

    def first_pass(self, rows: Rows, statistics_M9: torch.Tensor) -> "_FirstPass":
        assert rows.ref_product is not None
        logits = rows.policy.logits_(rows.product)
        ref_logits = rows.reference.logits_(rows.ref_product)
        slope = rows.policy.options.slope(logits)
        may_exclude = rows.policy.may_exclude or rows.reference.may_exclude
        statistics, distributions = statistics_(logits, ref_logits, rows.target, self._divergence, may_exclude)
        torch.cat(statistics, -1, out=statistics_M9)
        return _FirstPass(rows, statistics, distributions, self._divergence, slope)

    def second_pass(self, rows: Rows, statistics: Statistics, loss: LossGradients) -> None:
        logits = rows.policy.logits_(rows.product)
        ref_logits = None if rows.ref_product is None else rows.reference.logits_(rows.ref_product)
        slope = rows.policy.options.slope(logits)
        may_exclude = rows.policy.may_exclude or rows.reference.may_exclude
        gradient = recomputed_gradient_(
            logits, ref_logits, statistics, rows.target, loss, self._divergence, may_exclude
        )
        # Copies nothing where the gradient was made in that place
        rows.product.copy_(_times_slope_(gradient, slope))


class _FirstPass:
    def __init__(
        self,
        rows: Rows,
        statistics: Statistics,
        distributions: Distributions,
        divergence: Divergence,
        slope: torch.Tensor | float,
    ):
        self.statistics = statistics
        self._rows = rows
        self._distributions = distributions
        self._divergence = divergence
        self._slope = slope

    def write_gradient(self, g_logp: torch.Tensor, g_kl: torch.Tensor) -> None:
        gradient = gradient_(
            self._distributions, self._divergence, self.statistics.mean_score, self._rows.target, g_logp, g_kl
        )
        self._rows.product.copy_(_times_slope_(gradient, self._slope))

    def write_derivatives(self) -> None:
        assert self._rows.ref_product is not None
        d_logp, d_kl = derivatives_(
            self._distributions, self._divergence, self.statistics.mean_score, self._rows.target
        )
        self._rows.product.copy_(_times_slope_(d_kl, self._slope))
        self._rows.ref_product.copy_(_times_slope_(d_logp, self._slope))
