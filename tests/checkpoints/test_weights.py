"""Models that are saved under other names than their modules' are resumed with the weights that were saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.checkpoints.runs import assert_same_run, make, seen
from tests.support.tiny_models import save_tiny_model
from trl_grpo_ext.checkpoints.weights import load_converted_weights


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
OPTIONS = {"beta": 0.0, "sync_ref_model": False, "kl_estimator": "k3", "steps_per_generation": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("moe"), Qwen3MoeForCausalLM, Qwen3MoeConfig, **MOE)


def test_a_mixture_of_experts_resumes_with_the_weights_that_were_saved(tiny_moe, tmp_path):
    """Transformers leaves the experts where the run started (issue 48805)."""
    whole = make("full", tiny_moe, tmp_path, **OPTIONS)
    whole.train()
    resumed = make("full", tiny_moe, tmp_path, **OPTIONS)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same_run(seen(resumed), seen(whole))


def test_the_best_model_is_loaded_with_the_weights_that_were_saved(tiny_moe, tmp_path):
    trainer = make("full", tiny_moe, tmp_path, **OPTIONS)
    trainer.train()
    saved = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert not torch.equal(
        trainer.model.state_dict()["model.layers.0.mlp.experts.down_proj"],
        saved["model.layers.0.mlp.experts.down_proj"],
    )
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


def test_weights_that_are_not_found_again_are_an_error(tiny_moe, tmp_path):
    model = Qwen3MoeForCausalLM.from_pretrained(tiny_moe)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "layers.1.mlp.experts" not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not find model.layers.1.mlp.experts.down_proj, .*its folder as `model`"
    ):
        load_converted_weights(model, tmp_path)


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_names_that_only_the_caller_knows_are_an_error(tiny_model, tmp_path, max_shard_size):
    """`key_mapping` is an argument of `from_pretrained`, and transformers saves under the names that it maps."""
    weights = load_file(f"{tiny_model}/model.safetensors")
    shutil.copytree(tiny_model, tmp_path / "renamed")
    renamed = {name.replace("self_attn", "attention"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "renamed", key_mapping={"attention": "self_attn"})
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM under other names .* model.layers.0.self_attn.k_proj"):
        load_converted_weights(model, tmp_path)


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"])
def test_conversion_gives_back_every_bit(tiny_moe, tmp_path, dtype, max_shard_size):
    model = Qwen3MoeForCausalLM.from_pretrained(tiny_moe, dtype=torch.bfloat16 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        # The first parameter's type is that of `model.dtype`
        model.model.layers[1].mlp.experts.float()
        model.model.layers[1].mlp.experts.down_proj.data += 1e-6
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_converted_weights(model, tmp_path)
    found = model.state_dict()
    assert all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


def test_a_vision_language_model_gets_its_weights_back(tmp_path):
    heads = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(
        text_config={**heads, **ids, "vocab_size": 20, "num_hidden_layers": 1, "rope_parameters": rope},
        vision_config={
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
            "fullatt_block_indexes": [0],
        },
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "start")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_converted_weights(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_a_model_that_is_saved_under_its_own_names_is_not_loaded_twice(tiny_model, tmp_path, monkeypatch):
    whole = make("full", tiny_model, tmp_path, **{**OPTIONS, "max_steps": 1})
    whole.train()

    def loaded(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(type(whole.model), "from_pretrained", loaded)
    load_converted_weights(whole.model, tmp_path / "checkpoint-1")
