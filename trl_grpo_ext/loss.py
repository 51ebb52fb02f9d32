"""What mirrors TRL's loss: the reductions of each loss type, the importance ratio, and the clipped gradient."""

from collections.abc import Callable
from typing import Any

import torch


PER_SEQUENCE_MEAN = ("grpo", "sapo")
PER_WINDOW_TOKEN = ("cispo", "dapo", "vespo", "token_mean")
# Loss types whose policy term is the clipped ratio times the advantage
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
REDUCTIONS = (*PER_SEQUENCE_MEAN, "bnpo", "dr_grpo", "luspo", *PER_WINDOW_TOKEN)


def reduce_tokens(
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    reduction: str,
    *,
    max_completion_length: int,
    window_tokens: torch.Tensor | float,
    accumulation_steps: float,
) -> torch.Tensor:
    """
    Reduces the values of one micro-batch's loss tokens to its share of the loss of an optimizer step.

    With `s_b = sum_t mask_bt values_bt`, `n_b = sum_t mask_bt`, W = `window_tokens`, C = `accumulation_steps`:

    | reduction | share |
    |---|---|
    | "grpo", "sapo" | `mean_b (s_b / max(n_b, 1)) / C` |
    | "bnpo" | `sum_b s_b / max(sum_b n_b, 1) / C` |
    | "dr_grpo" | `sum_b s_b / (B max_completion_length) / C` |
    | "luspo" | `mean_b s_b / C` |
    | "cispo", "dapo", "vespo", "token_mean" | `sum_b s_b / W` |

    Summed over the micro-batches of a step, the last group does not depend on how the batch was cut, the means over b
    and "dr_grpo" do not as long as the cuts hold equally many completions, and "bnpo" does, its denominator being the
    micro-batch's own.
    Values outside the mask, NaN included, change nothing.

    Mirrors `GRPOTrainer._compute_loss` of TRL 1.16. "token_mean" is the mean over all loss tokens of the step.

    Args:
        values_BT: per-token values.
        mask_BT: 1 on loss tokens, 0 elsewhere.
        reduction: a TRL `loss_type`, or "token_mean".
        max_completion_length: TRL's `max_completion_length`; used by "dr_grpo".
        window_tokens: loss tokens of the step (in evaluation, of the batch) over all processes, at least 1, divided by
            the number of processes; used by the last group.
        accumulation_steps: micro-batches of the step, 1 in evaluation; used by all but the last group.

    Returns:
        Scalar, differentiable in `values_BT`.

    Raises:
        ValueError: if the shapes differ or the reduction is unknown.
    """
    if values_BT.dim() != 2 or mask_BT.shape != values_BT.shape:
        raise ValueError(
            "`values_BT` and `mask_BT` must share a shape (B, T), "
            f"got {tuple(values_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    kept_BT, lengths_B = values_BT.masked_fill(mask_BT == 0, 0), mask_BT.sum(-1)
    if reduction in PER_SEQUENCE_MEAN:
        return (kept_BT.sum(-1) / lengths_B.clamp(min=1)).mean() / accumulation_steps
    if reduction == "bnpo":
        return kept_BT.sum() / lengths_B.sum().clamp(min=1) / accumulation_steps
    if reduction == "dr_grpo":
        return kept_BT.sum() / (len(kept_BT) * max_completion_length) / accumulation_steps
    if reduction == "luspo":
        return kept_BT.sum(-1).mean() / accumulation_steps
    if reduction in PER_WINDOW_TOKEN:
        return kept_BT.sum() / window_tokens
    raise ValueError(f"`reduction` must be one of {REDUCTIONS}, got {reduction!r}")


def token_weights(mask_BT: torch.Tensor, reduction: str, **options: Any) -> torch.Tensor:
    """What each token's value counts in [`reduce_tokens`], `(B, T)`: its gradient, with the same arguments."""
    with torch.enable_grad():
        values_BT = torch.zeros_like(mask_BT, dtype=torch.float32).requires_grad_()
        (weights_BT,) = torch.autograd.grad(reduce_tokens(values_BT, mask_BT, reduction, **options), values_BT)
    return weights_BT


def importance_ratio(
    logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, mask_BT: torch.Tensor, level: str
) -> torch.Tensor:
    """
    Ratio of the policy to the policy that sampled the tokens, TRL's `coef_1`.

    "token": `exp(logp_bt - old_logp_bt)`. "sequence" (GSPO, arXiv 2507.18071): `exp` of the mean of that difference
    over the loss tokens of row b; 1 for a row without any.

    Args:
        logp_BT: log-probabilities under the policy.
        old_logp_BT: log-probabilities under the policy that sampled.
        mask_BT: 1 on loss tokens, 0 elsewhere, where values are ignored ("sequence") or may be anything ("token").
        level: "token" or "sequence", TRL's `importance_sampling_level`.

    Returns:
        Ratios, `(B, T)` for "token" and `(B, 1)` for "sequence", differentiable.

    Raises:
        ValueError: if the shapes differ or the level is unknown.
    """
    for name, tensor in {"old_logp_BT": old_logp_BT, "mask_BT": mask_BT}.items():
        if tensor.shape != logp_BT.shape:
            raise ValueError(f"`{name}` must have shape {tuple(logp_BT.shape)}, got {tuple(tensor.shape)}")
    log_ratio_BT = logp_BT - old_logp_BT
    if level == "token":
        return log_ratio_BT.exp()
    if level == "sequence":
        total_B1 = log_ratio_BT.masked_fill(mask_BT == 0, 0).sum(-1, keepdim=True)
        return torch.exp(total_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1))
    raise ValueError(f'`level` must be "token" or "sequence", got {level!r}')


