"""`@step_reward`: what the function gets, where its rewards lie, and what is refused, on four real tokenizers."""

import asyncio
import copy
import functools
import inspect
import pickle
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import hub_folders
from tests.support.tiny_models import save_tiny_model
from tests.support.tokenizers import FAST, characters, load_tokenizer
from tests.support.training import FixedCompletions
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, Segmentation, StepRewards, step_reward
from trl_grpo_ext._trl import is_async_callable
from trl_grpo_ext.rewards.sources import wrap_source
from trl_grpo_ext.rewards.types import PreparableSource


STEPS = ["First, 3 * 4 = 12 apples.", "Then 12 - 2 = 10.", "The answer is 10."]
TEXT = "\n\n".join(STEPS)


def prepared(source, tokenizer=None):
    source.prepare(accelerator=None, policy_tokenizer=tokenizer or hub_folders.byte_tokenizer(), batch_tokens=None)
    return source


def call(source, texts, tokenizer=None, **columns):
    """What the reward function gives for completions with these texts, called as TRL calls it."""
    tokenizer = tokenizer or hub_folders.byte_tokenizer()
    completion_ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    columns.setdefault("prompts", ["What is 3 * 4 - 2?"] * len(texts))
    given = prepared(source, tokenizer)(completions=texts, completion_ids=completion_ids, **columns)
    return asyncio.run(given) if is_async_callable(source) else given


def lengths(steps):
    return [float(len(step)) for step in steps]


# ---------------------------------------------------------------------------------------------------------------------
# Where the rewards lie


@pytest.mark.xdist_group("tokenizers")
def test_blank_lines_within_qwen_s_tokens():
    """No token of this text is "\\n" or "\\n\\n": a search for one finds no step."""
    tokenizer = load_tokenizer("qwen")
    ids = tokenizer.encode(TEXT)
    assert not {"\n", "\n\n"} & {tokenizer.decode([token]) for token in ids}
    source = prepared(step_reward(lambda problem, steps: lengths(steps)), tokenizer)
    (rewards,) = source(prompts=["?"], completions=[TEXT], completion_ids=[[*ids, tokenizer.eos_token_id]])
    assert rewards == StepRewards(ends=[12, 24, 31], values=[25.0, 17.0, 17.0])


PROSE = [
    "So x = 3.",
    "**Step 2:** add, then stop:",
    "1. $x$ costs \\$3;",
    "解：因为 😀",
    "Ответ: [4]",
    "The answer is 10",
]
WHOLE = ["\\[\nx^2 = 9\n\\]", "$$\na\n= b\n$$", "```python\na = 1\n\n\nb = 2\n```", "so \\[x\\]: y"]
SEPARATORS = {"blank_line": ["\n\n", "\n \n", "\n\n\n"], "newline": ["\n", "\n\n"]}


@pytest.mark.xdist_group("tokenizers")
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("by", SEPARATORS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_reward_lies_on_the_token_with_the_step_s_last_character(name, by, data):
    expected = data.draw(st.lists(st.sampled_from([*PROSE, *WHOLE]), min_size=1, max_size=5))
    separators = [data.draw(st.sampled_from(SEPARATORS[by])) for _ in expected[1:]] + [""]
    text = "".join(step + separator for step, separator in zip(expected, separators, strict=True))
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    given = []
    source = prepared(step_reward(lambda steps: given.extend(steps) or lengths(steps), by=by), tokenizer)
    (rewards,) = source(prompts=["?"], completion_ids=[[*ids, tokenizer.eos_token_id]])
    assert given == expected
    assert rewards.values == lengths(expected)
    held = characters(name, ids)
    stops = accumulate(len(step) + len(separator) for step, separator in zip(expected, separators, strict=True))
    assert rewards.ends == [held[stop - 1].last for stop in stops]


def test_a_segmentation_and_a_callable_say_where_steps_end():
    text = "one two three"
    joined = Segmentation(by="regex: ", max_steps=2)
    assert call(step_reward(lengths, by=joined), [text]) == [StepRewards([3, 12], [3.0, 9.0])]
    assert call(step_reward(lengths, by=lambda text: [text.index("three")]), [text]) == [
        StepRewards([7, 12], [7.0, 5.0])
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What the function gets


def record(into, **options):
    @step_reward(**options)
    def judge(**given):
        into.append(given)
        return [1.0] * len(given["steps"])

    return judge


def test_a_function_of_any_columns_gets_the_row_s_values_and_the_last_user_message():
    calls = []
    prompts = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}],
    ]
    state = SimpleNamespace(global_step=3)
    call(
        record(calls),
        [TEXT, "x"],
        prompts=prompts,
        # The dataset's own column of that name is hidden by the prompt's text
        problem=["not", "these"],
        answer=["10", "11"],
        sizes=[(1, 2), (3,)],
        trainer_state=state,
    )
    first = {"problem": "a", "steps": STEPS, "completion": TEXT, "prompt": prompts[0], "answer": "10", "sizes": (1, 2)}
    second = {"problem": "e", "steps": ["x"], "completion": "x", "prompt": prompts[1], "answer": "11", "sizes": (3,)}
    assert calls == [{**first, "trainer_state": state}, {**second, "trainer_state": state}]


