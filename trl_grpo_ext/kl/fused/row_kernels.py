"""
Two Triton kernels for the logit rows on a GPU: the statistics of each token, and the gradient in the products' place.

Both read the products as the matrix products wrote them. Bias, softcap, scale and temperature are applied in
registers, so no tensor of logits exists. The first kernel reads both rows of a token once, the second once more.

The first kernel sums over the vocabulary block by block, with the maxima so far, as online softmax does. The
divergence is a sum of terms of two distributions a and b: the policy's and the reference's for the reverse KL, the
other way round for the forward KL.

    D = sum_v t(a_v, b_v)
    t(a, b) = a log(a / b) - a + b

Every term is of second order in the log-ratio, and not negative. So small values do not drown in rounding, and equal
models are exactly 0 apart ([`~trl_grpo_ext.kl.divergences`] says more). The terms need the totals of both
distributions, which are known only in the end. The chain rule of relative entropy helps: all tokens before the block
count as one token. Its probabilities under a and b are alpha and beta, and D' is the divergence so far:

    D = alpha D' + t(alpha, beta) + sum_{v in block} t(a_v, b_v)
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .rows import SWITCH, LossGradients, Rows, Statistics


# Of a row's products that one program has in registers at a time: for each thread two loads of 128 bits
_BLOCK_BYTES = 8192
_WARPS = 8

# Below every logit, and finite: the difference of two is not NaN
_LOWEST = tl.constexpr(-1.7e38)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of numbers


@triton.jit
def _tanh(x):
    square = x * x
    series = tl.fma(square, tl.fma(square, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0)
    series = x * tl.fma(square, tl.fma(square, series, -1.0 / 3.0), 1.0)
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    # 1 - decay would lose the digits of a small x
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -size, size))


@triton.jit
def _log_quotient(a, b):
    """`log(a / b)`, to full precision also where the two are nearly equal."""
    s = (a - b) / (a + b)
    square = s * s
    series = tl.fma(square, tl.fma(square, tl.fma(square, 1.0 / 7.0, 1.0 / 5.0), 1.0 / 3.0), 1.0)
    return tl.where(tl.abs(s) < 0.1, 2.0 * s * series, tl.log(a / b))


@triton.jit
def _divergence_term(a, b, log_ratio):
    """`a x - a + b` with `x = log(a / b)`; `0 log 0 = 0`."""
    # Any finite x that is not small will do where a is 0
    x = tl.where(a == 0, 1.0, log_ratio)
    # exp(-x) - 1 + x = x^2 / 2 - x^3 / 6 + ...
    series = tl.fma(x, tl.fma(x, 1.0 / 40320.0, -1.0 / 5040.0), 1.0 / 720.0)
    series = tl.fma(x, tl.fma(x, tl.fma(x, tl.fma(x, series, -1.0 / 120.0), 1.0 / 24.0), -1.0 / 6.0), 0.5)
    return tl.where(tl.abs(x) < 0.5, a * (x * x * series), tl.fma(a, x - 1.0, b))


@triton.jit
def _load_logits(product_row, bias, offsets, V, stride, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of a block, -inf beyond the vocabulary, and the slope of the cap."""
    # Up to the stride, which is a multiple of 16: a mask that ends anywhere else forbids loads of 128 bits
    product = tl.load(product_row + offsets, mask=offsets < stride, other=0.0)
    if HAS_BIAS:
        addend = tl.load(bias + offsets, mask=offsets < V, other=0.0)
        # Rounded before it is widened, as TRL does
        product = (product.to(tl.float32) + addend.to(tl.float32)).to(product.dtype)
    logits = product.to(tl.float32) * scale
    slope = 1.0
    if HAS_CAP:
        capped = _tanh(logits)
        slope = 1.0 - capped * capped
        logits = capped * cap
    return tl.where(offsets < V, logits, float("-inf")), slope


@triton.jit
def _load_target(target, V):
    # An id that is no token's reads nothing, and its log-prob is -inf
    token = tl.load(target)
    return tl.where(token < 0, V, token)


@triton.jit
def _add_terms(weighted_sum, total, shift, rescale, p, values):
    """`sum_v p_v values_v` with one more block, where all values before become larger by `shift`; `0 log 0 = 0`."""
    before = tl.where(rescale == 0, 0.0, (weighted_sum + total * shift) * rescale)
    return before + tl.sum(tl.where(p == 0, 0.0, p * values), axis=0)


