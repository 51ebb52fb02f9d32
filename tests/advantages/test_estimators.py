"""The estimators: worked examples, zero spread, what must not matter, reductions, and a row added from outside."""

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.advantages.batches import (
    LABELS,
    ORDERS,
    SCALES,
    Batch,
    advantages_of,
    batches,
    computed,
    every_order,
    every_scale,
    every_unit,
    few,
    outcome,
)
from tests.support import oracles
from trl_grpo_ext.advantages.comparisons import Compared
from trl_grpo_ext.advantages.estimators import ESTIMATORS, Estimator


NONE = float("nan")


# Worked examples: every number was derived by hand; the oracle is held to them as well


RAGGED = ([[1, 0, 2], [3, NONE, NONE]], [[1, 1, 1], [1, 0, 0]])
STEPS = ([[1, NONE, 5], [NONE, 3, NONE]], [[1, 1, 1], [1, 1, 0]])
PLACES = ([[1, NONE, 5], [3, 1, NONE]], [[1, 1, 1], [1, 1, 1]])
SOFT = ([[0.2, 0.2 + 0.1 * np.log(3)], [1.0, NONE]], [[1, 1], [1, 0]])
PAIRS = ([[0.0], [2.0], [10.0], [14.0]], [[1], [1], [1], [1]])
HALF = np.sqrt(0.5)

WORKED_EXAMPLES = [
    # Returns [1.5, 1, 2] and [3]; means over the group 2.25, 0.5, 1, or over the one completion still running.
    (RAGGED, {"estimator": "position-all", "scale": "none"}, [[-0.75, 0.5, 1], [0.75, 0, 0]]),
    (RAGGED, {"estimator": "position-active", "scale": "none"}, [[-0.75, 0, 0], [0.75, 0, 0]]),
    (RAGGED, {"estimator": "position-leave_one_out", "scale": "none"}, [[-1.5, 1, 2], [1.5, 0, 0]]),
    (RAGGED, {"estimator": "position-all", "scale": "group"}, [[-HALF, HALF, HALF], [HALF, 0, 0]]),
    (
        RAGGED,
        {"estimator": "position-all", "scale": "group", "eps": HALF},
        [[-0.6 * HALF, 0.5 * HALF, HALF * 2 / 3], [0.6 * HALF, 0, 0]],
    ),
    # Rewards 1, 5 and 3: mean 3, std 2, so -1, 1 and 0, then summed to go.
    (STEPS, {"estimator": "pooled", "scale": "group"}, [[-0.75, 0.5, 1], [0, 0, 0]]),
    (STEPS, {"estimator": "pooled", "scale": "group", "gamma_unit": "step"}, [[-0.5, 1, 1], [0, 0, 0]]),
    # First steps 1 and 3, second steps 5 and 1.
    (PLACES, {"estimator": "step", "scale": "none"}, [[-0.5, 1, 2], [0, -2, 0]]),
    (PLACES, {"estimator": "step", "scale": "none", "gamma_unit": "step"}, [[0, 2, 2], [0, -2, 0]]),
    # Soft-min weights 3/4 and 1/4: r* = [0.15, 0.05 + 0.025 ln 3]; the mean returns are 0.1524653 and 1.
    (
        SOFT,
        {"estimator": "min", "scale": "none", "gamma": 1.0},
        [[-0.77253469, -0.92253469], [0.84753469, 0]],
    ),
    # Variance with the first completion's tokens at weight 1/2: 0.5 * 0.1216387 + 0.5 * 0.2487689 + 0.1795788.
    (
        SOFT,
        {"estimator": "min", "scale": "group", "gamma": 1.0},
        [[-1.27908963, -1.52744539], [1.40326751, 0]],
    ),
    # Group means 1 and 12; the batch's variance is 131 / 3.
    (PAIRS, {"estimator": "position-all", "scale": "batch"}, np.array([[-1], [1], [-2], [2]]) / np.sqrt(131 / 3)),
    (PAIRS, {"estimator": "pooled", "scale": "batch"}, np.array([[-1], [1], [-2], [2]]) / np.sqrt(131 / 3)),
    (PAIRS, {"estimator": "step", "scale": "batch"}, np.array([[-1], [1], [-2], [2]]) / np.sqrt(131 / 3)),
    (PAIRS, {"estimator": "min", "scale": "batch"}, np.array([[-2], [2], [-4], [4]]) / np.sqrt(131 / 3)),
]


