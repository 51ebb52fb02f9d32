"""Several reward sources: the oracle for every combination of options, what must be ignored, and what must commute."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.advantages.batches import (
    SCALES,
    UNITS,
    Batch,
    batches,
    computed,
    every_estimator,
    every_order,
    every_scale,
    few,
)
from tests.support import oracles


# Oracles


@every_order
@every_scale
@every_estimator
@few
@given(batch=batches, unit=st.sampled_from(UNITS))
def test_equals_the_oracle(batch, estimator, scale, order, unit):
    options = batch.options(estimator, scale, order, unit)
    np.testing.assert_allclose(batch.run(options), batch.oracle(options), rtol=0, atol=1e-10)


@every_order
@every_estimator
def test_equals_the_oracle_in_float32_on_a_large_batch(estimator, order):
    batch = Batch(seed=0, sources=3, groups=4, group_size=8, length=200)
    batch.eps = 1e-4
    batch.weights = batch.weights.astype(np.float32)
    options = batch.options(estimator, "group", order, "step")
    advantages = batch.run(options, rewards=batch.rewards.astype(np.float32))
    np.testing.assert_allclose(advantages, batch.oracle(options), rtol=1e-4, atol=1e-4)


def test_worked_example_sum_of_two_sources_with_their_own_gammas():
    """Returns 2 * [0.5, 1] + 3 * [1, 0] = [4, 2] against 0; the source missing for the second completion counts 0."""
    rewards = np.array([[[np.nan, 1.0], [np.nan, 0.0]], [[1.0, np.nan], [np.nan, np.nan]]])
    options = {"estimator": "position", "gamma": [0.5, 0.0], "scale": "none"}
    for function in (computed, oracles.process_advantages):
        inputs = (rewards, np.ones((2, 2)), np.array([2.0, 3.0]))
        inputs = [torch.tensor(x) for x in inputs] if function is computed else inputs
        np.testing.assert_allclose(np.asarray(function(*inputs, 2, **options)), [[2, 1], [-2, -1]], atol=1e-12)


def test_worked_example_batch_step_counts_every_completion_once():
    """Pooled values [0, h] and [-h], h = sqrt(1/2), weights 1/2, 1/2, 1: mean -h/4, variance 11/16."""
    rewards = np.array([[[np.nan, 1.0], [0.0, np.nan]]])
    options = {"estimator": "pooled", "gamma": 0.0, "aggregation": "normalize_then_sum", "eps": 0.0}
    expected = np.array([[0.25, 1.25], [-0.75, 0]]) * np.sqrt(0.5) / np.sqrt(11 / 16)
    for function in (computed, oracles.process_advantages):
        inputs = (rewards, np.array([[1, 1], [1, 0]]), np.array([1.0]))
        inputs = [torch.tensor(x) for x in inputs] if function is computed else inputs
        np.testing.assert_allclose(np.asarray(function(*inputs, 2, **options)), expected, atol=1e-12)


# What must be ignored


@every_order
@every_estimator
@few
@given(batch=batches, scale=st.sampled_from(SCALES), unit=st.sampled_from(UNITS))
def test_poison_outside_the_mask_changes_no_bit(batch, estimator, scale, unit, order):
    options = batch.options(estimator, scale, order, unit)
    clean = batch.run(options, rewards=np.where(batch.mask, batch.rewards, np.nan))
    for poison in (1e4, -1e4, np.nan, np.inf, -np.inf):
        poisoned = batch.run(options, rewards=np.where(batch.mask, batch.rewards, poison))
        assert np.array_equal(poisoned, clean)
    assert not clean[batch.mask == 0].any()


@every_order
@every_estimator
@few
@given(batch=batches, scale=st.sampled_from(SCALES), unit=st.sampled_from(UNITS))
def test_padding_columns_change_nothing(batch, estimator, scale, unit, order):
    options = batch.options(estimator, scale, order, unit)
    length = batch.mask.shape[1]
    rewards = np.pad(batch.rewards, ((0, 0), (0, 0), (0, 5)), constant_values=1e4)
    padded = batch.run(options, rewards=rewards, mask=np.pad(batch.mask, ((0, 0), (0, 5))))
    np.testing.assert_allclose(padded[:, :length], batch.run(options), rtol=0, atol=1e-12)
    assert not padded[:, length:].any()


@every_order
@every_estimator
@few
# What lies between two tokens decides where a turn ends
@given(batch=batches, scale=st.sampled_from(SCALES), unit=st.sampled_from([unit for unit in UNITS if unit != "turn"]))
def test_masked_tokens_in_the_middle_change_nothing(batch, estimator, scale, unit, order):
    """Tool output between a completion's own tokens: at different places in each completion."""
    options = batch.options(estimator, scale, order, unit)
    sources, count, length = batch.rewards.shape
    rewards = np.full((sources, count, length + 4), 1e4)
    mask = np.zeros((count, length + 4), dtype=np.int64)
    slots = np.stack([np.sort(batch.rng.permutation(length + 4)[:length]) for _ in range(count)])
    np.put_along_axis(mask, slots, batch.mask, axis=1)
    for k in range(sources):
        np.put_along_axis(rewards[k], slots, batch.rewards[k], axis=1)
    advantages = batch.run(options, rewards=rewards, mask=mask)
    kept = np.take_along_axis(advantages, slots, axis=1)
    np.testing.assert_allclose(kept, batch.run(options), rtol=0, atol=1e-12)