@triton.jit
def _add_block(
    divergence, z, ref_z, total, ref_total, new_total, new_ref_total, shift, ref_shift, IS_FORWARD: tl.constexpr
):
    """
    The divergence times the total of a, with one more block.

    `z` and `ref_z` are the block's logits minus the maxima so far. By `shift` and `ref_shift` the maxima before the
    block differ from these; they are not positive. `total` and `ref_total` are relative to the maxima before.
    """
    p = tl.exp(z)
    q = tl.exp(ref_z)
    rescale = tl.exp(shift)
    ref_rescale = tl.exp(ref_shift)
    before = total * rescale
    ref_before = ref_total * ref_rescale
    # Where all tokens so far are excluded, there is nothing to scale
    safe_total = tl.where(new_total == 0, 1.0, new_total)
    safe_ref_total = tl.where(new_ref_total == 0, 1.0, new_ref_total)
    log_quotient = _log_quotient(safe_ref_total, safe_total)
    log_ratio = (z - ref_z) + log_quotient
    before_log_ratio = ((shift - ref_shift) + _log_quotient(total, ref_total)) + log_quotient
    # The other distribution at the scale of a
    if IS_FORWARD:
        scale = safe_ref_total / safe_total
        terms = _divergence_term(q, p * scale, -log_ratio)
        before_term = _divergence_term(ref_before, before * scale, -before_log_ratio)
        rescale = ref_rescale
    else:
        scale = safe_total / safe_ref_total
        terms = _divergence_term(p, q * scale, log_ratio)
        before_term = _divergence_term(before, ref_before * scale, before_log_ratio)
    # An infinite divergence of tokens whose probability has become 0 counts for nothing
    return tl.where(rescale == 0, 0.0, divergence * rescale) + before_term + tl.sum(terms, axis=0)


@triton.jit
def _kl_and_mean_score(divergence, difference, total, ref_total, IS_FORWARD: tl.constexpr):
    # The mean of the scores as `_weighted_score` makes them, from rounded log-totals: a gradient's row sums to 0
    log_quotient = tl.log(ref_total) - tl.log(total)
    if IS_FORWARD:
        kl = divergence / ref_total
        mean_score = log_quotient - _log_quotient(ref_total, total)
    else:
        kl = divergence / total
        mean_score = difference / total + log_quotient
    return kl, mean_score


@triton.jit
def _weighted_score(p, z, ref_z, log_total, ref_log_total, IS_FORWARD: tl.constexpr):
    """`p_v s_v` with the divergence's score s."""
    if IS_FORWARD:
        weighted = p - tl.exp(ref_z - ref_log_total)
    else:
        weighted = tl.where(p == 0, 0.0, p * ((z - ref_z) + (ref_log_total - log_total)))
    return weighted


