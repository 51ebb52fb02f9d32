"""
The gradient of the loss, predicted before the loss is computed: it spares the fused head its second pass.

Under TRL's clipped losses, the gradient with respect to a token's log-prob is known as soon as the log-prob is, and
the one with respect to its KL is known from the start. With a prediction of these two, the forward computes the
gradients with respect to hidden states and head from the logits that it holds anyway ([`AppliedPrediction`]).

A wrong prediction costs time, and changes no result. The backward compares the prediction with the gradients that
arrive, and the tokens that differ go through the heads again. [`SecondPassCount`] says how many they were:

- none under TRL's clipped losses, with [`~trl_grpo_ext.loss.ClippedLossGradient`] as the prediction,
- those tokens whose gradient TRL's `delta` or `top_entropy_quantile` changes,
- all tokens with an entropy bonus; with a trained head, also in float16 and for losses without a prediction.
"""

from collections.abc import Callable, Sequence

import torch

from .chunks import HeadModel
from .gradients import Block, GradientSums, Remainder
from .rows import LossGradients


PredictedGradient = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""
From the log-probs `(m,)` of some tokens, and the slice of the M tokens that they are, to the gradients of the loss
with respect to those tokens' `logp` and `kl`, `(m,)` each, up to one factor for all M tokens.
"""

# Two ways to compute the same gradient differ by some roundings
_TOLERATED_ROUNDINGS = 64


class SecondPassCount:
    """Counts the tokens of backward passes, and those among them that went through the policy's head again."""

    def __init__(self):
        self._second_pass_tokens = 0
        self._tokens = 0

    def add(self, second_pass_tokens: int, tokens: int) -> None:
        """Count a backward pass over `tokens` tokens."""
        self._second_pass_tokens += second_pass_tokens
        self._tokens += tokens

    def take(self) -> tuple[int, int]:
        """Tokens that took the second pass, and all tokens, of the backward passes since the last call."""
        counts = (self._second_pass_tokens, self._tokens)
        self._second_pass_tokens = 0
        self._tokens = 0
        return counts


def can_apply_prediction(policy: HeadModel, wanted: Sequence[bool]) -> bool:
    """Whether a prediction is of use for the gradients that are wanted, to hidden states, weight and bias."""
    # In float16 a gradient underflows unless the loss is scaled, by a factor that the forward does not know
    return any(wanted) and policy.hidden_MH.dtype != torch.float16


class AppliedPrediction:
    """
    A [`~trl_grpo_ext.kl.fused.gradients.Preparation`]: the forward computes the gradients of the predicted loss.

    The backward multiplies them by the factor between prediction and loss, and leaves to the second pass the tokens
    whose prediction was wrong.
    """

    def __init__(self, policy: HeadModel, wanted: Sequence[bool], predicted_gradient: PredictedGradient):
        self.sums: GradientSums | None = GradientSums.zeros(policy, wanted)
        self.predicted_gradient = predicted_gradient
        # Of each token, the gradients with respect to `logp` and `kl`
        self.predicted_M2 = policy.hidden_MH.new_empty(len(policy.hidden_MH), 2, dtype=policy.dtype)
        self.tolerance = 0.0

    def add_block(self, block: Block) -> None:
        assert self.sums is not None
        predicted = self.predicted_gradient(block.first_pass.statistics.logp.squeeze(-1), block.tokens)
        # With a prediction that is not finite, no difference could bring the gradient back
        g_logp, g_kl = (g.to(self.predicted_M2.dtype).nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1) for g in predicted)
        block.first_pass.write_gradient(g_logp, g_kl)
        self.sums.add_block(block.rows.product)
        self.predicted_M2[block.tokens] = torch.cat([g_logp, g_kl], -1)
        self.tolerance = _TOLERATED_ROUNDINGS * torch.finfo(predicted[0].dtype).eps

    def add_chunk(self, policy: HeadModel, tokens: slice, product: torch.Tensor, ref_product: torch.Tensor) -> None:
        assert self.sums is not None
        self.sums.add_chunk(policy, tokens, product)

    def gradients(
        self, policy: HeadModel, loss: LossGradients, wanted: Sequence[bool]
    ) -> tuple[GradientSums, Remainder]:
        # Given away instead of copied, since a head's gradient is large. A second backward through the same graph
        # finds none, and goes through the heads again
        sums = self.sums
        self.sums = None
        if sums is None:
            return GradientSums.zeros(policy, wanted), Remainder(None, loss)
        zeros_M1 = torch.zeros_like(self.predicted_M2[:, :1])
        g_logp, g_entropy, g_kl = (zeros_M1 if g is None else g for g in loss)
        arrived_M2 = torch.cat([g_logp, g_kl], -1)
        factor = _common_factor(self.predicted_M2[:, 1:], g_kl)
        difference_M2 = arrived_M2 - factor * self.predicted_M2
        as_predicted_M2 = (difference_M2.abs() <= self.tolerance * arrived_M2.abs()) & arrived_M2.isfinite()
        differs_M = ~as_predicted_M2.all(-1) | (g_entropy != 0).squeeze(-1)
        remaining_loss = LossGradients(difference_M2[:, :1], loss.entropy, difference_M2[:, 1:])
        return sums._replace(factor=factor), Remainder(differs_M.nonzero().squeeze(-1), remaining_loss)


def _common_factor(predicted_M1: torch.Tensor, arrived_M1: torch.Tensor) -> torch.Tensor:
    """
    The factor between prediction and loss that most tokens share, a scalar: of a loss scaler, for example.

    From the gradients with respect to the KL, whose prediction depends on nothing that the forward computes.
    """
    ratios_M1 = arrived_M1 / predicted_M1.where(predicted_M1 != 0, torch.nan)
    return ratios_M1.nanmedian().nan_to_num(1.0)