@every_order
@every_estimator
@few
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from(SCALES), sources=st.integers(1, 3))
def test_an_unjudged_completion_is_as_if_absent(seed, estimator, scale, sources, order):
    batch = Batch(seed, sources, groups=3, group_size=4, length=6)
    absent = np.array([batch.rng.integers(4) + 4 * group for group in range(3)])
    # It has loss tokens, so only the missing rewards can keep it out of the statistics.
    batch.mask[absent] = 1
    batch.rewards[:, absent] = np.nan
    options = batch.options(estimator, scale, order)
    advantages = batch.run(options)
    assert not advantages[absent].any()
    without = batch.run(
        options,
        rewards=np.delete(batch.rewards, absent, axis=1),
        mask=np.delete(batch.mask, absent, axis=0),
        group_size=3,
    )
    np.testing.assert_allclose(np.delete(advantages, absent, axis=0), without, rtol=0, atol=1e-12)


@every_estimator
def test_a_missing_source_is_left_out_of_that_completion_only(estimator):
    """Under "normalize_then_sum" a source's group statistics are those of the completions that it judges."""
    batch = Batch(seed=5, sources=2, groups=1, group_size=4, length=5)
    batch.mask[:] = 1
    batch.rewards = batch.rng.normal(size=batch.rewards.shape)
    # The first source judges all completions and has no spread, so that its own advantages are 0.
    batch.rewards[0] = 0.0
    batch.rewards[1, 2:] = np.nan
    batch.weights = np.array([1.0, 1.0])
    advantages = batch.run(batch.options(estimator, order="normalize_then_sum"))
    of_pair = batch.run(
        batch.options(estimator) | {"gamma": batch.gammas[1]},
        rewards=batch.rewards[1:, :2],
        mask=batch.mask[:2],
        weights=batch.weights[1:],
        group_size=2,
    )
    before_batch_step = np.concatenate([of_pair, np.zeros((2, 5))])
    mean, std, _ = oracles.moments([(x, 0.2) for x in before_batch_step.ravel()])
    np.testing.assert_allclose(advantages, (before_batch_step - mean) / (std + batch.eps), atol=1e-10)


@every_order
@every_scale
@every_estimator
def test_sources_that_cancel_give_exactly_zero(estimator, scale, order):
    """Weights 0.1 + 0.2 - 0.3 of one and the same source leave 1e-17, in the sum and in TRL's batch step."""
    batch = Batch(seed=1, sources=1, groups=2, group_size=4, length=6)
    batch.rewards, batch.weights = np.repeat(batch.rewards, 3, axis=0), np.array([0.1, 0.2, -0.3])
    batch.gammas, batch.eps = [0.9] * 3, 1e-8
    options = batch.options(estimator, scale, order)
    assert not batch.run(options).any()
    assert batch.run(options, weights=np.array([0.1, 0.2, -0.2])).any()


# Sources of weight 0


def with_monitor(batch, options):
    """The batch's inputs with one more source, of weight 0 and with a gamma of its own, and the options for it."""
    sources = len(batch.weights)
    at = int(batch.rng.integers(sources + 1))
    monitor = batch.rng.choice([np.nan, np.nan, -1e6, 0.0, 0.3, 7.0], size=batch.mask.shape)
    monitor[batch.rng.random(len(monitor)) < 0.3] = np.nan
    gammas = options["gamma"] if isinstance(options["gamma"], list) else [options["gamma"]] * sources
    inputs = {
        "rewards": np.insert(batch.rewards, at, monitor, axis=0),
        "weights": np.insert(batch.weights, at, batch.rng.choice([0.0, -0.0])),
    }
    return inputs, options | {"gamma": [*gammas[:at], 0.37, *gammas[at:]]}


@every_order
@every_estimator
@few
@given(batch=batches, scale=st.sampled_from(SCALES), unit=st.sampled_from(UNITS))
def test_a_source_of_weight_0_changes_no_bit(batch, estimator, scale, order, unit):
    options = batch.options(estimator, scale, order, unit)
    inputs, monitored = with_monitor(batch, options)
    assert np.array_equal(batch.run(monitored, **inputs), batch.run(options))


@every_order
@every_estimator
def test_a_completion_that_only_a_source_of_weight_0_judges_is_unjudged(estimator, order):
    batch = Batch(seed=4, sources=2, groups=2, group_size=4, length=6)
    batch.mask[:] = 1
    batch.rewards = batch.rng.normal(size=batch.rewards.shape)
    absent = [1, 6]
    batch.rewards[0, absent] = np.nan
    batch.weights = np.array([1.5, 0.0])
    options = batch.options(estimator, order=order)
    advantages = batch.run(options)
    assert not advantages[absent].any()
    without = batch.run(
        options,
        rewards=np.delete(batch.rewards, absent, axis=1),
        mask=np.delete(batch.mask, absent, axis=0),
        group_size=3,
    )
    np.testing.assert_allclose(np.delete(advantages, absent, axis=0), without, rtol=0, atol=1e-12)
    assert np.abs(without).max() > 0.1


