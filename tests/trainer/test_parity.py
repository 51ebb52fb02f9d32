"""With the new fields at their defaults the trainer is TRL's, bit for bit; and what reduces to TRL's does."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOTrainer

from tests.support.tiny_models import save_tiny_model
from tests.support.training import (
    PROMPTS,
    assert_same_gradients,
    fixed_completions,
    loss_and_gradients,
    make_trainer,
    moved_policy,
    scored_batch,
)
from trl_grpo_ext import GRPOExtTrainer


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
TIMINGS = ("step_time", "_runtime", "_per_second")


def distinct(completions, log_metric, log_extra, **kwargs):
    rewards = [float(len(set(text))) for text in completions]
    log_metric("most_distinct", max(rewards))
    log_extra("distinct", rewards)
    return rewards


async def first_token(completion_ids, **kwargs):
    return [ids[0] / 10 for ids in completion_ids]


def sometimes(completion_ids, **kwargs):
    return [None if ids[0] % 3 == 0 else float(ids[-1] % 5) for ids in completion_ids]


def train(trainer_class, model, reward_funcs, folder, trainer_options=None, **config):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 7,
        "temperature": 0.9,
        "learning_rate": 1e-2,
        # What TRL has by default, unlike the other tests: Adam, clipping, a schedule, gradient checkpointing
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": True,
    }
    trainer = make_trainer(
        trainer_class, model, reward_funcs, folder, trainer_options=trainer_options, **(settings | config)
    )
    trainer.train()
    return trainer


def assert_identical(trl, ext):
    """Every figure that TRL logged, but timings, and every weight."""
    assert len(trl.state.log_history) == len(ext.state.log_history)
    for expected, found in zip(trl.state.log_history, ext.state.log_history, strict=True):
        for name, value in expected.items():
            if not name.endswith(TIMINGS):
                both_nan = isinstance(value, float) and math.isnan(value) and math.isnan(found[name])
                assert found[name] == value or both_nan, (name, found["step"])
    weights = ext.model.state_dict()
    assert weights.keys() == trl.model.state_dict().keys()
    for name, value in trl.model.state_dict().items():
        assert torch.equal(weights[name], value), name


# With each loss type every pair of the others' values
@pytest.mark.parametrize(
    ("lora", "num_iterations", "beta"), [(False, 1, 0.0), (False, 2, 0.04), (True, 1, 0.04), (True, 2, 0.0)]
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_reduces_to_trl_with_defaults(tiny_model, tmp_path, beta, num_iterations, loss_type, lora):
    """Four steps of gradient accumulation, sampled completions included."""

    def run(trainer_class):
        # A config of its own for each: PEFT turns the target modules into a set
        peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if lora else None
        settings = {"beta": beta, "num_iterations": num_iterations, "loss_type": loss_type}
        return train(trainer_class, tiny_model, [distinct], tmp_path, peft, **settings)

    trl = run(GRPOTrainer)
    assert all(entry["grad_norm"] > 0.1 for entry in trl.state.log_history[:-1]), (
        "a run that stands still shows nothing"
    )
    assert_identical(trl, run(GRPOExtTrainer))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    return save_tiny_model(folder, LlamaForSequenceClassification, LlamaConfig, num_labels=1)


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_reduces_to_trl_for_every_kind_of_source(tiny_model, reward_model, tmp_path, aggregation, scale_rewards):
    """Functions, coroutines, missing rewards and a reward model's folder, weighted; evaluation included."""

    def run(trainer_class):
        return train(
            trainer_class,
            tiny_model,
            [distinct, first_token, sometimes, reward_model],
            tmp_path,
            {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
            reward_weights=[0.5, 2.0, 1.0, -1.5],
            multi_objective_aggregation=aggregation,
            scale_rewards=scale_rewards,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            num_generations_eval=2,
        )

    trl = run(GRPOTrainer)
    assert any("eval_reward" in entry for entry in trl.state.log_history)
    assert_identical(trl, run(GRPOExtTrainer))


def test_reduces_to_trl_where_no_source_judges_a_completion(tiny_model, tmp_path):
    trl, ext = (train(cls, tiny_model, sometimes, tmp_path, max_steps=2) for cls in (GRPOTrainer, GRPOExtTrainer))
    assert_identical(trl, ext)
    shares = [entry["rewards/sometimes/unjudged"] for entry in ext.state.log_history[:2]]
    assert all(0 < share < 1 for share in shares)


def row_rewards(row, **kwargs):
    return [math.sin(5.0 * number) for number in row]


LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_constant_token_advantages_reduce_to_trl(tiny_model, tmp_path, loss_type):
    """
    One reward per completion, pooled over the group and not discounted, is TRL's scalar advantage at every token: the
    same loss and gradient, off policy, for every loss type.
    """
    settings = {
        "loss_type": loss_type,
        "beta": 0.1,
        "num_iterations": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
    }
    process = {"supervision": "process", "advantage_estimator": "pooled", "gamma": 1.0}
    results = []
    for trainer_class, extra in ((GRPOTrainer, {}), (GRPOExtTrainer, process)):
        trainer = make_trainer(
            trainer_class,
            moved_policy(tiny_model),
            row_rewards,
            tmp_path,
            trainer_options={"rollout_func": fixed_completions(LENGTHS)},
            **settings,
            **extra,
        )
        batch = scored_batch(trainer, len(LENGTHS))
        noise = torch.randn(batch["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(2))
        batch["old_per_token_logps"] += 0.2 * noise
        results.append((batch, *loss_and_gradients(trainer, batch)))

    (trl_batch, trl_loss, trl_gradients), (batch, loss, gradients) = results
    mask = batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], trl_batch["advantages"][:, None] * mask, rtol=1e-6, atol=1e-6)
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert_same_gradients(gradients, trl_gradients, 1e-5)


@pytest.mark.parametrize(
    ("loss_type", "estimator", "reduction"),
    [
        *itertools.product(LOSS_TYPES, ["k3", "exact"], ["loss_type"]),
        ("grpo", "k1", "loss_type"),
        ("dr_grpo", "k2", "loss_type"),
        ("cispo", "k1", "token_mean"),
        ("bnpo", "k2", "token_mean"),
        ("grpo", "k3", "token_mean"),
        ("dapo", "exact", "token_mean"),
    ],
)
def test_loss_is_policy_loss_plus_kl_loss(tiny_model, tmp_path, loss_type, estimator, reduction):
    """
    Two generated batches of a policy away from its reference, each used twice. In the first, all completions get the
    same reward, so that the whole loss is the KL term (TRL's own for k3), off policy in the second step.
    """

    def rewards(row, trainer_state, **kwargs):
        return [0.0 if trainer_state.global_step < 2 else math.sin(5.0 * number) for number in row]

    trainer = make_trainer(
        GRPOExtTrainer,
        moved_policy(tiny_model),
        rewards,
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(LENGTHS)},
        loss_type=loss_type,
        kl_estimator=estimator,
        kl_reduction=reduction,
        beta=0.3,
        learning_rate=0.02 if loss_type == "luspo" else 0.1,
        num_iterations=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    trainer.train()
    logs = trainer.state.log_history[:4]
    for step, log in enumerate(logs):
        assert abs(log["kl_loss"]) > 1e-4
        if step < 2:
            assert log["loss"] == pytest.approx(log["kl_loss"], rel=1e-5)
            assert log["policy_loss"] == pytest.approx(0.0, abs=1e-7)
        else:
            assert log["loss"] == pytest.approx(log["policy_loss"] + log["kl_loss"], rel=1e-5, abs=1e-7)
    assert abs(logs[3]["policy_loss"]) > 1e-4


def test_token_mean_reduces_to_trls_dapo(tiny_model, tmp_path):
    """The mean over all loss tokens of the step is what TRL's own KL term is under dapo."""

    def kl_loss(**config):
        trainer = make_trainer(
            GRPOExtTrainer,
            moved_policy(tiny_model),
            row_rewards,
            tmp_path,
            trainer_options={"rollout_func": fixed_completions(LENGTHS)},
            beta=0.3,
            learning_rate=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=1,
            **config,
        )
        trainer.train()
        return trainer.state.log_history[0]["kl_loss"]

    expected = kl_loss(loss_type="dapo")
    for loss_type in ("grpo", "dr_grpo", "bnpo"):
        assert kl_loss(loss_type=loss_type, kl_reduction="token_mean") == pytest.approx(expected, rel=1e-5)
        assert kl_loss(loss_type=loss_type) != pytest.approx(expected, rel=1e-2)
