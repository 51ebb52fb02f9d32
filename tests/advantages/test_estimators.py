"""Returns, and the advantages of one reward source: worked examples, zero spread, and what must not matter."""

import numpy as np
import pytest
import torch

from tests.support import oracles
from trl_grpo_ext.advantages.combine import process_advantages
from trl_grpo_ext.advantages.returns import discounted_returns


ESTIMATORS = ["position-all", "position-active", "pooled", "step", "min"]
SCALES = ["group", "batch", "none"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
NONE = float("nan")


def advantages_of(rewards_NT, mask_NT, group_size, *, estimator, gamma=1.0, weight=1.0, **options):
    """Advantages of a single source as float64; "position-active" is estimator "position" with that baseline."""
    estimator, _, baseline = estimator.partition("-")
    rewards = torch.as_tensor(np.asarray(rewards_NT)[None])
    weights = torch.tensor([weight], dtype=rewards.dtype)
    advantages = process_advantages(
        rewards,
        torch.as_tensor(np.asarray(mask_NT)),
        weights,
        group_size,
        estimator=estimator,
        gamma=gamma,
        options={"position_baseline": baseline or "all"},
        **options,
    )
    return advantages.double().numpy()


def outcome(values_N, lengths_N, dtype=np.float64):
    """Rewards on the last token of completions of the given lengths, and their mask."""
    width = max(lengths_N)
    rewards = np.full((len(values_N), width), np.nan, dtype=dtype)
    rewards[np.arange(len(values_N)), np.asarray(lengths_N) - 1] = values_N
    return rewards, (np.arange(width) < np.asarray(lengths_N)[:, None]).astype(np.int64)


# Returns


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_returns_equal_their_closed_form_over_4096_tokens(gamma, dtype, tolerance):
    rewards = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32).astype(np.float64)
    returns = discounted_returns(torch.tensor(rewards, dtype=dtype), gamma)
    for i in range(3):
        expected = [oracles.discounted_return_closed_form(rewards[i], gamma, t) for t in range(4096)]
        scale = max(1.0, np.abs(expected).max())
        assert np.abs(returns[i].double().numpy() - expected).max() < tolerance * scale


def test_returns_do_not_underflow_over_32768_tokens():
    """`gamma ** t` is 0 in float32 from t = 987 for gamma 0.9: a division by it would give NaN."""
    rewards = torch.zeros(2, 32768)
    rewards[:, -1] = 1.0
    rewards[1, 20000] = 2.0
    returns = discounted_returns(rewards, 0.9)
    assert torch.isfinite(returns).all()
    assert returns[0, -8:].tolist() == pytest.approx([0.9**7, 0.9**6, 0.9**5, 0.9**4, 0.9**3, 0.9**2, 0.9, 1.0])
    assert returns[1, 19990:20001].tolist() == pytest.approx([2 * 0.9 ** (20000 - t) for t in range(19990, 20001)])
    assert returns[0, 0] < 1e-37
    assert discounted_returns(torch.ones(1, 32768), 1.0)[0, 0] == 32768


def test_returns_discount_only_where_a_step_ends():
    rewards, ends = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[True, False, True, False]])
    assert discounted_returns(rewards, 0.5).tolist() == [[1.5, 1.0, 2.0, 0.0]]
    assert discounted_returns(rewards, 0.5, ends).tolist() == [[2.0, 2.0, 2.0, 0.0]]
    rng = np.random.default_rng(1)
    rewards, ends = rng.normal(size=(5, 40)), rng.random((5, 40)) < 0.2
    returns = discounted_returns(torch.tensor(rewards), 0.8, torch.tensor(ends))
    np.testing.assert_allclose(returns.numpy(), oracles.discounted_returns(rewards, 0.8, ends), atol=1e-10)


@pytest.mark.parametrize(
    "rewards, ends, shape", [(torch.zeros(3), None, r"3"), (torch.zeros(2, 3), torch.zeros(2, 4), r"2, ?4")]
)
def test_returns_name_the_wrong_shape(rewards, ends, shape):
    with pytest.raises(ValueError, match=shape):
        discounted_returns(rewards, 0.9, ends)


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
@pytest.mark.parametrize("estimator", ESTIMATORS)
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
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_spread_beside_a_group_with_spread_gives_exactly_zero(estimator, scale):
    rewards, mask = outcome([0.35] * 7 + [0.0, 0.3, 0.1, 0.9, 1.0, 0.2, 0.7], [4] * 14)
    gamma = 1.0 if estimator == "min" else 0.9
    advantages = advantages_of(rewards, mask, 7, estimator=estimator, scale=scale, gamma=gamma)
    assert not advantages[:7].any()
    assert advantages[7:].all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_group_of_one_gets_zero(estimator, scale, order):
    """Of every length to 120: 13 weights of 1/13 sum to more than 1 in floating point, 49 of 1/49 to less."""
    rewards = np.random.default_rng(2).normal(size=(120, 120))
    mask = np.tri(120, dtype=np.int64)
    options = {"estimator": estimator, "scale": scale, "aggregation": order, "gamma": 0.9}
    assert not advantages_of(rewards, mask, 1, **options).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_only_judged_completion_of_a_group_gets_zero(estimator, scale):
    rewards = np.random.default_rng(3).normal(size=(240, 120))
    rewards[1:-1:2] = np.nan
    mask = np.repeat(np.tri(120, dtype=np.int64), 2, axis=0)
    advantages = advantages_of(rewards, mask, 2, estimator=estimator, scale=scale, gamma=0.9)
    assert not advantages[:-2].any()
    assert advantages[-2:].any(axis=1).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_are_finite_for_extreme_float32_rewards(estimator, scale, order):
    rng = np.random.default_rng(4)
    rewards = rng.choice(np.array([0.0, 1e-6, -1e-6, 1.0, 1e6, -1e6, np.nan], dtype=np.float32), size=(12, 9))
    rewards[4:8] = 1e6
    mask = (np.arange(9) < rng.integers(0, 10, size=(12, 1))).astype(np.int64)
    advantages = advantages_of(
        rewards, mask, 4, estimator=estimator, scale=scale, aggregation=order, gamma=0.9, eps=1e-8
    )
    assert np.isfinite(advantages).all()


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
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


@pytest.mark.parametrize("estimator", ESTIMATORS)
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