@every_order
@every_estimator
def test_weights_that_are_all_0_give_exactly_0(estimator, order):
    batch = Batch(seed=4, sources=3, groups=2, group_size=4, length=6)
    advantages = batch.run(batch.options(estimator, order=order), weights=np.zeros(3))
    assert advantages.shape == batch.mask.shape
    assert not advantages.any()


# What must commute


@every_order
@every_estimator
@few
@given(batch=batches, scale=st.sampled_from(SCALES), unit=st.sampled_from(UNITS))
def test_permuting_completions_groups_and_sources_permutes_the_advantages(batch, estimator, scale, unit, order):
    options = batch.options(estimator, scale, order, unit)
    advantages = batch.run(options)
    sources, count, _ = batch.rewards.shape
    groups = np.arange(count).reshape(-1, batch.group_size)
    rows = batch.rng.permuted(batch.rng.permutation(groups), axis=1).ravel()
    permuted = batch.run(options, rewards=batch.rewards[:, rows], mask=batch.mask[rows])
    np.testing.assert_allclose(permuted, advantages[rows], rtol=0, atol=1e-10)
    order_of_sources = batch.rng.permutation(sources)
    if isinstance(options["gamma"], list):
        options["gamma"] = [options["gamma"][k] for k in order_of_sources]
    permuted = batch.run(options, rewards=batch.rewards[order_of_sources], weights=batch.weights[order_of_sources])
    np.testing.assert_allclose(permuted, advantages, rtol=0, atol=1e-10)


# Inputs


@every_order
@every_estimator
def test_inputs_are_not_modified(estimator, order):
    batch = Batch(seed=3, sources=2, groups=2, group_size=3, length=6)
    tensors = [torch.tensor(x) for x in (batch.rewards, batch.mask, batch.weights)]
    copies = [x.clone() for x in tensors]
    computed(*tensors, 3, **batch.options(estimator, order=order))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(torch.nan_to_num(tensor, nan=7.0), torch.nan_to_num(copy, nan=7.0))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_the_mask_may_be_bool_int_or_float(kind):
    batch = Batch(seed=3, sources=2, groups=2, group_size=3, length=6)
    options = batch.options("position-all")
    advantages = computed(
        torch.tensor(batch.rewards), torch.tensor(batch.mask).to(kind), torch.tensor(batch.weights), 3, **options
    )
    np.testing.assert_allclose(advantages.numpy(), batch.oracle(options), atol=1e-10)


SHAPES = {"rewards": (2, 6, 5), "mask": (6, 5), "weights": (2,)}


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("rewards", (6, 5), r"6, ?5"),
        ("rewards", (2, 7, 5), r"7, ?5"),
        ("mask", (6, 9), r"6, ?9"),
        ("mask", (30,), r"30"),
        ("weights", (3,), r"3"),
        ("weights", (2, 1), r"2, ?1"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    tensors = {key: torch.ones(shape if key == name else size) for key, size in SHAPES.items()}
    with pytest.raises(ValueError, match=message):
        computed(*tensors.values(), 3, estimator="position", gamma=0.9)


@pytest.mark.parametrize("group_size", [0, 4])
def test_a_group_size_that_does_not_divide_is_named(group_size):
    with pytest.raises(ValueError, match=rf"{group_size}"):
        computed(*[torch.ones(s) for s in SHAPES.values()], group_size, estimator="position", gamma=0.9)


@pytest.mark.parametrize("option", ["estimator", "gamma_unit", "aggregation", "scale"])
def test_an_unknown_name_is_named(option):
    options = {"estimator": "position", "gamma": 0.9, option: "positoin"}
    with pytest.raises(ValueError, match=rf"^{option} must be one of .*'positoin'"):
        computed(*[torch.ones(s) for s in SHAPES.values()], 3, **options)


def test_as_many_gammas_as_sources():
    with pytest.raises(ValueError, match="3"):
        computed(*[torch.ones(s) for s in SHAPES.values()], 3, estimator="position", gamma=[0.9, 0.8, 0.7])


@pytest.mark.parametrize("estimator", ["pooled", "step"])
def test_one_summed_stream_has_one_gamma(estimator):
    inputs = [torch.ones(s) for s in SHAPES.values()]
    with pytest.raises(ValueError, match="gamma"):
        computed(*inputs, 3, estimator=estimator, gamma=[0.9, 0.8])
    same = computed(*inputs, 3, estimator=estimator, gamma=[0.9, 0.9])
    assert torch.equal(same, computed(*inputs, 3, estimator=estimator, gamma=0.9))
    computed(*inputs, 3, estimator=estimator, gamma=[0.9, 0.8], aggregation="normalize_then_sum")
