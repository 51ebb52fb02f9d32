"""Reward sources on their own: what is read, refused, transformed, reduced, placed on tokens and run in batches."""

import asyncio
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_grpo_ext import StepRewards
from trl_grpo_ext.reward_models.batching import TokenBatchedModel, token_batches
from trl_grpo_ext.rewards.sources import RewardSource, read_model_rewards, wrap_source
from trl_grpo_ext.rewards.transforms import parse_transform, transform_reward
from trl_grpo_ext.rewards.types import place_rewards, read_reward


WHERE = "reward source 'judge', completion 7"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


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
    read = read_reward(value, 3, WHERE)
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
    assert read_reward(value, 3, WHERE) == StepRewards([0, 1, 2], [1.0, 0.5, -2.0])


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
    read = read_reward(value, 5, WHERE)
    assert read == StepRewards([1, 4], [1.0, 0.5])
    assert all(type(end) is int for end in read.ends) and all(type(value) is float for value in read.values)


def test_steps_on_the_first_and_the_last_token_are_in_range():
    assert read_reward(StepRewards([0, 4], [1.0, 2.0]), 5, WHERE) == StepRewards([0, 4], [1.0, 2.0])


def test_step_rewards_without_steps_judge_nothing():
    assert read_reward(StepRewards([], []), 5, WHERE) is None


def test_steps_without_a_score_stay_and_are_passed_over():
    reward = read_reward(StepRewards([0, 2, 4], np.array([1.0, None, 0.5], dtype=object)), 5, WHERE)
    assert reward == StepRewards([0, 2, 4], [1.0, None, 0.5]) and reward.scored == [1.0, 0.5]
    assert transform_reward(reward, "progress", WHERE) == StepRewards([0, 2, 4], [1.0, None, -0.5])
    mask_BT = torch.ones(1, 5)
    assert place_rewards([reward], mask_BT).nan_to_num(-1).tolist() == [[1.0, -1.0, -1.0, -1.0, 0.5]]
    source = RewardSource(lambda **columns: [reward, StepRewards([1], [None]), 0.5], "judge")
    assert source(completion_ids=[[7] * 5] * 3) == [1.5, None, 0.5]
    assert source.count_steps() == (2, 4)


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
        read_reward(value, 3, WHERE)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [0.25, 1.0, 0.5]),
        ("center", [-0.5, 1.0, 0.0]),
        ("clip", [-0.25, 0.0, 0.0]),
        ("clip:0.75", [-0.5, 0.0, -0.25]),
        ("clip:-0.5", [0.0, 0.0, 0.0]),
        ("delta", [-0.75, 0.5, 0.0]),
        ("progress", [0.25, 0.75, -0.5]),
    ],
)
def test_worked_examples_of_transforms(name, expected):
    assert parse_transform(name)([0.25, 1.0, 0.5]) == expected
    steps = transform_reward(StepRewards([1, 3, 4], [0.25, 1.0, 0.5]), name, WHERE)
    assert steps == StepRewards([1, 3, 4], expected)
    assert transform_reward(None, name, WHERE) is None
    if name in ("delta", "progress"):
        with pytest.raises(ValueError, match=f"^{WHERE}: transform '{name}' compares steps"):
            transform_reward(0.25, name, WHERE)
    else:
        assert transform_reward(0.25, name, WHERE) == expected[0]


probabilities = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


@settings(deadline=None)
@given(probabilities)
def test_progress_adds_up_to_the_last_value_however_many_steps(values):
    assert math.fsum(parse_transform("progress")(values)) == pytest.approx(values[-1], abs=1e-12)


@settings(deadline=None)
@given(probabilities)
def test_delta_to_go_is_the_distance_to_the_last_value(values):
    transformed = parse_transform("delta")(values)
    assert transformed[-1] == 0.0
    for step, value in enumerate(values):
        assert math.fsum(transformed[step:]) == pytest.approx(value - values[-1], abs=1e-12)


@settings(deadline=None)
@given(probabilities, st.floats(-2, 2))
def test_clip_never_pays_for_a_step(values, threshold):
    for value, clipped in zip(values, parse_transform(f"clip:{threshold!r}")(values), strict=True):
        assert clipped == (0.0 if value >= threshold else value - threshold) <= 0.0


@settings(deadline=None)
@given(probabilities)
def test_center_is_odd_about_one_half(values):
    centred = parse_transform("center")(values)
    assert all(-1.0 <= value <= 1.0 for value in centred)
    mirrored = parse_transform("center")([1.0 - value for value in values])
    assert mirrored == pytest.approx([-value for value in centred], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def returning(returned, reduce=None):
    def judge(completion_ids, **kwargs):
        return returned

    if reduce is not None:
        judge.reduce = reduce
    return judge


def source_of(function, transform="none"):
    return wrap_source(function, "judge", transform, None, Accelerator(cpu=True), None)


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
    assert read_model_rewards(torch.tensor([0.25, 1.0]), "model", "center").tolist() == [-0.5, 1.0]
    with pytest.raises(ValueError, match="^reward source 'model', completion 1: the reward is nan"):
        read_model_rewards(torch.tensor([0.25, math.nan]), "model", "none")


# ---------------------------------------------------------------------------------------------------------------------
# On tokens
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# In batches of tokens
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_completion_once_within_the_budget(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    # No batch could have taken the next completion as well
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * max(lengths[index] for index in [*batch, following[0]]) > max_tokens


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    size = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**size, **heads, initializer_range=0.5)).eval()


LENGTHS = [3, 9, 1, 9, 4, 7, 2, 5]


@pytest.mark.parametrize(
    ("max_tokens", "shapes"),
    [
        (1000, [(8, 9)]),
        (27, [(3, 9), (5, 5)]),
        (18, [(2, 9), (2, 7), (4, 4)]),
        (5, [(1, 9), (1, 9), (1, 7), (1, 5), (1, 4), (1, 3), (2, 2)]),
        (1, [(1, 9), (1, 9), (1, 7), (1, 5), (1, 4), (1, 3), (1, 2), (1, 1)]),
    ],
)
def test_scores_do_not_depend_on_the_budget_and_the_forwards_keep_to_it(classifier, max_tokens, shapes):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 30, mask.shape, generator=generator) * mask
    whole = classifier(input_ids=ids, attention_mask=mask).logits
    assert len(set(whole.flatten().tolist())) == len(LENGTHS)

    ran = []
    hook = classifier.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        batched = TokenBatchedModel(classifier, max_tokens, Accelerator(cpu=True))
        with torch.inference_mode():
            logits = batched(input_ids=ids, attention_mask=mask).logits
    finally:
        hook.remove()
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
    assert ran == shapes


def test_only_a_model_with_a_budget_is_wrapped(classifier):
    accelerator = Accelerator(cpu=True)
    assert wrap_source(classifier, "model", "none", None, accelerator, None) is classifier
    assert isinstance(wrap_source(classifier, "model", "none", 64, accelerator, None), TokenBatchedModel)
    assert isinstance(wrap_source(returning([]), "judge", "none", 64, accelerator, None), RewardSource)
