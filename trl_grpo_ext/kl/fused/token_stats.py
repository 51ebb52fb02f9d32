"""
Log-prob, entropy and exact divergence of every token from hidden states, without the `(M, V)` logits.

The hidden states of both models go through their heads a chunk of tokens at a time. All statistics of a token come
from one pair of logit rows, the policy's and the reference's, which are then overwritten. As far as possible the
forward also prepares the gradient from these rows, since the backward would have to compute them again
([`~trl_grpo_ext.kl.fused.gradients`] says how).

The cost is in matrix products, each of M x H x V operations:

| head | gradient of the loss | in the forward | in the backward | stored for the backward |
|---|---|---|---|---|
| frozen | any | 4 | 0 | two `(M, H)` |
| trained | any | 2 | 4 | nothing |
| frozen | as predicted | 3 | 0 | `(M, H)` |
| trained | as predicted | 4 | 0 | `(M, H)` and the head's gradient |

Tokens whose entropy has a gradient, or whose prediction was wrong, go through the heads again in the backward: 2 to 4
products more.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..divergences import find_divergence
from .chunks import (
    GatherHead,
    HeadModel,
    HeadOptions,
    LogitsMemory,
    default_logits_bytes,
    gpu_bytes,
    head_models,
    matmul_dtype,
)
from .gradients import Block, NoPreparation, Preparation, TokenDerivatives, add_second_pass
from .plain import TokenStats
from .predicted_gradient import AppliedPrediction, PredictedGradient, SecondPassCount, can_apply_prediction
from .row_operations import row_operations
from .rows import LossGradients, RowOperations, Rows, Statistics, rows_of_block


def _already_gathered(*head: torch.Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext()


class _Options(NamedTuple):
    head: HeadOptions
    operations: RowOperations
    predicted_gradient: PredictedGradient | None
    second_pass: SecondPassCount
    gather_head: GatherHead


def _preparation(
    policy: HeadModel, wanted: Sequence[bool], predicted_gradient: PredictedGradient | None
) -> Preparation:
    """What the forward can do for the gradients that are wanted, to hidden states, weight and bias."""
    if predicted_gradient is not None and can_apply_prediction(policy, wanted):
        return AppliedPrediction(policy, wanted, predicted_gradient)
    return TokenDerivatives(policy) if tuple(wanted) == (True, False, False) else NoPreparation()


def _do_first_pass(
    operations: RowOperations, preparation: Preparation, rows: Rows, tokens: slice, statistics_M9: torch.Tensor
) -> None:
    # A function of its own, so that the tiles of a block are freed before those of the next block are made
    first_pass = operations.first_pass(rows, statistics_M9)
    preparation.add_block(Block(tokens, rows, first_pass))


class _FusedTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, options: _Options):
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing in the backward
        parameters = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        policy, reference = head_models(parameters, options.head)
        preparation = _preparation(policy, ctx.needs_input_grad[:3], options.predicted_gradient)
        buffer = policy.new_product_buffer()
        ref_buffer = policy.new_product_buffer()
        targets_M1 = targets[:, None]
        # Allocated before the blocks' tiles. A small tensor that was allocated between the tiles of two blocks would
        # break the free memory up, and tiles of the same size would not fit in again
        statistics_M9 = hidden.new_empty(len(targets), len(Statistics._fields), dtype=policy.dtype)
        for chunk, blocks in policy.chunks():
            product = policy.product(chunk, buffer)
            ref_product = reference.product(chunk, ref_buffer)
            for block in blocks:
                rows = rows_of_block(policy, reference, product, ref_product, targets_M1, chunk, block)
                _do_first_pass(options.operations, preparation, rows, block, statistics_M9[block])
            preparation.add_chunk(policy, chunk, product, ref_product)
        ctx.save_for_backward(*parameters, targets_M1, statistics_M9)
        ctx.options = options
        ctx.preparation = preparation
        logp, entropy, kl, ref_logp = (x.contiguous() for x in statistics_M9.unbind(-1)[:4])
        ctx.mark_non_differentiable(ref_logp)
        return logp, entropy, kl, ref_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *parameters, targets_M1, statistics_M9 = ctx.saved_tensors
        options = ctx.options
        loss = LossGradients(*(None if g is None else g[:, None] for g in grads[:3]))
        no_autocast = torch.autocast(parameters[0].device.type, enabled=False)  # products keep the forward's dtype
        with no_autocast, options.gather_head(*parameters[1:3]):
            policy, reference = head_models(parameters, options.head)
            sums, remainder = ctx.preparation.gradients(policy, loss, ctx.needs_input_grad[:3])
            if not remainder.is_empty:
                sums = sums.multiplied_()
            second_pass_tokens = add_second_pass(
                sums, policy, reference, options.operations, targets_M1, statistics_M9, remainder
            )
        options.second_pass.add(second_pass_tokens, len(targets_M1))
        return *sums.results_(parameters[:3]), *(None,) * 5


def _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias) -> None:
    for name, matrix in {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden}.items():
        if matrix.dim() != 2:
            raise ValueError(f"`{name}` must have two dimensions, got shape {tuple(matrix.shape)}")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("`ref_bias` needs `ref_weight`: without one the reference shares the policy's head")
    num_tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    ref_width = ref_hidden.shape[1]
    for name, tensor, shape in (
        ("weight", weight, (vocabulary, width)),
        ("targets", targets, (num_tokens,)),
        ("ref_hidden", ref_hidden, (num_tokens, width if ref_weight is None else ref_width)),
        ("ref_weight", ref_weight, (vocabulary, ref_width)),
        ("bias", bias, (vocabulary,)),
        ("ref_bias", ref_bias, (vocabulary,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}")


def _logits_memory(
    total_bytes: int | None, weight: torch.Tensor, dtype: torch.dtype, operations: RowOperations
) -> LogitsMemory:
    block_bytes = operations.block_bytes(weight.device)
    if total_bytes is None:
        total_bytes = default_logits_bytes(len(weight), dtype.itemsize, block_bytes, gpu_bytes(weight.device))
    return LogitsMemory(total_bytes, block_bytes)


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
    direction: str = "reverse",
    logits_memory_bytes: int | None = None,
) -> TokenStats:
    r"""
    Log-prob of the target, entropy, exact divergence and the reference's log-prob, per token.

    The policy's logits, of token i and vocabulary entry v (without the cap where `softcap` is `None`):

        z_iv = softcap * tanh((h_i . w_v + b_v) * logit_scale / softcap) / temperature

    With `p_i = softmax(z_i)`, and `q_i` the same from the reference's hidden states and head:

        logp_i     = log p_i[targets_i]
        entropy_i  = - sum_v p_iv log p_iv
        kl_i       = sum_v p_iv (log p_iv - log q_iv)    "reverse", KL(policy || reference)
                     sum_v q_iv (log q_iv - log p_iv)    "forward", KL(reference || policy)
        ref_logp_i = log q_i[targets_i]

    Conventions:

    - Natural logarithms, and `0 log 0 = 0`. The reverse KL is infinite where the reference excludes what the policy
      allows, the forward KL the other way round.
    - Equal policies have a divergence of exactly 0, and none is negative.
    - Gradients go from `logp`, `entropy` and `kl` to `hidden`, `weight` and `bias`. The reference gets none, not even
      where it shares the policy's head.
    - The matrix products run in the dtype of `hidden`, or autocast's. All else, and the sums of the gradients over
      chunks, is in float32 (in float64 for float64 `hidden`).
    - The order of operations is that of TRL's `kernels/chunked_logprob.py`.

    Reduces to [`~trl_grpo_ext.kl.fused.plain.plain_token_stats`], which holds all logits at once.

    Args:
        hidden (`torch.Tensor` of shape `(M, H)`):
            The policy's last hidden states of M tokens.
        weight (`torch.Tensor` of shape `(V, H)`):
            The policy's head.
        targets (`torch.Tensor` of shape `(M,)`):
            Sampled token ids, int64.
        ref_hidden (`torch.Tensor` of shape `(M, H')`):
            The reference's last hidden states.
        ref_weight (`torch.Tensor` of shape `(V, H')`, *optional*):
            The reference's head. `None`: the policy's `weight` and `bias`, taken as constants.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the policy's head.
        ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of `ref_weight`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, positive.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the product, before the cap.
        softcap (`float`, *optional*):
            Bound of the logits' absolute value, before the temperature.
        direction (`str`, *optional*, defaults to `"reverse"`):
            A key of [`~trl_grpo_ext.kl.divergences.DIVERGENCES`].
        logits_memory_bytes (`int`, *optional*):
            Bytes that tensors with a row of V entries for each token may take together at one moment; at least those
            of one token. Changes speed and memory, and results only by rounding. By default what
            [`~trl_grpo_ext.kl.fused.chunks.default_logits_bytes`] says: 256 MiB on a CPU, 2,048 tokens on a GPU.

    Returns:
        [`~trl_grpo_ext.kl.fused.plain.TokenStats`]: four tensors of shape `(M,)`, in float32 (in float64 for float64
        `hidden`).

    Raises:
        ValueError: a shape does not fit, a number that must be positive is not, or the direction is unknown; or the
            environment variable `TRL_GRPO_EXT_TRITON` is neither 0 nor 1.
        RuntimeError: a Triton kernel cannot be compiled on this GPU.
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
        direction=direction,
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
    direction: str = "reverse",
    logits_memory_bytes: int | None = None,
    predicted_gradient: PredictedGradient | None = None,
    second_pass: SecondPassCount | None = None,
    gather_head: GatherHead = _already_gathered,
) -> TokenStats:
    """
    [`fused_token_stats`] for a loss whose gradient can be predicted, and for a head that is sharded between uses.

    Args:
        predicted_gradient ([`~trl_grpo_ext.kl.fused.predicted_gradient.PredictedGradient`], *optional*):
            Gradient of the loss with respect to `logp` and `kl`. It changes the speed only: tokens whose gradient
            turns out to be another go through the heads again. Not used with float16 products.
        second_pass ([`~trl_grpo_ext.kl.fused.predicted_gradient.SecondPassCount`], *optional*):
            Counts these tokens, in every backward.
        gather_head (`Callable`, *optional*):
            From `weight` and `bias` to the context in which the backward finds them gathered. In the forward they have
            to be gathered already.
        hidden, weight, ..., logits_memory_bytes:
            As for [`fused_token_stats`].

    Returns:
        [`~trl_grpo_ext.kl.fused.plain.TokenStats`]: as [`fused_token_stats`].

    Raises:
        ValueError, RuntimeError: as [`fused_token_stats`].
    """
    _check_shapes(hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias)
    _check_positive(temperature=temperature, softcap=softcap, logits_memory_bytes=logits_memory_bytes)
    dtype = matmul_dtype(hidden)
    operations = row_operations(hidden.device, dtype, find_divergence(direction))
    memory = _logits_memory(logits_memory_bytes, weight, dtype, operations)
    head = HeadOptions(temperature, logit_scale, softcap, dtype, memory)
    if not torch.is_grad_enabled():
        # The function would prepare gradients for every input that requires one
        hidden = hidden.detach()
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    options = _Options(head, operations, predicted_gradient, second_pass or SecondPassCount(), gather_head)
    reference = (None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_FusedTokenStats.apply(hidden, weight, bias, *reference, targets, options))
