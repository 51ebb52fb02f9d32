"""
The KL divergence of the policy against the reference: estimates from the sampled token, and the exact sum.

All figures are per token, in nats, `KL(policy || reference)`. Each is the divergence of one next-token distribution at
a state that was visited. Their sum over a completion leaves out that a token also decides which states come later: its
gradient is not that of the KL between the two distributions over whole completions (arXiv 2506.09477, 2504.10637).
"""

import torch


ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Estimates `KL(policy || reference)` from the log-probabilities of the sampled token.

    With `l = logp - ref_logp`: `k1 = l`, `k2 = l^2 / 2`, `k3 = exp(-l) + l - 1`, in nats.

    Under tokens sampled from the policy, the means of k1 and k3 are the KL and that of k2 is not; k2 and k3 are never
    negative. As a loss it is the other way round: the expected gradient of k2 is the KL's, that of k3 is the one of
    `KL(reference || policy)`, and that of k1 is 0, unless the importance ratio multiplies them (`weight_by_ratio`).

    Reference: J. Schulman, "Approximating KL divergence" (2020); gradients: arXiv 2506.09477.

    Args:
        logp: policy's log-probabilities of the sampled tokens, any shape.
        ref_logp: the reference's, same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        Estimates in the shape of `logp`, differentiable in both arguments.

    Raises:
        ValueError: if the shapes differ or the estimator is unknown.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"`ref_logp` must have shape {tuple(logp.shape)}, got {tuple(ref_logp.shape)}")
    log_ratio = logp - ref_logp
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"`estimator` must be one of {ESTIMATORS}, got {estimator!r}")


def weight_by_ratio(kl: torch.Tensor, ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Corrects an estimate for the sampling of its token, so that its expected gradient is that of the exact KL.

    With `ratio = policy / sampling policy` at token level, for tokens of any sampling policy with full support:
    `ratio * k1` and `ratio * k3` are unbiased in value, and in gradient because the ratio is differentiated
    (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`); k2's own gradient is right already, so its ratio
    is held constant; the exact KL has no sampled token and is returned as it is. A sequence-level ratio makes none of
    them unbiased off policy.

    Args:
        kl: per-token estimates, `(B, T)`.
        ratio: from `importance_ratio`, `(B, T)` or `(B, 1)`.
        estimator: "k1", "k2", "k3" or "exact".

    Returns:
        Per-token values for the loss, in the shape of `kl`.

    Raises:
        ValueError: if the estimator is unknown.
    """
    if estimator == "exact":
        return kl
    if estimator not in ESTIMATORS:
        raise ValueError(f'`estimator` must be one of {ESTIMATORS} or "exact", got {estimator!r}')
    return kl * (ratio.detach() if estimator == "k2" else ratio)
