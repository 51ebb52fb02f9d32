"""Reward models from checkpoints: plain backbones, heads by data, no remote code, every key accounted for."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from .backbone import Backbone
from .heads import Head, Heads, vocabulary_head
from .presets import PRESETS, Preset, find_preset
from .readings import HeadReading, LogRatio, TokenPair
from .rendering import one_id
from .scorers import HeadReader, LogRatioScorer, Scorer, TokenPairReader


# Arguments of `from_pretrained` that say where files are; the others say how a backbone is loaded
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download")

# What PEFT puts before the names of a model's weights
_ADAPTED = "base_model.model."


class Source(NamedTuple):
    """
    Where a reward model comes from.

    Args:
        model (`str`):
            Id or folder that was asked for.
        where (`dict[str, Any]`):
            Those arguments of `from_pretrained` that say where its files are, such as `revision`.
        base (`str`):
            The same id or folder, or the one that it is an adapter of.
        base_where (`dict[str, Any]`):
            As `where`, for `base`.
        how (`dict[str, Any]`):
            The other arguments, which say how `base` is loaded.
        config (`PreTrainedConfig`):
            Of `base`.
    """

    model: str
    where: dict[str, Any]
    base: str
    base_where: dict[str, Any]
    how: dict[str, Any]
    config: PreTrainedConfig


def find_source(model: str, loading: dict[str, Any]) -> Source:
    """Where a model comes from: whether it is an adapter, of what, and the config."""
    where = {name: value for name, value in loading.items() if name in _WHERE}
    how = {name: value for name, value in loading.items() if name not in _WHERE}
    # A folder is known by its last part, and by its name whether two are the same
    model = os.fspath(model).rstrip("/")
    base, base_where = model, where
    if find_adapter_config_file(model, **where) is not None:
        adapter = PeftConfig.from_pretrained(model, **where)
        base = cast(str, adapter.base_model_name_or_path).rstrip("/")
        base_where = {**where, "revision": adapter.revision}
    return Source(model, where, base, base_where, how, AutoConfig.from_pretrained(base, **base_where))


def adapter_keys(source: Source) -> set[str]:
    """Weights of its base that an adapter brings whole, such as a head's; none for a model that is no adapter."""
    if source.model == source.base:
        return set()
    weights = load_peft_weights(source.model, device="cpu", **source.where)
    return {key.removeprefix(_ADAPTED) for key in weights}


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
def _without_load_reports() -> Iterator[None]:
    """What transformers logs about a checkpoint's other part is no news: all keys are checked here."""
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(verbosity)


def resolve_preset(model: str, preset: Preset | str | None, config: PreTrainedConfig | None = None) -> Preset:
    """
    The preset to load a model with: the one that is given, by itself or by name, or the one that fits the model.

    Raises:
        ValueError: an unknown name, or a model that no preset fits.
    """
    if isinstance(preset, Preset):
        return preset
    found = find_preset(model, config) if preset is None else PRESETS.get(preset)
    if found is None:
        what = f"no preset fits '{model}'" if preset is None else f"there is no preset '{preset}'"
        raise ValueError(f"{what}; pass preset= as one of {', '.join(PRESETS)}, or a Preset of your own.")
    return found