@pytest.mark.parametrize("inputs, options, expected", WORKED_EXAMPLES)
def test_worked_examples(inputs, options, expected):
    rewards, mask = np.array(inputs[0], dtype=np.float64), np.array(inputs[1])
    options = {"gamma": 0.5, "eps": 0.0, **options}
    np.testing.assert_allclose(advantages_of(rewards, mask, 2, **options), expected, atol=1e-7)
    estimator, _, baseline = options.pop("estimator").partition("-")
    oracle = oracles.process_advantages(
        rewards[None], mask, [1.0], 2, estimator=estimator, baseline=baseline or "all", **options
    )
    np.testing.assert_allclose(oracle, expected, atol=1e-7)


# Zero spread


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", LABELS)
def test_zero_spread_gives_exactly_zero(estimator, scale, order, dtype):
    """Eight rewards of 0.35 have a float32 std of 3e-8; one that is a rounding error away must not be amplified."""
    # "min" compares a token's return with the others' mean over tokens, so only at gamma = 1 are equal outcomes equal.
    gamma = 1.0 if estimator == "min" else 0.9
    options = {"estimator": estimator, "scale": scale, "aggregation": order, "gamma": gamma, "eps": 1e-8}
    values = np.full(8, 0.35, dtype=np.float32)
    rewards, mask = outcome(values, [3] * 8, dtype)
    assert not advantages_of(rewards, mask, 8, **options).any()
    values[5] = np.nextafter(values[5], np.float32(1))
    rewards, mask = outcome(values, [3] * 8, dtype)
    assert not advantages_of(rewards, mask, 8, **options).any()
    values[5] += np.float32(1e-4)
    rewards, mask = outcome(values, [3] * 8, dtype)
    assert advantages_of(rewards, mask, 8, **options).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", LABELS)
def test_zero_spread_beside_a_group_with_spread_gives_exactly_zero(estimator, scale):
    rewards, mask = outcome([0.35] * 7 + [0.0, 0.3, 0.1, 0.9, 1.0, 0.2, 0.7], [4] * 14)
    gamma = 1.0 if estimator == "min" else 0.9
    advantages = advantages_of(rewards, mask, 7, estimator=estimator, scale=scale, gamma=gamma)
    assert not advantages[:7].any()
    assert advantages[7:].all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", LABELS)
def test_a_group_of_one_gets_zero(estimator, scale, order):
    """Of every length to 120: 13 weights of 1/13 sum to more than 1 in floating point, 49 of 1/49 to less."""
    rewards = np.random.default_rng(2).normal(size=(120, 120))
    mask = np.tri(120, dtype=np.int64)
    options = {"estimator": estimator, "scale": scale, "aggregation": order, "gamma": 0.9}
    assert not advantages_of(rewards, mask, 1, **options).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", LABELS)
def test_the_only_judged_completion_of_a_group_gets_zero(estimator, scale):
    rewards = np.random.default_rng(3).normal(size=(240, 120))
    rewards[1:-1:2] = np.nan
    mask = np.repeat(np.tri(120, dtype=np.int64), 2, axis=0)
    advantages = advantages_of(rewards, mask, 2, estimator=estimator, scale=scale, gamma=0.9)
    assert not advantages[:-2].any()
    assert advantages[-2:].any(axis=1).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", LABELS)
def test_advantages_are_finite_for_extreme_float32_rewards(estimator, scale, order):
    rng = np.random.default_rng(4)
    rewards = rng.choice(np.array([0.0, 1e-6, -1e-6, 1.0, 1e6, -1e6, np.nan], dtype=np.float32), size=(12, 9))
    rewards[4:8] = 1e6
    mask = (np.arange(9) < rng.integers(0, 10, size=(12, 1))).astype(np.int64)
    advantages = advantages_of(
        rewards, mask, 4, estimator=estimator, scale=scale, aggregation=order, gamma=0.9, eps=1e-8
    )
    assert np.isfinite(advantages).all()


