"""LoRA and QLoRA: only the adapter moves, the KL starts at 0, and every way to build the adapter works."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.support.tiny_models import save_tiny_model
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer, StepRewards


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CASES = {
    "plain": {},
    "quantised": {"nf4": True},
    "quantised, checkpointed": {"nf4": True, "gradient_checkpointing": True},
    "quantised, pre-trained": {"nf4": True, "pretrained": True},
    "quantised, tied, moving": {"nf4": True, "tied": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "head trained": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    "head trained, quantised": {
        "nf4": True,
        "lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "bf16": True,
    },
    "tied, checkpointed": {"tied": True, "gradient_checkpointing": True},
}


def nf4(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )


def even_steps(completion_ids, **kwargs):
    return [
        StepRewards([*range(1, len(ids), 3)], [float(ids[t] % 2) for t in range(1, len(ids), 3)])
        for ids in completion_ids
    ]


def length(completion_ids, **kwargs):
    return [len(ids) / 16 for ids in completion_ids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    options = {"hidden_size": 32, "intermediate_size": 64}
    return {
        tied: save_tiny_model(folder / str(tied), LlamaForCausalLM, LlamaConfig, tie_word_embeddings=tied, **options)
        for tied in (False, True)
    }


def pretrained_adapter(folder, path, **loading):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    model.save_pretrained(path)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **loading), path, is_trainable=True)


@pytest.mark.parametrize("name", CASES)
def test_the_kl_starts_at_zero_and_only_the_adapter_moves(folders, tmp_path, name):
    case = dict(CASES[name])
    folder = folders[case.pop("tied", False)]
    lora = LoraConfig(**{**LORA, **case.pop("lora", {})})
    loading = {"dtype": "bfloat16" if "bf16" in case else "float32"}
    if case.pop("nf4", False):
        loading["quantization_config"] = nf4()
    model = folder
    options = {"model_init_kwargs": loading}
    if case.pop("pretrained", False):
        model = pretrained_adapter(folder, tmp_path / "adapter", **loading)
        lora = None
        options = {}
    trainer = make_trainer(
        GRPOExtTrainer,
        model,
        [even_steps, length],
        tmp_path / "out",
        trainer_options={"peft_config": lora},
        supervision="process",
        kl_estimator="exact",
        beta=0.1,
        max_steps=2,
        learning_rate=0.5,
        **options,
        **case,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    start, later = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(start) < 1e-8 and 1e-8 < later < 10
    after = trainer.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    trained = {name for name in before if ".default" in name}
    assert moved and moved <= trained | {name.replace(".default", ".ref") for name in trained}
    assert not moved <= {name for name in before if "lora_A" in name}


def test_a_quantised_head_is_refused_at_construction(folders, tmp_path):
    loading = {"dtype": "float32", "quantization_config": nf4(llm_int8_skip_modules=["nothing"])}
    options = {"trainer_options": {"peft_config": LoraConfig(**LORA)}, "beta": 0.1, "model_init_kwargs": loading}
    with pytest.raises(ValueError, match="LM head, which is quantised to torch.uint8"):
        make_trainer(GRPOExtTrainer, folders[False], length, tmp_path, kl_estimator="exact", **options)


def test_a_trained_head_of_another_dtype_than_the_quantised_models_is_refused(folders, tmp_path):
    loading = {"dtype": "float32", "quantization_config": nf4()}
    lora = {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])}
    options = {"trainer_options": lora, "beta": 0.1, "model_init_kwargs": loading}
    with pytest.raises(ValueError, match="trained LM head is torch.bfloat16 .* dtype='bfloat16'"):
        make_trainer(GRPOExtTrainer, folders[False], length, tmp_path, kl_estimator="exact", **options)
