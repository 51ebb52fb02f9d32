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

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .chunks import GatherHead, HeadOptions, head_models, matmul_dtype
from .gradients import LossGradients, add_second_pass, first_block, what_to_keep
from .predicted_gradient import PredictedGradient, SecondPassCount
from .tiles import Rows


LOGITS_MEMORY_BYTES = 256 * 2**20


def _whole(*head: torch.Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext()


class TokenStats(NamedTuple):
    """Figures of N tokens, each of shape `(N,)`, in nats."""

    logp: torch.Tensor  # log-probability of the target under the policy
    entropy: torch.Tensor  # of the policy
    kl: torch.Tensor  # of the policy against the reference
    ref_logp: torch.Tensor  # log-probability of the target under the reference, without gradient


class _FusedTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, options):
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing in the backward
        models = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        policy, reference = head_models(models, options)
        keep = what_to_keep(policy, ctx.needs_input_grad[:3])
        buffers, targets = (policy.buffer(), policy.buffer()), targets[:, None]
        # Made beforehand: what is kept of each block would lie where its tiles were, and the next ones not fit there
        rows_N9 = hidden.new_empty(len(targets), len(Rows._fields), dtype=policy.dtype)
        for chunk, blocks in policy.chunks():
            products = policy.product(chunk, buffers[0]), reference.product(chunk, buffers[1])
            for block in blocks:
                places = [product[block.start - chunk.start : block.stop - chunk.start] for product in products]
                rows_N9[block] = first_block(policy, reference, keep, places, block, targets[block])
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
        loss = LossGradients(*(None if g is None else g[:, None] for g in grads[:3]))
        no_autocast = torch.autocast(models[0].device.type, enabled=False)  # the products keep the forward's dtype
        with no_autocast, ctx.options.gather_head(*models[1:3]):
            policy, reference = head_models(models, ctx.options)
            gradients, tokens, rest = ctx.keep.backward(policy, targets, loss, ctx.needs_input_grad[:3])
            if tokens is not None:
                policy, reference = (model._replace(hidden=model.hidden[tokens]) for model in (policy, reference))
                targets, rows_N9, rest = targets[tokens], rows_N9[tokens], rest.take(tokens)
            second = gradients
            if tokens is not None and gradients.hidden is not None:
                second = gradients._replace(hidden=torch.zeros_like(policy.hidden, dtype=policy.dtype))
            needed = len(targets) if any(g is not None for g in rest) else 0
            ctx.options.second_pass.add(needed, len(models[0]))
            if needed:
                add_second_pass(second, policy, reference, targets, Rows(*rows_N9.split(1, -1)), rest)
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


def _check_options(temperature: float, softcap: float | None, logits_memory_bytes: int) -> None:
    for name, value in (
        ("temperature", temperature),
        ("softcap", softcap),
        ("logits_memory_bytes", logits_memory_bytes),
    ):
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
    logits_memory_bytes: int = LOGITS_MEMORY_BYTES,
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

    Reduces to [`~trl_grpo_ext.kl.estimates.exact_kl`] of the dense logits. The logits' order of operations is that of
    TRL's `kernels/chunked_logprob.py`.

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
        logits_memory_bytes: bytes that the V-wide tiles alive at one moment may take together; one token's tiles are the
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
        logits_memory_bytes=logits_memory_bytes,
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
    logits_memory_bytes: int = LOGITS_MEMORY_BYTES,
    direction: str = "reverse",
    predicted_gradient: PredictedGradient | None = None,
    second_pass: SecondPassCount | None = None,
    gather_head: GatherHead = _whole,
) -> TokenStats:
    """
    [`fused_token_stats`] for a loss whose gradients can be foretold, and for heads that are sharded between uses.

    Args:
        predicted_gradient: from log-probabilities `(n,)` and the slice of their tokens to the gradients of the loss with respect
            to `logp` and `kl`, `(n,)` each, up to one factor for all N tokens. They decide about the speed only: the
            backward compares them with what arrives, and makes good what differs. Not used with float16 products, in
            which gradients underflow unless the loss has been scaled.
        gather_head: from `weight` and `bias` to the context in which the backward finds them whole; in the forward they
            have to be.
    """
    _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias)
    _check_options(temperature, softcap, logits_memory_bytes)
    dtype = matmul_dtype(hidden)
    if direction != "reverse":
        raise ValueError(f"`direction` must be 'reverse', got {direction!r}")
    if not torch.is_grad_enabled():
        # The function would prepare gradients for every input that requires one
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    options = HeadOptions(
        temperature,
        logit_scale,
        softcap,
        dtype,
        logits_memory_bytes,
        predicted_gradient,
        gather_head,
        second_pass or SecondPassCount(),
    )
    reference = (None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_FusedTokenStats.apply(hidden, weight, bias, *reference, targets, options))
