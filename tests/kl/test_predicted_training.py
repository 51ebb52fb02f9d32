"""The trainer's prediction of the loss's gradient: which tokens go through the head a second time."""

import pytest

from tests.support.training import fixed_completions, make_trainer, moved_policy
from trl_grpo_ext import GRPOExtTrainer, StepRewards


LENGTHS = [14, 9, 12, 7, 15, 6, 11, 13]
# Tokens of tool output in two completions
HOLES = [[1] * 5 + [0] * 3 + [1] * (length - 8) if length > 12 else [1] * length for length in LENGTHS]


def steps(completion_ids, **columns):
    return [StepRewards([1, len(ids) - 1], [0.1 * len(ids), float(ids[0] % 3)]) for ids in completion_ids]


def outcome(completion_ids, **columns):
    return [float(ids[0] % 5) for ids in completion_ids]


def second_pass_shares(trainer):
    """Shares of tokens that went through the head a second time, of each step."""
    return [entry["kl/second_pass_share"] for entry in trainer.state.log_history if "loss" in entry]


def train(tiny_model, tmp_path, **config):
    options = {"beta": 0.1, "kl_estimator": "exact", "learning_rate": 0.5, "max_steps": 4} | config
    trainer = make_trainer(
        GRPOExtTrainer,
        moved_policy(tiny_model),
        [steps, outcome],
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(LENGTHS, env_mask=HOLES)},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("supervision", ["outcome", "process"])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_clipped_losses_are_predicted(tiny_model, tmp_path, loss_type, supervision, num_iterations):
    trainer = train(
        tiny_model,
        tmp_path,
        loss_type=loss_type,
        supervision=supervision,
        num_iterations=num_iterations,
        kl_reduction="token_mean" if loss_type == "dr_grpo" else "loss_type",
    )
    clipped = max(entry.get("clip_ratio/region_mean", 0.0) for entry in trainer.state.log_history)
    assert (clipped > 0.1) == (num_iterations > 1)
    assert second_pass_shares(trainer) == [0.0] * 4


@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence_token", "supervision": "process"},
    ],
)
def test_on_policy_every_loss_is_predicted(tiny_model, tmp_path, config):
    assert second_pass_shares(train(tiny_model, tmp_path, **config)) == [0.0] * 4


def test_a_float64_model_is_trained(tiny_model, tmp_path):
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 1}
    rows = {"rollout_func": fixed_completions(LENGTHS)}
    trainer = make_trainer(
        GRPOExtTrainer, moved_policy(tiny_model).double(), outcome, tmp_path, trainer_options=rows, **options
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    assert second_pass_shares(trainer) == [0.0]


# Tokens of tool output have no gradient at all, as predicted
LOSS_TOKENS = sum(map(sum, HOLES)) / sum(LENGTHS)


@pytest.mark.parametrize(
    ("config", "least", "most"),
    [
        ({"delta": 1.05, "num_iterations": 3}, 0.0, LOSS_TOKENS / 2),
        ({"top_entropy_quantile": 0.5}, 0.4 * LOSS_TOKENS, 0.6 * LOSS_TOKENS),
        ({"entropy_coef": 0.1}, LOSS_TOKENS, LOSS_TOKENS),
    ],
    ids=["delta", "top_entropy_quantile", "entropy_coef"],
)
def test_tokens_with_another_gradient_take_the_second_pass(tiny_model, tmp_path, monkeypatch, config, least, most):
    predicted = train(tiny_model, tmp_path, **config)
    shares = second_pass_shares(predicted)
    assert max(shares) > 0
    assert all(least - 1e-6 <= share <= most + 1e-6 for share in shares), shares
    # Without a prediction, the head stores what any loss needs, or goes a second time over every token
    monkeypatch.setattr(GRPOExtTrainer, "_predicted_gradient", lambda self, inputs: None)
    unpredicted = train(tiny_model, tmp_path, **config)
    assert second_pass_shares(unpredicted) == [1.0] * 4
    for name in ("loss", "grad_norm", "kl"):
        values = [[entry[name] for entry in t.state.log_history if name in entry] for t in (predicted, unpredicted)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-7)
