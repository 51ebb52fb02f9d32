"""Gates between sources, and the metrics that show whether process rewards and outcomes agree."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.support.training import PROMPTS, RecordingExtTrainer, fixed_completions, make_trainer
from trl_grpo_ext import StepRewards
from trl_grpo_ext.metrics import outcome_correlations, reward_stats, step_metrics, withheld_shares
from trl_grpo_ext.rewards.gating import gate_indices


nan = math.nan
LENGTHS = [5, 3, 6, 2, 4, 5, 2, 4]
STEPS = [StepRewards([0, length - 1], [0.1 * row, 0.5 - 0.1 * row]) for row, length in enumerate(LENGTHS)]
STEPS[2] = StepRewards([1, 3, 5], [0.3, None, None])
STEPS[3] = None
# Positive at rows 0, 2, 5 and 6; row 7 is not judged
RIGHT = [1.0, 0.0, 0.5, 1.0, -1.0, 2.0, 1.0, None]
OPEN = [right is not None and right > 0 for right in RIGHT]


def source(name, returned):
    def judge(row, **columns):
        return [returned[index] for index in row]

    judge.__name__ = name
    return judge


def train(model, sources, folder, **config):
    trainer = make_trainer(
        RecordingExtTrainer,
        model,
        sources,
        folder,
        trainer_options={"rollout_func": fixed_completions(LENGTHS)},
        per_device_train_batch_size=8,
        max_steps=1,
        **config,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("order", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("supervision", [{"supervision": "process"}, {}, {"advantage_eps": 0.01}])
def test_a_gate_is_as_if_the_source_did_not_judge_where_the_outcome_is_not_positive(
    tiny_model, tmp_path, supervision, order
):
    options = {**supervision, "multi_objective_aggregation": order, "reward_weights": [1.0, 0.25]}
    sources = [source("steps", STEPS), source("right", RIGHT)]
    gated = train(tiny_model, sources, tmp_path, outcome_gate=["right", "none"], **options)
    by_hand = [reward if is_open else None for reward, is_open in zip(STEPS, OPEN, strict=True)]
    expected = train(tiny_model, [source("steps", by_hand), sources[1]], tmp_path, **options)
    torch.testing.assert_close(gated.batches[0]["advantages"], expected.batches[0]["advantages"], rtol=0, atol=0)
    entry, without = gated.state.log_history[0], expected.state.log_history[0]
    assert entry["rewards/steps/mean"] == without["rewards/steps/mean"]
    # Of seven judged completions, rows 1, 4 and 7 are withheld
    assert entry["rewards/steps/withheld"] == pytest.approx(3 / 7)
    assert entry["rewards/steps/unjudged"] == pytest.approx(1 / 8)
    assert "rewards/steps/withheld" not in without
    ungated = train(tiny_model, sources, tmp_path, **options)
    assert not torch.equal(gated.batches[0]["advantages"], ungated.batches[0]["advantages"])


def test_withheld_is_a_share_of_the_completions_that_a_source_judges():
    rewards_NK = torch.tensor([[0.5, 1.0], [nan, -1.0], [0.2, -1.0], [0.3, 1.0], [nan, 1.0]])
    withheld_NK = torch.tensor([[False, False], [True, False], [True, False], [False, False], [False, False]])
    shares = withheld_shares(["steps", "right"], rewards_NK.isnan(), withheld_NK)
    assert shares == {"rewards/steps/withheld": pytest.approx(1 / 3), "rewards/right/withheld": 0.0}


def test_a_gate_sees_transformed_rewards(tiny_model, tmp_path):
    options = {"supervision": "process", "outcome_gate": ["right", "none"]}
    sources = [source("steps", STEPS), source("right", [0.4, 0.6] * 4)]
    trainer = train(tiny_model, sources, tmp_path, reward_transforms=["none", "center"], **options)
    assert trainer.state.log_history[0]["rewards/steps/withheld"] == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (["rigth", "none"], r"outcome_gate\[0\] is 'rigth', the name of 0 of the reward sources steps, right"),
        (["none", "right"], r"outcome_gate\[1\]: 'right' cannot gate itself"),
        (["right"], "outcome_gate has 1 entries for 2 reward sources"),
    ],
)
def test_gates_that_cannot_be_are_refused_by_name(tiny_model, tmp_path, gates, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_model, [source("steps", STEPS), source("right", RIGHT)], tmp_path, outcome_gate=gates)


def test_a_gate_must_name_one_source():
    with pytest.raises(ValueError, match=r"outcome_gate\[2\] is 'judge', the name of 2 of the reward sources"):
        gate_indices(["none", "none", "judge"], ["judge", "judge", "steps"])


def test_unscored_steps_are_counted_and_carry_no_reward(tiny_model, tmp_path):
    trainer = train(tiny_model, [source("steps", STEPS), source("right", RIGHT)], tmp_path, supervision="process")
    entry = trainer.state.log_history[0]
    # Six completions of two steps and one of three, two of its steps without a score
    assert entry["rewards/steps/unscored"] == pytest.approx(2 / 15)
    assert "rewards/right/unscored" not in entry
    assert entry["rewards/steps/steps"] == pytest.approx(13 / 7)
    nothing = [StepRewards([0, 1], [None, None])] * 8
    trainer = train(tiny_model, [source("steps", nothing), source("right", RIGHT)], tmp_path, supervision="process")
    entry = trainer.state.log_history[0]
    assert entry["rewards/steps/unscored"] == 1.0 == entry["rewards/steps/unjudged"]


def test_tokens_per_step_are_loss_tokens_up_to_the_last_reward():
    rewards_KNT = torch.tensor([[[nan, 1.0, nan, nan, 1.0, nan], [nan, nan, 0.5, nan, nan, nan], [nan] * 6]])
    mask_NT = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6])
    metrics = step_metrics(["prm"], reward_stats(rewards_KNT, mask_NT), [True])
    # Four loss tokens for two rewards, two for one, and a completion without any
    assert metrics["rewards/prm/tokens_per_step"] == pytest.approx((4 / 2 + 2 / 1) / 2)


def correlation(process, outcome, group_size):
    """Pearson's, of the deviations from the group's mean, over completions that have both."""
    both = ~np.isnan(process + outcome)
    x, y = np.where(both, process, nan), np.where(both, outcome, nan)
    groups = np.arange(len(x)) // group_size
    for values in (x, y):
        for group in set(groups[both]):
            values[groups == group] -= np.nanmean(values[groups == group])
    return np.corrcoef(x[both], y[both])[0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_of_process_and_outcome_is_within_groups(seed):
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(12, 3)) + np.repeat(10 * rng.normal(size=3), 4)[:, None]
    steps[rng.random((12, 3)) < 0.3] = nan
    steps[5] = nan
    outcome = steps[:, 0] + rng.normal(size=12)
    outcome[7] = nan
    rewards_KNT = torch.full((2, 12, 5), nan, dtype=torch.float64)
    rewards_KNT[0, :, [0, 2, 4]] = torch.tensor(steps)
    rewards_KNT[1, :, 4] = torch.tensor(outcome)
    ((name, value),) = outcome_correlations(["prm", "right"], rewards_KNT.nanmean(-1), [True, False], 4).items()
    assert name == "rewards/prm/corr/right"
    process = np.array([np.nanmean(row) if not np.isnan(row).all() else nan for row in steps])
    assert value == pytest.approx(correlation(process, outcome, 4))


def test_in_evaluation_the_correlation_is_within_groups_of_evaluation(tiny_model, tmp_path):
    steps = [StepRewards([0, length - 1], [math.sin(row), 0.1 * row]) for row, length in enumerate(LENGTHS)]
    trainer = make_trainer(
        RecordingExtTrainer,
        tiny_model,
        [source("steps", steps), source("right", RIGHT)],
        tmp_path,
        trainer_options={
            "rollout_func": fixed_completions(LENGTHS),
            "eval_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        },
        supervision="process",
        num_generations_eval=2,
        per_device_eval_batch_size=8,
    )
    trainer.evaluate()
    process = np.array([np.mean(own.values) for own in steps])
    outcome = np.array([nan if right is None else right for right in RIGHT])
    expected = correlation(process, outcome, 2)
    assert abs(expected - correlation(process, outcome, 4)) > 0.1
    assert trainer.state.log_history[-1]["eval_rewards/steps/corr/right"] == pytest.approx(expected, rel=1e-5)


def test_a_correlation_needs_spread_within_a_group():
    rewards_KNT = torch.full((2, 6, 2), nan)
    rewards_KNT[0] = 0.1
    rewards_KNT[1, :, 1] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    (value,) = outcome_correlations(["prm", "right"], rewards_KNT.nanmean(-1), [True, False], 3).values()
    assert math.isnan(value)
    # Means of equal numbers, whose rounding is no spread either
    rewards_KNT[0] = torch.tensor([0.1, 0.3])
    (value,) = outcome_correlations(["prm", "right"], rewards_KNT.nanmean(-1), [True, False], 3).values()
    assert math.isnan(value)
    assert outcome_correlations(["right"], rewards_KNT[1:].nanmean(-1), [False], 3) == {}


def test_a_process_source_stays_one_where_every_completion_is_one_step(tiny_model, tmp_path):
    one_step = [StepRewards([0], [0.1 * row]) for row in range(8)]
    trainer = train(tiny_model, [source("steps", one_step), source("right", RIGHT)], tmp_path, supervision="process")
    assert abs(trainer.state.log_history[0]["rewards/steps/corr/right"]) > 0.1
