"""The KL's reference is the model before training, whatever PEFT does; where it cannot be, construction fails."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig

from tests.support.adapters import CONTINUED, LORA, answer_length, base, trained_adapter
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer, StepRewards


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
