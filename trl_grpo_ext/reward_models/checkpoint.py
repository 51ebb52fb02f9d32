"""Where the files of a reward model's checkpoint are, and whether all keys of its weights are accounted for."""

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations import deepspeed
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file


# Arguments of `from_pretrained` that say where files are; the others say how a model is loaded from them
_LOCATION_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

# What PEFT puts before the names of a model's weights
ADAPTER_PREFIX = "base_model.model."

_SHOWN_KEYS = 8


class Checkpoint(NamedTuple):
    """
    A reward model's checkpoint, located.

    Args:
        name (`str`):
            Id on the Hub or folder, without a slash at its end.
        location (`dict[str, Any]`):
            Those arguments of `from_pretrained` that say where its files are, such as `revision`.
        base_name (`str`):
            The same as `name`; for an adapter, the id or folder of the model that it is put on.
        base_location (`dict[str, Any]`):
            As `location`, for `base_name`.
        config (`PreTrainedConfig`):
            Config of the base.
    """

    name: str
    location: dict[str, Any]
    base_name: str
    base_location: dict[str, Any]
    config: PreTrainedConfig

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and not a whole model."""
        return self.name != self.base_name

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions of the base; `None` where its config does not say."""
        return self.config.get_text_config().to_dict().get("max_position_embeddings")

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the adapter, on the CPU; none for a whole model."""
        return load_peft_weights(self.name, device="cpu", **self.location) if self.is_adapter else {}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `from_pretrained`: those that say where files are, and those that say how a model is loaded."""
    location = {name: value for name, value in options.items() if name in _LOCATION_OPTIONS}
    loading = {name: value for name, value in options.items() if name not in _LOCATION_OPTIONS}
    return location, loading


def locate_checkpoint(model: "str | os.PathLike[str] | Checkpoint", location: Mapping[str, Any]) -> Checkpoint:
    """
    Find out what a model id stands for: a whole model, or an adapter on another one.

    Args:
        model (`str`, `os.PathLike` or [`Checkpoint`]):
            Id on the Hub, or folder. A checkpoint that is located already is returned as it is.
        location (`Mapping[str, Any]`):
            Those arguments of `from_pretrained` that say where its files are.

    Raises:
        OSError: there is no such model; the message names it.
    """
    if isinstance(model, Checkpoint):
        return model
    # One folder has one name, by which reward models over the same folder find each other
    name = os.fspath(model).rstrip("/")
    location = dict(location)
    base_name = name
    base_location = location
    with _naming(name):
        is_adapter = find_adapter_config_file(name, **location) is not None
        adapter = PeftConfig.from_pretrained(name, **location) if is_adapter else None
    if adapter is not None:
        base_name = cast(str, adapter.base_model_name_or_path).rstrip("/")
        base_location = {**location, "revision": adapter.revision}
    with _naming(base_name):
        config = AutoConfig.from_pretrained(base_name, **base_location)
    return Checkpoint(name, location, base_name, base_location, config)


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Errors about files that are not there say of which model: offline, transformers leaves it out."""
    try:
        yield
    except OSError as error:
        where = "" if os.path.isdir(model) else " It is no folder here, and on the Hub an id is ORGANISATION/NAME."
        raise OSError(f"the reward model '{model}' cannot be loaded.{where} {error}") from error


def check_keys(missing: Set[str], unexpected: Set[str], *, name: str, preset_name: str) -> None:
    """
    Refuse a checkpoint whose keys are not the preset's.

    Args:
        missing (`Set[str]`):
            Keys that the preset needs and the checkpoint does not have.
        unexpected (`Set[str]`):
            Keys that the checkpoint has and the preset does not know.
        name (`str`):
            The checkpoint, for errors.
        preset_name (`str`):
            The preset, for errors.

    Raises:
        ValueError: there are any; the message shows the first ones.
    """
    for what, keys in (("lacks", missing), ("has, against expectation,", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:_SHOWN_KEYS])
            more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
            raise ValueError(f"'{name}', loaded as preset '{preset_name}': the checkpoint {what} {shown}{more}.")


def without_stray(keys: Set[str], patterns: tuple[str, ...]) -> set[str]:
    """Keys that none of a preset's `stray_keys` fits."""
    return {key for key in keys if not any(fnmatch(key, pattern) for pattern in patterns)}


@contextmanager
def whole_on_every_process() -> Iterator[None]:
    """
    Load models whole, also under ZeRO-3, which shards them when they are prepared.

    transformers would shard them at once, heads too and in the training's dtype, and would not say which keys of the
    checkpoint it does not use.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    try:
        deepspeed.unset_hf_deepspeed_config()
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


@contextmanager
def without_load_reports() -> Iterator[None]:
    """
    Keep transformers from reporting keys that a model does not use.

    A head is loaded without its backbone and a backbone without its head, so that each report would list the other.
    [`check_keys`] accounts for all of them.
    """
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(verbosity)
