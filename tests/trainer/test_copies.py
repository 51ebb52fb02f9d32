"""A copy of a model that was trained, as a moving average or an evaluation makes it, computes with its own weights."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer


IDS = torch.tensor([[5, 6, 7]])


def judge(completions, **columns):
    return [float(len(set(text))) for text in completions]


def train(model, folder, **config):
    peft = {"peft_config": LoraConfig(target_modules="all-linear")} if config.pop("lora", False) else None
    trainer = make_trainer(GRPOExtTrainer, model, [judge], folder, trainer_options=peft, max_steps=1, **config)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def assert_copies_have_their_own_weights(model):
    before = model(input_ids=IDS).logits
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(duplicate(input_ids=IDS).logits, before)
    assert (model(input_ids=IDS).logits == 0).all() and (before != 0).any()


EXACT = {"beta": 0.1, "kl_estimator": "exact"}


@pytest.mark.parametrize("config", [{}, EXACT, {**EXACT, "lora": True}, {**EXACT, "bf16": True}], ids=str)
def test_a_copy_of_a_trained_model_has_its_own_weights(tiny_model, tmp_path, config):
    assert_copies_have_their_own_weights(train(tiny_model, tmp_path, **config))


@pytest.mark.parametrize("second", [{}, EXACT])
def test_so_has_a_copy_of_a_model_that_was_trained_twice(tiny_model, tmp_path, second):
    model = train(tiny_model, tmp_path / "first", **EXACT)
    assert_copies_have_their_own_weights(train(model, tmp_path / "second", **second))


def test_so_has_a_copy_of_a_model_with_a_hook_of_accelerate(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    calls = []

    def hooked(module, *args, **kwargs):
        calls.append(module)
        return type(module).forward(module, *args, **kwargs)

    # As `accelerate.hooks.add_hook_to_module` binds its own
    model.forward = functools.update_wrapper(functools.partial(hooked, model), model.forward)
    assert_copies_have_their_own_weights(train(model, tmp_path))
    assert len(set(map(id, calls))) == 2
