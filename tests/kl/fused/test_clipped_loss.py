"""A training loss through the fused head: clipped policy term, KL and entropy bonus, against float64 autograd."""

import math

import pytest
import torch

from tests.kl.fused.problems import dense, fused, problem, trained


BETA = 0.3
ENTROPY_COEF = 0.05


def loss(stats, p):
    """`-min(r A, clip(r) A) + beta KL - c entropy`, a sum over the tokens, with ratios on both sides of the clip."""
    ratio = torch.exp(stats.logp - (stats.logp.detach() + 0.3 * p.mix[0].to(stats.logp)))
    advantages = p.mix[1].to(stats.logp)
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (policy + BETA * stats.kl - ENTROPY_COEF * stats.entropy).sum()


# With float32 products a kernel's block has 2,048 entries
@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(0, 50), (1, 1), (1, 2048), (3, 7), (2, 2049), (5, 2047), (3, 4096), (2, 4097)]
)
@pytest.mark.parametrize("scaling", [{"temperature": 0.7}, {"softcap": 3.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_clipped_loss_with_kl_and_entropy(tokens, vocabulary, scaling, direction):
    p = problem(tokens, 6, vocabulary, ref_width=4)
    # A whole block of tokens is excluded: the first one, by both models or by the one that may alone
    if vocabulary > 2048 and "softcap" not in scaling:
        if direction == "reverse" or vocabulary == 2049:
            p.bias[:2048] = -math.inf
        if direction == "forward" or vocabulary == 2049:
            p.ref_bias[:2048] = -math.inf
        p.targets = torch.full((tokens,), vocabulary - 1)
    leaves = trained(p)
    stats = fused(p, **scaling, direction=direction)
    expected, expected_leaves = dense(p, **scaling, direction=direction)
    found = torch.autograd.grad(loss(stats, p), leaves)
    truth = torch.autograd.grad(loss(expected, p), expected_leaves)
    for x, y in zip(stats, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    for x, y in zip(found, truth, strict=True):
        largest = y.abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(x.double(), y.nan_to_num(0.0), rtol=0, atol=1e-5 * largest + 1e-7)