def test_a_function_gets_the_columns_that_it_names():
    calls = []

    @step_reward
    def judge(steps, *, answer, tolerance=0.5, trainer_state):
        calls.append((steps, answer, tolerance, trainer_state))
        return [1.0] * len(steps)

    # A prompt without a user's text is no hindrance to a function that does not ask for the problem
    image = [{"role": "user", "content": [{"type": "image"}]}]
    call(judge, ["x", "y"], prompts=[image] * 2, answer=[1, 2], level=[3, 4], trainer_state="state")
    assert calls == [(["x"], 1, 0.5, "state"), (["y"], 2, 0.5, "state")]


class Judge:
    """Judges by a factor."""

    reduce = "min"

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, steps, offset=0):
        return [self.factor * len(step) + offset for step in steps]

    def method(self, problem, steps):
        return self(steps)


class AsyncJudge(Judge):
    async def __call__(self, steps, offset=0):
        return super().__call__(steps, offset)


async def judge_later(steps, factor):
    return [factor * len(step) for step in steps]


@pytest.mark.parametrize(
    ("function", "name", "is_async"),
    [
        (Judge(2), "Judge", False),
        (Judge(2).method, "method", False),
        (functools.partial(Judge(1), offset=1), "Judge", False),
        (AsyncJudge(2), "AsyncJudge", True),
        (functools.partial(judge_later, factor=2), "judge_later", True),
    ],
)
def test_whatever_can_be_called_by_name_can_judge(function, name, is_async):
    source = step_reward(function)
    assert source.__name__ == name
    assert is_async_callable(source) == is_async
    assert call(source, ["a"]) == [StepRewards([0], [2.0])]


# ---------------------------------------------------------------------------------------------------------------------
# What it is


class Grader:
    """Decorated methods."""

    def __init__(self, factor):
        self.factor = factor

    @step_reward(by="newline", reduce="min")
    def judge(self, steps, offset=0):
        """Judge."""
        return [self.factor + step_number + offset for step_number, _ in enumerate(steps)]

    @step_reward(name="later")
    async def judge_later(self, steps):
        return [self.factor] * len(steps)

    @staticmethod
    @step_reward
    def alone(steps):
        return [7.0] * len(steps)

    # An object that can be called is not bound by Python either
    held = step_reward(Judge(5.0))


