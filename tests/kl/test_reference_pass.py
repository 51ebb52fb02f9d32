"""The reference's forward pass: without dropout of any kind, and of the model that is the reference now."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)

from tests.kl.dense import TEMPERATURE, dense_logps, mean_dense_kl
from tests.support.tiny_models import save_tiny_model
from tests.support.training import SetAttribute, fixed_completions, make_trainer, moved_policy
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.kl.reference import evaluation_mode


LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4]


def same_rewards(row, **kwargs):
    return [1.0] * len(row)


def trainer_of(trainer_class, model, folder, callbacks=(), peft_config=None, **config):
    settings = {"kl_estimator": "exact", "beta": 0.1, "temperature": TEMPERATURE, "loss_type": "dapo"}
    return make_trainer(
        trainer_class,
        model,
        same_rewards,
        folder,
        trainer_options={
            "rollout_func": fixed_completions(LENGTHS),
            "callbacks": list(callbacks),
            "peft_config": peft_config,
        },
        per_device_train_batch_size=8,
        **(settings | config),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


class Watching(GRPOExtTrainer):
    """Keeps the log-probs of the reference, and the completions that they are of."""

    def per_token_kl(self, output, inputs):
        logps = output.ref_log_probs if self.args.kl_estimator == "exact" else inputs["ref_per_token_logps"]
        self.seen = (inputs["completion_ids"], logps)
        return super().per_token_kl(output, inputs)


# A probability that is handed to attention, one that is handed to a function, and a layer
DROPOUTS = {
    "attention": (LlamaForCausalLM, LlamaConfig, {"attention_dropout": 0.5}, ["q_proj"]),
    "function": (OPTForCausalLM, OPTConfig, {"dropout": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}, ["q_proj"]),
    "layer": (GPTNeoXForCausalLM, GPTNeoXConfig, {"hidden_dropout": 0.5}, ["query_key_value"]),
}


@pytest.mark.parametrize("start", ["fresh", "continued", "all weights"])
@pytest.mark.parametrize("estimator", ["exact", "k2"])
@pytest.mark.parametrize("name", DROPOUTS)
def test_the_references_log_probs_are_those_without_dropout(tmp_path, name, estimator, start):
    model_class, config_class, settings, targets = DROPOUTS[name]
    folder = save_tiny_model(tmp_path / "model", model_class, config_class, **settings)
    adapter = LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=start != "continued")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = copy.deepcopy(model).eval()
    if start == "continued":
        model = get_peft_model(model, adapter)
        expected = copy.deepcopy(model).eval()
    fresh = adapter if start == "fresh" else None
    trainer = trainer_of(Watching, model, tmp_path, peft_config=fresh, kl_estimator=estimator, max_steps=1)
    trainer.train()
    rows = fixed_completions(LENGTHS)
    completion_ids, logps = trainer.seen
    for ids, found in zip(completion_ids.tolist(), logps, strict=True):
        row = next(i for i, row in enumerate(rows.completion_ids) if row == ids[: len(row)])
        right = dense_logps(expected, rows, row, TEMPERATURE)
        torch.testing.assert_close(found[: len(right)], right, rtol=1e-4, atol=1e-4)
    # The policy keeps its own
    modules = trainer.model.modules()
    assert all(module.training for module in modules if module.__class__.__name__ != "Identity")


def test_evaluation_mode_leaves_every_module_as_it_was():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5)), torch.nn.ReLU())
    model.train()
    model[1].training = False
    model[2].training = False
    before = [module.training for module in model.modules()]
    x = torch.ones(1000)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert torch.equal(model(x), x)
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert not torch.equal(model(x), x)


# ---------------------------------------------------------------------------------------------------------------------
# Another model


def train_with(setter, model, folder, **config):
    trainer = trainer_of(GRPOExtTrainer, model, folder, [setter], learning_rate=0.0, **config)
    setter.trainer = trainer
    trainer.train()
    return [entry.get("kl") for entry in trainer.state.log_history if "policy_loss" in entry]


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_callback_may_replace_the_reference(tiny_model, tmp_path, lora, updates):
    """Also amid the updates on a batch, and with a copy of a model that is in use, which TRL has patched."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    policy = moved_policy(tiny_model)
    near, far = moved_policy(tiny_model, 0.02).eval(), moved_policy(tiny_model, 0.1).eval()
    rows = fixed_completions(LENGTHS)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    setter = SetAttribute("ref_model", {1: near, 2: far, 3: None if lora else near, 5: far})
    kls = train_with(
        setter, moved_policy(tiny_model), tmp_path, peft_config=adapter, num_iterations=updates, max_steps=7
    )
    first = policy if lora else base
    references = [first, near, far, policy if lora else near, policy if lora else near, far, far]
    expected = [mean_dense_kl(policy.double(), reference.double(), rows).item() for reference in references]
    assert kls == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert len({round(kl, 3) for kl in kls}) >= 3


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_a_callback_may_take_the_kl_out_and_back_in(tiny_model, tmp_path, estimator, lora, updates):
    """After each generated batch; with the exact KL also amid the updates on one."""
    model = moved_policy(tiny_model)
    options = {"kl_estimator": estimator, "num_iterations": updates, "max_steps": 10}
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    setter = SetAttribute("beta", {})
    constant = train_with(setter, copy.deepcopy(model), tmp_path, **options)
    first, second = (2, 6) if estimator == "exact" else (4, 8)
    kls = train_with(SetAttribute("beta", {first: 0.0, second: 0.5}), model, tmp_path, **options)
    assert kls[first:second] == [None] * (second - first)
    assert kls[:first] == pytest.approx(constant[:first], rel=1e-6, abs=1e-9)
    assert kls[second:] == pytest.approx(constant[second:], rel=1e-6, abs=1e-9)


def test_a_copy_of_the_policy_may_become_the_reference(tiny_model, tmp_path):
    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                self.trainer.ref_model = copy.deepcopy(model).eval()

    setter = Copy()
    trainer = trainer_of(
        GRPOExtTrainer, moved_policy(tiny_model), tmp_path, [setter], learning_rate=0.5, beta=1.0, max_steps=4
    )
    setter.trainer = trainer
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] > 1e-3 and kls[1] > 1e-3 and kls[2] < 1e-8
    assert not isinstance(trainer.ref_model, PeftModel)


@pytest.mark.parametrize("case", ["none", "vocabulary"])
def test_a_model_that_cannot_be_the_reference_is_refused(tiny_model, tmp_path, case):
    larger = AutoModelForCausalLM.from_pretrained(tiny_model)
    larger.resize_token_embeddings(64)
    reference, message = {
        "none": (None, "trainer.ref_model is None, and the policy has no adapter.*trainer.beta to 0"),
        "vocabulary": (larger, "policy's vocabulary has 46 tokens, and that of the reference.* 64"),
    }[case]
    with pytest.raises(ValueError, match=message):
        train_with(SetAttribute("ref_model", {1: reference}), tiny_model, tmp_path, max_steps=3)
