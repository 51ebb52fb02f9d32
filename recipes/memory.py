"""
What a recipe takes of a device's memory, by part, from the configs of its models alone; no weights are loaded.

    python recipes/memory.py --config recipes/configs/qwen2.5_7b_lora_8gpus.yaml \
        --accelerate_config recipes/accelerate_configs/fsdp2.yaml --prompt_tokens 256

Weights, adapters, gradients, optimiser state and cached reference states are counted tensor by tensor. What lives only
during one phase of a step is estimated: the cache of keys and values, a layer's activations with gradient
checkpointing, the tiles of the head. Phases follow each other, so the peak is what stays plus the largest phase. Not
counted: the libraries (0.5 GiB of a GPU, 1 GiB of a process) and what allocators leave unused.

Takes every field of recipes/grpo.py beside its own; where there is no GPU, add `--bf16 false`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import yaml
from grpo import ScriptArguments, looks_like_model
from peft import PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from trl_grpo_ext import GRPOExtConfig
from trl_grpo_ext.reward_models.heads import Heads
from trl_grpo_ext.reward_models.presets import find_preset


GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
STAYS, GENERATION, SCORING, TRAINING = "always", "generation", "scoring", "training"
# bitsandbytes: weights that share a scale, scales that share one, and the tables of 4-bit and 8-bit codes
NF4_BLOCK, NF4_SCALES_BLOCK, NF4_CODES, SCALE_CODES = 64, 256, 16, 256


class Part(NamedTuple):
    """A part of a device's memory, and the phase of a step in which it is there."""

    name: str
    size: int
    phase: str


@dataclass
class MemoryArguments:
    """
    What the recipe's own fields do not say.

    Args:
        accelerate_config (`str`, *optional*):
            File that `accelerate launch --config_file` takes; a single process by default.
        prompt_tokens (`int`, *optional*, defaults to `256`):
            Length of the prompts, chat template and system message included.
        device_memory (`float`, *optional*, defaults to `80.0`):
            Of the GPU in GB, of which a colocated vLLM takes its share.
    """

    accelerate_config: str | None = field(default=None, metadata={"help": "File for `accelerate launch`."})
    prompt_tokens: int = field(default=256, metadata={"help": "Length of the prompts in tokens."})
    device_memory: float = field(default=80.0, metadata={"help": "Of the GPU, in GB."})


class Shards(NamedTuple):
    """Into how many parts a process's share of something is cut: 1 where every process has it whole."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    reward_models: int = 1
    master_weights: bool = False  # DeepSpeed trains a float32 copy of bfloat16 weights

    @classmethod
    def read(cls, path: str | None) -> "Shards":
        """Those of a file for `accelerate launch`."""
        if path is None:
            return cls()
        with open(path) as file:
            config: dict[str, Any] = yaml.safe_load(file)
        count = int(config["num_processes"])
        if config["distributed_type"] == "FSDP":
            return cls(count, count, count)
        if config["distributed_type"] == "DEEPSPEED":
            stage = config["deepspeed_config"]["zero_stage"]
            cut = [count if stage >= least else 1 for least in (3, 2, 1, 3)]
            return cls(*cut, master_weights=True)
        return cls()


def nf4_bytes(weights: int, nested: bool) -> int:
    """Of one matrix: two weights in a byte, a scale for each block, and the codes, as bitsandbytes keeps them."""
    blocks = math.ceil(weights / NF4_BLOCK)
    scales = blocks * FLOAT32
    if nested:
        scales = blocks + (math.ceil(blocks / NF4_SCALES_BLOCK) + SCALE_CODES + 1) * FLOAT32
    return math.ceil(weights / 2) + scales + NF4_CODES * FLOAT32


def weight_bytes(model: nn.Module, head: nn.Module | None, quantization: Any, itemsize: int) -> int:
    """
    All parameters of a model without adapters.

    With `quantization`, a `BitsAndBytesConfig` for 4 bits, linear layers other than `head` are nf4 and the rest
    has `itemsize`.
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
    # A quantised checkpoint's own settings are no part of its shape
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        return auto.from_config(config)


def trained_sizes(model: PreTrainedModel, peft_config: PeftConfig | None) -> list[int]:
    """Number of elements of each parameter that is trained; adapters are put on the model."""
    if peft_config is not None:
        with torch.device("meta"):
            model = get_peft_model(model, peft_config)  # type: ignore[assignment]
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


def checkpoint_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Inputs of all layers, kept by gradient checkpointing."""
    return config.num_hidden_layers * tokens * config.hidden_size * itemsize


def layer_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """
    What autograd keeps of one decoder layer with an adapter on each frozen linear layer, about.

    Two norms with a float32 copy of their input, each adapter's own input in the dtype of the products, the rotated
    queries and keys, values and the attention's output; gate, its activation, up and their product.
    """
    keys = config.num_key_value_heads * head_size(config)
    own = 8 * config.hidden_size + 2 * keys + 4 * config.intermediate_size
    return tokens * (own * itemsize + 2 * config.hidden_size * FLOAT32)


def head_size(config: Any) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Keys and values of all layers."""
    return config.num_hidden_layers * tokens * 2 * config.num_key_value_heads * head_size(config) * itemsize