def test_a_decorated_method_judges_with_its_object():
    two = Grader(2.0).judge
    assert (two.__name__, two.__doc__, two.reduce) == ("judge", "Judge.", "min")
    # Another object's method does not change the first one's
    assert call(Grader(3.0).judge, ["a\nb"]) == [StepRewards([1, 2], [3.0, 4.0])]
    assert call(two, ["a\nb"]) == [StepRewards([1, 2], [2.0, 3.0])]
    assert call(Grader(4.0).judge_later, ["a"]) == [StepRewards([0], [4.0])]
    assert Grader(4.0).judge_later.__name__ == "later"
    assert is_async_callable(Grader(4.0).judge_later)
    assert call(Grader(2.0).alone, ["a"]) == [StepRewards([0], [7.0])]
    assert call(Grader(2.0).held, ["a"]) == [StepRewards([0], [5.0])]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_copies_and_pickles_of_a_decorated_method_judge_alike(make):
    bound = prepared(Grader(2.0).judge)
    made = make(bound)
    assert made is not bound and made.policy_tokenizer is not None
    assert call(made, ["a\nb"]) == [StepRewards([1, 2], [2.0, 3.0])]


def test_a_decorated_method_without_self_is_refused_where_it_is_bound():
    class Wrong:
        @step_reward
        def judge(steps):
            return steps

    with pytest.raises(TypeError, match="reward source 'judge' has no parameter `steps`"):
        Wrong().judge  # noqa: B018


def test_the_signature_is_that_of_trl_s_call():
    for source in (module_judge, Grader(1.0).judge):
        assert list(inspect.signature(source).parameters) == [
            *("prompts", "completions", "completion_ids", "tool_mask", "prompt_ids", "columns")
        ]
    with pytest.raises(TypeError, match="'lengths' has been made a reward function of steps already"):
        step_reward(step_reward(lengths))


def test_three_ways_to_decorate():
    def judge(steps):
        """Judges."""
        return lengths(steps)

    for source in (step_reward(judge), step_reward()(judge), step_reward(by="newline")(judge)):
        assert (source.__name__, source.__doc__) == ("judge", "Judges.")
        assert isinstance(source, PreparableSource)
    assert call(step_reward(by="newline")(judge), ["a\nbc"]) == [StepRewards([1, 3], [1.0, 2.0])]
    assert call(step_reward(judge), ["a\nbc"]) == [StepRewards([3], [4.0])]


def test_the_trainer_sees_name_and_reduce():
    assert wrap_source(step_reward(lengths, reduce="min"), "x").reduce == "min"
    assert wrap_source(step_reward(Judge(1)), "x").reduce == "min"
    assert step_reward(lengths, name="other").__name__ == "other"
    # By which the trainer knows that nobody has chosen the sum
    assert not wrap_source(step_reward(lengths), "x").chose_reduce


@step_reward(by="newline")
def module_judge(steps, answer):
    return [float(answer in step) for step in steps]


@step_reward(name="later")
async def async_module_judge(steps):
    return lengths(steps)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
@pytest.mark.parametrize(("source", "columns"), [(module_judge, {"answer": ["a"]}), (async_module_judge, {})])
def test_copies_and_pickles_judge_alike_and_are_prepared_alone(make, source, columns):
    expected = call(source, ["a\nb"], **columns)
    made = make(source)
    assert (type(made), made.__name__) == (type(source), source.__name__)
    tokenizer = hub_folders.byte_tokenizer()
    ids = [tokenizer.encode("a\nb")]
    given = made(prompts=["?"], completion_ids=ids, **columns)
    assert (asyncio.run(given) if is_async_callable(made) else given) == expected
    made.prepare(None, "another", None)
    assert source.policy_tokenizer is tokenizer


def test_an_undecorated_name_keeps_its_function():
    undecorated = pickle.loads(pickle.dumps(step_reward(lengths)))
    assert undecorated.function is lengths
    assert copy.deepcopy(step_reward(lambda steps: lengths(steps)))


# ---------------------------------------------------------------------------------------------------------------------
# What it returns


@pytest.mark.parametrize("text", ["", "\n \n", "<|im_end|>"])
def test_a_completion_without_steps_is_not_shown_to_the_function(text):
    calls = []
    assert call(record(calls), [text, "x"])[0] == StepRewards([], [])
    assert [given["steps"] for given in calls] == [["x"]]


