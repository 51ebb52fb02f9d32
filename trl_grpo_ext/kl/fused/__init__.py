"""Log-probability, entropy and exact KL from hidden states, without the `(N, V)` logits."""
