"""
Log-probability, entropy and exact KL of every token, from hidden states, without the `(N, V)` logits.

Both models' hidden states go through their heads a few tokens at a time. All figures of a token come from the same
pair of logit rows, which is then freed; the backward projects again.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


# Bytes that all the V-wide tiles alive at one moment may take together
LOGITS_MEMORY = 256 * 2**20
# Upper bound of the V-wide tiles of one chunk alive at its worst moment, a mask and the slope of `softcap` included
_LIVE_TILES = 6


class TokenStats(NamedTuple):
    """Figures of N tokens, each of shape `(N,)`, in nats."""

    logp: torch.Tensor  # log-probability of the target under the policy
    entropy: torch.Tensor  # of the policy
    kl: torch.Tensor  # of the policy against the reference
    ref_logp: torch.Tensor  # log-probability of the target under the reference, without gradient


class _Options(NamedTuple):
    """From the head's product `y` to the logits, `z = softcap * tanh(y * logit_scale / softcap) / temperature`."""

    temperature: float
    logit_scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    logits_memory: int

    def logits_(self, y: torch.Tensor) -> torch.Tensor:
        if self.softcap is None:
            return y.mul_(self.logit_scale / self.temperature)
        return y.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """`dz / dy` at the logits `z`."""
        factor = self.logit_scale / self.temperature
        if self.softcap is None:
            return factor
        return z.mul(self.temperature / self.softcap).square_().neg_().add_(1).mul_(factor)


class _Model(NamedTuple):
    """One model's hidden states and head, in the dtype of the matrix product."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: _Options

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matrix products: float32, or float64 for float64 hidden states."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def logits(self, rows: slice) -> torch.Tensor:
        # Widened after the product, as TRL does, so that the log-probabilities are TRL's
        y = self.hidden[rows] @ self.weight.t()
        if self.bias is not None:
            y += self.bias
        return self.options.logits_(y.to(self.dtype))

    def chunks(self) -> list[slice]:
        n_tokens, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        rows = max(1, self.options.logits_memory // (_LIVE_TILES * vocabulary * self.dtype.itemsize))
        # No token still makes one (empty) chunk, so that empty outputs come out of the same code
        return [slice(start, min(start + rows, n_tokens)) for start in range(0, max(n_tokens, 1), rows)]


def _models(tensors, options: _Options) -> tuple[_Model, _Model]:
    """Policy and reference from their hidden states, weights and biases; a shared head is cast once."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors

    def model(hidden, weight, bias) -> _Model:
        dtype = options.matmul_dtype
        return _Model(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), options)

    policy = model(hidden, weight, bias)
    if ref_weight is None:
        return policy, policy._replace(hidden=ref_hidden.to(options.matmul_dtype))
    return policy, model(ref_hidden, ref_weight, ref_bias)


