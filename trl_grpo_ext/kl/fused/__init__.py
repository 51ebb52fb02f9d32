"""
Log-prob, entropy and exact divergence of each token from hidden states, without a tensor of all logits.

`plain` says in a few lines what is computed, `token_stats` how it is computed in little memory.
"""
