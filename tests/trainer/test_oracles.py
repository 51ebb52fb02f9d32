"""The oracles' own check."""

import numpy as np
import pytest

from tests.support import oracles


def test_seed_loss_gradient_is_the_derivative_of_seed_loss():
    """The oracle's own check: central differences, with ratios inside and on both sides of the clip."""
    rng = np.random.default_rng(8)
    logits, ref_logits = 2 * rng.normal(size=(2, 3, 4, 5))
    tokens = rng.integers(0, 5, size=(3, 4))
    chosen = np.take_along_axis(oracles.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    old_logp = chosen + rng.choice([-0.5, -0.05, 0.05, 0.5], size=(3, 4))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    others = (ref_logits, tokens, old_logp, rng.normal(size=(3, 4)), mask)
    options = {"epsilon": 0.2, "beta": 0.3, "max_len": 6}
    gradient = oracles.seed_loss_gradient(logits, *others, **options)
    for index in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        difference = oracles.seed_loss(up, *others, **options)[0] - oracles.seed_loss(down, *others, **options)[0]
        assert gradient[index] == pytest.approx(difference / 2e-6, abs=1e-8)
    loss, policy, kl = oracles.seed_loss(logits, *others, **options)
    assert loss == pytest.approx(policy + 0.3 * kl)
    # One token of two equally likely ones, ratio 1, advantage 3, one position of two: -3 / 2; KL(1/2 || 3/4).
    loss, policy, kl = oracles.seed_loss(
        np.zeros((1, 2, 2)), np.log([[[3.0, 1.0], [1.0, 1.0]]]), [[0, 0]], np.log([[0.5, 0.5]]), [[3.0, 9.0]], [[1, 0]]
    )
    assert policy == pytest.approx(-1.5)
    assert kl == pytest.approx(0.5 * np.log(4 / 3))
