"""
The gradient of the fused head: what its forward keeps for its backward, and the second pass where that is not enough.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch

from .chunks import HeadModel, add_product_
from .predicted_gradient import PredictedGradient
from .tiles import Rows, Tile, gradient_, recomputed_gradient_, statistics_


# Between two ways to compute the same gradient
_ROUNDINGS = 64


def sloped_(gradient: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """From the logits' gradient to that of the product, without a pass where they are the same."""
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


def _zeros(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(x, dtype=dtype)


class Gradients(NamedTuple):
    """What goes back to the policy's hidden states, head and bias, summed in place over chunks, as far as wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def zeros(cls, policy: HeadModel, wanted: Sequence[bool]) -> "Gradients":
        tensors = zip((policy.hidden, policy.weight, policy.bias), wanted, strict=True)
        return cls(*(_zeros(x, policy.dtype) if want and x is not None else None for x, want in tensors))

    def add_block(self, product: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the gradient with respect to some rows of the product, and leave it in their place for `add_chunk`."""
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        # Copies nothing where the gradient was made in that place
        product.copy_(gradient)

    def add_chunk(self, policy: HeadModel, rows: slice, product: torch.Tensor) -> None:
        if self.hidden is not None:
            add_product_(self.hidden[rows], product, policy.weight)
        if self.weight is not None:
            add_product_(self.weight, product.t(), policy.hidden[rows])


class LossGradients(NamedTuple):
    """Gradients of the loss with respect to the outputs, `(N, 1)`; None for an output that it does not use."""

    logp: torch.Tensor | None
    entropy: torch.Tensor | None
    kl: torch.Tensor | None

    def take(self, rows: torch.Tensor | slice) -> "LossGradients":
        return LossGradients(*(None if g is None else g[rows] for g in self))


class Block(NamedTuple):
    """Some rows after the forward's elementwise work."""

    rows: slice
    tile: Tile
    target: torch.Tensor  # column
    slope: torch.Tensor | float
    product: torch.Tensor  # these two are free to be overwritten
    ref_product: torch.Tensor


class Keep(Protocol):
    """What the forward does for the backward, between the matrix products."""

    def block(self, block: Block) -> None:
        """See the statistics of some rows, and leave in place of their products what `chunk` is to project."""

    def chunk(self, policy: HeadModel, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        """Project what the blocks have left."""

    def backward(
        self, policy: HeadModel, targets: torch.Tensor, loss: LossGradients, wanted: Sequence[bool]
    ) -> tuple[Gradients, torch.Tensor | None, LossGradients]:
        """The gradients; the tokens (None: all) that need a second pass; the loss's gradients that it is to apply."""
        ...


class KeepNothing:
    """Everything is left to a second pass."""

    def block(self, block: Block) -> None:
        pass

    def chunk(self, policy: HeadModel, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        pass

    def backward(self, policy, targets, loss, wanted):
        return Gradients.zeros(policy, wanted), None, loss


class KeepBases:
    """
    For a frozen head: the gradient to a token's hidden state is a combination of two vectors known in the forward.

    `g_logp sum_v (1[v = target] - p_v) slope_v w_v + g_kl sum_v p_v (log_ratio_v - mean) slope_v w_v`. The target's
    own term is in the sum, since in bfloat16 two sums would not cancel where p_target is close to 1.
    """

    def __init__(self, policy: HeadModel):
        shape = policy.hidden.shape
        self.logp_basis = policy.hidden.new_zeros(shape, dtype=policy.dtype)
        self.kl_basis = policy.hidden.new_zeros(shape, dtype=policy.dtype)

    def block(self, block: Block) -> None:
        tile, slope = block.tile, block.slope
        block.product.copy_(sloped_(tile.log_ratio.sub_(tile.rows.mean_log_ratio).mul_(tile.p), slope))
        direction = tile.p.neg_().scatter_add_(-1, block.target, torch.ones_like(tile.rows.logp))
        block.ref_product.copy_(sloped_(direction, slope))

    def chunk(self, policy: HeadModel, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        add_product_(self.kl_basis[rows], product, policy.weight)
        add_product_(self.logp_basis[rows], ref_product, policy.weight)

    def backward(self, policy, targets, loss, wanted):
        hidden = torch.zeros_like(self.kl_basis)
        if loss.kl is not None:
            hidden.addcmul_(self.kl_basis, loss.kl)
        if loss.logp is not None:
            hidden.addcmul_(self.logp_basis, loss.logp)
        return Gradients(hidden, None, None), None, LossGradients(None, loss.entropy, None)


class KeepExpected:
    """The gradients of the expected loss; the backward applies the factor, and corrects the tokens that differ."""

    def __init__(self, policy: HeadModel, wanted: Sequence[bool], expected: PredictedGradient):
        self.gradients: Gradients | None = Gradients.zeros(policy, wanted)
        self.expected, self.tolerance = expected, 0.0
        self.loss_N2 = policy.hidden.new_empty(policy.hidden.shape[0], 2, dtype=policy.dtype)

    def block(self, block: Block) -> None:
        tile, gradients = block.tile, cast(Gradients, self.gradients)
        foretold = self.expected(tile.rows.logp.squeeze(-1), block.rows)
        # What is not finite could not be made good
        g_logp, g_kl = (g.to(self.loss_N2.dtype).nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1) for g in foretold)
        gradient = gradient_(tile, block.target, g_logp, g_kl)
        gradients.add_block(block.product, sloped_(gradient, block.slope))
        self.tolerance = _ROUNDINGS * torch.finfo(foretold[0].dtype).eps
        self.loss_N2[block.rows] = torch.cat([g_logp, g_kl], -1)

    def chunk(self, policy: HeadModel, rows: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        cast(Gradients, self.gradients).add_chunk(policy, rows, product)

    def backward(self, policy, targets, loss, wanted):
        # Given away, not copied: a weight's gradient is large. A second backward through one forward makes its own
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            return Gradients.zeros(policy, wanted), None, loss
        expected_N2 = self.loss_N2
        nothing = torch.zeros_like(expected_N2[:, :1])
        g_logp, g_entropy, g_kl = (nothing if g is None else g for g in loss)
        found_N2 = torch.cat([g_logp, g_kl], -1)
        # The weight of the KL is known for certain, so the factor is the one that it arrived with
        kl_weight = expected_N2[:, 1:].where(expected_N2[:, 1:] != 0, torch.nan)
        factor = (g_kl / kl_weight).nanmedian().nan_to_num(1.0)
        missing_N2 = found_N2 - factor * expected_N2
        same_N2 = (missing_N2.abs() <= self.tolerance * found_N2.abs()) & found_N2.isfinite()
        tokens = (~same_N2.all(-1) | (g_entropy != 0).squeeze(-1)).nonzero().squeeze(-1)
        for x in gradients:
            if x is not None:
                x.mul_(factor)
        return gradients, tokens, LossGradients(missing_N2[:, :1], loss.entropy, missing_N2[:, 1:])


def what_to_keep(policy: HeadModel, wanted: Sequence[bool]) -> Keep:
    """For the gradients that are wanted, to hidden states, weight and bias, and what is expected of the loss."""
    # A half's gradient underflows unless the loss is scaled, by a factor that the forward does not know
    is_half = policy.hidden.dtype == torch.float16
    if policy.options.predicted_gradient is not None and any(wanted) and not is_half:
        return KeepExpected(policy, wanted, policy.options.predicted_gradient)
    return KeepBases(policy) if tuple(wanted) == (True, False, False) else KeepNothing()


# A block's work is a function of its own, so that its tiles are freed before the next block's are made


def first_block(
    policy: HeadModel, reference: HeadModel, keep: Keep, places: list[torch.Tensor], rows: slice, target: torch.Tensor
) -> torch.Tensor:
    """The statistics of some tokens, `(n, 9)`, from the products in `places`, which then hold what is kept of them."""
    logits, ref_logits = policy.logits_(places[0]), reference.logits_(places[1])
    slope = policy.options.slope(logits)
    tile = statistics_(logits, ref_logits, target, policy.excludes or reference.excludes)
    keep.block(Block(rows, tile, target, slope, places[0], places[1]))
    return torch.cat(tile.rows, -1)


def _second_block(
    policy: HeadModel,
    reference: HeadModel,
    gradients: Gradients,
    places: list[torch.Tensor],
    rows: Rows,
    target: torch.Tensor,
    loss: LossGradients,
) -> None:
    logits, ref_logits = policy.logits_(places[0]), None if loss.kl is None else reference.logits_(places[1])
    slope = policy.options.slope(logits)
    excludes = policy.excludes or reference.excludes
    gradient = recomputed_gradient_(logits, ref_logits, rows, target, loss.logp, loss.entropy, loss.kl, excludes)
    gradients.add_block(places[0], sloped_(gradient, slope))


def add_second_pass(
    gradients: Gradients,
    policy: HeadModel,
    reference: HeadModel,
    targets: torch.Tensor,
    rows: Rows,
    loss: LossGradients,
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
