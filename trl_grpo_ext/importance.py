"""Importance ratios of the policy to the policy that sampled the tokens."""

import torch


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
