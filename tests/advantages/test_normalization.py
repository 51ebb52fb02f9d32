"""Means, standard deviations and normalisation: the oracle, and what is never read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.advantages.batches import SCALES, few
from tests.support import oracles
from trl_grpo_ext.advantages.normalization import (
    compare,
    completion_weights,
    mean_of_others,
    pack_order,
    standardize,
    weighted_moments,
)


def random_groups(seed):
    """Values `(P, G, T)`, weights 0, 1 or `1 / L`, and the values with NaN wherever the weight is 0."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, [4, 5, 7])
    values = np.round(rng.normal(size=shape), 1)
    counted = rng.random(values.shape) < 0.7
    weights = counted.astype(np.float64)
    if seed % 2:
        weights /= np.maximum(counted.sum(2, keepdims=True), 1)
    return values, weights, np.where(counted, values, np.nan)


def pairs(values, weights):
    return list(zip(values.ravel().tolist(), weights.ravel().tolist(), strict=True))


def standardized(values, weights, group_dims, scale, eps):
    tensors = (torch.tensor(values), torch.tensor(weights))
    return standardize(tensors[0], compare(*tensors, group_dims, scale=scale, eps=eps), scale=scale).numpy()


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_moments_equal_the_oracle_and_read_nothing_of_weight_0(seed):
    _, weights, poisoned = random_groups(seed)
    moments = weighted_moments(torch.tensor(poisoned), torch.tensor(weights), (1, 2))
    for group in range(len(weights)):
        mean, std, flat = oracles.moments(pairs(poisoned[group], weights[group]))
        assert moments.has_spread[group].item() is not flat
        if not flat:
            assert moments.mean[group].item() == pytest.approx(mean, abs=1e-12)
            assert moments.std[group].item() == pytest.approx(std, abs=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@few
@given(seed=st.integers(0, 2**32 - 1), eps=st.sampled_from([0.0, 0.1]))
def test_standardize_equals_the_oracle_and_reads_nothing_of_weight_0(seed, eps, scale):
    _, weights, poisoned = random_groups(seed)
    whole = standardized(poisoned, weights, (1, 2), scale, eps)
    for group in range(len(weights)):
        expected = oracles.standardise(pairs(poisoned[group], weights[group]), pairs(poisoned, weights), scale, eps)
        np.testing.assert_allclose(whole[group].ravel(), expected, atol=1e-10)
    # Along one axis the weights are 0 or 1: tokens are not compared by completion.
    weights = (weights > 0).astype(np.float64)
    columns = standardized(poisoned, weights, (1,), scale, eps)
    for t in range(weights.shape[2]):
        batch = pairs(poisoned[:, :, t], weights[:, :, t])
        for group in range(len(weights)):
            expected = oracles.standardise(pairs(poisoned[group, :, t], weights[group, :, t]), batch, scale, eps)
            np.testing.assert_allclose(columns[group, :, t], expected, atol=1e-10)


@few
@given(seed=st.integers(0, 2**31 - 1))
def test_the_mean_of_others_leaves_out_the_completion_itself_and_weight_0(seed):
    values, weights, poisoned = random_groups(2 * seed)
    means = mean_of_others(torch.tensor(poisoned), torch.tensor(weights)).numpy()
    for p, i, t in np.ndindex(*values.shape):
        others = [values[p, j, t] for j in range(values.shape[1]) if j != i and weights[p, j, t]]
        assert means[p, i, t] == pytest.approx(np.mean(others) if others else 0.0, abs=1e-12)


def test_every_judged_completion_has_weights_that_sum_to_1():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    weights = completion_weights(mask, torch.tensor([True, True, False, True]), torch.float64)
    third = 1 / 3
    assert weights.tolist() == [[third, third, third, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_pack_order_keeps_the_order_among_the_packed():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert pack_order(mask).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]
