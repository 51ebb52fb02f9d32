"""
What a recipe takes of a device's memory, part by part, from the configs of its models. No weights are loaded.

    python recipes/bench/memory.py --config recipes/configs/qwen2.5_7b_lora_8gpus.yaml \
        --accelerate_config recipes/accelerate_configs/fsdp2.yaml --prompt_tokens 256

Weights, adapters, gradients, optimiser state and cached reference states are counted tensor by tensor. What exists
only during one phase of a step is estimated: keys and values, activations, the logits of the head. The phases of a
step follow each other, so the peak is what always stays plus the largest phase. Not counted are the libraries (0.5 GiB
of a GPU, 1 GiB of a process) and what allocators leave unused.

Takes every field of recipes/grpo.py beside its own. On a machine without a GPU, add `--bf16 false`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from model_bytes import (
    FLOAT32,
    cache_bytes,
    checkpoint_bytes,
    forward_bytes,
    largest_matrix,
    layer_bytes,
    on_meta,
    reward_model_bytes,
    trained_sizes,
    weight_bytes,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config


sys.path.append(str(Path(__file__).parent.parent))

from grpo import ScriptArguments, looks_like_model

from trl_grpo_ext import GRPOExtConfig
from trl_grpo_ext.kl.fused.chunks import default_logits_bytes


GIB = 2**30
BFLOAT16 = 2
ITEMSIZES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": 2}

# When a part is there
STAYS = "always"
GENERATION = "generation"
SCORING = "scoring"
TRAINING = "training"


class Part(NamedTuple):
    """A part of a device's memory, and the phase of a step in which it is there."""

    name: str
    size: int
    phase: str


@dataclass
class MemoryArguments:
    """
    What the fields of a recipe do not say.

    Args:
        accelerate_config (`str`, *optional*):
            File that `accelerate launch --config_file` takes; a single process by default.
        prompt_tokens (`int`, *optional*, defaults to `256`):
            Length of the prompts, chat template and system message included.
        device_memory (`float`, *optional*, defaults to `80.0`):
            Memory of the GPU in GB. A colocated vLLM takes a share of it, and the logits have a bound by it.
    """

    accelerate_config: str | None = field(default=None, metadata={"help": "File for `accelerate launch`."})
    prompt_tokens: int = field(default=256, metadata={"help": "Length of the prompts in tokens."})
    device_memory: float = field(default=80.0, metadata={"help": "Memory of the GPU in GB."})


class Shards(NamedTuple):
    """Into how many shards each kind of tensor is cut, one shard per process; 1 where each process has all of it."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    reward_models: int = 1
    # DeepSpeed trains a float32 copy of bfloat16 weights
    master_weights: bool = False

    @classmethod
    def read(cls, path: str | None) -> "Shards":
        """The shards under a configuration file of `accelerate launch`."""
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


class Run(NamedTuple):
    """
    What the parts depend on.

    Args:
        args ([`GRPOExtConfig`]):
            Settings of the recipe.
        shards ([`Shards`]):
            Into how many shards tensors are cut.
        config (`PreTrainedConfig`):
            Config of the policy's decoder.
        itemsize (`int`):
            Bytes of a number in the policy's dtype.
        quantized (`bool`):
            Whether the policy's linear layers are nf4.
        weights (`int`):
            Bytes of the policy, without adapters.
        matrix (`int`):
            Elements of the policy's largest linear layer.
        layer (`int`):
            Elements of one of the policy's decoder layers.
        adapters (`bool`):
            Whether adapters are trained, not the policy's own weights.
        trained (`int`):
            Elements that are trained.
        prompt_tokens (`int`):
            Length of the prompts.
    """

    args: GRPOExtConfig
    shards: Shards
    config: Any
    itemsize: int
    quantized: bool
    weights: int
    matrix: int
    layer: int
    adapters: bool
    trained: int
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return cast(int, self.args.max_completion_length)

    @property
    def length(self) -> int:
        """Tokens of a prompt and its completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def generated(self) -> int:
        """Completions that a device generates at once."""
        return self.args.per_device_train_batch_size * cast(int, self.args.steps_per_generation)


def describe(memory_args: MemoryArguments, args: GRPOExtConfig, model_args: ModelConfig) -> Run:
    """Read a recipe, its models' configs included."""
    itemsize = ITEMSIZES[cast(str, model_args.dtype)]
    quantization = get_quantization_config(model_args)
    peft_config = get_peft_config(model_args)
    config = AutoConfig.from_pretrained(cast(str, model_args.model_name_or_path))
    model = on_meta(config, AutoModelForCausalLM)
    layers = cast(nn.ModuleList, model.base_model.get_submodule("layers"))
    return Run(
        args=args,
        shards=Shards.read(memory_args.accelerate_config),
        config=config.get_text_config(),
        itemsize=itemsize,
        quantized=quantization is not None,
        weights=weight_bytes(model, model.get_output_embeddings(), quantization, itemsize),
        matrix=largest_matrix(model),
        layer=sum(parameter.numel() for parameter in layers[0].parameters()),
        adapters=peft_config is not None,
        # Last, because it puts the adapters on the model
        trained=sum(trained_sizes(model, peft_config)),
        prompt_tokens=memory_args.prompt_tokens,
    )


