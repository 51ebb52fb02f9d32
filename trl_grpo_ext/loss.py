"""
Everything that mirrors `GRPOTrainer._compute_loss` of TRL 1.16.

The KL term is added beside TRL's loss, so it has to be masked, reduced and weighted as TRL does it with the policy
term. This is the one file to read again when that method changes:

- the loss mask and the log-probs of the completion's tokens ([`loss_mask`], [`completion_logps`]),
- the reduction of each loss type and the tokens of an optimizer step ([`reduce_tokens`], [`window_tokens`]),
- the importance ratio of each level ([`importance_ratio`], [`sequence_token_old_logps`]),
- the gradient of the clipped loss ([`ClippedLossGradient`]).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch


PER_SEQUENCE_MEAN = ("grpo", "sapo")
PER_WINDOW_TOKEN = ("cispo", "dapo", "vespo", "token_mean")
LOSS_REDUCTIONS = (*PER_SEQUENCE_MEAN, "bnpo", "dr_grpo", "luspo", *PER_WINDOW_TOKEN)
# Loss types whose policy term is the clipped ratio times the advantage
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """
    Tokens that are trained on, `(B, T)`: neither padding, nor masked truncated completions, nor tool output.

    Args:
        inputs (`Mapping[str, Any]`):
            A batch as TRL scored it.
    """
    mask_BT = inputs["completion_mask"]
    return mask_BT * inputs["tool_mask"] if "tool_mask" in inputs else mask_BT


def completion_logps(output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Log-probs of the completion's tokens, `(B, T)`, from the output of TRL's fused forward over the whole input."""
    return output.log_probs[:, -inputs["completion_ids"].size(1) :]


# ---------------------------------------------------------------------------------------------------------------------
# Reductions


def window_tokens(
    num_items_in_batch: torch.Tensor, num_processes: int, accumulation_steps: float, steps_per_generation: float
) -> torch.Tensor:
    """
    Loss tokens of one optimizer step over all processes, at least 1, divided by the number of processes.

    With `n` the loss tokens of the generated batch, `P` processes, and `C` of its `M` micro-batches in an optimizer
    step:

        W = max(n, 1) / P * C / M

    In evaluation the batch is neither cut nor accumulated: `C = M = 1`.

    Args:
        num_items_in_batch (`torch.Tensor`):
            Loss tokens of the generated batch over all processes, a scalar.
        num_processes (`int`):
            Number of processes.
        accumulation_steps (`float`):
            Micro-batches of an optimizer step.
        steps_per_generation (`float`):
            Micro-batches of a generated batch.
    """
    return num_items_in_batch.clamp(min=1.0) / num_processes * accumulation_steps / steps_per_generation


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
    Reduce the values of one micro-batch's loss tokens to its share of the loss of an optimizer step.

    With `s_b = sum_t mask_bt values_bt`, `n_b = sum_t mask_bt`, `W` = `window_tokens`, `C` = `accumulation_steps`:

    | reduction | share |
    |---|---|
    | `"grpo"`, `"sapo"` | `mean_b (s_b / max(n_b, 1)) / C` |
    | `"bnpo"` | `sum_b s_b / max(sum_b n_b, 1) / C` |
    | `"dr_grpo"` | `sum_b s_b / (B max_completion_length) / C` |
    | `"luspo"` | `mean_b s_b / C` |
    | `"cispo"`, `"dapo"`, `"vespo"`, `"token_mean"` | `sum_b s_b / W` |

    An optimizer step adds the shares of its micro-batches up. How the batch is cut into micro-batches then changes

    - nothing for the last row of the table,
    - nothing for the means over b and for `"dr_grpo"`, provided that all micro-batches hold equally many completions,
    - the result of `"bnpo"`, which divides by the micro-batch's own number of tokens.

    Values outside the mask, NaN included, change nothing. `"token_mean"` is not TRL's: it is the mean over all loss
    tokens of the step.

    Args:
        values_BT (`torch.Tensor` of shape `(B, T)`):
            Per-token values.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            1 on loss tokens, 0 elsewhere.
        reduction (`str`):
            A TRL `loss_type`, or `"token_mean"`.
        max_completion_length (`int`):
            TRL's `max_completion_length`; used by `"dr_grpo"`.
        window_tokens (`torch.Tensor` or `float`):
            See [`window_tokens`]; used by the last row of the table.
        accumulation_steps (`float`):
            Micro-batches of the step, 1 in evaluation; used by all rows but the last.

    Returns:
        `torch.Tensor`: a scalar, differentiable in `values_BT`.

    Raises:
        ValueError: the shapes differ, or the reduction is unknown.
    """
    if values_BT.dim() != 2 or mask_BT.shape != values_BT.shape:
        raise ValueError(
            "`values_BT` and `mask_BT` must share a shape (B, T), "
            f"got {tuple(values_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    kept_BT = values_BT.masked_fill(mask_BT == 0, 0)
    lengths_B = mask_BT.sum(-1)
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
    raise ValueError(f"`reduction` must be one of {LOSS_REDUCTIONS}, got {reduction!r}")


def token_weights(mask_BT: torch.Tensor, reduction: str, **options: Any) -> torch.Tensor:
    """What each token's value counts in [`reduce_tokens`], `(B, T)`: its gradient, with the same arguments."""
    with torch.enable_grad():
        values_BT = torch.zeros_like(mask_BT, dtype=torch.float32).requires_grad_()
        (weights_BT,) = torch.autograd.grad(reduce_tokens(values_BT, mask_BT, reduction, **options), values_BT)
    return weights_BT


