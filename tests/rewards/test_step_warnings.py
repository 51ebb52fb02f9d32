"""What is said about steps, once and by name, and the share of steps whose rewards do not count."""

import logging

import pytest
import torch

from tests.support.tiny_models import tiny_tokenizer
from tests.support.training import EOS, FixedCompletions, make_trainer, scored_batch
from trl_grpo_ext import GRPOExtTrainer, Segmentation, StepRewards, step_reward
from trl_grpo_ext.rewards.sources import RewardSource, StepCounts
from trl_grpo_ext.rewards.step_warnings import StepWarnings


LINES = ["a\nb\nc", "a\nb", "c", "a\nb\nc\na"]


def rows_of(texts, **options):
    ids = [[*tiny_tokenizer().encode(text, add_special_tokens=False), EOS] for text in texts]
    return FixedCompletions([[4, 5]] * len(ids), ids, **options)


def trainer_of(source, model, folder, rows, **config):
    options = {"supervision": "process", "num_generations": 4, **config}
    return make_trainer(GRPOExtTrainer, model, source, folder, trainer_options={"rollout_func": rows}, **options)


def said(caplog, trainer, batches=2):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        for _ in range(batches):
            scored_batch(trainer, 4)
    return [record.getMessage() for record in caplog.records if "reward source" in record.getMessage()]


def test_a_wrong_separator_is_named_once(tiny_model, tmp_path, caplog):
    judge = step_reward(lambda steps: [1.0] * len(steps), by="blank_line", name="judge")
    (message,) = said(caplog, trainer_of(judge, tiny_model, tmp_path, rows_of(LINES)))
    assert "'judge' found a single step in each of the 4 completions that it judges" in message
    assert "'a\\nb\\nc'" in message
    assert "Do the steps end otherwise? See `Segmentation`" in message


@pytest.mark.parametrize(
    ("function", "by"),
    [
        (lambda steps: [1.0] * len(steps), "newline"),
        # The steps are found, and not judged; of the empty completion there are none
        (lambda steps: None, "newline"),
    ],
    ids=["several steps", "not judged"],
)
def test_steps_that_are_found_are_no_reason_to_warn(tiny_model, tmp_path, caplog, function, by):
    trainer = trainer_of(step_reward(function, by=by), tiny_model, tmp_path, rows_of([*LINES[:3], ""]))
    assert said(caplog, trainer) == []


def source_of(function):
    return RewardSource(function, "judge")


def test_completions_of_one_step_are_no_reason_to_warn_once_others_had_several():
    source = source_of(step_reward(lambda steps: []))
    several = StepCounts(steps=5, with_several=1)
    single = StepCounts(steps=4)
    warnings = StepWarnings(is_outcome=False)
    assert warnings.of_batch(source, several, 4, "a\nb") is None
    assert warnings.of_batch(source, single, 4, "a") is None
    assert "a single step" in (StepWarnings(is_outcome=False).of_batch(source, single, 4, "a") or "")


def test_a_function_that_places_its_steps_itself_knows_how_many_there_are():
    source = source_of(lambda **columns: [])
    assert StepWarnings(is_outcome=False).of_batch(source, StepCounts(steps=4), 4, "a") is None


def test_the_steps_of_a_batch_are_counted():
    returned = [StepRewards([], []), None, 1.0, StepRewards([0, 1], [1.0, None]), StepRewards([1], [2.0])]
    source = source_of(lambda **columns: returned)
    source(completion_ids=[[7, 7]] * 5)
    assert source.count_steps() == StepCounts(steps=3, unscored=1, with_several=1, without_step=1)


@pytest.mark.parametrize(("mask", "share"), [([1] * 6, 0.0), ([1, 1, 1, 0, 1, 1], 1 / 6), ([1, 0, 1, 0, 0, 1], 0.5)])
def test_rewards_outside_the_loss_mask_are_counted(tiny_model, tmp_path, mask, share):
    rows = rows_of(["a\nb\nc"] * 4)
    rows.env_mask = [mask] * 4

    def judge(completion_ids, **columns):
        return [[1.0] * len(ids) for ids in completion_ids]

    trainer = trainer_of(judge, tiny_model, tmp_path, rows)
    scored_batch(trainer, 4)
    assert trainer._metrics["eval"]["rewards/judge/masked"] == [pytest.approx(share)]


@pytest.mark.parametrize(
    ("mask", "steps", "by"),
    [
        ([1] * 6, {1: "a", 3: "b", 4: "c"}, "newline"),
        # The newline within the turn ends a step, and the turn another
        ([1, 1, 1, 0, 1, 1], {1: "a", 2: "b", 4: "c"}, "newline"),
        # The third turn is the end alone
        ([1, 0, 1, 0, 0, 1], {0: "a", 2: "b"}, "newline"),
        ([1, 1, 1, 0, 1, 1], {2: "a\nb", 4: "c"}, "turn"),
        ([1] * 6, {4: "a\nb\nc"}, "turn"),
        ([1, 0, 1, 0, 1, 1], {0: "a", 4: "b\n\nc"}, Segmentation("turn", max_steps=2)),
        ([1, 1, 1, 0, 1, 1], {2: "a\nb", 4: "c"}, Segmentation("newline", min_step_tokens=3)),
    ],
)
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_the_output_of_a_tool_belongs_to_no_step_and_ends_one(tiny_model, tmp_path, mask, steps, by, form):
    """The tokens are a, newline, b, newline, c, end."""
    seen = []
    rows = rows_of(["a\nb\nc"] * 4)
    rows.completion_ids = [form(ids) for ids in rows.completion_ids]
    rows.env_mask = [form(mask)] * 4

    @step_reward(by=by)
    def judge(steps):
        seen.append(steps)
        return [1.0] * len(steps)

    trainer = trainer_of(judge, tiny_model, tmp_path, rows)
    trainer.compute_advantages = lambda batch: seen.append(batch) or GRPOExtTrainer.compute_advantages(trainer, batch)
    scored_batch(trainer, 4)
    batch = seen.pop()
    assert seen == [list(steps.values())] * 4
    assert (~batch.rewards_KNT[0, 0].isnan()).nonzero().flatten().tolist() == list(steps)
    assert trainer._metrics["eval"]["rewards/judge/masked"] == [0.0]


def test_what_a_step_function_logs_lies_in_its_row_of_the_table(tiny_model, tmp_path):
    @step_reward(by="newline")
    async def judge(steps, log_extra):
        log_extra("first", [steps[0]])
        return [1.0] * len(steps)

    trainer = trainer_of(judge, tiny_model, tmp_path, rows_of(["c", "", "a\nb", "b"]), log_completions=True)
    scored_batch(trainer, 4)
    assert list(trainer._logs["completion"]) == ["c", "", "a\nb", "b"]
    assert list(trainer._logs["extra"]["first"]) == ["c", None, "a", "b"]
