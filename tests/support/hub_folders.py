"""Reward models as they lie on the Hub, tiny: config, safetensors with the real key names, a real tokenizer.

The tokenizers come from wheels that hold their data and nothing else that is needed here: `pip install --no-deps
dashscope llama-models`, and `pip install mistral-common sentencepiece tiktoken pydantic-extra-types pycountry`, since
transformers imports mistral-common where it is installed. Nothing here imports the package under test.
"""

import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import TikTokenConverter


WIDTH = 16

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_SPLIT = _QWEN_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
)

QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)


def missing_packages() -> str | None:
    """What keeps the tokenizers from being built here, as a reason to skip; `None` if nothing does."""
    names = ("dashscope", "llama_models", "mistral_common", "sentencepiece", "tiktoken")
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (see tests/support/hub_folders.py)" if absent else None


def _data(package: str, *path: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]).joinpath(*path)


@functools.cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's, with the tag of its process reward models; 2 s."""
    special = [*_QWEN_SPECIAL.split(), "<|quad_start|>", "<extra_0>"]
    backend = TikTokenConverter(
        str(_data("dashscope", "resources", "qwen.tiktoken")), pattern=_QWEN_SPLIT, extra_special_tokens=special
    ).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=QWEN_TEMPLATE,
    )


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and Qwen2.5's special ones: needs no wheel, and keeps models small."""
    special = [*_QWEN_SPECIAL.split(), "<extra_0>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN_TEMPLATE
    )


@functools.cache
def skywork_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's with a beginning-of-sequence token that only the caller writes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen_tokenizer().backend_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


@functools.cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3.1's, which begins what it encodes with a beginning-of-sequence token; 2 s."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4))]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    backend = TikTokenConverter(
        str(_data("llama_models", "llama3", "tokenizer.model")), pattern=_LLAMA_SPLIT, extra_special_tokens=special
    ).converted()
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        # Athene's; no other model of the family reads it
        cls_token="<|reserved_special_token_1|>",
        additional_special_tokens=special,
        chat_template=LLAMA_TEMPLATE,
    )


def save_mistral_tokenizer(folder: Path, **settings) -> None:
    """Mistral 7B's SentencePiece model, as it lies beside the weights."""
    shutil.copy(_data("mistral_common", "data", "tokenizer.model.v1"), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, **settings}))


def _config(config_class, vocabulary: int, **settings):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    return config_class(**{**sizes, **settings})


FAMILIES = {
    "qwen": (Qwen2Config, 151936, qwen_tokenizer),
    "bytes": (Qwen2Config, 320, byte_tokenizer),
    "granite": (GraniteConfig, 320, byte_tokenizer),
    "qwen3": (Qwen3Config, 320, byte_tokenizer),
    "skywork": (Qwen2Config, 151936, skywork_tokenizer),
    "llama": (LlamaConfig, 128256, llama_tokenizer),
    "mistral": (MistralConfig, 32000, None),
}


# Removed when the process ends
_SHARED = tempfile.TemporaryDirectory(prefix="tokenizers-")


@functools.cache
def tokenizer_folder(family: str) -> Path:
    """A family's tokenizer and config, written once. Folders of models link to the tokenizer's files."""
    folder = Path(_SHARED.name) / family
    config_class, vocabulary, tokenizer = FAMILIES[family]
    # transformers chooses the tokenizer's class by the config beside it
    _config(config_class, vocabulary).save_pretrained(folder)
    if tokenizer is None:
        save_mistral_tokenizer(folder, pad_token="</s>")
    else:
        tokenizer().save_pretrained(folder)
    return folder


def save_hub_folder(
    folder: Path,
    family: str,
    architecture: str,
    head: dict[str, tuple[int, ...]] | None = None,
    lm_head: bool = False,
    head_scale: float = 0.2,
    seed: int = 0,
    **settings,
) -> Path:
    """
    Write a tiny model: a backbone under `model.*`, and a head by its keys and shapes or a causal language model's.

    Args:
        folder: Where to; its last part is what a preset is found by.
        family: One of `FAMILIES`: config, vocabulary and tokenizer.
        architecture: What the config's `architectures` says.
        head: Keys and shapes of the head, drawn at random; `None` for a causal language model.
        lm_head: Whether the causal head is written too, stray.
        head_scale: Standard deviation of the head's numbers.
        settings: Fields of the config.
    """
    config_class, vocabulary, _ = FAMILIES[family]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = _config(config_class, vocabulary, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if head is not None:
        weights = {key: value for key, value in weights.items() if lm_head or not key.startswith("lm_head.")}
        weights |= {key: head_scale * torch.randn(shape, generator=generator) for key, shape in head.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {**config.to_dict(), "architectures": [architecture], "dtype": "float32"}
    # As remote code is announced; it must never run
    fields["auto_map"] = {"AutoModel": "modeling_not_here.Remote"} if head is not None else {}
    (folder / "config.json").write_text(json.dumps(fields))
    for file in tokenizer_folder(family).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    return folder


def load_tokenizer(folder: Path):
    """The folder's tokenizer, loaded once for all folders that link to the same files."""
    return _load_tokenizer((folder / "tokenizer_config.json").resolve().parent)


@functools.cache
def _load_tokenizer(folder: Path):
    # Llama's and Mistral's files are read as a user's are; Qwen's would take 4 s more, as it was made of the same data
    in_memory = {"qwen": qwen_tokenizer, "skywork": skywork_tokenizer}.get(folder.name)
    return AutoTokenizer.from_pretrained(folder) if in_memory is None else in_memory()
