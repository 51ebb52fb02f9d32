"""What the fused head computes, written plainly: dense logits, and autograd for the gradients."""

from typing import NamedTuple

import torch

from ..divergences import exact_divergence


class TokenStats(NamedTuple):
    """
    Statistics of M tokens, each of shape `(M,)`, in nats.

    Args:
        logp (`torch.Tensor`):
            Log-prob of the target under the policy.
        entropy (`torch.Tensor`):
            Entropy of the policy.
        kl (`torch.Tensor`):
            Divergence of policy and reference.
        ref_logp (`torch.Tensor`):
            Log-prob of the target under the reference, without gradient.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_logp: torch.Tensor


def plain_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: str = "reverse",
) -> TokenStats:
    """
    The statistics that [`~trl_grpo_ext.kl.fused.token_stats.fused_token_stats`] computes, from all logits at once.

    To be read first, and to be compared with. It takes the same arguments, and holds about ten tensors of the size of
    the logits, `(M, V)`.
    """

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        z = y.to(torch.promote_types(y.dtype, torch.float32)) * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z / temperature

    policy_logits = logits(hidden, weight, bias)
    # Nothing of the reference is trained, not even a head that it shares with the policy
    with torch.no_grad():
        ref_logits = logits(ref_hidden, *((weight, bias) if ref_weight is None else (ref_weight, ref_bias)))
    logp = policy_logits.log_softmax(-1)
    ref_logp = ref_logits.log_softmax(-1)
    p = logp.exp()
    # 0 log 0 = 0
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    kl = exact_divergence(policy_logits, ref_logits, direction)
    target = targets[:, None]
    return TokenStats(logp.gather(-1, target)[:, 0], entropy, kl, ref_logp.gather(-1, target)[:, 0])