def test_a_batch_without_spread_gets_zero_under_batch_scale():
    """One group's spread is above the rounding, the batch's below it: 2.8 at eps = 1e-8 if only the group counts."""
    rewards_KNT = torch.ones(1, 16, 1, dtype=torch.float64)
    rewards_KNT[0, 0] = 1 + 6e-7
    advantages_NT = computed(
        rewards_KNT,
        torch.ones(16, 1),
        torch.ones(1, dtype=torch.float64),
        4,
        estimator="position",
        gamma=1.0,
        scale="batch",
        eps=1e-8,
    )
    assert (advantages_NT == 0).all()


# Shift and scale


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "estimator, gamma, lengths",
    [
        # Where returns are compared, a constant cancels only if all returns carry it: equal lengths, or gamma = 1.
        ("position-all", 0.9, [5] * 8),
        ("position-active", 1.0, [1, 5, 3, 2, 4, 5, 5, 1]),
        ("pooled", 0.9, [1, 5, 3, 2, 4, 5, 5, 1]),
        ("step", 0.9, [1, 5, 3, 2, 4, 5, 5, 1]),
        ("min", 1.0, [1, 5, 3, 2, 4, 5, 5, 1]),
    ],
)
def test_a_constant_added_to_an_outcome_reward_changes_nothing(estimator, gamma, lengths, scale, order):
    values = np.array([0.1, 0.9, -0.3, 0.5, 2.0, 1.5, 1.7, 1.1])
    options = {"estimator": estimator, "gamma": gamma, "scale": scale, "aggregation": order}
    before = advantages_of(*outcome(values, lengths), 4, **options)
    after = advantages_of(*outcome(values + 3.0, lengths), 4, **options)
    np.testing.assert_allclose(after, before, atol=1e-10)
    assert np.abs(before).max() > 0.1


@pytest.mark.parametrize("estimator", LABELS)
def test_scaling_rewards_changes_nothing_under_group_scaling(estimator):
    rng = np.random.default_rng(5)
    lengths = [4, 7, 1, 6, 7, 2, 3, 7]
    rewards, mask = outcome(rng.normal(size=8), lengths)
    if estimator != "min":  # the soft-min weights have a temperature, so process rewards may not be scaled there
        rewards = np.where(mask, rng.normal(size=rewards.shape), np.nan)
    options = {"estimator": estimator, "gamma": 0.9, "scale": "group"}
    before = advantages_of(rewards, mask, 4, eps=1e-12, **options)
    np.testing.assert_allclose(advantages_of(100 * rewards, mask, 4, eps=1e-12, **options), before, atol=1e-8)
    # eps is in the units of the reward: scaled with it, nothing changes at all; kept, small rewards shrink.
    scaled = advantages_of(0.01 * rewards, mask, 4, eps=0.01, **options)
    np.testing.assert_allclose(scaled, advantages_of(rewards, mask, 4, eps=1.0, **options), atol=1e-10)
    assert np.abs(scaled).max() < 0.8 * np.abs(before).max()


@pytest.mark.parametrize("estimator", LABELS)
def test_scale_none_is_linear_in_the_reward(estimator):
    rng = np.random.default_rng(6)
    rewards, mask = outcome(rng.normal(size=8), [4, 7, 1, 6, 7, 2, 3, 7])
    options = {"estimator": estimator, "gamma": 0.9, "scale": "none"}
    before = advantages_of(rewards, mask, 4, **options)
    np.testing.assert_allclose(advantages_of(-2.5 * rewards, mask, 4, **options), -2.5 * before, atol=1e-10)
    np.testing.assert_allclose(advantages_of(rewards, mask, 4, weight=-2.5, **options), -2.5 * before, atol=1e-10)


# Reductions


@pytest.mark.parametrize("lengths", [[1] * 8, [3, 1, 6, 2, 4, 4, 5, 6]])
def test_reduces_to_rloo(lengths):
    values = np.random.default_rng(7).normal(size=8)
    rewards, mask = outcome(values, lengths)
    advantages = advantages_of(rewards, mask, 4, estimator="min", scale="none", gamma=1.0)
    expected = oracles.rloo_advantages(values, 4)[:, None] * mask
    np.testing.assert_allclose(advantages, expected, atol=1e-12)