def _matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _log_softmax_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, in the place of `logits`, and probabilities, for one exponential."""
    p = logits.sub_(logits.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    return logits.sub_(total.log()), p.div_(total)


def _log_ratio_(logp: torch.Tensor, ref_logp: torch.Tensor, impossible: torch.Tensor) -> torch.Tensor:
    """`log p - log q`, in the place of `ref_logp`; 0 where `p` is 0, which weighs nothing whatever `q` is."""
    return torch.sub(logp, ref_logp, out=ref_logp).masked_fill_(impossible, 0)


def _mass_gap_(log_ratio: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """
    `sum_v (q_v - p_v)` to the precision of the log-ratios rather than of the two sums; overwrites its arguments.

    `q - p = p * expm1(-log_ratio)` loses nothing where the two are close, and `max(q - e p, 0)` adds what the clamp
    cuts off where `q > e p` (there the exponential could overflow, or `p` be 0).
    """
    excess = q.sub_(p, alpha=math.e).clamp_(min=0).sum(-1)
    return log_ratio.clamp_(min=-1).neg_().expm1_().mul_(p).sum(-1) + excess


def _chunk_stats(policy: _Model, reference: _Model, targets: torch.Tensor, rows: slice):
    """The `TokenStats` of the tokens in `rows`, then their `sum_v p_v (log p_v - log q_v)` as summed."""
    target = targets[rows, None]
    logp, p = _log_softmax_(policy.logits(rows))
    ref_logp, q = _log_softmax_(reference.logits(rows))
    target_logp, target_ref_logp = logp.gather(1, target).squeeze(1), ref_logp.gather(1, target).squeeze(1)
    impossible = p == 0
    log_ratio = _log_ratio_(logp, ref_logp, impossible)
    entropy = -logp.masked_fill_(impossible, 0).mul_(p).sum(-1)
    mean_log_ratio = torch.mul(log_ratio, p, out=logp).sum(-1)
    # sum_v (q - p) is 0 but for rounding: adding it turns each term into p log(p/q) + q - p >= 0, second order in the
    # log-ratio, so that rounding in the normalisers does not drown (or turn negative) a small KL.
    kl = (mean_log_ratio + _mass_gap_(log_ratio, p, q)).clamp_(min=0)
    return target_logp, entropy, kl, target_ref_logp, mean_log_ratio


def _product_gradient(policy: _Model, reference: _Model, per_token, grads, rows: slice) -> torch.Tensor:
    """
    Gradient of the loss with respect to the head's product, for the tokens in `rows`, shape `(n, V)`.

    With the incoming `grads` g (None where the loss does not use the output) and the logits `z_j`: `dloss / dz_j =
    g_logp (1[j = target] - p_j) - g_entropy p_j (log p_j + entropy) + g_kl p_j (log p_j - log q_j - KL)`.
    """
    targets, entropy, mean_log_ratio = (x[rows, None] for x in per_token)
    g_logp, g_entropy, g_kl = (None if g is None else g[rows, None] for g in grads)
    logits = policy.logits(rows)
    slope = policy.options.slope(logits)
    logp, p = _log_softmax_(logits)
    impossible = p == 0
    if g_kl is None:  # the reference need not be projected again
        grad = torch.zeros_like(p)
    else:
        ref_logp = _log_softmax_(reference.logits(rows))[0]
        # The mean as it was summed: p sums to 1 only to rounding, and the row's gradient must sum to 0
        grad = _log_ratio_(logp, ref_logp, impossible).sub_(mean_log_ratio).mul_(g_kl)
    if g_entropy is not None:
        grad.sub_(logp.masked_fill_(impossible, 0).add_(entropy).mul_(g_entropy))
    if g_logp is not None:
        grad.sub_(g_logp)
    grad.mul_(p)
    if g_logp is not None:
        grad.scatter_add_(1, targets, g_logp)
    return grad.mul_(slope)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` without rounding the product to the dtype of `a`: that rounding, per chunk, drifts training."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _add_gradients_(sums: list[torch.Tensor | None], policy: _Model, product_gradient: torch.Tensor, rows: slice):
    hidden, weight, bias = sums
    if bias is not None:
        bias += product_gradient.sum(0)
    product_gradient = product_gradient.to(policy.hidden.dtype)
    if hidden is not None:
        _add_product_(hidden[rows], product_gradient, policy.weight)
    if weight is not None:
        _add_product_(weight, product_gradient.t(), policy.hidden[rows])


class _FusedTokenStats(torch.autograd.Function):
    """Keeps the inputs and two numbers per token; the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, options):
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing in the backward
        models = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        policy, reference = _models(models, options)
        parts = [_chunk_stats(policy, reference, targets, rows) for rows in policy.chunks()]
        logp, entropy, kl, ref_logp, mean_log_ratio = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(*models, targets, entropy, mean_log_ratio)
        ctx.options = options
        ctx.mark_non_differentiable(ref_logp)
        return logp, entropy, kl, ref_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        models, per_token = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        with torch.autocast(models[0].device.type, enabled=False):  # the products keep the forward's dtype
            policy, reference = _models(models, ctx.options)
            sums = [
                torch.zeros_like(x, dtype=policy.dtype) if needed else None
                for x, needed in zip(models[:3], ctx.needs_input_grad[:3], strict=True)
            ]
            for rows in policy.chunks():
                # Not bound to a name, which would keep the tile alive during the next chunk
                _add_gradients_(sums, policy, _product_gradient(policy, reference, per_token, grads[:3], rows), rows)
        results = (None if x is None else x.to(p.dtype) for x, p in zip(sums, models[:3], strict=True))
        return *results, *(None,) * 5


