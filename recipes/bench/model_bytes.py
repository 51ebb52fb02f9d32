"""Bytes of models and of what they compute. Models are built from their configs, without weights."""

import math
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trl_grpo_ext.reward_models.heads import Heads
from trl_grpo_ext.reward_models.presets import find_preset


FLOAT32 = 4

# How bitsandbytes stores 4-bit weights
NF4_BLOCK = 64  # weights that share a scale
NF4_SCALES_BLOCK = 256  # scales that share a scale, with double quantisation
NF4_CODES = 16  # values that a weight can have
SCALE_CODES = 256  # values that a scale can have, with double quantisation


def nf4_bytes(weights: int, nested: bool) -> int:
    """Bytes of one matrix as bitsandbytes keeps it: two weights in a byte, a scale for each block, and the codes."""
    blocks = math.ceil(weights / NF4_BLOCK)
    scales = blocks * FLOAT32
    if nested:
        scales = blocks + (math.ceil(blocks / NF4_SCALES_BLOCK) + SCALE_CODES + 1) * FLOAT32
    return math.ceil(weights / 2) + scales + NF4_CODES * FLOAT32


def weight_bytes(model: nn.Module, head: nn.Module | None, quantization: Any, itemsize: int) -> int:
    """
    Bytes of all parameters of a model without adapters.

    With `quantization`, a `BitsAndBytesConfig` for 4 bits, linear layers other than `head` are nf4. All other
    parameters take `itemsize` bytes for each element.
    """
    total = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and module is not head
            if quantization is not None and linear and name == "weight":
                total += nf4_bytes(parameter.numel(), quantization.bnb_4bit_use_double_quant)
            else:
                total += parameter.numel() * itemsize
    return total


def on_meta(config: PreTrainedConfig, auto: Any) -> PreTrainedModel:
    """A model of the auto class `auto`, without weights and not quantised."""
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        return auto.from_config(config)


def trained_sizes(model: PreTrainedModel, peft_config: PeftConfig | None) -> list[int]:
    """Number of elements of each parameter that is trained. With `peft_config`, the model gets its adapters."""
    if peft_config is not None:
        with torch.device("meta"):
            model = get_peft_model(model, peft_config)  # type: ignore[assignment]
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


def checkpoint_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of the inputs of all layers, which gradient checkpointing keeps."""
    return config.num_hidden_layers * tokens * config.hidden_size * itemsize


def layer_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """
    About the bytes that autograd keeps of one decoder layer, with an adapter on each frozen linear layer.

    They are: the two norms, with a float32 copy of their input; the input of each adapter, in the dtype of the matrix
    products; rotated queries and keys, values and the output of the attention; gate, its activation, up, and the
    product of the last two.
    """
    keys = config.num_key_value_heads * head_size(config)
    own = 8 * config.hidden_size + 2 * keys + 4 * config.intermediate_size
    return tokens * (own * itemsize + 2 * config.hidden_size * FLOAT32)


def head_size(config: Any) -> int:
    """Width of an attention head."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of all layers."""
    return config.num_hidden_layers * tokens * 2 * config.num_key_value_heads * head_size(config) * itemsize


def largest_matrix(model: PreTrainedModel) -> int:
    """Elements of the largest linear layer, the head aside. A quantised layer is dequantised as a whole."""
    head = model.get_output_embeddings()
    return max(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def reward_model_bytes(name: str, itemsize: int, quantization: Any) -> tuple[int, Any]:
    """Bytes of a reward model's weights, its head in float32; and its config."""
    config = AutoConfig.from_pretrained(name)
    preset = find_preset(name, config)
    if preset is None:
        raise ValueError(f"no preset fits the reward model {name!r}; its size is not known.")
    if preset.head is None:
        model = on_meta(config, AutoModelForCausalLM)
        return weight_bytes(model, model.get_output_embeddings(), quantization, itemsize), config
    with torch.device("meta"):
        head = Heads(config, preset.head)
    heads = sum(parameter.numel() * FLOAT32 for parameter in head.parameters())
    return weight_bytes(on_meta(config, AutoModel), None, quantization, itemsize) + heads, config


def forward_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of a forward without gradients at its peak: gate, up, their product, hidden states and their norm."""
    return tokens * ((3 * config.intermediate_size + 2 * config.hidden_size) * itemsize + config.hidden_size * FLOAT32)