def outcome_batch(seed, lengths, sources=3, missing=0.25):
    """Outcome rewards `(N, K)`, some None, and the same rewards on the last token of completions of these lengths."""
    rng = np.random.default_rng(seed)
    rewards_NK = np.round(rng.normal(size=(len(lengths), sources)), 2)
    rewards_NK[rng.random(rewards_NK.shape) < missing] = np.nan
    rewards_KNT = np.full((sources, len(lengths), max(lengths)), np.nan)
    for i, length in enumerate(lengths):
        rewards_KNT[:, i, length - 1] = rewards_NK[i]
    mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    return rewards_NK, torch.tensor(rewards_KNT), torch.tensor(mask)


@every_order
@every_scale
@pytest.mark.parametrize("estimator", ["position-all", "position-active", "pooled", "step"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_reduces_to_trl_outcome_advantages_with_one_token(group_size, estimator, scale, order):
    weights = np.array([1.0, -0.5, 2.0])
    estimator, _, baseline = estimator.partition("-")
    for seed in range(5):
        rewards_NK, rewards, mask = outcome_batch(seed, [1] * 12)
        advantages = computed(
            rewards,
            mask,
            torch.tensor(weights),
            group_size,
            estimator=estimator,
            gamma=0.99,
            options={"position_baseline": baseline or "all"},
            aggregation=order,
            scale=scale,
        )
        expected = oracles.trl_outcome_advantages(rewards_NK, weights, group_size, order, scale)
        np.testing.assert_allclose(advantages[:, 0].numpy(), expected, atol=1e-10)


@every_unit
@every_order
@every_scale
@pytest.mark.parametrize("estimator", ["pooled", "step"])
def test_reduces_to_trl_for_outcome_rewards_pooled_gamma_one(estimator, scale, order, unit):
    """At gamma = 1 an outcome reward gives TRL's scalar at every token, whatever the lengths."""
    weights = np.array([1.0, -0.5, 2.0])
    lengths = [3, 7, 1, 5, 2, 2, 6, 4, 7, 1, 1, 3]
    for seed in range(5):
        rewards_NK, rewards, mask = outcome_batch(seed, lengths)
        advantages = computed(
            rewards,
            mask,
            torch.tensor(weights),
            4,
            estimator=estimator,
            gamma=1.0,
            gamma_unit=unit,
            aggregation=order,
            scale=scale,
        )
        expected = oracles.trl_outcome_advantages(rewards_NK, weights, 4, order, scale)
        np.testing.assert_allclose(advantages.numpy(), expected[:, None] * mask.numpy(), atol=1e-10)


@pytest.mark.parametrize("lengths", [[6] * 8, [6, 2, 4, 1, 5, 6, 3, 3]])
def test_position_reduces_to_seed_document(lengths):
    rng = np.random.default_rng(9)
    rewards, weights = rng.normal(size=(2, 8, 6)), np.array([0.7, 1.3])
    mask = (np.arange(6) < np.asarray(lengths)[:, None]).astype(np.int64)
    advantages = computed(
        torch.tensor(rewards),
        torch.tensor(mask),
        torch.tensor(weights),
        4,
        estimator="position",
        gamma=0.99,
        options={"position_baseline": "all"},
        aggregation="sum_then_normalize",
        scale="group",
        eps=1e-8,
    )
    expected = oracles.seed_process_advantages(rewards, mask, weights, 4, gamma=0.99) * mask
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-10)


# A row from outside


def leave_one_out_by_position(inputs):
    """`A_{i,t} = R_{i,t} - mean_{j != i} R_{j,t}` over the judged completions j, those that ended counting as 0."""
    returns_PGT = inputs.values_NT.unflatten(0, (-1, inputs.group_size))
    judged_PG1 = inputs.judged_N.view(-1, inputs.group_size, 1).to(returns_PGT)
    others_PG1 = judged_PG1.sum(1, keepdim=True) - judged_PG1
    counted_PGT = judged_PG1 * returns_PGT
    sums_PGT = counted_PGT.sum(1, keepdim=True) - counted_PGT
    return (returns_PGT - sums_PGT / others_PG1).where(others_PG1 > 0, 0.0).flatten(0, 1)


@every_unit
@every_order
@few
@given(batch=batches)
def test_a_row_that_is_added_to_the_table_is_an_estimator(batch, order, unit):
    options = {"gamma": batch.gammas, "gamma_unit": unit, "aggregation": order, "eps": batch.eps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ESTIMATORS, "mine", Estimator(leave_one_out_by_position, normalizes="returns"))
        advantages = batch.run({"estimator": "mine", **options})
    expected = oracles.leave_one_out_process_advantages(
        batch.rewards, batch.mask, batch.weights, batch.group_size, **options
    )
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="estimator must be one of 'position', .*'mine'"):
        batch.run({"estimator": "mine", **options})
    unlisted = batch.run({"estimator": Estimator(leave_one_out_by_position), **options})
    assert np.array_equal(unlisted, advantages)
    for other in (f"{__name__}:BY_PATH", leave_one_out_by_position, f"{__name__}:leave_one_out_by_position"):
        assert np.array_equal(batch.run({"estimator": other, **options}), advantages)


