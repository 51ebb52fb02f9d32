"""The KL and the log-probs of whole models from their own logits, each completion alone and unpadded."""

from typing import Any

import torch

from tests.support.training import FixedCompletions, dense_logits


TEMPERATURE = 0.7


def dense_kl(
    policy: Any, reference: Any, rows: FixedCompletions, row: int, direction: str = "reverse"
) -> torch.Tensor:
    """`sum_v p_v (log p_v - log q_v)` at each token of one completion; "forward": `sum_v q_v (log q_v - log p_v)`."""
    logp = dense_logits(policy, rows, row, TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        ref_logp = dense_logits(reference, rows, row, TEMPERATURE).log_softmax(-1)
    if direction == "forward":
        return (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def dense_logps(model: Any, rows: FixedCompletions, row: int, temperature: float) -> torch.Tensor:
    """Log-prob of each token of one completion."""
    logps = dense_logits(model, rows, row, temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(rows.completion_ids[row])[:, None])[:, 0]


def mean_dense_kl(policy: Any, reference: Any, rows: FixedCompletions, direction: str = "reverse") -> torch.Tensor:
    """Mean over all tokens, as `loss_type="dapo"` reduces it."""
    kl_rows = [dense_kl(policy, reference, rows, row, direction) for row in range(len(rows.completion_ids))]
    return torch.cat(kl_rows).mean()