@pytest.mark.parametrize(
    "listed",
    [
        list,
        tuple,
        iter,
        np.array,
        torch.tensor,
        lambda values: map(torch.tensor, values),
        lambda values: map(np.float32, values),
    ],
)
def test_any_list_of_numbers_is_taken(listed):
    source = step_reward(lambda steps: listed([float(len(step)) for step in steps]))
    assert call(source, ["a\n\nbc"]) == [StepRewards([2, 4], [1.0, 2.0])]


def test_none_is_not_scored_for_a_step_and_not_judged_for_a_completion():
    source = step_reward(lambda steps: None if steps == ["?"] else [1, None, 0.5][: len(steps)])
    assert call(source, ["?", TEXT])[0] is None
    assert call(source, ["?", TEXT])[1].values == [1, None, 0.5]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "1 rewards for 3 steps"),
        ([1.0] * 4, ValueError, "4 rewards for 3 steps"),
        ([], ValueError, "0 rewards for 3 steps"),
        (1.0, TypeError, "got 1.0; expected a list with one reward for each step, or None"),
        ({1: 1.0}, TypeError, "expected a list"),
        ([1.0, float("nan"), 1.0], ValueError, "step 1, 'Then 12 - 2 = 10.', is nan"),
        ([1.0, 1.0, float("-inf")], ValueError, "step 2, 'The answer is 10.', is -inf"),
        (["1", 1.0, 1.0], TypeError, "step 0, 'First, 3 .* is '1', which is not a number"),
    ],
)
def test_bad_rewards_name_the_source_the_completion_and_the_step(returned, error, message):
    async def later(steps):
        return returned if len(steps) == 3 else [1.0]

    for function in (lambda steps: returned if len(steps) == 3 else [1.0], later):
        with pytest.raises(error, match=f"^reward source 'judge', completion 1: .*{message}"):
            call(step_reward(function, name="judge"), ["x", TEXT])


def test_a_parameter_that_is_no_column_is_named():
    source = step_reward(lambda problem, steps, answr: lengths(steps), name="judge")
    with pytest.raises(TypeError, match="'judge' has a parameter 'answr'.*: answer, completion, problem, prompt"):
        call(source, ["x"], answer=["a"])


def test_a_column_has_one_value_for_each_completion():
    with pytest.raises(ValueError, match="'judge', completion 0: column 'answer' has 1 values for 2 prompts"):
        call(step_reward(lambda steps, **columns: lengths(steps), name="judge"), ["x", "y"], answer=["a"])


def test_without_the_policy_s_tokenizer():
    source = step_reward(lengths, name="judge")
    with pytest.raises(ValueError, match="'judge' has no `policy_tokenizer`.*GRPOExtTrainer sets it"):
        source(prompts=["?"], completion_ids=[[1]])