BY_PATH = Estimator(leave_one_out_by_position)


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (f"{__name__}:ABSENT", ValueError, r"estimator='.*:ABSENT' cannot be imported \(AttributeError: .*ABSENT"),
        ("no_such_module:BY_PATH", ValueError, r"cannot be imported \(ModuleNotFoundError: .*no_such_module"),
        (f"{__name__}:LABELS", TypeError, "is a list; it has to be of type Estimator"),
        (3, ValueError, "estimator must be one of 'position'"),
    ],
)
def test_what_is_no_estimator_is_named(estimator, error, message):
    batch = Batch(seed=7, sources=1, groups=1, group_size=2, length=3)
    with pytest.raises(error, match=message):
        batch.run({"estimator": estimator, "gamma": 0.9})


@pytest.mark.parametrize("normalizes", ["step_rewards", "returns"])
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda values_NT: values_NT.tolist(), TypeError, "function returned a list"),
        (lambda values_NT: values_NT[:, :1], ValueError, r"returned shape \(4, 1\).* \(4, 6\)"),
        (lambda values_NT: values_NT.sum(1), ValueError, r"returned shape \(4,\)"),
        (lambda values_NT: values_NT.where(torch.arange(4)[:, None] != 2, torch.inf), ValueError, "completion 2 "),
        (lambda values_NT: values_NT.where(torch.arange(4)[:, None] != 3, torch.nan), ValueError, "completion 3 "),
    ],
)
def test_what_an_estimator_of_ones_own_returns_is_checked(returned, error, message, normalizes):
    def function(inputs):
        return returned(inputs.values_NT)

    rewards = torch.ones(1, 4, 6, dtype=torch.float64)
    options = {"estimator": Estimator(function, normalizes=normalizes), "gamma": 0.9}
    with pytest.raises(error, match=message):
        computed(rewards, torch.ones(4, 6), torch.ones(1), 2, **options)


def deviations_by_position(inputs):
    counted_NT = inputs.judged_N[:, None].expand_as(inputs.mask_NT).double()
    return Compared(*(values.unflatten(0, (-1, inputs.group_size)) for values in (inputs.values_NT, counted_NT)), (1,))


@every_order
@every_scale
def test_a_row_that_says_what_it_compares_is_normalised_by_the_scale(scale, order):
    batch = Batch(seed=7, sources=2, groups=3, group_size=4, length=6)
    options = batch.options("position-all", scale, order)
    row = Estimator(deviations_by_position, compares=True)
    assert np.array_equal(batch.run(options | {"estimator": row}), batch.run(options))
    row = Estimator(times, compares=True)
    with pytest.raises(TypeError, match="function returned a Tensor; with compares=True it has to return a Compared"):
        batch.run(options | {"estimator": row})


