"""What a newcomer may get wrong: each mistake is met before the first step, by a message that names it."""

import logging
import re

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.support.tiny_models import tiny_tokenizer
from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer, ProcessRewardModel


def judge(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def without_tokens(*names):
    tokenizer = tiny_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


@pytest.mark.parametrize(
    ("reward_funcs", "error", "message"),
    [
        # Offline, transformers does not name the model that it has not found
        (
            ["Qwen/Qwen2.5-Math-PRM-7"],
            OSError,
            "the reward model 'Qwen/Qwen2.5-Math-PRM-7' cannot be loaded. It is no",
        ),
        (["Qwen2.5-Math-PRM-7B"], OSError, "'Qwen2.5-Math-PRM-7B' cannot .* on the Hub an id is ORGANISATION/NAME"),
        ([r"C:\models\prm"], OSError, r"the reward model 'C:\\models\\prm' cannot be loaded. It is no folder here"),
        (["./models/prm"], OSError, "the reward model './models/prm' cannot be loaded. It is no folder here"),
        ([judge, ProcessRewardModel], TypeError, r"reward_funcs\[1\] is the class ProcessRewardModel; pass an object"),
        ([{"judge": judge}], TypeError, r"reward_funcs\[0\] is {'judge': .*}, of type dict; a reward source is a fun"),
        ([judge, None], TypeError, r"reward_funcs\[1\] is None, of type NoneType; a reward source is a function"),
    ],
)
def test_a_source_that_is_none_is_named(tiny_model, tmp_path, reward_funcs, error, message):
    with pytest.raises(error, match=message):
        make_trainer(GRPOExtTrainer, tiny_model, reward_funcs, tmp_path)


@pytest.mark.parametrize("missing", [("pad_token", "eos_token"), ("eos_token",)])
def test_a_tokenizer_that_cannot_end_a_completion_is_refused(tiny_model, tmp_path, missing):
    options = {"processing_class": without_tokens(*missing)}
    with pytest.raises(ValueError, match="the tokenizer has no eos token, .* Set `processing_class.eos_token`"):
        make_trainer(GRPOExtTrainer, tiny_model, [judge], tmp_path, trainer_options=options)


def test_rollouts_of_ones_own_need_no_eos_token(tiny_model, tmp_path):
    options = {"processing_class": without_tokens("eos_token"), "rollout_func": fixed_completions([3, 4, 5, 6])}
    make_trainer(GRPOExtTrainer, tiny_model, [judge], tmp_path, trainer_options=options, max_steps=1).train()


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_a_column_under_a_name_of_trl_is_refused(tiny_model, tmp_path, argument, column):
    dataset = Dataset.from_dict({"prompt": ["ab"] * 8, column: ["cd"] * 8})
    options = {"eval_dataset": {"one": dataset}} if argument == "eval_dataset" else {}
    with pytest.raises(ValueError, match=f"{argument} has a column '{column}', a name under which reward functions"):
        trainer_of_dataset(tiny_model, tmp_path, dataset if argument == "train_dataset" else None, **options)


def trainer_of_dataset(model, folder, dataset=None, **options):
    class OfDataset(GRPOExtTrainer):
        def __init__(self, *arguments, train_dataset, **keywords):
            super().__init__(*arguments, train_dataset=dataset or train_dataset, **keywords, **options)

    return make_trainer(OfDataset, model, [judge], folder, max_steps=1)


def test_a_data_set_without_prompts_is_refused_with_its_columns(tiny_model, tmp_path):
    dataset = Dataset.from_dict({"question": ["ab"] * 8, "answer": ["cd"] * 8})
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt'; it has: question, answer"):
        trainer_of_dataset(tiny_model, tmp_path, dataset)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "ab"}, "the data set has no column 'prompt'; it has: question"),
        ({"prompt": "ab", "completions": "cd"}, "the data set has a column 'completions', a name under which reward"),
    ],
)
def test_so_is_a_streamed_one_before_anything_is_generated(tiny_model, tmp_path, row, message):
    dataset = IterableDataset.from_generator(lambda: (dict(row) for _ in range(8)))
    assert dataset.column_names is None
    trainer = trainer_of_dataset(tiny_model, tmp_path, dataset)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda ids: torch.ones(len(ids), 1),
            r"1 token rewards for a completion of \d+ tokens. For one reward of the",
        ),
        (
            lambda ids: [([0, 1], [0.5, 1.0]) for _ in ids],
            r"got a pair of lists; .* return StepRewards\(ends, values\)",
        ),
    ],
    ids=["(N, 1)", "pairs"],
)
def test_rewards_of_the_wrong_shape_say_which_was_meant(tiny_model, tmp_path, returned, message):
    def shaped(completion_ids, **columns):
        return returned(completion_ids)

    trainer = make_trainer(GRPOExtTrainer, tiny_model, [shaped], tmp_path, supervision="process", max_steps=1)
    with pytest.raises((TypeError, ValueError), match=f"^reward source 'shaped', completion 0: {message}"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------------------
# What TRL takes is taken, and nothing is said about it


@pytest.mark.parametrize(
    "shape",
    [tuple, lambda rewards: torch.tensor(rewards)[:, None], lambda rewards: [torch.tensor([r]) for r in rewards]],
    ids=["a tuple", "(N, 1)", "one-element tensors"],
)
def test_with_defaults_a_shape_that_trl_takes_gives_its_advantages(tiny_model, tmp_path, shape, caplog):
    def shaped(completion_ids, **columns):
        return shape(judge(completion_ids))

    def advantages_of(function):
        rows = fixed_completions([3, 5, 4, 6])
        trainer = make_trainer(
            GRPOExtTrainer, tiny_model, [function], tmp_path, trainer_options={"rollout_func": rows}, max_steps=1
        )
        trainer.train()
        return list(trainer._logs["advantages"])

    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        assert advantages_of(shaped) == advantages_of(judge)
    assert not [record for record in caplog.records if re.search("reward source", record.getMessage())]