@pytest.mark.parametrize(
    ("decorate", "error", "message"),
    [
        (lambda: step_reward("newline"), TypeError, "`by` is given by name"),
        (lambda: step_reward(Judge), TypeError, "a class as an instance"),
        (lambda: step_reward(lambda problem: []), TypeError, "has no parameter `steps`"),
        (lambda: step_reward(lambda steps, /: []), TypeError, "'steps' is positional-only"),
        (lambda: step_reward(by="paragraph"), ValueError, "unknown by='paragraph'"),
        (lambda: step_reward(lengths, reduce="max"), ValueError, "'lengths': reduce='max'; known: 'sum', .*'min'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(decorate, error, message):
    with pytest.raises(error, match=message):
        decorate()


# ---------------------------------------------------------------------------------------------------------------------
# Async functions


def test_all_completions_are_judged_at_the_same_time():
    started = []

    @step_reward
    async def judge(steps):
        started.append(steps)
        # Goes on only when every completion has come this far
        while len(started) < 3:
            await asyncio.sleep(0)
        return lengths(steps)

    given = call(judge, ["a", "bb", "", "ccc"])
    assert [rewards.values for rewards in given] == [[1.0], [2.0], [], [3.0]]
    assert [] not in started


class Table:
    """The columns that TRL would log."""

    def __init__(self):
        self.columns = {}

    def log_extra(self, column, values):
        self.columns.setdefault(column, []).extend(values)


def test_what_is_logged_lies_in_the_row_of_its_completion():
    """Judgements end in the order of their lengths, one completion has no step, and one logs nothing."""

    async def slow(steps, log_extra):
        await asyncio.sleep(0.02 * len(steps[0]))
        if steps[0] != "c":
            log_extra("first", [steps[0]])
        return lengths(steps)

    def quick(steps, log_extra):
        if steps[0] == "bb":
            log_extra("only", ["bb"])
        return lengths(steps)

    table = Table()
    for function in (slow, quick):
        call(step_reward(function), ["aaaa", "bb", "", "c", "ddd"], log_extra=table.log_extra)
    assert table.columns == {"first": ["aaaa", "bb", None, None, "ddd"], "only": [None, "bb", None, None, None]}


@pytest.mark.parametrize("values", [1.0, "text", [], [1.0, 2.0]])
def test_a_completion_logs_one_value(values):
    def judge(steps, log_extra):
        log_extra("column", values)

    with pytest.raises(ValueError, match=r"completion 0: log_extra\('column', .*one value of this completion"):
        call(step_reward(judge), ["a"], log_extra=Table().log_extra)


def test_a_completion_logs_once():
    def judge(steps, log_extra):
        log_extra("column", [1])
        log_extra("column", [2])

    with pytest.raises(ValueError, match=r"log_extra\('column', ...\) is called twice for one completion"):
        call(step_reward(judge), ["a"], log_extra=Table().log_extra)


def test_the_first_failure_cancels_the_others():
    ended = []

    @step_reward
    async def judge(steps):
        if steps == ["bad"]:
            raise RuntimeError("no connection")
        try:
            await asyncio.sleep(3600)
        finally:
            # Has to be over before the failure is seen
            await asyncio.sleep(0)
            ended.append(steps)

    with pytest.raises(RuntimeError, match="no connection"):
        call(judge, ["a", "bad", "b"])
    assert ended == [["a"], ["b"]]


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


class _RecordingTrainer(GRPOExtTrainer):
    def compute_advantages(self, batch):
        self.batch = batch
        return super().compute_advantages(batch)


@step_reward
def judge_with_column(problem, steps, answer):
    return [1.0 if answer in step else 0.25 for step in steps]


@step_reward(name="async")
async def judge_conversation(problem, steps, **columns):
    await asyncio.sleep(0)
    assert problem == columns["prompt"][-1]["content"]
    return [float(columns["answer"] in step) for step in steps]


@pytest.mark.xdist_group("tokenizers")
def test_the_trainer_gives_the_tokenizer_and_trains_on_the_placed_rewards(tmp_path):
    tokenizer = load_tokenizer("qwen")
    model = save_tiny_model(tmp_path / "model", vocab_size=len(tokenizer))
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in (TEXT, "No:\n\n10", "?", "")]
    args = GRPOExtConfig(
        str(tmp_path / "out"), supervision="process", bf16=False, use_cpu=True, report_to="none", num_generations=4
    )
    trainer = _RecordingTrainer(
        model,
        [judge_with_column, judge_conversation],
        args,
        train_dataset=Dataset.from_dict({"prompt": ["unused"]}),
        processing_class=tokenizer,
        rollout_func=FixedCompletions([[1]] * 4, ids),
    )
    trainer.model.eval()
    prompt = [{"role": "user", "content": "How many?"}]
    trainer._generate_and_score_completions([{"prompt": prompt, "answer": "10"}] * 4)

    rewards_KNT = trainer.batch.rewards_KNT
    placed = [[{t: r for t, r in enumerate(row) if r == r} for row in rows] for rows in rewards_KNT.tolist()]
    assert placed[0] == [{12: 0.25, 24: 1.0, 31: 1.0}, {1: 0.25, 3: 1.0}, {0: 0.25}, {}]
    assert placed[1] == [{12: 0.0, 24: 1.0, 31: 1.0}, {1: 0.0, 3: 1.0}, {0: 0.0}, {}]