def times(inputs, *, factor=1.0, sign="plus"):
    """`factor` times what it is given, and rubbish where nothing may be read."""
    read_NT = ~inputs.values_NT.isnan() & inputs.mask_NT & inputs.judged_N[:, None]
    return (inputs.values_NT * (factor if sign == "plus" else -factor)).where(read_NT, 1e4)


@few
@given(batch=batches)
def test_without_normalisation_it_does_not_matter_which_side_of_the_returns_it_is_on(batch):
    """Returns are linear, so the weighted sum of returns is the returns of the weighted sum."""
    expected = np.zeros(batch.mask.shape)
    for i, kept in enumerate(batch.mask.astype(bool)):
        for weight, rewards in zip(batch.weights, batch.rewards, strict=True):
            expected[i, kept] += weight * oracles.stream_returns(rewards[i, kept], 0.9, "token")
    for normalizes in ("step_rewards", "returns"):
        advantages = batch.run({"estimator": Estimator(times, normalizes=normalizes), "gamma": 0.9})
        np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-10)


@every_order
@pytest.mark.parametrize("normalizes", ["step_rewards", "returns"])
def test_the_rewards_are_shaped_before_anything_else(normalizes, order):
    batch = Batch(seed=4, sources=2, groups=2, group_size=4, length=6)
    options = {"gamma": 0.9, "aggregation": order}
    shaping = Estimator(times, normalizes=normalizes, shape_rewards=torch.square)
    shaped = batch.run({"estimator": shaping, **options})
    squared = batch.run({"estimator": Estimator(times, normalizes=normalizes), **options}, rewards=batch.rewards**2)
    assert np.abs(squared).max() > 0.1
    np.testing.assert_allclose(shaped, squared, atol=1e-12)


# Options


def test_an_estimator_gets_the_options_of_its_row_and_no_others():
    batch = Batch(seed=4, sources=2, groups=2, group_size=4, length=6)
    plain = batch.run({"estimator": Estimator(times), "gamma": 0.9})
    assert np.abs(plain).max() > 0.1
    row = Estimator(times, options={"factor": (), "sign": ("plus", "minus")})
    given = {"position_baseline": "active", "factor": 2.0, "sign": "minus"}
    assert np.array_equal(batch.run({"estimator": row, "gamma": 0.9, "options": given}), -2 * plain)
    assert np.array_equal(batch.run({"estimator": row, "gamma": 0.9}), plain)
    with pytest.raises(ValueError, match="^sign must be one of 'plus', 'minus'; got 'times'"):
        batch.run({"estimator": row, "gamma": 0.9, "options": {"sign": "times"}})
    # Of the table's rows only "position" reads it.
    for estimator in ("pooled", "step", "min"):
        with_option = batch.run({"estimator": estimator, "gamma": 0.9, "options": {"position_baseline": "active"}})
        assert np.array_equal(with_option, batch.run({"estimator": estimator, "gamma": 0.9}))


def test_the_default_of_an_option_is_that_of_the_function():
    batch = Batch(seed=4, sources=2, groups=2, group_size=4, length=6)
    default = batch.run({"estimator": "position", "gamma": 0.9})
    assert np.array_equal(default, batch.run(batch.options("position-all") | {"gamma": 0.9, "eps": 1e-4}))
    assert not np.array_equal(default, batch.run(batch.options("position-active") | {"gamma": 0.9, "eps": 1e-4}))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"position_baseline": "mean"},
            "^position_baseline must be one of 'all', 'active', 'leave_one_out'; got 'mean'",
        ),
        ({"position_base": "all"}, "option .* must be one of 'position_baseline'; got 'position_base'"),
    ],
)
def test_an_option_that_is_unknown_or_has_no_such_value_is_named(options, message):
    batch = Batch(seed=7, sources=1, groups=1, group_size=2, length=3)
    with pytest.raises(ValueError, match=message):
        batch.run({"estimator": "position", "gamma": 0.9, "options": options})


def test_an_estimator_that_normalises_something_else_is_refused():
    with pytest.raises(ValueError, match="^normalizes must be one of 'step_rewards', 'returns'; got 'rewards'"):
        Estimator(leave_one_out_by_position, normalizes="rewards")


def test_every_row_has_a_description():
    assert all(row.description for row in ESTIMATORS.values())
