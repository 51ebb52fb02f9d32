"""Weights of reward sources that change during training."""

import math

import pytest

from tests.support.training import FixedCompletions, RecordingExtTrainer, make_trainer
from trl_grpo_ext.rewards.weights import WeightSchedule, parse_weight


def quarter(row, **columns):
    return [number / 4 for number in row]


def sign(row, **columns):
    return [float((-1) ** number) for number in row]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (0.5, {0.0: 0.5, 1.0: 0.5}),
        ("0.5", {0.0: 0.5, 1.0: 0.5}),
        ("linear:1:0", {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        ("linear:0:2:0.5", {0.0: 0.0, 0.25: 1.0, 0.5: 2.0, 1.0: 2.0}),
        ("cosine:1:0.5", {0.0: 1.0, 0.25: 0.75 + math.sqrt(2) / 8, 0.5: 0.75, 1.0: 0.5}),
        ("step:1:-1:0.3", {0.0: 1.0, 0.29: 1.0, 0.3: -1.0, 1.0: -1.0}),
    ],
)
def test_values(text, at):
    weight = parse_weight(text)
    assert {progress: weight.at(progress) for progress in at} == pytest.approx(at, abs=1e-15)
    assert weight.changes == (":" in str(text))


@pytest.mark.parametrize(
    "value",
    [
        *("half", "", "linear", "linear:1", "linear:1:2:3:4", "line:1:0", "linear:1:x", "linear:1:nan", "nan", "1:2"),
        *("linear:1:0:0", "linear:1:0:1.5", "cosine:1:0:-0.5", "step:0:1", "step:0:1:1", True, None, [1.0]),
    ],
)
def test_what_is_no_weight(value):
    with pytest.raises(ValueError, match="is no weight: a finite number, or PATH:FIRST:LAST"):
        parse_weight(value)


def trainer(tiny_model, folder, callbacks=(), **config):
    rows = FixedCompletions([[4]] * 4, [[5, 6, 2]] * 4)
    options = {"trainer_options": {"rollout_func": rows, "callbacks": list(callbacks)}, "max_steps": 4, **config}
    return make_trainer(RecordingExtTrainer, tiny_model, [quarter, sign], folder, **options)


@pytest.mark.parametrize("supervision", ["outcome", "process"])
def test_each_batch_has_the_weights_of_its_step(tiny_model, tmp_path, supervision):
    run = trainer(
        tiny_model,
        tmp_path,
        supervision=supervision,
        scale_rewards="none",
        gamma=1.0,
        per_device_train_batch_size=4,
        reward_weights=[1.0, "linear:2:0:0.5"],
    )
    assert run.reward_weights.tolist() == [1.0, 2.0]
    run.train()
    log = run.state.log_history[:4]
    assert [entry["rewards/sign/weight"] for entry in log] == [2.0, 1.0, 0.0, 0.0]
    assert [entry["rewards/quarter/weight"] for entry in log] == [1.0] * 4
    for step, batch in enumerate(run.batches):
        weight = max(2.0 - step, 0.0)
        # The means are 0.375 and 0
        expected = [row / 4 - 0.375 + weight * (-1) ** row for row in range(4)]
        last = batch["advantages"] if supervision == "outcome" else batch["advantages"][:, 0]
        assert last.tolist() == pytest.approx(expected, abs=1e-6)
    assert run.args.reward_weights == [1.0, "linear:2:0:0.5"]
    assert "linear:2:0:0.5" in run.args.to_json_string()


def test_a_resumed_run_has_the_weights_of_its_steps(tiny_model, tmp_path):
    config = {"reward_weights": ["cosine:1:0.25", 1.0], "save_strategy": "steps", "save_steps": 2}
    trainer(tiny_model, tmp_path, per_device_train_batch_size=4, **config).train()
    resumed = trainer(tiny_model, tmp_path, per_device_train_batch_size=4, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    weights = [entry["rewards/quarter/weight"] for entry in resumed.state.log_history if "loss" in entry]
    assert weights == pytest.approx([WeightSchedule("cosine", 1.0, 0.25).at(step / 4) for step in range(4)])


def test_a_schedule_may_not_start_where_its_gamma_does_not_fit(tiny_model, tmp_path):
    """A source that begins with weight 0 counts later."""
    with pytest.raises(ValueError, match="so it takes one gamma"):
        trainer(
            tiny_model,
            tmp_path,
            supervision="process",
            advantage_estimator="pooled",
            gamma=[0.9, 1.0],
            reward_weights=[1.0, "step:0:1:0.5"],
        )


def test_without_a_schedule_no_weight_is_logged(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, reward_weights=[0.5, 1.0], max_steps=1)
    run.train()
    assert not [name for name in run.state.log_history[0] if name.endswith("/weight")]