def _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias) -> None:
    for name, matrix in {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden}.items():
        if matrix.dim() != 2:
            raise ValueError(f"`{name}` must have two dimensions, got shape {tuple(matrix.shape)}")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("`ref_bias` needs `ref_weight`: without one the reference shares the policy's head")
    (n_tokens, width), vocabulary, ref_width = hidden.shape, weight.shape[0], ref_hidden.shape[1]
    for name, tensor, shape in (
        ("weight", weight, (vocabulary, width)),
        ("targets", targets, (n_tokens,)),
        ("ref_hidden", ref_hidden, (n_tokens, width if ref_weight is None else ref_width)),
        ("ref_weight", ref_weight, (vocabulary, ref_width)),
        ("bias", bias, (vocabulary,)),
        ("ref_bias", ref_bias, (vocabulary,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")


def _check_options(temperature: float, softcap: float | None, logits_memory: int) -> None:
    for name, value in ("temperature", temperature), ("softcap", softcap), ("logits_memory", logits_memory):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}")


def fused_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_memory: int = LOGITS_MEMORY,
) -> TokenStats:
    """
    Log-probability of the target, entropy, exact KL to the reference and the reference's log-probability, per token.

    With `z_iv = softcap * tanh((h_i . w_v + b_v) * logit_scale / softcap) / temperature` (no cap when `softcap` is
    None), `p_i = softmax(z_i)` and `q_i` the same from the reference's hidden states and head:

    `logp_i = log p_i[targets_i]`, `entropy_i = - sum_v p_iv log p_iv`, `ref_logp_i = log q_i[targets_i]`,
    `kl_i = KL(p_i || q_i) = sum_v p_iv (log p_iv - log q_iv)`, with v over the whole vocabulary.

    Natural logarithms; policy against reference, so `kl` is infinite where the reference excludes what the policy
    allows; `0 log 0 = 0`. The matrix products run in the dtype of `hidden`, or autocast's; all else, and the sums of
    the gradients over chunks, in float32 (float64 for float64 `hidden`). Gradients go from `logp`, `entropy` and `kl`
    to `hidden`, `weight` and `bias`, never to the reference, also where it shares the policy's head. Equal policies
    have a KL of exactly 0, and no KL is negative. Without gradients nothing is kept for a backward.

    Reduces to `kl.exact_kl` of the dense logits. The logits' order of operations is that of TRL's
    `kernels/chunked_logprob.py`.

    Args:
        hidden: policy's last hidden states of N tokens, `(N, H)`.
        weight: policy's head, `(V, H)`.
        targets: sampled token ids, `(N,)`, int64.
        ref_hidden: reference's last hidden states, `(N, H')`.
        ref_weight: reference's head, `(V, H')`. None: the policy's `weight` and `bias`, taken as constants.
        bias: policy's head bias, `(V,)`.
        ref_bias: bias of `ref_weight`, `(V,)`.
        temperature: sampling temperature, positive.
        logit_scale: factor on the product, before the cap.
        softcap: bound of the logits' absolute value before the temperature; None for none.
        logits_memory: bytes that the V-wide tiles alive at one moment may take together; one token's tiles are the
            least. Affects speed and memory, and results only through rounding.

    Returns:
        `TokenStats`, four tensors of shape `(N,)`, in float32 (float64 for float64 `hidden`).

    Raises:
        ValueError: if a shape does not fit, or a number that must be positive is not.
    """
    _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias)
    _check_options(temperature, softcap, logits_memory)
    options = _Options(temperature, logit_scale, softcap, _matmul_dtype(hidden), logits_memory)
    reference = (None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_FusedTokenStats.apply(hidden, weight, bias, *reference, targets, options))
