"""`sync_ref_model`: the reference moves to where the policy is, under PEFT too, and the exact KL sees it at once."""

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig
from transformers import TrainerCallback

from tests.support.adapters import CONTINUED, LORA, answer_length, trained_adapter
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.kl.reference import adapter_reference


ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "all layers, dropout": LoraConfig(**{**LORA, "target_modules": "all-linear"}, lora_dropout=0.3),
    "dora and the head": LoraConfig(**LORA, use_dora=True, modules_to_save=["lm_head"]),
    "new tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
SYNC = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}


def policy_name(reference: str) -> str:
    return reference.replace(".ref", ".default")


class Watcher(TrainerCallback):
    """The adapter's two versions and the base weights after every step; the trainer's own callbacks come first."""

    def __init__(self):
        self.policies = []
        self.references = []
        self.bases = []

    def on_step_end(self, args, state, control, model, **kwargs):
        weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
        references = adapter_reference(model)
        self.references.append({policy_name(name): value.detach().clone() for name, value in references.items()})
        self.policies.append({name: weights[name] for name in self.references[-1]})
        own = {*references, *map(policy_name, references)}
        self.bases.append({name: value for name, value in weights.items() if name not in own})


def train(model, folder, watcher=None, peft_config=None, **config):
    options = {"peft_config": peft_config} if peft_config else {}
    trainer = make_trainer(
        GRPOExtTrainer,
        model,
        answer_length,
        folder,
        trainer_options=options,
        **{"learning_rate": 0.1, **SYNC, **config},
    )
    if watcher:
        # After the trainer's own
        trainer.add_callback(watcher)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_equal(found, expected, **tolerance):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_after_a_copy_the_kl_is_zero_again_and_the_base_is_untouched(tiny_model, tmp_path, name, estimator):
    watcher = Watcher()
    options = {"kl_estimator": estimator, "max_steps": 5, "disable_dropout": True, "learning_rate": 2.0}
    trainer = train(tiny_model, tmp_path, watcher, ADAPTERS[name], **options)
    kls = logged(trainer, "kl")
    assert all(abs(kl) < 1e-8 for kl in kls[::2]) and all(kl > 1e-8 for kl in kls[1::2]), kls
    for step in (1, 3):
        assert_equal(watcher.references[step], watcher.policies[step])
        assert_equal(watcher.references[step + 1], watcher.policies[step])
    for base in watcher.bases[1:]:
        assert_equal(base, watcher.bases[0])


@pytest.mark.parametrize("continued", [False, True])
def test_the_reference_is_the_mixture(tiny_model, tmp_path, continued):
    model = tiny_model
    adapter = ADAPTERS["lora"]
    if continued:
        model = trained_adapter(tiny_model, CONTINUED["lora"], tmp_path / "adapter")
        adapter = None
    watcher = Watcher()
    options = {"ref_model_mixup_alpha": 0.6, "kl_estimator": "exact", "max_steps": 6}
    train(model, tmp_path, watcher, adapter, **options)
    for step in (3, 5):
        expected = {
            name: 0.4 * reference.double() + 0.6 * watcher.policies[step][name].double()
            for name, reference in watcher.references[step - 1].items()
        }
        found = {name: value.double() for name, value in watcher.references[step].items()}
        assert_equal(found, expected, rtol=1e-6, atol=1e-8)
        assert any((found[name] - watcher.policies[step][name]).abs().max() > 1e-4 for name in found)


def test_dropout_of_the_adapter_is_the_policys_alone(tiny_model, tmp_path):
    adapter = LoraConfig(**LORA, lora_dropout=0.5)
    trainer = train(tiny_model, tmp_path, None, adapter, kl_estimator="exact", max_steps=1)
    probabilities = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {name.split(".")[-1]: p for name, p in probabilities.items()} == {"default": 0.5, "ref": 0.0}


@pytest.mark.parametrize("peft_config", [None, ADAPTERS["lora"]])
def test_a_move_amid_the_updates_on_a_batch_is_seen_at_once(tiny_model, tmp_path, peft_config):
    """Four updates on each batch, the reference copied after every third step: states kept from before it are gone."""
    options = {"kl_estimator": "exact", "ref_model_sync_steps": 3, "max_steps": 8}
    for updates in ({"num_iterations": 4}, {"steps_per_generation": 4}):
        kls = logged(train(tiny_model, tmp_path, None, peft_config, **options, **updates), "kl")
        assert [kl < 1e-8 for kl in kls] == [True, False, False, True, False, False, True, False], kls


def test_full_fine_tuning_keeps_the_callback_of_trl(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path, kl_estimator="exact", max_steps=2)
    for reference, policy in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(reference, policy)
    assert trainer.args.sync_ref_model is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "sync_ref_model.*beta=0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha must be"),
    ],
)
def test_what_cannot_move_is_refused(tiny_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(GRPOExtTrainer, tiny_model, answer_length, tmp_path, **{**SYNC, **options})
