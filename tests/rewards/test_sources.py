"""Reward functions as TRL calls them: what is remembered, reduced, refused and named."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch

from trl_grpo_ext import StepRewards
from trl_grpo_ext.rewards.sources import parse_model_scores, wrap_source


def returning(returned, reduce=None):
    def judge(completion_ids, **kwargs):
        return returned

    if reduce is not None:
        judge.reduce = reduce
    return judge


def source_of(function, transform="none"):
    return wrap_source(function, "judge", transform)


IDS = [[1, 2, 3], [4, 5], [6], [7, 8]]
RETURNED = [StepRewards([0, 2], [0.5, -2.0]), [3.0, 0.25], 0.75, None]


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (None, [-1.5, 3.25, 0.75, None]),
        ("sum", [-1.5, 3.25, 0.75, None]),
        ("mean", [-0.75, 1.625, 0.75, None]),
        ("min", [-2.0, 0.25, 0.75, None]),
        ("prod", [-1.0, 0.75, 0.75, None]),
        ("last", [-2.0, 0.25, 0.75, None]),
    ],
)
def test_trl_gets_one_number_and_the_steps_are_kept(reduce, expected):
    source = source_of(returning(RETURNED, reduce))
    assert source(completion_ids=IDS) == expected
    assert source.rewards == [RETURNED[0], StepRewards([0, 1], [3.0, 0.25]), 0.75, None]


def test_the_transform_comes_before_the_reduction():
    assert source_of(returning(RETURNED, "min"), "center")(completion_ids=IDS) == [-5.0, -0.5, 0.5, None]


def test_trls_messages_and_a_traceback_show_the_users_name():
    source = source_of(returning(RETURNED))
    assert source.__name__ == "judge" and repr(source) == "RewardSource('judge')"


def test_rewards_are_those_of_the_last_batch_only():
    source = source_of(lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids])
    source(completion_ids=IDS)
    assert source(completion_ids=[[1], [2, 3]]) == source.rewards == [1.0, 2.0]


def test_a_source_gets_every_argument_of_trl():
    seen = {}

    def judge(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, answer=answer, others=kwargs)
        return np.array([0.5, 1.0])

    given = {"prompts": ["a", "b"], "completions": ["c", "d"], "answer": [1, 2], "log_metric": print}
    assert source_of(judge)(completion_ids=IDS[:2], **given) == [0.5, 1.0]
    assert seen == {
        "prompts": ["a", "b"],
        "completions": ["c", "d"],
        "answer": [1, 2],
        "others": {"log_metric": print},
    }


class AsyncJudge:
    reduce = "last"

    async def __call__(self, completion_ids, **kwargs):
        await asyncio.sleep(0)
        return RETURNED


def test_a_coroutine_is_awaited_and_read_in_the_same_way():
    source = source_of(AsyncJudge())
    assert asyncio.run(source(completion_ids=IDS)) == [-2.0, 0.25, 0.75, None]
    assert source.rewards[0] == RETURNED[0]


def test_a_partial_reduces_as_its_function():
    def judge(completion_ids, scale):
        return [StepRewards([0, 1], [scale, 3.0])]

    judge.reduce = "min"
    assert source_of(functools.partial(judge, scale=2.0))(completion_ids=[[1, 2]]) == [2.0]


@pytest.mark.parametrize("reduce", ["max", None])
def test_an_unknown_reduce_is_refused_when_the_source_is_wrapped(reduce):
    function = returning(RETURNED)
    function.reduce = reduce
    message = f"reward source 'judge': `reduce` is {reduce!r}; known: 'sum', 'mean', 'min', 'prod', 'last'"
    with pytest.raises(ValueError, match=message):
        source_of(function)


@pytest.mark.parametrize("count", [3, 5])
def test_as_many_rewards_as_completions(count):
    with pytest.raises(ValueError, match=f"reward source 'judge' returned {count} rewards for 4 completions"):
        source_of(returning([0.5] * count))(completion_ids=IDS)


@pytest.mark.parametrize(
    "returned",
    [
        None,
        0.5,
        "text",
        StepRewards([0], [1.0]),
        dict.fromkeys(range(4), 1.0),
        {0.1, 0.2, 0.3, 0.4},
        torch.tensor(1.0),
    ],
)
def test_anything_but_a_list_of_rewards_is_refused(returned):
    with pytest.raises(TypeError, match="reward source 'judge' returned .*expected a list with one reward per"):
        source_of(returning(returned))(completion_ids=IDS)


def test_lengths_are_those_before_a_function_changes_its_lists():
    def judge(completion_ids, **kwargs):
        for ids in completion_ids:
            ids.append(0)
        return [StepRewards([len(ids) - 1], [1.0]) for ids in completion_ids]

    with pytest.raises(ValueError, match=f"outside the completion's {len(IDS[0])} tokens"):
        source_of(judge)(completion_ids=[list(ids) for ids in IDS])


def test_the_completion_is_counted_within_the_batch():
    source = source_of(returning([0.5, 0.5, 0.5, StepRewards([2], [1.0])]))
    with pytest.raises(ValueError, match=r"^reward source 'judge', completion 3: ends\[0\] is 2, outside"):
        source(completion_ids=IDS)


def test_scores_of_a_model_are_checked_and_transformed():
    assert parse_model_scores(torch.tensor([0.25, 1.0]), "model", "center").tolist() == [-0.5, 1.0]
    with pytest.raises(ValueError, match="^reward source 'model', completion 1: the reward is nan"):
        parse_model_scores(torch.tensor([0.25, math.nan]), "model", "none")
