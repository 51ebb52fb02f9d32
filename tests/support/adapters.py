"""Adapters of every kind that the reference has to survive."""

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM


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
