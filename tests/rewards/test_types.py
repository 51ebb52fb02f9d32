"""What a source may return for a completion: parsed, refused, placed on tokens."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from trl_grpo_ext import StepRewards
from trl_grpo_ext.rewards.sources import RewardSource, StepCounts
from trl_grpo_ext.rewards.transforms import transform_reward
from trl_grpo_ext.rewards.types import parse_as_trl, parse_reward, place_rewards


WHERE = "reward source 'judge', completion 7"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0.5, 0.5),
        (-3, -3.0),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(False), 0.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_numbers_are_read_as_floats(value, expected):
    read = parse_reward(value, 3, WHERE)
    assert read == expected and type(read) in (float, type(None))


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5, -2.0],
        (1.0, 0.5, -2),
        np.array([1.0, 0.5, -2.0]),
        np.array([1.0, 0.5, -2.0], dtype=np.float16),
        torch.tensor([1.0, 0.5, -2.0]),
        torch.tensor([1.0, 0.5, -2.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1.0), np.float64(0.5), np.int64(-2)],
        [torch.tensor(1.0), torch.tensor(0.5), torch.tensor(-2.0)],
    ],
)
def test_as_many_numbers_as_tokens_are_rewards_of_the_tokens(value):
    assert parse_reward(value, 3, WHERE) == StepRewards([0, 1, 2], [1.0, 0.5, -2.0])


@pytest.mark.parametrize(
    "value",
    [
        StepRewards([1, 4], [1.0, 0.5]),
        StepRewards((1, 4), (True, 0.5)),
        StepRewards(range(1, 5, 3), (value for value in (1.0, 0.5))),
        StepRewards(np.array([1, 4]), np.array([1.0, 0.5])),
        StepRewards(torch.tensor([1, 4]), torch.tensor([1.0, 0.5], requires_grad=True)),
        StepRewards(list(np.array([1, 4])), list(np.array([1.0, 0.5]))),
    ],
)
def test_step_rewards_are_read_from_any_sequence(value):
    read = parse_reward(value, 5, WHERE)
    assert read == StepRewards([1, 4], [1.0, 0.5])
    assert all(type(end) is int for end in read.ends) and all(type(value) is float for value in read.values)


def test_steps_on_the_first_and_the_last_token_are_in_range():
    assert parse_reward(StepRewards([0, 4], [1.0, 2.0]), 5, WHERE) == StepRewards([0, 4], [1.0, 2.0])


def test_step_rewards_without_steps_judge_nothing():
    assert parse_reward(StepRewards([], []), 5, WHERE) is None


def test_steps_without_a_score_stay_and_are_passed_over():
    reward = parse_reward(StepRewards([0, 2, 4], np.array([1.0, None, 0.5], dtype=object)), 5, WHERE)
    assert reward == StepRewards([0, 2, 4], [1.0, None, 0.5]) and reward.scored == [1.0, 0.5]
    assert transform_reward(reward, "progress", WHERE) == StepRewards([0, 2, 4], [1.0, None, -0.5])
    mask_BT = torch.ones(1, 5)
    assert place_rewards([reward], mask_BT).nan_to_num(-1).tolist() == [[1.0, -1.0, -1.0, -1.0, 0.5]]
    source = RewardSource(lambda **columns: [reward, StepRewards([1], [None]), 0.5], "judge")
    assert source(completion_ids=[[7] * 5] * 3) == [1.5, None, 0.5]
    assert source.count_steps() == StepCounts(steps=4, unscored=2, with_several=1, without_step=0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, ValueError, "the reward is nan"),
        (-math.inf, ValueError, "the reward is -inf"),
        (torch.tensor(math.nan), ValueError, "the reward is nan"),
        (1e39, ValueError, r"1e\+39"),
        ("0.5", TypeError, "got str"),
        ({"reward": 1.0}, TypeError, "got dict"),
        (1j, TypeError, "got complex"),
        ([0.5, 0.5], ValueError, "2 token rewards for a completion of 3 tokens"),
        ([0.5] * 4, ValueError, "4 token rewards for a completion of 3 tokens"),
        ([], ValueError, "0 token rewards for a completion of 3 tokens"),
        (torch.zeros(1, 3), ValueError, "1 token rewards for a completion of 3 tokens"),
        (torch.zeros(3, 1), TypeError, r"token rewards\[0\] is \[0.0\]"),
        ([0.5, math.nan, 0.5], ValueError, r"token rewards\[1\] is nan"),
        ([0.5, 0.5, math.inf], ValueError, r"token rewards\[2\] is inf"),
        ([0.5, None, 0.5], TypeError, r"token rewards\[1\] is None"),
        ([0.5, "1", 0.5], TypeError, r"token rewards\[1\] is '1'"),
        (StepRewards([0, 1], [1.0]), ValueError, "2 `ends` but 1 `values`"),
        (StepRewards([0], [1.0, 1.0]), ValueError, "1 `ends` but 2 `values`"),
        (StepRewards(None, [1.0]), TypeError, "StepRewards has ends=None; expected a list"),
        (StepRewards(0, 1.0), TypeError, "StepRewards has ends=0; expected a list"),
        (StepRewards([0], 1.0), TypeError, "StepRewards has values=1.0; expected a list"),
        (StepRewards([0, 3], [1.0, 1.0]), ValueError, r"ends\[1\] is 3, outside the completion's 3 tokens"),
        (StepRewards([-1], [1.0]), ValueError, r"ends\[0\] is -1, outside"),
        (StepRewards([1, 1], [1.0, 1.0]), ValueError, r"ends\[1\] is 1 after 1; ends must increase"),
        (StepRewards([2, 0], [1.0, 1.0]), ValueError, r"ends\[1\] is 0 after 2; ends must increase"),
        (StepRewards([1.0], [1.0]), TypeError, r"ends\[0\] is 1.0"),
        (StepRewards([True], [1.0]), TypeError, r"ends\[0\] is True"),
        (StepRewards([0, 2], [1.0, math.nan]), ValueError, r"values\[1\] is nan"),
        (StepRewards([0, 2], [-math.inf, 1.0]), ValueError, r"values\[0\] is -inf"),
    ],
)
def test_a_bad_reward_is_refused_with_source_completion_and_field(value, error, message):
    with pytest.raises(error, match=f"^{WHERE}: .*{message}"):
        parse_reward(value, 3, WHERE)


def test_rewards_are_placed_on_the_tokens_that_carry_them():
    nan = math.nan
    mask_BT = torch.tensor(
        [
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1],
            [1, 0, 1, 0, 0],
            [1, 0, 1, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
        ]
    )
    rewards = [0.5, StepRewards([0, 4], [1.0, 2.0]), 3.0, StepRewards([1, 2], [4.0, 5.0]), 6.0, None, None]
    placed_BT = place_rewards(rewards, mask_BT)
    expected_BT = torch.tensor(
        [
            [nan, nan, nan, 0.5, nan],
            [1.0, nan, nan, nan, 2.0],
            [nan, nan, 3.0, nan, nan],
            # A step that ends in a tool's output keeps its place; the advantages leave it out
            [nan, 4.0, 5.0, nan, nan],
            [nan] * 5,
            [nan] * 5,
            [nan] * 5,
        ]
    )
    torch.testing.assert_close(placed_BT, expected_BT, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(place_rewards(rewards, mask_BT.bool()).isnan(), placed_BT.isnan())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0.5], 0.5),
        (torch.tensor([0.5]), 0.5),
        (np.array([0.5]), 0.5),
        (math.nan, None),
        (torch.tensor(math.nan), None),
        (torch.tensor([math.nan]), None),
        (Decimal("0.25"), 0.25),
    ],
)
def test_under_outcome_supervision_what_trl_takes_is_a_reward(value, expected):
    assert parse_reward(parse_as_trl(value), 12, WHERE) == expected


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            torch.tensor([0.5]),
            ValueError,
            "1 token rewards for a completion of 12 tokens. For one reward of the whole",
        ),
        (([1, 3], [0.5, 1.0]), TypeError, r"got a pair of lists; .* return StepRewards\(ends, values\)"),
    ],
)
def test_a_reward_of_the_wrong_shape_says_which_was_meant(value, error, message):
    with pytest.raises(error, match=f"^{WHERE}: {message}"):
        parse_reward(value, 12, WHERE)