def largest_matrix(model: PreTrainedModel) -> int:
    """Elements of the largest linear layer, which is dequantised whole."""
    head = model.get_output_embeddings()
    return max(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def reward_model_bytes(name: str, itemsize: int, quantization: Any) -> tuple[int, Any]:
    """Weights of a reward model, its head in float32, and its config."""
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


def parts(
    memory_args: MemoryArguments, script_args: ScriptArguments, args: GRPOExtConfig, model_args: ModelConfig
) -> Iterator[Part]:
    """Everything that one device holds, part by part."""
    shards = Shards.read(memory_args.accelerate_config)
    itemsize = getattr(torch, model_args.dtype or "float32").itemsize
    quantization = get_quantization_config(model_args)
    config = AutoConfig.from_pretrained(cast(str, model_args.model_name_or_path))
    text: Any = config.get_text_config()
    model = on_meta(config, AutoModelForCausalLM)
    whole = weight_bytes(model, model.get_output_embeddings(), quantization, itemsize)
    yield Part("policy weights", whole // shards.weights, STAYS)

    peft_config = get_peft_config(model_args)
    matrix = largest_matrix(model) * itemsize
    layers = cast(nn.ModuleList, model.base_model.get_submodule("layers"))
    layer = sum(parameter.numel() for parameter in layers[0].parameters()) * itemsize
    trained = trained_sizes(model, peft_config)
    # PEFT makes adapters float32; TRL makes them bfloat16 on quantised models and leaves them so under ZeRO-3
    low = quantization is not None or shards.weights > 1 and shards.master_weights
    trained_itemsize = itemsize if peft_config is None else BFLOAT16 if low else FLOAT32
    count = sum(trained)
    if peft_config is not None:
        yield Part("adapters", count * trained_itemsize // shards.weights, STAYS)
    elif args.beta:
        yield Part("reference weights", whole // shards.weights, STAYS)
    yield Part("gradients", count * trained_itemsize // shards.gradients, STAYS)
    state = 3 * FLOAT32 if shards.master_weights else 2 * trained_itemsize
    yield Part("optimiser (AdamW)", count * state // shards.optimizer, STAYS)

    rows = args.per_device_train_batch_size * cast(int, args.steps_per_generation)
    completion = cast(int, args.max_completion_length)
    length = memory_args.prompt_tokens + completion
    if args.kl_estimator == "exact" and args.beta:
        yield Part("cached reference states", rows * completion * text.hidden_size * itemsize, STAYS)

    options = cast(dict[str, Any], script_args.reward_model_options)
    reward_quantization = as_config(options.get("quantization_config"))
    for name in filter(looks_like_model, script_args.reward_funcs):
        size, reward_config = reward_model_bytes(name, itemsize, reward_quantization)
        yield Part(f"reward model {name.rstrip('/').split('/')[-1]}", size // shards.reward_models, STAYS)
        scored = args.reward_batch_tokens or rows * length
        yield Part("reward model's activations", forward_bytes(reward_config, scored, itemsize), SCORING)

    if not args.use_vllm:
        yield Part("keys and values", cache_bytes(text, rows * length, itemsize), GENERATION)
        yield Part("logits of the next token", 3 * rows * text.vocab_size * FLOAT32, GENERATION)
    elif args.vllm_mode == "colocate":
        share = int(args.vllm_gpu_memory_utilization * memory_args.device_memory * 1e9)
        yield Part("vLLM, weights and cache", share, GENERATION if args.vllm_enable_sleep_mode else STAYS)

    tokens = args.per_device_train_batch_size * length
    if args.gradient_checkpointing:
        yield Part("layer inputs (checkpoints)", checkpoint_bytes(text, tokens, itemsize), TRAINING)
        yield Part("one layer's activations", layer_bytes(text, tokens, itemsize), TRAINING)
    else:
        every = text.num_hidden_layers * layer_bytes(text, tokens, itemsize)
        yield Part("all layers' activations", every, TRAINING)
    # Their gradients, of the widest few tensors
    yield Part("gradients of activations", 3 * tokens * text.intermediate_size * itemsize, TRAINING)
    own = args.per_device_train_batch_size * completion
    if args.kl_estimator == "exact":
        yield Part("head, tiles of logits", args.logits_memory_bytes, TRAINING)
        yield Part("head, gradient of hidden states", 2 * own * text.hidden_size * FLOAT32, TRAINING)
    if quantization is not None:
        yield Part("one matrix dequantised", matrix, TRAINING)
    if shards.weights > 1:
        yield Part("two layers gathered", 2 * layer, TRAINING)
        yield Part("head gathered", text.vocab_size * text.hidden_size * itemsize, TRAINING)


def forward_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """The widest moment of a forward without gradients: gate, up and their product beside the stream and its norm."""
    return tokens * ((3 * config.intermediate_size + 2 * config.hidden_size) * itemsize + config.hidden_size * FLOAT32)


def as_config(quantization: Any) -> Any:
    """`quantization_config` of reward models, which stands in YAML as a mapping."""
    return BitsAndBytesConfig(**quantization) if isinstance(quantization, dict) else quantization


def peak(found: list[Part]) -> int:
    """What stays, and the largest of the phases."""
    sizes = {phase: sum(p.size for p in found if p.phase == phase) for phase in (GENERATION, SCORING, TRAINING)}
    return sum(p.size for p in found if p.phase == STAYS) + max(sizes.values())


def as_table(found: list[Part], title: str) -> Table:
    table = Table("part", "when", "GiB", title=title)
    table.columns[-1].justify = "right"
    for part in sorted(found, key=lambda part: (STAYS, GENERATION, SCORING, TRAINING).index(part.phase)):
        table.add_row(part.name, part.phase, f"{part.size / GIB:.2f}")
    table.add_section()
    table.add_row("peak: what stays, and the largest phase", "", f"{peak(found) / GIB:.1f}")
    return table


def make_parser() -> TrlParser:
    return TrlParser(cast(Any, (MemoryArguments, ScriptArguments, GRPOExtConfig, ModelConfig)))


if __name__ == "__main__":
    memory_args, *recipe = make_parser().parse_args_and_config()
    title = f"{recipe[2].model_name_or_path}: memory of one device"
    Console().print(as_table(list(parts(memory_args, *recipe)), title))
