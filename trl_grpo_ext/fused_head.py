"""
Log-probability, entropy and exact KL of every token, from hidden states, without the `(N, V)` logits.

Both models' hidden states go through their heads a chunk of tokens at a time, and all figures of a token come from one
pair of logit rows. The gradient is made from them too, before the loss is known: its gradients with respect to the
figures are one factor per token each, so that what they multiply can be kept. Matrix products of N x H x V operations:

| head | gradients of the loss | forward | backward | kept |
|---|---|---|---|---|
| frozen | anything | 4 | 0 | two `(N, H)` |
| trained | anything | 2 | 4 | nothing |
| frozen | as expected | 3 | 0 | `(N, H)` |
| trained | as expected | 4 | 0 | `(N, H)` and the head's gradient |

Tokens whose gradients are not as expected, or whose entropy has one, go through the head(s) a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from .logit_tiles import Rows, Tile, gradient_, recomputed_gradient_, statistics_


# Bytes that all the V-wide tiles alive at one moment may take together
LOGITS_MEMORY = 256 * 2**20
# Elementwise work goes over blocks of this many bytes: what the cache holds on a CPU, and enough for a kernel on a GPU
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_ELSEWHERE = 32 * 2**20
# Upper bound of the block-sized tiles alive at the worst moment
_BLOCK_TILES = 7
# Chunk-sized tiles: the two models' logits, which make place for what their gradient is made from
_CHUNK_TILES = 2
# Relative difference between two ways to compute the same gradient in float32
_SAME = 64 * torch.finfo(torch.float32).eps

# From log-probabilities `(n,)` and the slice of the N tokens that they are of to the gradients of the loss with
# respect to those tokens' `logp` and `kl`, up to one factor for all tokens
ExpectedGradients = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


# From weight and bias of a head to the context in which they are whole
Gathered = Callable[..., AbstractContextManager[Any]]


def _whole(*head: torch.Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext()


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
    expected: ExpectedGradients | None
    gathered: Gathered

    def logits_(self, y: torch.Tensor) -> torch.Tensor:
        if self.softcap is not None:
            return y.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.logit_scale / self.temperature
        return y if factor == 1 else y.mul_(factor)

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

    @property
    def excludes(self) -> bool:
        """Whether a logit may be -inf: a bias can say so, and float16 overflows."""
        return self.bias is not None or self.hidden.dtype == torch.float16

    def product(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """The head's product of some rows, in the first rows of `out`: fresh memory costs more than the product's."""
        return torch.mm(self.hidden[rows], self.weight.t(), out=out[: rows.stop - rows.start])

    def logits_(self, product: torch.Tensor) -> torch.Tensor:
        # Widened after product and bias, as TRL does, so that the log-probabilities are TRL's
        if self.bias is not None:
            product += self.bias
        return self.options.logits_(product.to(self.dtype))

    @property
    def _sizes(self) -> tuple[int, int]:
        """Rows of a chunk and of a block."""
        vocabulary, memory = self.weight.shape[0], self.options.logits_memory
        row = vocabulary * self.dtype.itemsize
        cache = _BLOCK_BYTES.get(self.hidden.device.type, _BLOCK_BYTES_ELSEWHERE)
        block = max(1, min(cache, memory // (_BLOCK_TILES + _CHUNK_TILES)) // row)
        chunk = (memory - _BLOCK_TILES * block * row) // (_CHUNK_TILES * vocabulary * self.hidden.itemsize)
        return max(1, chunk), block

    def buffer(self) -> torch.Tensor:
        """Place for the products of a chunk."""
        return self.hidden.new_empty(min(self._sizes[0], self.hidden.shape[0]), self.weight.shape[0])

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """The tokens in chunks, for the matrix products, and each chunk in blocks, for the elementwise work."""
        n_tokens, (chunk, block) = self.hidden.shape[0], self._sizes
        # No token still makes one (empty) chunk, so that empty outputs come out of the same code
        for start in range(0, max(n_tokens, 1), chunk):
            stop = min(start + chunk, n_tokens)
            yield slice(start, stop), [slice(s, min(s + block, stop)) for s in range(start, max(stop, 1), block)]


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


def _sloped_(gradient: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """From the logits' gradient to that of the product, without a pass where they are the same."""
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` without rounding the product to the dtype of `a`: that rounding, per chunk, drifts training."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _zeros(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(x, dtype=dtype)


class _Gradients(NamedTuple):
    """What goes back to the policy's hidden states, head and bias, summed in place over chunks, as far as wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def zeros(cls, policy: _Model, wanted: Sequence[bool]) -> "_Gradients":
        tensors = zip((policy.hidden, policy.weight, policy.bias), wanted, strict=True)
        return cls(*(_zeros(x, policy.dtype) if want and x is not None else None for x, want in tensors))

    def add_block(self, product: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the gradient with respect to some rows of the product, and leave it in their place for `add_chunk`."""
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        # Copies nothing where the gradient was made in that place
        product.copy_(gradient)

    def add_chunk(self, policy: _Model, rows: slice, product: torch.Tensor) -> None:
        if self.hidden is not None:
            _add_product_(self.hidden[rows], product, policy.weight)
        if self.weight is not None:
            _add_product_(self.weight, product.t(), policy.hidden[rows])


class _LossGradients(NamedTuple):
    """Gradients of the loss with respect to the outputs, `(N, 1)`; None for an output that it does not use."""

    logp: torch.Tensor | None
    entropy: torch.Tensor | None
    kl: torch.Tensor | None

    def take(self, rows: torch.Tensor | slice) -> "_LossGradients":
        return _LossGradients(*(None if g is None else g[rows] for g in self))


class _Block(NamedTuple):
    """Some rows after the forward's elementwise work."""

    rows: slice
    tile: Tile
    target: torch.Tensor  # column
    slope: torch.Tensor | float
    product: torch.Tensor  # these two are free to be overwritten
    ref_product: torch.Tensor


class _Forward(Protocol):
    """What the forward does for the backward, between the matrix products."""

    def block(self, block: _Block) -> None:
        """See the statistics of some rows, and leave in place of their products what `chunk` is to project."""

    def chunk(self, policy: _Model, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        """Project what the blocks have left."""

    def backward(
        self, policy: _Model, targets: torch.Tensor, loss: _LossGradients, wanted: Sequence[bool]
    ) -> tuple[_Gradients, torch.Tensor | None, _LossGradients]:
        """The gradients; the tokens (None: all) that need a second pass; the loss's gradients that it is to apply."""
        ...


class _KeepNothing:
    """Everything is left to a second pass."""

    def block(self, block: _Block) -> None:
        pass

    def chunk(self, policy: _Model, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        pass

    def backward(self, policy, targets, loss, wanted):
        return _Gradients.zeros(policy, wanted), None, loss


class _KeepBases:
    """
    For a frozen head: the gradient to a token's hidden state is a combination of three vectors known in the forward.

    `g_logp (slope_target w_target - sum_v p_v slope_v w_v) + g_kl sum_v p_v (log_ratio_v - mean) slope_v w_v`.
    """

    def __init__(self, policy: _Model):
        shape = policy.hidden.shape
        self.p_basis = policy.hidden.new_zeros(shape, dtype=policy.dtype)
        self.kl_basis = policy.hidden.new_zeros(shape, dtype=policy.dtype)
        self.target_slopes = policy.hidden.new_empty(shape[0], 1, dtype=policy.dtype)

    def block(self, block: _Block) -> None:
        tile, slope = block.tile, block.slope
        block.product.copy_(_sloped_(tile.log_ratio.sub_(tile.rows.mean_log_ratio).mul_(tile.p), slope))
        block.ref_product.copy_(_sloped_(tile.p, slope))
        at_target = slope.gather(-1, block.target) if isinstance(slope, torch.Tensor) else slope
        self.target_slopes[block.rows] = at_target

    def chunk(self, policy: _Model, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        _add_product_(self.kl_basis[rows], product, policy.weight)
        _add_product_(self.p_basis[rows], ref_product, policy.weight)

    def backward(self, policy, targets, loss, wanted):
        hidden = torch.zeros_like(self.kl_basis)
        if loss.kl is not None:
            hidden.addcmul_(self.kl_basis, loss.kl)
        if loss.logp is not None:
            direction = policy.weight[targets.squeeze(-1)] * self.target_slopes - self.p_basis
            hidden.addcmul_(direction, loss.logp)
        return _Gradients(hidden, None, None), None, _LossGradients(None, loss.entropy, None)


class _KeepExpected:
    """The gradients of the expected loss; the backward applies the factor, and corrects the tokens that differ."""

    def __init__(self, policy: _Model, wanted: Sequence[bool], expected: ExpectedGradients):
        self.gradients = _Gradients.zeros(policy, wanted)
        self.expected = expected
        self.loss_N2 = policy.hidden.new_empty(policy.hidden.shape[0], 2, dtype=policy.dtype)

    def block(self, block: _Block) -> None:
        tile = block.tile
        g_logp, g_kl = (g.unsqueeze(-1) for g in self.expected(tile.rows.logp.squeeze(-1), block.rows))
        gradient = gradient_(tile, block.target, g_logp, g_kl)
        self.gradients.add_block(block.product, _sloped_(gradient, block.slope))
        self.loss_N2[block.rows] = torch.cat([g_logp, g_kl], -1)

    def chunk(self, policy: _Model, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        self.gradients.add_chunk(policy, rows, product)

    def backward(self, policy, targets, loss, wanted):
        expected_N2 = self.loss_N2
        nothing = torch.zeros_like(expected_N2[:, :1])
        g_logp, g_entropy, g_kl = (nothing if g is None else g for g in loss)
        found_N2 = torch.cat([g_logp, g_kl], -1)
        # The weight of the KL is known for certain, so the factor is the one that it arrived with
        kl_weight = expected_N2[:, 1:].where(expected_N2[:, 1:] != 0, torch.nan)
        factor = (g_kl / kl_weight).nanmedian().nan_to_num(1.0)
        missing_N2 = found_N2 - factor * expected_N2
        differs_N2 = missing_N2.abs() > _SAME * found_N2.abs().amax(-1, keepdim=True)
        tokens = (differs_N2.any(-1, keepdim=True) | (g_entropy != 0)).squeeze(-1).nonzero().squeeze(-1)
        gradients = _Gradients(*(None if x is None else x * factor for x in self.gradients))
        return gradients, tokens, _LossGradients(missing_N2[:, :1], loss.entropy, missing_N2[:, 1:])


def _keep(policy: _Model, wanted: Sequence[bool]) -> _Forward:
    if policy.options.expected is not None and any(wanted):
        return _KeepExpected(policy, wanted, policy.options.expected)
    return _KeepBases(policy) if tuple(wanted) == (True, False, False) else _KeepNothing()


# A block's work is a function of its own, so that its tiles are freed before the next block's are made


def _first_block(
    policy: _Model, reference: _Model, keep: _Forward, places: list[torch.Tensor], rows: slice, target: torch.Tensor
) -> torch.Tensor:
    logits, ref_logits = policy.logits_(places[0]), reference.logits_(places[1])
    slope = policy.options.slope(logits)
    tile = statistics_(logits, ref_logits, target, policy.excludes or reference.excludes)
    keep.block(_Block(rows, tile, target, slope, places[0], places[1]))
    return torch.cat(tile.rows, -1)


def _second_block(
    policy: _Model,
    reference: _Model,
    gradients: _Gradients,
    places: list[torch.Tensor],
    rows: Rows,
    target: torch.Tensor,
    loss: _LossGradients,
) -> None:
    logits, ref_logits = policy.logits_(places[0]), None if loss.kl is None else reference.logits_(places[1])
    slope = policy.options.slope(logits)
    excludes = policy.excludes or reference.excludes
    gradient = recomputed_gradient_(logits, ref_logits, rows, target, loss.logp, loss.entropy, loss.kl, excludes)
    gradients.add_block(places[0], _sloped_(gradient, slope))


def _add_second_pass(
    gradients: _Gradients, policy: _Model, reference: _Model, targets: torch.Tensor, rows: Rows, loss: _LossGradients
) -> None:
    """Add the gradients that are made from logits computed again."""
    models = (policy,) if loss.kl is None else (policy, reference)
    buffers = [policy.buffer() for _ in models]
    for chunk, blocks in policy.chunks():
        products = [model.product(chunk, out) for model, out in zip(models, buffers, strict=True)]
        for block in blocks:
            places = [product[block.start - chunk.start : block.stop - chunk.start] for product in products]
            own_rows, own_loss = Rows(*(x[block] for x in rows)), loss.take(block)
            _second_block(policy, reference, gradients, places, own_rows, targets[block], own_loss)
        gradients.add_chunk(policy, chunk, products[0])


class _FusedTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, options):
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing in the backward
        models = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        policy, reference = _models(models, options)
        keep = _keep(policy, ctx.needs_input_grad[:3])
        buffers, targets = (policy.buffer(), policy.buffer()), targets[:, None]
        # Made beforehand: what is kept of each block would lie where its tiles were, and the next ones not fit there
        rows_N9 = hidden.new_empty(len(targets), len(Rows._fields), dtype=policy.dtype)
        for chunk, blocks in policy.chunks():
            products = policy.product(chunk, buffers[0]), reference.product(chunk, buffers[1])
            for block in blocks:
                places = [product[block.start - chunk.start : block.stop - chunk.start] for product in products]
                rows_N9[block] = _first_block(policy, reference, keep, places, block, targets[block])
            keep.chunk(policy, chunk, *products)
        ctx.save_for_backward(*models, targets, rows_N9)
        ctx.options, ctx.keep = options, keep
        logp, entropy, kl, ref_logp = (x.contiguous() for x in rows_N9.unbind(-1)[:4])
        ctx.mark_non_differentiable(ref_logp)
        return logp, entropy, kl, ref_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *models, targets, rows_N9 = ctx.saved_tensors
        loss = _LossGradients(*(None if g is None else g[:, None] for g in grads[:3]))
        no_autocast = torch.autocast(models[0].device.type, enabled=False)  # the products keep the forward's dtype
        with no_autocast, ctx.options.gathered(*models[1:3]):
            policy, reference = _models(models, ctx.options)
            gradients, tokens, rest = ctx.keep.backward(policy, targets, loss, ctx.needs_input_grad[:3])
            if tokens is not None:
                policy, reference = (model._replace(hidden=model.hidden[tokens]) for model in (policy, reference))
                targets, rows_N9, rest = targets[tokens], rows_N9[tokens], rest.take(tokens)
            second = gradients
            if tokens is not None:
                second = gradients._replace(hidden=_Gradients.zeros(policy, ctx.needs_input_grad[:3]).hidden)
            if len(targets) and any(g is not None for g in rest):
                _add_second_pass(second, policy, reference, targets, Rows(*rows_N9.split(1, -1)), rest)
            if tokens is not None and gradients.hidden is not None:
                gradients.hidden.index_add_(0, tokens, second.hidden)
        results = (None if x is None else x.to(p.dtype) for x, p in zip(gradients, models[:3], strict=True))
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
    return fused_token_stats_for_loss(
        hidden,
        weight,
        targets,
        ref_hidden,
        ref_weight,
        bias=bias,
        ref_bias=ref_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_memory=logits_memory,
    )


def fused_token_stats_for_loss(
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
    expected: ExpectedGradients | None = None,
    gathered: Gathered = _whole,
) -> TokenStats:
    """
    [`fused_token_stats`] for a loss whose gradients can be foretold, and for heads that are sharded between uses.

    Args:
        expected: from log-probabilities `(n,)` and the slice of their tokens to the gradients of the loss with respect
            to `logp` and `kl`, `(n,)` each, up to one factor for all N tokens. They decide about the speed only: the
            backward compares them with what arrives, and makes good what differs.
        gathered: from `weight` and `bias` to the context in which the backward finds them whole; in the forward they
            have to be.
    """
    _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias)
    _check_options(temperature, softcap, logits_memory)
    dtype = _matmul_dtype(hidden)
    options = _Options(temperature, logit_scale, softcap, dtype, logits_memory, expected, gathered)
    reference = (None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_FusedTokenStats.apply(hidden, weight, bias, *reference, targets, options))
