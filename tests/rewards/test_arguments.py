"""Columns that reward sources need, against those of the data sets."""

import pytest
from datasets import Dataset

from tests.support.training import PROMPTS, fixed_completions, make_trainer, scored_batch
from trl_grpo_ext import GRPOExtTrainer, RemoteOutcomeRewardModel, step_reward
from trl_grpo_ext.rewards.arguments import check_columns, check_parameters, check_source_columns


DATA = Dataset.from_dict({"prompt": ["p"], "answer": ["4"]})


def plain(prompts, completions, completion_ids, answer, *, trainer_state, tolerance=0.1, **columns):
    return []


def named(steps, problem, prompt, answer, log_extra, tolerance=0.1):
    return []


@pytest.mark.parametrize(
    "source",
    [
        plain,
        step_reward(named),
        step_reward(lambda steps, **columns: []),
        RemoteOutcomeRewardModel("http://127.0.0.1:1", label_column="answer"),
        RemoteOutcomeRewardModel("http://127.0.0.1:1"),
        print,
    ],
)
def test_columns_that_are_there_are_found(source):
    check_source_columns([source], ["judge"], {"train_dataset": DATA, "eval_dataset": {"one": DATA}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (step_reward(lambda steps, answr: []), "needs the column 'answr', which eval_dataset lacks; it has: prompt"),
        (RemoteOutcomeRewardModel("http://127.0.0.1:1", label_column="gold"), "needs the column 'gold'"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_is_named(source, message):
    unknown = Dataset.from_dict({"prompt": ["p"]})
    unknown.set_transform(lambda rows: {"prompt": rows["prompt"], "answr": rows["prompt"]})
    with pytest.raises(TypeError, match=f"reward source 'judge' {message}"):
        check_source_columns([source], ["judge"], {"train_dataset": unknown, "eval_dataset": {"one": DATA}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda completions, answr: [], "has a parameter 'answr', which is no column of the dataset"),
        (lambda problem, answer: [], "has a parameter 'problem', .* decorate it with @step_reward"),
        (lambda steps, **columns: [], "has a parameter 'steps', .* decorate it with @step_reward"),
    ],
)
def test_a_parameter_that_a_function_is_not_given_is_named_at_its_call(source, message):
    # A subclass may add columns, so that only the call shows it
    check_source_columns([source], ["judge"], {"train_dataset": DATA})
    with pytest.raises(TypeError, match=f"reward source 'judge' {message}"):
        check_parameters(source, ["completions", "answer"], "reward source 'judge'")


def test_the_columns_of_a_transform_are_not_known():
    transformed = Dataset.from_dict({"question": ["p"]}).with_transform(lambda rows: {"prompt": rows["question"]})
    check_columns({"train_dataset": transformed}, needs_prompt=True)
    check_source_columns([step_reward(named)], ["judge"], {"train_dataset": transformed})


def test_a_missing_column_is_named_when_the_trainer_is_made(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="reward source 'named' needs the column 'answer', which train_dataset lacks"):
        make_trainer(GRPOExtTrainer, tiny_model, step_reward(named), tmp_path)


def test_with_rollouts_of_ones_own_a_missing_column_is_named_when_rewards_are_asked_for(tiny_model, tmp_path):
    def judge(problem, steps):
        return []

    rows = fixed_completions([3] * len(PROMPTS))
    trainer = make_trainer(GRPOExtTrainer, tiny_model, judge, tmp_path, trainer_options={"rollout_func": rows})
    with pytest.raises(TypeError, match="'judge' has a parameter 'problem', .* decorate it with @step_reward"):
        scored_batch(trainer, len(PROMPTS))
