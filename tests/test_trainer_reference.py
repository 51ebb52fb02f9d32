"""The KL's reference is the model before training, whatever PEFT does; where it cannot be, construction fails."""

import gc
import weakref

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer, StepRewards


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CONTINUED = {
    "lora": LoraConfig(**LORA),
    "lora of the embedding": LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "lora and new tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def answer_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def base(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained_adapter(folder: str, config, path) -> PeftModel:
    """An adapter that is not at its initial values, loaded as from an earlier training."""
    model = get_peft_model(base(folder), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return PeftModel.from_pretrained(base(folder), path, is_trainable=True)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("name", CONTINUED)
def test_kl_of_a_continued_adapter_starts_at_zero(tiny_model, tmp_path, name, estimator):
    model = trained_adapter(tiny_model, CONTINUED[name], tmp_path / "adapter")
    options = {"beta": 0.1, "kl_estimator": estimator, "max_steps": 2, "learning_rate": 0.1}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trainer.train()
    before, after = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert abs(before) < 1e-8
    assert after > 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weights"),
        ({"bias": "lora_only"}, "bias='lora_only' in the PEFT config trains the base"),
        ({"bias": "all"}, "bias='all' in the PEFT config trains the base"),
    ],
)
def test_adapters_that_change_the_base_are_refused(tiny_model, tmp_path, options, message):
    def make(beta):
        adapter = {"peft_config": LoraConfig(**{**LORA, **options})}
        return make_trainer(GRPOExtTrainer, tiny_model, answer_length, tmp_path, trainer_options=adapter, beta=beta)

    with pytest.raises(ValueError, match=message):
        make(0.1)
    make(0.0)


def test_the_reference_is_freed_with_the_trainer(tiny_model, tmp_path):
    model = base(tiny_model)
    model.name_or_path = tiny_model
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 1}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trainer.train()
    head = weakref.ref(trainer.ref_model.lm_head.weight)
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    assert head() is None
    # The model stays usable
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape[1] == 3


def test_rewards_on_tokens_that_are_not_trained_on_count_as_unjudged(tiny_model, tmp_path):
    def judge_last(completion_ids, **kwargs):
        return [StepRewards([len(ids) - 1], [1.0]) for ids in completion_ids]

    # Two tokens are never enough to end, so that every completion is truncated and masked
    options = {
        "supervision": "process",
        "mask_truncated_completions": True,
        "max_completion_length": 2,
        "max_steps": 1,
    }
    trainer = make_trainer(GRPOExtTrainer, tiny_model, judge_last, tmp_path, min_p=0.5, **options)
    trainer.train()
    masked = trainer.state.log_history[0]["completions/clipped_ratio"]
    assert masked > 0
    assert trainer.state.log_history[0]["rewards/judge_last/unjudged"] == pytest.approx(masked)