def trained_itemsize(run: Run) -> int:
    """Bytes of a number that is trained: PEFT makes adapters float32, TRL those of a quantised model bfloat16."""
    if not run.adapters:
        return run.itemsize
    # TRL leaves adapters in bfloat16 under ZeRO-3 too
    low = run.quantized or (run.shards.weights > 1 and run.shards.master_weights)
    return BFLOAT16 if low else FLOAT32


def kept_parts(run: Run) -> Iterator[Part]:
    """Weights, adapters, gradients, optimiser state and cached states."""
    shards = run.shards
    itemsize = trained_itemsize(run)
    yield Part("policy weights", run.weights // shards.weights, STAYS)
    if run.adapters:
        yield Part("adapters", run.trained * itemsize // shards.weights, STAYS)
    elif run.args.beta:
        yield Part("reference weights", run.weights // shards.weights, STAYS)
    yield Part("gradients", run.trained * itemsize // shards.gradients, STAYS)
    state = 3 * FLOAT32 if shards.master_weights else 2 * itemsize
    yield Part("optimiser (AdamW)", run.trained * state // shards.optimizer, STAYS)
    if run.args.kl_estimator == "exact" and run.args.beta:
        states = run.generated * run.completion_tokens * run.config.hidden_size
        yield Part("cached reference states", states * run.itemsize, STAYS)


def reward_model_parts(run: Run, script_args: ScriptArguments) -> Iterator[Part]:
    """Weights of each reward model, and its activations while it scores."""
    options = cast(dict[str, Any], script_args.reward_model_options)
    quantization = as_config(options.get("quantization_config"))
    scored = run.args.reward_batch_tokens or run.generated * run.length
    for name in filter(looks_like_model, script_args.reward_funcs):
        size, config = reward_model_bytes(name, run.itemsize, quantization)
        yield Part(f"reward model {name.rstrip('/').split('/')[-1]}", size // run.shards.reward_models, STAYS)
        yield Part("reward model's activations", forward_bytes(config, scored, run.itemsize), SCORING)


def generation_parts(run: Run, device_memory: float) -> Iterator[Part]:
    """Cache and logits of transformers' generation, or what vLLM takes of `device_memory`."""
    args = run.args
    if not args.use_vllm:
        cache = cache_bytes(run.config, run.generated * run.length, run.itemsize)
        yield Part("keys and values", cache, GENERATION)
        yield Part("logits of the next token", 3 * run.generated * run.config.vocab_size * FLOAT32, GENERATION)
    elif args.vllm_mode == "colocate":
        share = int(args.vllm_gpu_memory_utilization * device_memory * 1e9)
        yield Part("vLLM, weights and cache", share, GENERATION if args.vllm_enable_sleep_mode else STAYS)


def logits_bytes(run: Run, device_memory: float) -> int:
    """Both models' logits of a chunk of tokens, on a GPU with Triton's kernels."""
    vocabulary = run.config.vocab_size
    allowed = run.args.logits_memory_bytes or default_logits_bytes(
        vocabulary, run.itemsize, block_bytes=None, gpu_bytes=int(device_memory * 1e9)
    )
    tokens = run.args.per_device_train_batch_size * run.completion_tokens
    return min(allowed, 2 * tokens * vocabulary * run.itemsize)


def training_parts(run: Run, device_memory: float) -> Iterator[Part]:
    """Activations of a micro-batch and their gradients, the head's logits, and weights that are made whole."""
    rows = run.args.per_device_train_batch_size
    tokens = rows * run.length
    activations = layer_bytes(run.config, tokens, run.itemsize)
    if run.args.gradient_checkpointing:
        yield Part("layer inputs (checkpoints)", checkpoint_bytes(run.config, tokens, run.itemsize), TRAINING)
        yield Part("one layer's activations", activations, TRAINING)
    else:
        yield Part("all layers' activations", run.config.num_hidden_layers * activations, TRAINING)
    # Those of the three widest tensors
    yield Part("gradients of activations", 3 * tokens * run.config.intermediate_size * run.itemsize, TRAINING)
    if run.args.kl_estimator == "exact":
        hidden = rows * run.completion_tokens * run.config.hidden_size
        yield Part("head, logits of a chunk", logits_bytes(run, device_memory), TRAINING)
        yield Part("head, gradient of hidden states", 2 * hidden * FLOAT32, TRAINING)
    if run.quantized:
        yield Part("one matrix dequantised", run.matrix * run.itemsize, TRAINING)
    if run.shards.weights > 1:
        head = run.config.vocab_size * run.config.hidden_size
        yield Part("two layers gathered", 2 * run.layer * run.itemsize, TRAINING)
        yield Part("head gathered", head * run.itemsize, TRAINING)


def parts(
    memory_args: MemoryArguments, script_args: ScriptArguments, args: GRPOExtConfig, model_args: ModelConfig
) -> Iterator[Part]:
    """Everything that one device holds, part by part."""
    run = describe(memory_args, args, model_args)
    yield from kept_parts(run)
    yield from reward_model_parts(run, script_args)
    yield from generation_parts(run, memory_args.device_memory)
    yield from training_parts(run, memory_args.device_memory)


def as_config(quantization: Any) -> Any:
    """`quantization_config` of reward models, which stands in YAML as a mapping."""
    return BitsAndBytesConfig(**quantization) if isinstance(quantization, dict) else quantization


def peak(found: list[Part]) -> int:
    """Bytes of what stays and of the largest phase."""
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
