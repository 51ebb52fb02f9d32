"""Reward models from checkpoints: plain backbones, heads by data, no remote code, every key accounted for."""

from fnmatch import fnmatch
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .heads import BackboneWithHead, HeadReading, HeadScorer, LogRatio, LogRatioScorer, TokenPair, TokenPairScorer
from .presets import PRESETS, Preset, find_preset
from .rendering import one_id


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


def load_causal(model: str, preset: Preset, loading: dict[str, Any]) -> PreTrainedModel:
    """A causal language model, with the adapter's layers in place if the folder holds an adapter."""
    adapter = find_adapter_config_file(model) is not None
    base = PeftConfig.from_pretrained(model).base_model_name_or_path if adapter else model
    assert base is not None
    causal, info = cast(Any, AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, **loading))
    _check_keys(set(info["missing_keys"]), set(info["unexpected_keys"]), base, preset)
    if not adapter:
        return causal
    with_adapter = PeftModel.from_pretrained(causal, model)
    loaded, found = set(get_peft_model_state_dict(with_adapter)), set(load_peft_weights(model, device="cpu"))
    _check_keys(loaded - found, found - loaded, model, preset)
    # LoRA layers were put into the model itself
    return cast(PreTrainedModel, with_adapter.get_base_model())


def load_with_head(model: str, preset: Preset, config: PreTrainedConfig, loading: dict[str, Any]) -> BackboneWithHead:
    """A backbone with the preset's head, every key of both accounted for."""
    loading = {"config": config, "head": preset.head, "output_loading_info": True, **loading}
    loaded, info = cast(Any, BackboneWithHead.from_pretrained(model, **loading))
    _check_keys(set(info["missing_keys"]), set(info["unexpected_keys"]), model, preset)
    return loaded


def load_reference(reference: str | PreTrainedModel | None, preset: Preset, loading: dict[str, Any]) -> Any:
    """The second model of a log-ratio: the one that is given, else the preset's."""
    reference = preset.reference if reference is None else reference
    if reference is None:
        raise ValueError(f"preset '{preset.name}' reads a log-ratio: pass reference=, an id, a folder or a model.")
    return load_causal(reference, preset, loading) if isinstance(reference, str) else reference


def make_scorer(model: PreTrainedModel, preset: Preset, tokenizer: Any, reference: Any) -> nn.Module:
    """The module that runs a loaded model and reads its scores."""
    if isinstance(preset.reading, TokenPair):
        good, bad = (one_id(tokenizer, text, "answer") for text in (preset.reading.good, preset.reading.bad))
        return TokenPairScorer(model, good, bad)
    if isinstance(preset.reading, LogRatio):
        return LogRatioScorer(model, reference, preset.reading.beta)
    assert preset.head is not None
    return HeadScorer(cast(BackboneWithHead, model), preset.head, cast(HeadReading, preset.reading))


def whole_config(model: str, loading: dict[str, Any]) -> tuple[str, PreTrainedConfig]:
    """The id or folder of the whole model, an adapter's base included, and its config."""
    if find_adapter_config_file(model) is not None:
        model = cast(str, PeftConfig.from_pretrained(model).base_model_name_or_path)
    known = {name: loading[name] for name in ("revision", "token", "cache_dir") if name in loading}
    return model, AutoConfig.from_pretrained(model, **known)


def length_limit(config: PreTrainedConfig) -> int | None:
    """Positions that the model has; `None` where its config does not say."""
    return config.get_text_config().to_dict().get("max_position_embeddings")