def sequence_token_old_logps(logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    r"""
    Old log-probs under which a token-level ratio has the sequence ratio's value and the token's gradient.

    `old'_t = sg[logp_t] - sg[mean_t (logp_t - old_t)]`, so that `exp(logp_t - old'_t) = sg[s] logp-gradient of t` with
    the sequence ratio `s = exp(mean_t (logp_t - old_t))`: GSPO-token (arXiv 2507.18071, section 4.3).

    Args:
        logp_BT (`torch.Tensor` of shape `(B, T)`):
            Log-probs of the tokens under the policy, nats.
        old_logp_BT (`torch.Tensor` of shape `(B, T)`):
            Log-probs when they were sampled.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            Loss mask.

    Returns:
        `torch.Tensor` of shape `(B, T)`, without gradient.
    """
    logp_BT = logp_BT.detach()
    log_ratio_BT = (logp_BT - old_logp_BT).masked_fill(mask_BT == 0, 0.0)
    return logp_BT - log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)


class ExpectedLoss:
    """
    Gradients of the clipped loss and the KL term with respect to each token's log-prob and KL, before the loss is run.

    For `- sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + sum_t k_t KL_t` with `r_t = exp(logp_t - old_t)`:
    `- w_t A_t r_t` where the ratio is not clipped, else 0, and `k_t`.

    Args:
        weighted_advantages_BT (`torch.Tensor` of shape `(B, T)`):
            `w_t A_t`.
        kl_weights_BT (`torch.Tensor` of shape `(B, T)`):
            `k_t`.
        old_logp_BT (`torch.Tensor` of shape `(B, T)` or `None`):
            Log-probs when the tokens were sampled; `None` where the ratio is 1.
        low, high (`float`):
            The clip range.
    """

    def __init__(
        self,
        weighted_advantages_BT: torch.Tensor,
        kl_weights_BT: torch.Tensor,
        old_logp_BT: torch.Tensor | None,
        low: float,
        high: float,
    ):
        self.weighted_advantages_BT = weighted_advantages_BT
        self.kl_weights_BT = kl_weights_BT
        self.old_logp_BT = old_logp_BT
        self.low, self.high = low, high

    def at(self, mask_BT: torch.Tensor) -> Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]:
        """The two gradients of the tokens inside `mask_BT`, as a function of log-probs and the slice they are of."""
        advantages_N, kl_weights_N = (
            x.to(mask_BT.device)[mask_BT] for x in (self.weighted_advantages_BT, self.kl_weights_BT)
        )
        old_logp_N = None if self.old_logp_BT is None else self.old_logp_BT.to(mask_BT.device)[mask_BT]

        def gradients(logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            advantages = advantages_N[rows]
            if old_logp_N is None:
                return -advantages, kl_weights_N[rows]
            ratio = torch.exp(logp - old_logp_N[rows])
            clipped = torch.where(advantages > 0, ratio > 1 + self.high, ratio < 1 - self.low)
            return (-advantages * ratio).masked_fill(clipped, 0.0), kl_weights_N[rows]

        return gradients