# ---------------------------------------------------------------------------------------------------------------------
# Importance ratio


def importance_ratio(
    logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, mask_BT: torch.Tensor, level: str
) -> torch.Tensor:
    """
    Ratio of the policy to the policy that sampled the tokens, TRL's `coef_1`.

    With `l_bt = logp_bt - old_logp_bt` and `n_b` the number of loss tokens of row b:

        "token":     exp(l_bt)
        "sequence":  exp(sum_t mask_bt l_bt / max(n_b, 1))

    The second is that of GSPO (arXiv 2507.18071, equation 7).

    Args:
        logp_BT (`torch.Tensor` of shape `(B, T)`):
            Log-probs under the policy, nats.
        old_logp_BT (`torch.Tensor` of shape `(B, T)`):
            Log-probs under the policy that sampled.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            1 on loss tokens, 0 elsewhere. There, `"sequence"` ignores the log-probs.
        level (`str`):
            `"token"` or `"sequence"`, TRL's `importance_sampling_level`.

    Returns:
        `torch.Tensor` of shape `(B, T)` for `"token"` and `(B, 1)` for `"sequence"`, differentiable.

    Raises:
        ValueError: the shapes differ, or the level is unknown.
    """
    for name, tensor in {"old_logp_BT": old_logp_BT, "mask_BT": mask_BT}.items():
        if tensor.shape != logp_BT.shape:
            raise ValueError(f"`{name}` must have shape {tuple(logp_BT.shape)}, got {tuple(tensor.shape)}")
    log_ratio_BT = logp_BT - old_logp_BT
    if level == "token":
        return log_ratio_BT.exp()
    if level == "sequence":
        return torch.exp(_mean_over_tokens(log_ratio_BT, mask_BT))
    raise ValueError(f'`level` must be "token" or "sequence", got {level!r}')


def sequence_token_old_logps(logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    r"""
    Old log-probs that give a token-level ratio the value of the sequence's ratio and the gradient of the token's.

    With `sg` the stop-gradient:

        old'_t = sg[logp_t] - sg[mean_t (logp_t - old_t)]

    so that `exp(logp_t - old'_t)` has the value of `exp(mean_t (logp_t - old_t))` and a gradient with respect to
    `logp_t` only: GSPO-token (arXiv 2507.18071, section 4.3).

    TRL's loss reads the old log-probs after its forward pass, which is why they can still be replaced then.

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
    return logp_BT - _mean_over_tokens(logp_BT - old_logp_BT, mask_BT)


def _mean_over_tokens(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the loss tokens of each row, `(B, 1)`; 0 for a row without any."""
    return values_BT.masked_fill(mask_BT == 0, 0.0).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


class ClippedLossGradient:
    r"""
    Gradient of the clipped policy loss and the KL term with respect to each token's log-prob and KL.

    The loss, with `r_t = exp(logp_t - old_t)` and weights `w_t` and `k_t` that the reductions give:

        loss = - sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + sum_t k_t KL_t

    Its gradients:

        d loss / d logp_t = - w_t A_t r_t    where the ratio is not clipped, else 0
        d loss / d KL_t   = k_t

    They need nothing but the token's own log-prob, so the fused head can apply them before the loss is computed.

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
        self.low = low
        self.high = high

    def at(self, mask_BT: torch.Tensor) -> Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]:
        """The two gradients of the M tokens inside `mask_BT`, as a function of log-probs and the slice they are of."""
        advantages_M = self.weighted_advantages_BT.to(mask_BT.device)[mask_BT]
        kl_weights_M = self.kl_weights_BT.to(mask_BT.device)[mask_BT]
        old_logp_M = None if self.old_logp_BT is None else self.old_logp_BT.to(mask_BT.device)[mask_BT]

        def gradients(logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            advantages = advantages_M[rows]
            if old_logp_M is None:
                return -advantages, kl_weights_M[rows]
            ratio = torch.exp(logp - old_logp_M[rows])
            clipped = torch.where(advantages > 0, ratio > 1 + self.high, ratio < 1 - self.low)
            return (-advantages * ratio).masked_fill(clipped, 0.0), kl_weights_M[rows]

        return gradients
