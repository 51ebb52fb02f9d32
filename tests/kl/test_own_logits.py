"""The log-probs that are trained on are those of the model's own logits, or the run stops before its first update."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    SiglipVisionConfig,
)
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.support.families import tiny_config
from tests.support.tiny_models import save_tiny_model
from tests.support.training import FixedCompletions, fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.kl.own_logits import OwnLogits


TEMPERATURE = 0.7
LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4]


def row_rewards(row, **kwargs):
    return [float(number % 3) for number in row]


def exact_trainer(model, folder, rows=None, trainer_options=None, **config):
    settings = {"kl_estimator": "exact", "beta": 0.1, "temperature": TEMPERATURE, "max_steps": 2}
    return make_trainer(
        GRPOExtTrainer,
        model,
        row_rewards,
        folder,
        trainer_options={"rollout_func": rows or fixed_completions(LENGTHS), **(trainer_options or {})},
        per_device_train_batch_size=8,
        learning_rate=0.1,
        **(settings | config),
    )


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


RECURRENT_GEMMA = (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaConfig,
    {"num_hidden_layers": 3, "lru_width": 16, "head_dim": 8, "logits_soft_cap": 0.5, "w_init_variance_scale": 1.0},
)
MODERNBERT = (ModernBertDecoderForCausalLM, ModernBertDecoderConfig, {"global_attn_every_n_layers": 1})
GPT2 = (GPT2LMHeadModel, GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64})


def prompts_of(length):
    """The same completions after prompts that need no padding."""
    rows = fixed_completions(LENGTHS)
    return FixedCompletions([[5, 6, 7, 8][:length]] * len(LENGTHS), rows.completion_ids)


def numbers(message):
    """Fused and own log-prob of the token that differs most, as the error shows them."""
    return map(float, re.search(r"difference: (\S+) from hidden states, (\S+) from", message).groups())


@pytest.mark.parametrize(
    ("family", "padded", "cause"),
    [
        (RECURRENT_GEMMA, False, "does not know the text config's logits_soft_cap=0.5.*set final_logit_softcapping"),
        (MODERNBERT, False, "layers between its backbone and its LM head"),
        (GPT2, True, "absolute positions, for which TRL passes no position_ids.*prompts of one length"),
    ],
    ids=["recurrent_gemma", "modernbert", "gpt2"],
)
def test_a_model_whose_logits_are_others_stops_with_both_numbers(tmp_path, family, padded, cause):
    model_class, config_class, settings = family
    folder = save_tiny_model(tmp_path / "model", model_class, config_class, **settings)
    rows = fixed_completions(LENGTHS) if padded else prompts_of(4)
    trainer = exact_trainer(folder, tmp_path, rows)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match=f"{model_class.__name__}.*not those of its own logits.*{cause}") as raised:
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))

    fused, own = numbers(str(raised.value))
    # The eight last tokens of the prompt, here all of it, and the eight first of the completion
    ids = torch.tensor([rows.prompt_ids[0] + rows.completion_ids[0]])
    with torch.no_grad():
        logits = model_class.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits / TEMPERATURE
    own_logps = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
    assert (own_logps - own).abs().min() < 1e-3
    assert abs(fused - own) > 0.05


def test_gpt2_trains_as_long_as_no_prompt_is_padded(tmp_path):
    model_class, config_class, settings = GPT2
    folder = save_tiny_model(tmp_path / "model", model_class, config_class, **settings)
    one_length = prompts_of(3)
    exact_trainer(folder, tmp_path / "one", one_length).train()
    longer = FixedCompletions([*one_length.prompt_ids, *fixed_completions(LENGTHS).prompt_ids], [])
    longer.completion_ids = one_length.completion_ids * 2
    trainer = exact_trainer(folder, tmp_path / "two", longer)
    with pytest.raises(ValueError, match="absolute positions"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_nothing_else_of_the_run_changes(tiny_model, tmp_path, monkeypatch):
    """With dropout and sampled completions, which other random numbers would change."""

    def run(name):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
        trainer = make_trainer(
            GRPOExtTrainer,
            model,
            lambda completions, **kwargs: [float(len(set(text))) for text in completions],
            tmp_path / name,
            trainer_options={"peft_config": adapter},
            kl_estimator="exact",
            beta=0.1,
            max_steps=4,
            learning_rate=0.1,
            gradient_checkpointing=True,
        )
        trainer.train()
        return trainer

    calls = []
    compare = OwnLogits._mean_difference
    monkeypatch.setattr(OwnLogits, "_mean_difference", lambda *args: calls.append(args) or compare(*args))
    compared = run("compared")
    assert len(calls) == 1
    monkeypatch.setattr(OwnLogits, "check", lambda *args: None)
    alone = run("alone")
    for found, expected in zip(compared.state.log_history, alone.state.log_history, strict=True):
        for name in expected.keys() - {"step_time", "train_runtime"}:
            assert found[name] == expected[name] or "per_second" in name, name
    for found, expected in zip(compared.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"kl_estimator": "k3"}, {"kl_estimator": "k2"}, {"beta": 0.0}])
def test_the_sampled_estimates_are_not_compared(tiny_model, tmp_path, monkeypatch, options):
    monkeypatch.setattr(OwnLogits, "check", lambda *args: pytest.fail("compared"))
    exact_trainer(tiny_model, tmp_path, **({"kl_estimator": "k3"} | options)).train()


# ---------------------------------------------------------------------------------------------------------------------
# Vision-language models


VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}


def cohere_config():
    return tiny_config(Cohere2Config, logit_scale=0.0625)


VISION_LANGUAGE = {
    "cohere2_vision": lambda: Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(vision_config=SiglipVisionConfig(**VISION), text_config=cohere_config(), image_token_id=5)
    ),
    "aya_vision": lambda: AyaVisionForConditionalGeneration(
        AyaVisionConfig(vision_config=SiglipVisionConfig(**VISION), text_config=cohere_config(), image_token_index=5)
    ),
    "llava_next_granite": lambda: LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=tiny_config(GraniteConfig, logits_scaling=8.0),
            image_token_index=5,
        )
    ),
    "gemma3_soft_cap": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(**VISION),
            text_config=tiny_config(Gemma3TextConfig, final_logit_softcapping=3.0),
            image_token_id=5,
            mm_tokens_per_image=4,
        )
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=tiny_config(LlamaConfig), image_token_index=5
        )
    ),
}
FIELDS = {
    "cohere2_vision": "logit_scale",
    "aya_vision": "logit_scale",
    "llava_next_granite": "logits_scaling",
    "gemma3_soft_cap": "final_logit_softcapping",
}


def vision_language_batch(name):
    """Two scored rows, the second with padding, and for two of the models with an image of four tokens."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "prompt_ids": torch.randint(7, 40, (2, 12), generator=generator),
        "prompt_mask": torch.ones(2, 12, dtype=torch.long),
        "completion_ids": torch.randint(7, 40, (2, 9), generator=generator),
        "completion_mask": torch.ones(2, 9, dtype=torch.long),
    }
    batch["prompt_mask"][1, :5] = 0
    if name in ("gemma3_soft_cap", "llava"):
        batch["prompt_ids"][1, 6:10] = 5
        batch["pixel_values"] = torch.randn(1, 3, 8, 8, generator=generator)
        batch["num_images"] = [0, 1]
    if name == "gemma3_soft_cap":
        batch["token_type_ids"] = torch.zeros(2, 21, dtype=torch.long)
        batch["token_type_ids"][1, 6:10] = 1
    return batch


def check(model, batch):
    """The check alone, through TRL's own method, without a trainer."""
    add_fused_lm_head(model, temperature=TEMPERATURE)
    accelerator = Accelerator(cpu=True)
    trainer = SimpleNamespace(accelerator=accelerator)

    def score(*args, **kwargs):
        return GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(trainer, *args, **kwargs)

    OwnLogits(accelerator, TEMPERATURE, pad_id=0).check(model, batch, score)


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_a_scale_that_the_vision_models_forward_leaves_out_is_named_and_can_be_set_right(name):
    torch.manual_seed(0)
    batch = vision_language_batch(name)
    model = VISION_LANGUAGE[name]()
    if name in FIELDS:
        with pytest.raises(ValueError, match=f"by the text config's {FIELDS[name]}=.*Set {FIELDS[name]}="):
            check(model, batch)
        torch.manual_seed(0)
        model = VISION_LANGUAGE[name]()
        neutral = None if name == "gemma3_soft_cap" else 1.0
        setattr(model.config.get_text_config(), FIELDS[name], neutral)
    check(model, batch)