@triton.jit
def _store(results, first, second, third, fourth):
    tl.store(results, first)
    tl.store(results + 1, second)
    tl.store(results + 2, third)
    tl.store(results + 3, fourth)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def statistics_kernel(
    product,
    ref_product,
    bias,
    ref_bias,
    targets,
    statistics,
    stride,
    V,
    scale,
    cap,
    IS_FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each token: a sweep over both rows, to the token's statistics."""
    row = tl.program_id(0).to(tl.int64)
    product_row = product + row * stride
    ref_product_row = ref_product + row * stride
    maximum = _LOWEST
    ref_maximum = _LOWEST
    total = 0.0
    ref_total = 0.0
    # Times a total: the mean of z - maximum, that of its difference to the reference's, and the divergence
    weighted = 0.0
    difference = 0.0
    divergence = 0.0
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z, _ = _load_logits(product_row, bias, offsets, V, stride, scale, cap, HAS_BIAS, HAS_CAP)
        ref_z, _ = _load_logits(ref_product_row, ref_bias, offsets, V, stride, scale, cap, HAS_REF_BIAS, HAS_CAP)
        new_maximum = tl.maximum(maximum, tl.max(z, axis=0))
        new_ref_maximum = tl.maximum(ref_maximum, tl.max(ref_z, axis=0))
        shift = maximum - new_maximum
        ref_shift = ref_maximum - new_ref_maximum
        rescale = tl.exp(shift)
        z -= new_maximum
        ref_z -= new_ref_maximum
        p = tl.exp(z)
        new_total = total * rescale + tl.sum(p, axis=0)
        new_ref_total = ref_total * tl.exp(ref_shift) + tl.sum(tl.exp(ref_z), axis=0)
        weighted = _add_terms(weighted, total, shift, rescale, p, z)
        if not IS_FORWARD:
            difference = _add_terms(difference, total, shift - ref_shift, rescale, p, z - ref_z)
        divergence = _add_block(
            divergence, z, ref_z, total, ref_total, new_total, new_ref_total, shift, ref_shift, IS_FORWARD
        )
        maximum = new_maximum
        ref_maximum = new_ref_maximum
        total = new_total
        ref_total = new_ref_total

    log_total = tl.log(total)
    ref_log_total = tl.log(ref_total)
    kl, mean_score = _kl_and_mean_score(divergence, difference, total, ref_total, IS_FORWARD)
    target = _load_target(targets + row, V)
    z, _ = _load_logits(product_row, bias, target, V, stride, scale, cap, HAS_BIAS, HAS_CAP)
    ref_z, _ = _load_logits(ref_product_row, ref_bias, target, V, stride, scale, cap, HAS_REF_BIAS, HAS_CAP)
    results = statistics + row * 9
    ref_logp = (ref_z - ref_maximum) - ref_log_total
    _store(results, (z - maximum) - log_total, log_total - weighted / total, kl, ref_logp)
    _store(results + 4, maximum, log_total, ref_maximum, ref_log_total)
    tl.store(results + 8, mean_score)


@triton.jit
def gradient_kernel(
    product,
    ref_product,
    bias,
    ref_bias,
    targets,
    statistics,
    g_logp,
    g_entropy,
    g_kl,
    stride,
    V,
    scale,
    cap,
    slope_scale,
    IS_FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_KL: tl.constexpr,
    IS_SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    One program for each block of each token: the gradient with respect to the product, in the policy's product.

    Where `IS_SEPARATE`, the derivative of the divergence in the policy's product, that of the log-prob in the
    reference's.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product_row = product + row * stride
    ref_product_row = ref_product + row * stride
    results = statistics + row * 9
    maximum = tl.load(results + 4)
    log_total = tl.load(results + 5)

    z, slope = _load_logits(product_row, bias, offsets, V, stride, scale, cap, HAS_BIAS, HAS_CAP)
    z -= maximum
    logp = z - log_total
    p = tl.exp(logp)
    slope *= slope_scale
    is_target = tl.where(offsets == tl.load(targets + row), 1.0, 0.0)
    inside = offsets < stride

    # p_v (s_v - mean_score)
    d_kl = tl.zeros_like(p)
    if HAS_KL:
        ref_log_total = tl.load(results + 7)
        ref_z, _ = _load_logits(ref_product_row, ref_bias, offsets, V, stride, scale, cap, HAS_REF_BIAS, HAS_CAP)
        ref_z -= tl.load(results + 6)
        d_kl = _weighted_score(p, z, ref_z, log_total, ref_log_total, IS_FORWARD) - p * tl.load(results + 8)

    if IS_SEPARATE:
        tl.store(product_row + offsets, (d_kl * slope).to(product.dtype.element_ty), mask=inside)
        d_logp = (is_target - p) * slope
        tl.store(ref_product_row + offsets, d_logp.to(product.dtype.element_ty), mask=inside)
    else:
        gradient = tl.zeros_like(p)
        if HAS_KL:
            gradient += tl.load(g_kl + row) * d_kl
        if HAS_LOGP:
            gradient += tl.load(g_logp + row) * (is_target - p)
        if HAS_ENTROPY:
            score = tl.where(p == 0, 0.0, logp + tl.load(results + 1))
            gradient -= tl.load(g_entropy + row) * p * score
        tl.store(product_row + offsets, (gradient * slope).to(product.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def launch_options(dtype: torch.dtype) -> dict[str, int | bool]:
    """
    Block and warps for products of this dtype.

    Without fused multiply-adds but those that are written, since a difference of two equal expressions has to be 0.
    """
    return {"BLOCK": _BLOCK_BYTES // dtype.itemsize, "num_warps": _WARPS, "enable_fp_fusion": False}


def _launch(kernel: Any, blocks: int, product: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel's programs, so many for each row of the product, on the product's device."""
    if len(product) == 0:
        return
    with torch.cuda.device_of(product):
        try:
            kernel[(len(product), blocks)](product, *arguments, **options, **launch_options(product.dtype))
        except Exception as error:
            raise RuntimeError(
                f"A Triton kernel of the exact KL cannot be compiled or started on {product.device} "
                f"({type(error).__name__}: {error}). Set the environment variable {SWITCH}=0 to use PyTorch's "
                "operations instead, which are slower."
            ) from error


class KernelOperations:
    """
    [`~trl_grpo_ext.kl.fused.rows.RowOperations`] by the two kernels, for a whole chunk at once.

    Args:
        is_forward (`bool`):
            Whether the divergence is the forward KL, or else the reverse KL.
    """

    def __init__(self, *, is_forward: bool):
        self.is_forward = is_forward

    def block_bytes(self, device: torch.device) -> None:
        return None

    def first_pass(self, rows: Rows, statistics_M9: torch.Tensor) -> "_FirstPass":
        _launch(statistics_kernel, 1, *self._inputs(rows, statistics_M9), **self._options(rows))
        return _FirstPass(self, rows, statistics_M9)

    def second_pass(self, rows: Rows, statistics: Statistics, loss: LossGradients) -> None:
        self.write_gradient(rows, torch.cat(statistics, -1), loss)

    def write_gradient(
        self, rows: Rows, statistics_M9: torch.Tensor, loss: LossGradients, *, is_separate: bool = False
    ) -> None:
        """Run the second kernel; `is_separate` as there."""
        head = rows.policy.options
        blocks = triton.cdiv(rows.product.stride(0), launch_options(rows.product.dtype)["BLOCK"])
        *tensors, stride, vocabulary, scale, cap = self._inputs(rows, statistics_M9)
        # A column that is not used has to be something all the same
        columns = (statistics_M9 if g is None else g.contiguous() for g in loss)
        _launch(
            gradient_kernel,
            blocks,
            *tensors,
            *columns,
            stride,
            vocabulary,
            scale,
            cap,
            head.logit_scale / head.temperature,
            **self._options(rows),
            HAS_LOGP=loss.logp is not None,
            HAS_ENTROPY=loss.entropy is not None,
            HAS_KL=is_separate or loss.kl is not None,
            IS_SEPARATE=is_separate,
        )

    def _inputs(self, rows: Rows, statistics_M9: torch.Tensor) -> tuple[Any, ...]:
        """What both kernels begin and end with."""
        policy, reference, product, ref_product, target = rows
        head = policy.options
        inner = head.temperature if head.softcap is None else head.softcap
        return (
            product,
            product if ref_product is None else ref_product,
            product if policy.bias_V is None else policy.bias_V.contiguous(),
            product if reference.bias_V is None else reference.bias_V.contiguous(),
            target.contiguous(),
            statistics_M9,
            product.stride(0),
            product.shape[1],
            head.logit_scale / inner,
            1.0 if head.softcap is None else head.softcap / head.temperature,
        )

    def _options(self, rows: Rows) -> dict[str, bool]:
        return {
            "IS_FORWARD": self.is_forward,
            "HAS_BIAS": rows.policy.bias_V is not None,
            "HAS_REF_BIAS": rows.reference.bias_V is not None,
            "HAS_CAP": rows.policy.options.softcap is not None,
        }


class _FirstPass:
    def __init__(self, operations: KernelOperations, rows: Rows, statistics_M9: torch.Tensor):
        self.statistics = Statistics.columns(statistics_M9)
        self._operations = operations
        self._rows = rows
        self._statistics_M9 = statistics_M9

    def write_gradient(self, g_logp: torch.Tensor, g_kl: torch.Tensor) -> None:
        self._operations.write_gradient(self._rows, self._statistics_M9, LossGradients(g_logp, None, g_kl))

    def write_derivatives(self) -> None:
        nothing = LossGradients(None, None, None)
        self._operations.write_gradient(self._rows, self._statistics_M9, nothing, is_separate=True)