def _check_keys(missing: set[str], unexpected: set[str], model: str, preset: Preset) -> None:
    unexpected = {key for key in unexpected if not any(fnmatch(key, pattern) for pattern in preset.stray_keys)}
    for what, keys in (("lacks", missing), ("has, against expectation,", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise ValueError(f"'{model}', loaded as preset '{preset.name}': the checkpoint {what} {shown}.")


def _load_backbone(source: Source, preset: Preset, head_keys: set[str] | None, offload: bool) -> Backbone:
    """
    The checkpoint without its head.

    `head_keys` are the head's, which are expected in it; `None`: an adapter brings the head, so that any other may be.
    """
    loading = {**source.how, **source.base_where, "output_loading_info": True, "trust_remote_code": False}
    causal = preset.head is None
    loader = AutoModelForCausalLM if causal else AutoModel
    model, info = cast(Any, loader.from_pretrained(source.base, **loading))
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if not causal:
        missing = {f"{model.base_model_prefix}.{key}" for key in missing}
        unexpected = set() if head_keys is None else unexpected - head_keys
    _check_keys(missing, unexpected, source.base, preset)
    return Backbone(model, source.base, causal, offload)


def _load_heads(source: Source, preset: Preset, backbone: Backbone | None) -> tuple[Heads, bool]:
    """
    The head alone, and whether it comes from an adapter and not from the checkpoint that the adapter is of.

    `backbone` is the one that it shall read, if that is loaded.
    """
    # Not quantised, as the backbone may be
    config = copy.deepcopy(source.config)
    vars(config).pop("quantization_config", None)
    if source.model != source.base:
        weights = load_peft_weights(source.model, device="cpu", **source.where)
        heads = Heads(config, cast(Any, preset.head)).float()
        own = {key: weights[_ADAPTED + key] for key in heads.state_dict() if _ADAPTED + key in weights}
        if own:
            _check_keys(heads.state_dict().keys() - own.keys(), set(), source.model, preset)
            heads.load_state_dict(own)
            return heads, True
    loading = {"config": config, "head": preset.head, "dtype": torch.float32, "output_loading_info": True}
    heads, info = cast(tuple[Heads, Any], Heads.from_pretrained(source.base, **loading, **source.base_where))
    _check_keys(set(info["missing_keys"]), set(), source.base, preset)
    if backbone is not None and backbone.source != source.base and info["unexpected_keys"]:
        raise ValueError(
            f"weights_of holds '{backbone.source}', but '{source.base}' has weights of its own beside its head, such "
            f"as {min(info['unexpected_keys'])}. Load it by itself, or a checkpoint of its head alone."
        )
    return heads, False


def _add_adapter(backbone: Backbone, source: Source, preset: Preset, head_keys: set[str]) -> str:
    """Put an adapter on a backbone, beside those that it has, and return its name there."""
    config = PeftConfig.from_pretrained(source.model, **source.where)
    # With a task, PEFT would look for a head of its own kind
    config.task_type, config.inference_mode = None, True
    heads = {"classifier", *(key.split(".")[0] for key in head_keys)}
    kept = [name for name in vars(config).get("modules_to_save") or [] if name not in heads]
    vars(config)["modules_to_save"] = kept or None
    name = backbone.add_adapter(config)
    adapters = cast(PeftModel, backbone.adapters)
    adapters.load_adapter(source.model, name, **source.where)
    loaded = set(get_peft_model_state_dict(adapters, adapter_name=name))
    found = set(load_peft_weights(source.model, device="cpu", **source.where)) - {_ADAPTED + key for key in head_keys}
    _check_keys(loaded - found, found - loaded, source.model, preset)
    return name


def _shared_backbone(shared: Scorer, source: Source, preset: Preset) -> Backbone:
    """The backbone of a loaded reward model for another one."""
    backbone, reason = shared.backbone, None
    whole_adapter = source.model != source.base
    if source.base != backbone.source and (whole_adapter or preset.head is None):
        reason = f"'{source.model}' needs '{source.base}'"
    elif preset.head is None and not backbone.causal:
        reason = f"preset '{preset.name}' reads the vocabulary; load that one first, and the others with its weights"
    elif source.how:
        reason = f"{', '.join(source.how)} cannot be chosen any more"
    elif backbone.accelerator is not None:
        reason = "a trainer has placed it already; load all of them before"
    if reason is not None:
        raise ValueError(f"weights_of holds '{backbone.source}', but {reason}.")
    return backbone


def _load_reference(
    reference: str | PreTrainedModel | None, source: Source, shared: Scorer | None, preset: Preset, offload: bool
) -> tuple[Backbone, str | None]:
    """The second model of a log-ratio, and its adapter: the one given, else the other scorer's, else the preset's."""
    if reference is None and isinstance(shared, LogRatioScorer):
        return shared.reference, shared.reference_adapter
    reference = preset.reference if reference is None else reference
    if reference is None:
        raise ValueError(f"preset '{preset.name}' reads a log-ratio: pass reference=, an id, a folder or a model.")
    if not isinstance(reference, str):
        return Backbone(reference, type(reference).__name__, causal=True, offload=offload), None
    where = find_source(reference, {**source.how, **{k: v for k, v in source.where.items() if k != "revision"}})
    backbone = _load_backbone(where, preset, set(), offload)
    return backbone, None if where.model == where.base else _add_adapter(backbone, where, preset, set())


def load_scorer(
    source: Source,
    preset: Preset,
    tokenizer: Any,
    reference: str | PreTrainedModel | None = None,
    shared: Scorer | None = None,
    offload: bool = False,
) -> Scorer:
    """
    Load a model and what reads it.

    Args:
        source ([`Source`]), preset ([`Preset`]):
            What is loaded, and as what.
        tokenizer:
            The model's, in which answers are looked up.
        reference (`str` or `PreTrainedModel`, *optional*):
            Second model of a log-ratio.
        shared ([`Scorer`], *optional*):
            One whose backbone is used instead of a second copy.
        offload (`bool`, *optional*, defaults to `False`):
            See [`Backbone`].
    """
    with whole_on_every_process(), _without_load_reports():
        backbone = None if shared is None else _shared_backbone(shared, source, preset)
        heads, adapter_brings_it, head_keys = None, False, set()
        if preset.head is not None:
            heads, adapter_brings_it = _load_heads(source, preset, backbone)
            head_keys = set(heads.state_dict())
        if backbone is None:
            backbone = _load_backbone(source, preset, None if adapter_brings_it else head_keys, offload)
        adapter = None if source.model == source.base else _add_adapter(backbone, source, preset, head_keys)
        if isinstance(preset.reading, LogRatio):
            second, second_adapter = _load_reference(reference, source, shared, preset, offload)
            return LogRatioScorer(backbone, second, preset.reading.beta, adapter, second_adapter)
    if isinstance(preset.reading, TokenPair):
        good, bad = (one_id(tokenizer, text, "answer") for text in (preset.reading.good, preset.reading.bad))
        head = vocabulary_head(backbone.loaded)
        reader = TokenPairReader(head.weight.detach(), head.bias, good, bad)
    else:
        reader = HeadReader(cast(Heads, heads), cast(Head, preset.head), cast(HeadReading, preset.reading))
    return Scorer(backbone, reader, adapter)


def length_limit(config: PreTrainedConfig) -> int | None:
    """Positions that the model has; `None` where its config does not say."""
    return config.get_text_config().to_dict().get("max_position_embeddings")
