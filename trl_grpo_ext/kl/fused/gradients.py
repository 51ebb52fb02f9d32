"""
The gradient of the fused head: what the forward prepares for the backward, and the second pass for the rest.

The loss depends on a token only through its log-prob, its entropy and its divergence. So the gradient of the loss with
respect to the token's hidden state h is a weighted sum of three vectors:

    g_logp d logp/dh + g_entropy d entropy/dh + g_kl d kl/dh

The weights `g_logp`, `g_entropy` and `g_kl` come from the loss, in the backward. The vectors do not depend on the
loss, so the forward can prepare them while it holds the logits. There are three kinds of [`Preparation`]:

- [`TokenDerivatives`], for a frozen head: the forward stores `d logp/dh` and `d kl/dh` of each token.
- [`NoPreparation`], for a trained head: its gradient is one matrix for each token, too many to store.
- [`~trl_grpo_ext.kl.fused.predicted_gradient.AppliedPrediction`], for either: the weights are predicted.

What a preparation does not cover is its [`Remainder`], for which the second pass computes the logits of tokens again.
A gradient of the entropy is always left to the second pass, since few losses have one.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .chunks import HeadModel, add_product_
from .rows import FirstPass, LossGradients, RowOperations, Rows, Statistics, rows_of_block


class GradientSums(NamedTuple):
    """
    Gradients of the loss with respect to the policy's hidden states, head and bias; `None` for one that is not wanted.

    Summed over chunks in place, in float32 or better. Where there is a `factor`, a scalar, all are still to be
    multiplied by it.
    """

    hidden_MH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None
    factor: torch.Tensor | None = None

    @classmethod
    def zeros(cls, policy: HeadModel, wanted: Sequence[bool]) -> "GradientSums":
        """Those that are wanted, as zeros."""

        def zeros(parameter: torch.Tensor | None, is_wanted: bool) -> torch.Tensor | None:
            if parameter is None or not is_wanted:
                return None
            return torch.zeros_like(parameter, dtype=policy.dtype)

        hidden, weight, bias = wanted
        return cls(zeros(policy.hidden_MH, hidden), zeros(policy.weight_VH, weight), zeros(policy.bias_V, bias))

    def add_block(self, product_gradient: torch.Tensor) -> None:
        """Add what a block's gradient with respect to the product means for the bias."""
        if self.bias_V is not None:
            self.bias_V.add_(product_gradient.sum(0, dtype=self.bias_V.dtype))

    def multiplied_(self) -> "GradientSums":
        """The same with the factor multiplied in, so that others can be added."""
        if self.factor is None:
            return self
        for x in self[:3]:
            if x is not None:
                x.mul_(self.factor)
        return self._replace(factor=None)

    def results_(self, parameters: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients in the dtypes of hidden states, head and bias."""
        pairs = zip(self[:3], parameters, strict=True)
        return [None if x is None or p is None else self._result_(x, p.dtype) for x, p in pairs]

    def _result_(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.factor is None:
            return x.to(dtype)
        # A head's gradient is large: one pass multiplies and rounds it
        return torch.mul(x, self.factor, out=x if x.dtype == dtype else torch.empty_like(x, dtype=dtype))

    def add_chunk(self, policy: HeadModel, tokens: slice, product_gradient: torch.Tensor) -> None:
        """Add what a chunk's gradient with respect to the product means for hidden states and head."""
        if self.hidden_MH is not None:
            add_product_(self.hidden_MH[tokens], product_gradient, policy.weight_VH)
        if self.weight_VH is not None:
            add_product_(self.weight_VH, product_gradient.t(), policy.hidden_MH[tokens])


class Block(NamedTuple):
    """
    A block of tokens in the forward, once its statistics are known.

    Args:
        tokens (`slice`):
            Which of the M tokens.
        rows ([`~trl_grpo_ext.kl.fused.rows.Rows`]):
            Their products. What is left in their memory, the matrix products of `add_chunk` can use.
        first_pass ([`~trl_grpo_ext.kl.fused.rows.FirstPass`]):
            Has the statistics, and writes a gradient into the memory of the products.
    """

    tokens: slice
    rows: Rows
    first_pass: FirstPass


class Remainder(NamedTuple):
    """
    What is left to the second pass.

    Args:
        tokens (`torch.Tensor` or `None`):
            Indices of the tokens that need it; `None` for all.
        loss ([`~trl_grpo_ext.kl.fused.rows.LossGradients`]):
            The gradients of the loss to apply, for all M tokens.
    """

    tokens: torch.Tensor | None
    loss: LossGradients

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return all(g is None for g in self.loss) or (self.tokens is not None and len(self.tokens) == 0)


class Preparation(Protocol):
    """What the forward does for the backward."""

    def add_block(self, block: Block) -> None:
        """Leave in the memory of a block's products what [`Preparation.add_chunk`] multiplies."""

    def add_chunk(self, policy: HeadModel, tokens: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        """Multiply what the blocks of a chunk have left in the products' memory."""

    def gradients(
        self, policy: HeadModel, loss: LossGradients, wanted: Sequence[bool]
    ) -> tuple[GradientSums, Remainder]:
        """In the backward: the gradients as far as they are prepared, and what is left to the second pass."""
        ...


class NoPreparation:
    """Leaves everything to the second pass."""

    def add_block(self, block: Block) -> None:
        pass

    def add_chunk(self, policy: HeadModel, tokens: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        pass

    def gradients(
        self, policy: HeadModel, loss: LossGradients, wanted: Sequence[bool]
    ) -> tuple[GradientSums, Remainder]:
        return GradientSums.zeros(policy, wanted), Remainder(None, loss)


class TokenDerivatives:
    """
    Stores the derivatives of each token's log-prob and divergence with respect to its hidden state, for a frozen head.

        d logp/dh = sum_v (1[v = target] - p_v) slope_v w_v
        d kl/dh   = sum_v p_v (s_v - mean_score) slope_v w_v

    `w_v` is the head's row of token v, `slope_v` the derivative of its logit with respect to the product. The term of
    the target is part of the first sum, not added to it afterwards: where p of the target is nearly 1, the two nearly
    cancel, and rounded to bfloat16 they would not.
    """

    def __init__(self, policy: HeadModel):
        self.d_logp_MH = torch.zeros_like(policy.hidden_MH, dtype=policy.dtype)
        self.d_kl_MH = torch.zeros_like(policy.hidden_MH, dtype=policy.dtype)

    def add_block(self, block: Block) -> None:
        block.first_pass.write_derivatives()

    def add_chunk(self, policy: HeadModel, tokens: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        add_product_(self.d_kl_MH[tokens], product, policy.weight_VH)
        add_product_(self.d_logp_MH[tokens], ref_product, policy.weight_VH)

    def gradients(
        self, policy: HeadModel, loss: LossGradients, wanted: Sequence[bool]
    ) -> tuple[GradientSums, Remainder]:
        hidden_MH = torch.zeros_like(self.d_kl_MH)
        if loss.kl is not None:
            hidden_MH.addcmul_(self.d_kl_MH, loss.kl)
        if loss.logp is not None:
            hidden_MH.addcmul_(self.d_logp_MH, loss.logp)
        return GradientSums(hidden_MH, None, None), Remainder(None, LossGradients(None, loss.entropy, None))


def _add_all_tokens(
    sums: GradientSums,
    policy: HeadModel,
    reference: HeadModel,
    operations: RowOperations,
    targets: torch.Tensor,
    statistics_M9: torch.Tensor,
    loss: LossGradients,
) -> None:
    buffer = policy.new_product_buffer()
    ref_buffer = None if loss.kl is None else policy.new_product_buffer()
    for chunk, blocks in policy.chunks():
        product = policy.product(chunk, buffer)
        ref_product = None if ref_buffer is None else reference.product(chunk, ref_buffer)
        for block in blocks:
            rows = rows_of_block(policy, reference, product, ref_product, targets, chunk, block)
            operations.second_pass(rows, Statistics.columns(statistics_M9[block]), loss.of(block))
            sums.add_block(rows.product)
        sums.add_chunk(policy, chunk, product)


def add_second_pass(
    sums: GradientSums,
    policy: HeadModel,
    reference: HeadModel,
    operations: RowOperations,
    targets: torch.Tensor,
    statistics_M9: torch.Tensor,
    remainder: Remainder,
) -> int:
    """
    Add the gradients of the remainder, from logits that are computed again.

    Returns:
        `int`: number of tokens whose logits were computed again.
    """
    tokens, loss = remainder
    if remainder.is_empty:
        return 0
    if tokens is None:
        _add_all_tokens(sums, policy, reference, operations, targets, statistics_M9, loss)
        return len(targets)
    own_policy = policy._replace(hidden_MH=policy.hidden_MH[tokens])
    own_reference = reference._replace(hidden_MH=reference.hidden_MH[tokens])
    own_sums = sums
    if sums.hidden_MH is not None:
        own_sums = sums._replace(hidden_MH=torch.zeros_like(own_policy.hidden_MH, dtype=policy.dtype))
    _add_all_tokens(
        own_sums, own_policy, own_reference, operations, targets[tokens], statistics_M9[tokens], loss.of(tokens)
    )
    if sums.hidden_MH is not None and own_sums.hidden_MH is not None:
        sums.hidden_MH.index_add_(0, tokens, own_sums.hidden_MH)
    return len(tokens)
