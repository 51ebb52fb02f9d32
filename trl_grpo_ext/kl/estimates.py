"""
Estimates of `KL(policy || reference)` from the log-probs of the sampled tokens.

Every value is per token, in nats, and belongs to one next-token distribution, at a state that was visited. The sum
over a completion leaves out that a token also decides which states come later. Its gradient is therefore not the
gradient of the KL between the two distributions over whole completions (arXiv 2506.09477, 2504.10637). This holds for
the exact sum over the vocabulary too ([`~trl_grpo_ext.kl.divergences.exact_divergence`]).
"""

import torch

from ..tables import check_choice


SAMPLED_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Estimates `KL(policy || reference)` from the log-probs of the sampled token.

    With `l = logp - ref_logp`:

        k1 = l
        k2 = l^2 / 2
        k3 = exp(-l) + l - 1

    k2 and k3 are never negative. For tokens sampled from the policy, what each is right for:

    | estimator | mean | mean gradient, as a loss without the importance ratio |
    |---|---|---|
    | k1 | the KL | 0 |
    | k2 | not the KL | the KL's |
    | k3 | the KL | that of `KL(reference || policy)` |

    [`weight_by_ratio`] makes the gradients right.

    Reference: J. Schulman, "Approximating KL divergence" (2020); gradients: arXiv 2506.09477.

    Args:
        logp (`torch.Tensor`):
            Log-probs of the sampled tokens under the policy.
        ref_logp (`torch.Tensor`):
            Log-probs of the same tokens under the reference, same shape.
        estimator (`str`):
            `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor` in the shape of `logp`, differentiable in both arguments.

    Raises:
        ValueError: the shapes differ, or the estimator is unknown.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"`ref_logp` must have shape {tuple(logp.shape)}, got {tuple(ref_logp.shape)}")
    check_choice("estimator", estimator, SAMPLED_ESTIMATORS)
    log_ratio = logp - ref_logp
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    # exp(-l) - 1 by itself would round a small l away
    return torch.expm1(-log_ratio) + log_ratio


def weight_by_ratio(kl: torch.Tensor, ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Corrects an estimate for the sampling of its token: its mean gradient becomes that of the exact KL.

    With `ratio = policy / sampling policy` of each token, and `sg` the stop-gradient:

        k1, k3:  ratio * estimate
        k2:      sg[ratio] * estimate

    For tokens of any sampling policy that can sample every token, `ratio * k1` and `ratio * k3` also have the right
    mean. Their gradient is right because the ratio is differentiated (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    `use_bias_correction_kl`). k2 has the right gradient by itself, so its ratio is held constant. The exact KL has no
    sampled token, and is not corrected. With a sequence's ratio, no estimate is right off policy.

    Args:
        kl (`torch.Tensor` of shape `(B, T)`):
            Estimates.
        ratio (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
            From [`~trl_grpo_ext.loss.importance_ratio`].
        estimator (`str`):
            `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor` of shape `(B, T)`: values for the loss.

    Raises:
        ValueError: the estimator is unknown.
    """
    check_choice("estimator", estimator, SAMPLED_ESTIMATORS)
    # k2's gradient is right already: a differentiated ratio would add to it
    return kl * (ratio.detach() if estimator == "k2" else ratio)
