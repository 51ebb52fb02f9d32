"""
What the fused head does with the logit rows of a few tokens, whoever does it.

The matrix products of a chunk of tokens are in memory. [`RowOperations`] makes from them the statistics of each token
and, in the memory of the products, the gradient of the loss with respect to the products. There are two:

- [`~trl_grpo_ext.kl.fused.tiles.TileOperations`], PyTorch's operations on one block of tokens after the other: any
  device, any dtype, any divergence.
- [`~trl_grpo_ext.kl.fused.row_kernels.KernelOperations`], two Triton kernels for a GPU.

[`~trl_grpo_ext.kl.fused.row_operations.row_operations`] chooses.
"""

from typing import NamedTuple, Protocol

import torch

from .chunks import HeadModel


SWITCH = "TRL_GRPO_EXT_TRITON"
"""
Environment variable that switches the kernels off with `0`.

Unset or `1`: they are used on a GPU where Triton is installed.
"""


class Statistics(NamedTuple):
    """
    Statistics of each token, all columns.

    The first four are the results, see [`~trl_grpo_ext.kl.fused.plain.TokenStats`]. The next four make a token's
    log-probs from its logits once more: `log p = logits - maximum - log_total`. The last one is `sum_v p_v s_v`, with
    the divergence's score s.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_logp: torch.Tensor
    maximum: torch.Tensor
    log_total: torch.Tensor
    ref_maximum: torch.Tensor
    ref_log_total: torch.Tensor
    mean_score: torch.Tensor

    @classmethod
    def columns(cls, statistics_M9: torch.Tensor) -> "Statistics":
        """Those that lie side by side in one tensor `(M, 9)`."""
        return cls(*statistics_M9.split(1, -1))


class LossGradients(NamedTuple):
    """Gradients of the loss with respect to the statistics, all columns; `None` for one that the loss does not use."""

    logp: torch.Tensor | None
    entropy: torch.Tensor | None
    kl: torch.Tensor | None

    def of(self, tokens: torch.Tensor | slice) -> "LossGradients":
        """Those of some tokens."""
        return LossGradients(*(None if g is None else g[tokens] for g in self))


class Rows(NamedTuple):
    """
    The products of a block of tokens.

    Args:
        policy, reference ([`~trl_grpo_ext.kl.fused.chunks.HeadModel`]):
            The models whose heads made the products.
        product (`torch.Tensor` of shape `(M, V)`):
            The policy's products, to be overwritten.
        ref_product (`torch.Tensor` of shape `(M, V)` or `None`):
            The reference's, to be overwritten; `None` where the loss does not use the divergence.
        target (`torch.Tensor` of shape `(M, 1)`):
            Token ids.
    """

    policy: HeadModel
    reference: HeadModel
    product: torch.Tensor
    ref_product: torch.Tensor | None
    target: torch.Tensor


def rows_of_block(
    policy: HeadModel,
    reference: HeadModel,
    product: torch.Tensor,
    ref_product: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: slice,
    block: slice,
) -> Rows:
    """From the products of a chunk and the targets of all tokens, a column, the rows of one of the chunk's blocks."""
    part = slice(block.start - chunk.start, block.stop - chunk.start)
    ref_part = None if ref_product is None else ref_product[part]
    return Rows(policy, reference, product[part], ref_part, targets[block])


class FirstPass(Protocol):
    """The rows of the forward once their statistics are known. One of the two methods can be called, once."""

    statistics: Statistics

    def write_gradient(self, g_logp: torch.Tensor, g_kl: torch.Tensor) -> None:
        """
        Write the gradient of `g_logp logp + g_kl kl` with respect to the product over the policy's product.

            (g_logp (1[v = target] - p_v) + g_kl p_v (s_v - mean_score)) slope_v

        `g_logp` and `g_kl` are columns, and `slope_v` is the derivative of the logit with respect to the product.
        """

    def write_derivatives(self) -> None:
        """
        Write the derivative of `kl` over the policy's product, and the derivative of `logp` over the reference's.

            d kl   = p_v (s_v - mean_score) slope_v
            d logp = (1[v = target] - p_v) slope_v
        """


class RowOperations(Protocol):
    """The work on the rows, for one divergence."""

    def block_bytes(self, device: torch.device) -> int | None:
        """Bytes of a float32 tile of one block; `None` where there are no tiles, and a whole chunk is one block."""
        ...

    def first_pass(self, rows: Rows, statistics_M9: torch.Tensor) -> FirstPass:
        """Write the [`Statistics`] of the rows into `statistics_M9`."""
        ...

    def second_pass(self, rows: Rows, statistics: Statistics, loss: LossGradients) -> None:
        """
        Write the gradient of the loss over the policy's product, from the statistics of the first pass.

        The gradient of [`FirstPass.write_gradient`], and the entropy's:

            - g_entropy p_v (log p_v + entropy) slope_v
        """
