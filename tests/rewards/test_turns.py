"""Rewards of turns and tool calls, placed on the policy's tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracles
from trl_grpo_ext import StepRewards, TurnRewards
from trl_grpo_ext.advantages.combine import process_advantages
from trl_grpo_ext.advantages.settings import AdvantageSettings
from trl_grpo_ext.metrics import turn_metrics, turn_stats, turn_sums
from trl_grpo_ext.rewards.sources import wrap_source
from trl_grpo_ext.rewards.turns import Turn, find_turns, land_on_policy_tokens, turn_ends, turn_indices


nan = math.nan
MASK = [1, 1, 0, 0, 1, 1, 1, 0, 1]


def call(*names):
    return [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]


def said(*calls):
    return {"role": "assistant", "content": "", **({"tool_calls": call(*calls)} if calls else {})}


RESULT = {"role": "tool", "name": "add", "content": "3"}
# Two calls in the first turn; the last one calls in vain
MESSAGES = [said("add", "add"), RESULT, RESULT, said("add"), RESULT, said("add")]


def parsed(reward, mask=MASK, completion=None, transform="none"):
    source = wrap_source(lambda **columns: [reward], "judge", transform, False, [mask])
    (number,) = source(completion_ids=[[7] * len(mask)], completions=[MESSAGES if completion is None else completion])
    return source.rewards[0], number


@settings(derandomize=True, deadline=None)
@given(mask=st.lists(st.integers(0, 1), max_size=12))
def test_turns_are_what_the_policy_wrote_without_an_interruption(mask):
    turns = find_turns(mask)
    written = [i for start, end in turns for i in range(start, end)]
    assert written == [i for i, own in enumerate(mask) if own]
    assert all(second.start > first.end for first, second in zip(turns, turns[1:], strict=False))
    # The three of them say the same
    ends = turn_ends(torch.tensor([mask]))[0].tolist()
    assert [i for i, is_end in enumerate(ends) if is_end] == [turn.end - 1 for turn in turns]
    indices = turn_indices(torch.tensor([mask]))[0].tolist()
    assert indices == [next((k for k, turn in enumerate(turns) if i in range(*turn)), -1) for i in range(len(mask))]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.data())
def test_a_reward_on_a_tool_s_output_moves_to_the_policy_s_last_token_before(mask, data):
    ends = data.draw(st.lists(st.integers(0, len(mask) - 1), max_size=6).map(sorted))
    moved = land_on_policy_tokens(StepRewards(ends, [1.0] * len(ends)), mask)
    expected = {}
    for end in ends:
        before = [token for token in range(end + 1) if mask[token]]
        token = before[-1] if before else end
        expected[token] = expected.get(token, 0.0) + 1.0
    assert moved == StepRewards(list(expected), list(expected.values()))


def test_a_completion_without_tools_is_one_turn():
    assert find_turns([1, 1, 1]) == [Turn(0, 3)]
    assert parsed(TurnRewards([0.5]), [1, 1, 1], "text") == (StepRewards([2], [0.5]), 0.5)


@pytest.mark.parametrize(
    ("rewards", "ends", "values"),
    [
        (TurnRewards([1.0, 2.0, 3.0]), [1, 6, 8], [1.0, 2.0, 3.0]),
        (TurnRewards([1.0, None, np.float32(3)]), [1, 6, 8], [1.0, None, 3.0]),
        (TurnRewards(torch.tensor([1.0, 2.0, 3.0])), [1, 6, 8], [1.0, 2.0, 3.0]),
        # Calls of a turn add up; the call without a result may be left out
        (TurnRewards([1.0, 2.0, 4.0], per="tool_call"), [1, 6], [3.0, 4.0]),
        (TurnRewards([1.0, 2.0, 4.0, 8.0], per="tool_call"), [1, 6, 8], [3.0, 4.0, 8.0]),
        (TurnRewards([1.0, None, None, None], per="tool_call"), [1, 6, 8], [1.0, None, None]),
        # A verdict on a result, placed on the result by its author
        (StepRewards([1, 3, 4, 7], [1.0, 2.0, None, 4.0]), [1, 4, 6], [3.0, None, 4.0]),
        (StepRewards([2, 3, 8], [None, 2.0, 4.0]), [1, 8], [2.0, 4.0]),
    ],
)
def test_each_reward_lands_on_the_last_token_of_its_turn(rewards, ends, values):
    assert parsed(rewards)[0] == StepRewards(ends, values)


def test_a_transform_sees_each_reward_before_those_of_a_turn_are_added_up():
    rewards, number = parsed(TurnRewards([1.0, 0.0, 0.5], per="tool_call"), transform="center")
    assert (rewards, number) == (StepRewards([1, 6], [0.0, 0.0]), 0.0)
    assert parsed(StepRewards([2, 3], [0.25, 1.0]), transform="delta")[0] == StepRewards([1], [-0.75])


def test_a_list_has_its_own_values_for_tokens_of_tools():
    values = [float(i) for i in range(len(MASK))]
    assert parsed(values)[0] == StepRewards(list(range(len(MASK))), values)


def test_without_a_call_there_is_nothing_to_judge():
    assert parsed(TurnRewards([], per="tool_call"), [1, 1], [said()]) == (None, None)


def test_before_the_first_token_of_the_policy_nothing_moves():
    assert land_on_policy_tokens(StepRewards([1, 3], [1.0, 2.0]), [0, 0, 1, 0]) == StepRewards([1, 2], [1.0, 2.0])


@pytest.mark.parametrize(
    ("rewards", "completion", "error", "message"),
    [
        (TurnRewards([1.0]), None, ValueError, "TurnRewards has 1 values for 3 turns of the policy"),
        (
            TurnRewards([1.0] * 2, per="tool_call"),
            None,
            ValueError,
            "2 values for 4 tool calls, of which 3 have a result",
        ),
        (TurnRewards([1.0], per="tool_call"), "text", ValueError, "the completion is a text, which has no tool calls"),
        (TurnRewards([1.0], per="tool_call"), [said()], ValueError, "1 messages of the policy for 3 turns"),
        (TurnRewards([1.0], per="message"), None, ValueError, "per='message'; known: 'turn', 'tool_call'"),
        (TurnRewards(1.0), None, TypeError, "values=1.0; expected a list"),
        (TurnRewards([1.0, nan, 0.0]), None, ValueError, r"values\[1\] is nan; rewards must be finite"),
        (TurnRewards([1.0, "2", 0.0]), None, TypeError, r"values\[1\] is '2', which is not a number"),
    ],
)
def test_bad_rewards_name_source_and_completion(rewards, completion, error, message):
    with pytest.raises(error, match=f"reward source 'judge', completion 0.*{message}"):
        parsed(rewards, completion=completion)


def test_a_function_that_names_it_gets_the_mask():
    seen = []

    def judge(completion_ids, tool_mask, **columns):
        seen.append((tool_mask, columns))
        tool_mask[0][0] = 9
        return [1.0]

    wrap_source(judge, "judge", "none", False, [MASK])(completion_ids=[[7] * 9], a=[1])
    wrap_source(judge, "judge")(completion_ids=[[7, 7]])
    assert seen == [([[9, *MASK[1:]]], {"a": [1]}), ([[9, 1]], {})]
    assert MASK[0] == 1


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), weight=st.sampled_from([0.0, 0.3, 1.0]))
def test_mt_grpo(seed, weight):
    """A turn source and an outcome source, each turn of any length, some tool output between."""
    rng = np.random.default_rng(seed)
    turn, outcome = rng.integers(0, 3, 8).astype(float), rng.normal(size=8)
    lengths = rng.integers(1, 5, size=(8, 3))
    mask = np.zeros((8, 12), dtype=bool)
    rewards = np.full((2, 8, 12), nan)
    for i, (first, tool, second) in enumerate(lengths):
        mask[i, :first] = mask[i, first + tool : first + tool + second] = True
        rewards[0, i, first - 1] = turn[i]
        rewards[1, i, first + tool + second - 1] = outcome[i]
    expected = oracles.mt_grpo_advantages(turn, outcome, 4, weight)
    found = process_advantages(
        *(torch.tensor(rewards), torch.tensor(mask), torch.ones(2), 4),
        AdvantageSettings(estimator="step", gamma=weight, gamma_unit="turn"),
    ).numpy()
    for i, (first, tool, second) in enumerate(lengths):
        np.testing.assert_allclose(found[i, :first], expected[i, 0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[i, first + tool : first + tool + second], expected[i, 1], rtol=0, atol=1e-12)
    assert (found[~mask] == 0).all()


def test_metrics_of_turns():
    mask_NT = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0], [0] * 6])
    rewards_KNT = torch.tensor(
        [
            [[1.0, 2.0, nan, nan, nan, 5.0], [3.0, nan, nan, nan, nan, nan], [nan] * 6],
            [[nan] * 5 + [1.0], [nan] * 4 + [1.0, nan], [nan] * 6],
        ]
    )
    found = turn_metrics(["judge", "right"], turn_stats(rewards_KNT, mask_NT), [True, False])
    assert math.isnan(found.pop("rewards/judge/turn_2"))
    assert found == {
        "turns/per_completion": 2.5,
        "turns/tokens": pytest.approx(7 / 5),
        "rewards/judge/turn_1": 3.0,
        "rewards/judge/turn_3": 5.0,
    }
    alone = turn_metrics(["judge"], turn_stats(rewards_KNT[:1, :1, :2], mask_NT[:1, :2]), [True])
    assert alone == {"turns/per_completion": 1.0, "turns/tokens": 2.0, "rewards/judge/turn_1": 3.0}


def test_sums_of_turns():
    mask_BT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    sums = turn_sums(torch.tensor([[1.0, 2.0, 0.0, 4.0], [8.0, 0.0, 0.0, 0.0]]), mask_BT)
    assert sums[:3].tolist() == [[11.0, 3.0], [4.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda values: np.array(values, dtype=object)])
def test_a_list_in_any_form_keeps_its_values(form):
    source = wrap_source(
        lambda **columns: iter([form([1.0, 2.0, 10.0, 20.0, 5.0])]), "judge", "none", False, [[1, 1, 0, 0, 1]]
    )
    source(completion_ids=[[7] * 5], completions=["text"])
    assert source.rewards[0] == StepRewards(list(range(5)), [1.0, 2.0, 10.0, 20.0, 5.0])
