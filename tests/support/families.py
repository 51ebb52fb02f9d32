"""Tiny models of the families in transformers: the default config of each, with small sizes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


VOCABULARY = 48

# By the names that families have for them
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "lru_width", "out_hidden_size", "embed_dim"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "intermediate_size_mlp", "ffn_hidden_size"], 32),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "depth"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["head_dim", "linear_key_head_dim", "linear_value_head_dim", "qk_rope_head_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "o_lora_rank"], 8),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_top_k"], 2),
    **dict.fromkeys(["mamba_n_heads", "linear_num_value_heads", "time_step_rank", "mamba_dt_rank"], 4),
    **dict.fromkeys(["mamba_d_head"], 16),
    **dict.fromkeys(["mamba_d_state", "mamba_n_groups"], 1),
    "max_position_embeddings": 64,
    "n_positions": 64,
    "sliding_window": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """The default config with the sizes above where it has a field of the name, and with `settings`."""
    default = config_class().to_dict()
    sizes = {name: size for name, size in SIZES.items() if isinstance(default.get(name), (int, float))}
    return config_class(**{**sizes, **settings})


def tiny(model_class: type[PreTrainedModel], **settings: Any) -> Any:
    """A model with random weights; the same ones each time."""
    config = tiny_config(model_class.config_class, **settings)
    # The default implementation of experts has no float64
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return model_class(config).eval()


def families_with_router_loss() -> list[str]:
    """
    Every class of decoder-only models in transformers that can add a load-balancing loss.

    By the sources: importing all families takes seconds, in each process that collects tests.
    """
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, class_name in names.items():
            sources = (models / model_type_to_module_name(model_type)).glob("modeling_*.py")
            if any("load_balancing_loss_func" in source.read_text(encoding="utf-8") for source in sources):
                found[class_name] = None
    return list(found)
