"""Per-token values to a scalar, as each of TRL's loss types does it for its policy term."""

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
