"""Importance ratios of the policy to the policy that sampled the tokens."""

import torch


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
