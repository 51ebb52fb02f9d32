"""What cannot be trained is said at construction, by name and with a way out that works."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from tests.support.adapters import LORA
from tests.support.tiny_models import save_tiny_model
from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer


LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4]
EXACT = {"kl_estimator": "exact"}
ESTIMATORS = [{"beta": 0.0}, {}, {"kl_estimator": "k2"}, EXACT]


def row_rewards(row, **kwargs):
    return [float(number % 3) for number in row]


def trainer_of(model, folder, vocabulary=45, peft_config=None, processing_class=None, **config):
    return make_trainer(
        GRPOExtTrainer,
        model,
        row_rewards,
        folder,
        trainer_options={
            "rollout_func": fixed_completions(LENGTHS, vocabulary=vocabulary),
            "peft_config": peft_config,
            "processing_class": processing_class,
        },
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=0.1,
        **({"beta": 0.1} | config),
    )


def logged_kls(trainer):
    trainer.train()
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


# ---------------------------------------------------------------------------------------------------------------------
# Families


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 16),
    "decoder_start_token_id": 0,
}
LLAMA4 = {"intermediate_size_mlp": 16, "num_local_experts": 2, "head_dim": 8}


@pytest.mark.parametrize("config", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    ("model_class", "config_class", "settings", "message"),
    [
        (T5ForConditionalGeneration, T5Config, T5, "T5ForConditionalGeneration is an encoder-decoder"),
        (Llama4ForCausalLM, Llama4TextConfig, LLAMA4, "TRL finds no backbone in Llama4ForCausalLM"),
    ],
    ids=["t5", "llama4"],
)
def test_a_family_that_trl_cannot_score_is_refused(tmp_path, model_class, config_class, settings, message, config):
    folder = save_tiny_model(tmp_path / "model", model_class, config_class, **settings)
    with pytest.raises(ValueError, match=message):
        trainer_of(folder, tmp_path, **config)


def test_an_encoder_decoder_that_trl_trains_is_refused_with_the_exact_kl_and_warned_of_otherwise(tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    folder = save_tiny_model(tmp_path / "model", BartForConditionalGeneration, BartConfig, **BART)
    message = "BartForConditionalGeneration is an encoder-decoder.*Use a decoder-only model"
    with pytest.raises(ValueError, match=message):
        trainer_of(folder, tmp_path, **EXACT)
    with caplog.at_level(logging.WARNING):
        trainer_of(folder, tmp_path).train()
    assert "BartForConditionalGeneration is an encoder-decoder" in caplog.text


@pytest.mark.parametrize("routers_asked", [False, True])
def test_a_mixture_of_experts_whose_config_has_no_num_experts_trains_with_the_exact_kl(tmp_path, routers_asked):
    """Also where the config asks for the routers' logits, and with a pass for old log-probs."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": routers_asked}
    coefficient = {"router_aux_loss_coef": 0.1}
    folder = save_tiny_model(tmp_path / "model", GraniteMoeForCausalLM, GraniteMoeConfig, **settings)
    weighted = [{**config, **coefficient} for config in ESTIMATORS if config is not EXACT]
    for config in [*weighted, {"router_aux_loss_coef": 0.0}] if routers_asked else weighted:
        with pytest.raises(ValueError, match="num_experts .* config of granitemoe .* kl_estimator='exact'"):
            trainer_of(folder, tmp_path, **config)
    trainer = trainer_of(folder, tmp_path, num_iterations=2, **EXACT, **coefficient)
    start, later = logged_kls(trainer)
    assert abs(start) < 1e-8 < later
    log = trainer.state.log_history[1]
    assert log["aux_loss"] > 1
    assert log["loss"] == pytest.approx(log["policy_loss"] + log["kl_loss"] + 0.1 * log["aux_loss"], rel=1e-5)

    class WithoutKL(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.beta = 0.0

    trainer = trainer_of(folder, tmp_path, **EXACT, **coefficient)
    trainer.add_callback(WithoutKL())
    assert len(logged_kls(trainer)) == 1
    log = trainer.state.log_history[1]
    assert log["loss"] == pytest.approx(log["policy_loss"] + 0.1 * log["aux_loss"], rel=1e-5)
    if not routers_asked:
        assert logged_kls(trainer_of(folder, tmp_path, router_aux_loss_coef=0.0, num_iterations=2))


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary and head


def resized(folder):
    """The model with room for 64 tokens, and a tokenizer with 10 new ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(10)])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(64)
    return model, tokenizer


@pytest.mark.parametrize("config", [{}, {"kl_estimator": "k2"}, EXACT], ids=str)
def test_tokens_that_the_reference_does_not_know_are_refused_and_a_saved_model_trains(tiny_model, tmp_path, config):
    model, tokenizer = resized(tiny_model)
    message = "policy's vocabulary has 64 tokens, and that of the reference.* 46. .*save the model and its tokenizer"
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, 55, processing_class=tokenizer, **config)
    model, tokenizer = resized(tiny_model)
    model.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    start, later = logged_kls(trainer_of(str(tmp_path / "resized"), tmp_path, 55, **config))
    assert abs(start) < 1e-8 < abs(later)


def test_room_for_more_tokens_is_refused_with_the_exact_kl_only(tiny_model, tmp_path):
    """As `pad_to_multiple_of` makes it: no token is new, and TRL trains."""
    with pytest.raises(ValueError, match="vocabulary has 64 tokens"):
        trainer_of(resized(tiny_model)[0], tmp_path, **EXACT)
    trainer_of(resized(tiny_model)[0], tmp_path).train()


@pytest.mark.parametrize("config", ESTIMATORS, ids=str)
def test_new_tokens_of_tied_embeddings_are_refused_and_the_ways_out_train(tmp_path, config):
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    untied = save_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    new_tokens = LoraConfig(**LORA, trainable_token_indices=[5, 6, 7])
    with pytest.raises(ValueError, match="trainable_token_indices on tied embeddings.*Untie.*modules_to_save"):
        trainer_of(tied, tmp_path, peft_config=new_tokens, **config)
    whole = LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    for folder, adapter in ((untied, new_tokens), (tied, whole)):
        kls = logged_kls(trainer_of(folder, tmp_path, peft_config=adapter, **config))
        assert config.get("beta") == 0.0 or abs(kls[0]) < 1e-8 < abs(kls[1])


@pytest.mark.parametrize("config", ESTIMATORS, ids=str)
@pytest.mark.parametrize("as_id", [True, False])
def test_a_head_in_float32_with_tied_embeddings_and_an_adapter_is_refused(tmp_path, config, as_id):
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = LoraConfig(**LORA)
    model = tied if as_id else AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True with an adapter on a model of tied.*untie"):
        trainer_of(model, tmp_path, peft_config=adapter, cast_lm_head_to_fp32=True, **config)


@pytest.mark.parametrize("case", ["untied, adapter", "tied, all weights"])
def test_a_head_in_float32_works_elsewhere(tmp_path, case):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=case.startswith("tied"))
    adapter = LoraConfig(**LORA) if case.endswith("adapter") else None
    loading = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = trainer_of(folder, tmp_path, peft_config=adapter, cast_lm_head_to_fp32=True, **EXACT, **loading)
    start, later = logged_kls(trainer)
    assert abs(start) < 1e-8 < later
