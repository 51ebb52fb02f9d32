"""
The KL of policy and reference.

- `estimates`: from the sampled token.
- `divergences`: exact, over the whole vocabulary; one table, dense.
- `fused`: the same from hidden states, without a tensor of all logits.
- `model_forward`, `reference`, `cached_reference`: how the exact KL gets at both models' hidden states.
- `supported`, `start`, `own_logits`: what would train on another KL than the one that was asked for is said before.
- `trainer`: the KL in TRL's loss.
"""
