"""
Weights of models that transformers saves under other names than their modules', as Qwen3-MoE or Qwen2.5-VL.

`save_pretrained` writes the names, and the cut into experts, of the model's first release, and `from_pretrained`
converts them. The trainer of transformers does not when it resumes (issue 48805): it leaves such parameters at the
values that the run started with, and only logs their names.
"""

import functools
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging


logger = logging.get_logger(__name__)


def load_converted_weights(model: PreTrainedModel, folder: Path) -> None:
    """
    Give a model the weights of a checkpoint, converted as `from_pretrained` converts them.

    Does nothing for a model that is saved under its modules' names, which transformers' trainer has loaded by then.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, not sharded.
        folder (`Path`):
            The checkpoint's folder.

    Raises:
        ValueError: some weights are not in the checkpoint even under their first release's names; with the names.
    """
    saved = _saved_names(folder)
    own = model.state_dict().keys()
    # A conversion can also change values under the same name
    if saved <= own and not get_model_conversion_mapping(model, add_legacy=False):
        return
    # The conversion must not round what is saved, and a model may have parameters of several types
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    loaded, report = cast(Any, type(model)).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The checkpoint {folder} cannot be resumed: transformers saves this {type(model).__name__} under other "
            f"names than its modules' and does not find {', '.join(missing[:5])} among them again. Train from the "
            "checkpoint's weights in a new run, with its folder as `model`, or train with PEFT, FSDP or DeepSpeed, "
            "whose checkpoints keep the modules' names."
        )
    model.load_state_dict(loaded.state_dict())
    logger.warning(
        f"All weights in {folder} were converted to the names of the modules of {type(model).__name__}; keys that "
        "transformers reports as missing or unexpected are among them."
    )


def _saved_names(folder: Path) -> set[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_bytes())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        # A file of pickled weights has no names that could be read without loading it
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
