"""
Qwen2.5-7B's exact shape with random weights in nf4, as a folder that `from_pretrained` loads: 8 GB, in minutes.

    python recipes/bench/random_nf4.py outputs/qwen2.5_7b_random_nf4

Weights are drawn and quantised one matrix at a time, so that the model never exists whole in another precision. The
files are what `save_pretrained` writes after loading with `load_in_4bit`. The tokenizer has a token for each byte and
names for the rest of the vocabulary.
"""

import argparse
import json
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from huggingface_hub import save_torch_state_dict
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen2Config


QWEN2_5_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=256,
)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token for each byte, `<end>` for the end of a turn, and unused tokens up to `vocabulary`."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    tokens += [f"<{index}>" for index in range(len(tokens), vocabulary)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    return tokenizer


def nf4_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A quantised weight and its scales, by their keys in a checkpoint."""
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def random_tensors(config: Qwen2Config) -> dict[str, torch.Tensor]:
    """Random weights of a causal language model: nf4 inside the decoder layers, float32 elsewhere."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in track(list(model.named_parameters()), description="Drawing and quantising"):
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias"):
            tensors[name] = torch.zeros(parameter.shape)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            weight = torch.empty(parameter.shape).normal_(std=config.initializer_range)
            inside = isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
            tensors |= nf4_tensors(name, weight) if inside else {name: weight}
        else:
            tensors[name] = torch.ones(parameter.shape)
    return tensors


def save_random_model(folder: Path, config: Qwen2Config = QWEN2_5_7B) -> None:
    """Write weights, config and tokenizer."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_torch_state_dict(random_tensors(config), folder, max_shard_size="2GB")
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    fields = {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32", "quantization_config": NF4.to_dict()}
    # Last, since a folder with a config counts as complete
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **fields}, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    save_random_model(parser.parse_args().folder)
