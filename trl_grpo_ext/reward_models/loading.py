"""Reward models from checkpoints: plain backbones, heads by data, no remote code, every key accounted for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .backbone import AdaptedBackbone, Backbone, Scorer
from .checkpoint import (
    ADAPTER_PREFIX,
    Checkpoint,
    check_keys,
    locate_checkpoint,
    whole_on_every_process,
    without_load_reports,
    without_stray,
)
from .encoding import one_id
from .heads import AnswerLogits, Heads
from .preset import Preset
from .readings import CheckedReadOut


class _Parts(NamedTuple):
    """
    What a reading builds its module from, see [`~trl_grpo_ext.reward_models.readings.LoadedParts`].

    Args:
        backbone ([`Backbone`]):
            The loaded model.
        heads ([`Heads`], *optional*):
            The loaded head of the preset.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's own.
    """

    backbone: Backbone
    heads: Heads | None
    tokenizer: Any

    def head(self) -> nn.Module:
        return cast(Heads, self.heads)

    def answer_logits(self, answers: Sequence[str]) -> nn.Module:
        ids = [one_id(self.tokenizer, answer, "answer") for answer in answers]
        return AnswerLogits(self.backbone.loaded, ids)


def _load_backbone(
    checkpoint: Checkpoint, preset: Preset, loading: Mapping[str, Any], head_keys: set[str] | None, offload: bool
) -> Backbone:
    """
    Load a checkpoint without its head.

    Args:
        checkpoint ([`Checkpoint`]):
            Whose base is loaded.
        preset ([`Preset`]):
            As what.
        loading (`Mapping[str, Any]`):
            Arguments of `from_pretrained` that say how.
        head_keys (`set[str]` or `None`):
            Keys of the head, which the checkpoint may have too. `None` if an adapter brings the head, since the
            checkpoint may then have any other one.
        offload (`bool`):
            See [`Backbone`].
    """
    causal = preset.reading.needs_vocabulary
    loader = AutoModelForCausalLM if causal else AutoModel
    options = {**loading, **checkpoint.base_location, "output_loading_info": True, "trust_remote_code": False}
    model, info = cast(Any, loader.from_pretrained(checkpoint.base_name, **options))
    missing = set(info["missing_keys"])
    unexpected = set(info["unexpected_keys"])
    if not causal:
        missing = {f"{model.base_model_prefix}.{key}" for key in missing}
        unexpected = set() if head_keys is None else unexpected - head_keys
    unexpected = without_stray(unexpected, preset.stray_keys)
    check_keys(missing, unexpected, name=checkpoint.base_name, preset_name=preset.name)
    return Backbone(model, checkpoint.base_name, causal, offload)


def _unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config by which weights are loaded as they are, whatever is done with the backbone."""
    fields = config.to_dict()
    return type(config).from_dict({name: value for name, value in fields.items() if name != "quantization_config"})


def _heads_of_adapter(checkpoint: Checkpoint, preset: Preset) -> Heads | None:
    """The head that an adapter brings; `None` where there is none."""
    weights = checkpoint.adapter_weights()
    heads = Heads(_unquantized(checkpoint.config), cast(Any, preset.head)).float()
    own = {key: weights[ADAPTER_PREFIX + key] for key in heads.state_dict() if ADAPTER_PREFIX + key in weights}
    if not own:
        return None
    check_keys(heads.state_dict().keys() - own.keys(), set(), name=checkpoint.name, preset_name=preset.name)
    heads.load_state_dict(own)
    return heads


def _heads_of_base(checkpoint: Checkpoint, preset: Preset, backbone: Backbone | None) -> Heads:
    """The head in the checkpoint of a whole model; `backbone` is the one that it shall stand on, if that is loaded."""
    loaded = Heads.from_pretrained(
        checkpoint.base_name,
        config=_unquantized(checkpoint.config),
        head=preset.head,
        dtype=torch.float32,
        output_loading_info=True,
        **checkpoint.base_location,
    )
    # With `output_loading_info` a pair comes back, which the annotation of transformers leaves out
    heads, info = cast(tuple[Heads, dict[str, Any]], loaded)
    check_keys(set(info["missing_keys"]), set(), name=checkpoint.base_name, preset_name=preset.name)
    if backbone is not None and backbone.name != checkpoint.base_name and info["unexpected_keys"]:
        raise ValueError(
            f"weights_of holds '{backbone.name}', but '{checkpoint.base_name}' has weights of its own beside its "
            f"head, such as {min(info['unexpected_keys'])}. Load it by itself, or a checkpoint of its head alone."
        )
    return heads


def _add_adapter(backbone: Backbone, checkpoint: Checkpoint, preset: Preset, head_keys: set[str]) -> str:
    """Put an adapter on a backbone, beside those that it has, and return its name there."""
    config = cast(LoraConfig, PeftConfig.from_pretrained(checkpoint.name, **checkpoint.location))
    # With a task, PEFT would look for a head of its own kind
    config.task_type = None
    config.inference_mode = True
    # The head is loaded apart from the backbone, so that PEFT would not find its module
    heads = {"classifier", *(key.split(".")[0] for key in head_keys)}
    saved = config.to_dict().get("modules_to_save") or []
    config.modules_to_save = [name for name in saved if name not in heads] or None
    name = backbone.add_adapter(config)
    adapters = cast(PeftModel, backbone.adapters)
    adapters.load_adapter(checkpoint.name, name, **checkpoint.location)
    expected = set(get_peft_model_state_dict(adapters, adapter_name=name))
    found = checkpoint.adapter_weights().keys() - {ADAPTER_PREFIX + key for key in head_keys}
    unexpected = without_stray(found - expected, preset.stray_keys)
    check_keys(expected - found, unexpected, name=checkpoint.name, preset_name=preset.name)
    return name


def _shared_backbone(shared: Scorer, checkpoint: Checkpoint, preset: Preset, loading: Mapping[str, Any]) -> Backbone:
    """The backbone of a loaded reward model for another one; `ValueError` where it is not the right one."""
    backbone = shared.backbone
    reason = None
    # A whole checkpoint of another model may hold a head alone, which is seen when it is loaded
    if checkpoint.base_name != backbone.name and (checkpoint.is_adapter or preset.reading.needs_vocabulary):
        reason = f"'{checkpoint.name}' needs '{checkpoint.base_name}'"
    elif preset.reading.needs_vocabulary and not backbone.causal:
        reason = f"preset '{preset.name}' needs the vocabulary; load that one first, and the others with its weights"
    elif loading:
        reason = f"{', '.join(loading)} cannot be chosen any more"
    elif backbone.accelerator is not None:
        reason = "a trainer has placed it already; load all of them before"
    if reason is not None:
        raise ValueError(f"weights_of holds '{backbone.name}', but {reason}.")
    return backbone


def _load_log_ratio_model(
    given: str | PreTrainedModel | None,
    shared: Scorer | None,
    checkpoint: Checkpoint,
    preset: Preset,
    loading: Mapping[str, Any],
    offload: bool,
) -> AdaptedBackbone:
    """The second model of a log-ratio: the one that is given, else that of the other scorer, else the preset's."""
    if given is None and shared is not None and shared.log_ratio_model is not None:
        return shared.log_ratio_model
    model = preset.log_ratio_model if given is None else given
    if model is None:
        raise ValueError(
            f"preset '{preset.name}' needs log-ratios: pass log_ratio_model=, an id, a folder or a model."
        )
    if not isinstance(model, str):
        return AdaptedBackbone(Backbone(model, type(model).__name__, causal=True, offload=offload))
    # A revision is one of the reward model's own repository
    location = {name: value for name, value in checkpoint.location.items() if name != "revision"}
    second = locate_checkpoint(model, location)
    backbone = _load_backbone(second, preset, loading, set(), offload)
    adapter = _add_adapter(backbone, second, preset, set()) if second.is_adapter else None
    return AdaptedBackbone(backbone, adapter)


def load_scorer(
    checkpoint: Checkpoint,
    preset: Preset,
    tokenizer: Any,
    *,
    loading: Mapping[str, Any],
    log_ratio_model: str | PreTrainedModel | None = None,
    shared: Scorer | None = None,
    offload: bool = False,
) -> Scorer:
    """
    Load a model and what computes scores from its output.

    Args:
        checkpoint ([`Checkpoint`]):
            What is loaded.
        preset ([`Preset`]):
            As what.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's own, which has the ids of answers.
        loading (`Mapping[str, Any]`):
            Arguments of `from_pretrained` that say how, such as `dtype`.
        log_ratio_model (`str` or `PreTrainedModel`, *optional*):
            The second model of a log-ratio; that of `shared`, else the preset's, by default.
        shared ([`Scorer`], *optional*):
            One whose backbone is used instead of a second copy.
        offload (`bool`, *optional*, defaults to `False`):
            See [`Backbone`].

    Raises:
        ValueError: the checkpoint lacks a key or has one that the preset does not know, an answer is not one id, or
            the backbone of `shared` is another one.
    """
    with whole_on_every_process(), without_load_reports():
        backbone = None if shared is None else _shared_backbone(shared, checkpoint, preset, loading)
        heads = None
        # An adapter may bring the head of its own
        if preset.head is not None and checkpoint.is_adapter:
            heads = _heads_of_adapter(checkpoint, preset)
        adapter_has_heads = heads is not None
        if preset.head is not None and heads is None:
            heads = _heads_of_base(checkpoint, preset, backbone)
        head_keys = set() if heads is None else set(heads.state_dict())
        if backbone is None:
            known_keys = None if adapter_has_heads else head_keys
            backbone = _load_backbone(checkpoint, preset, loading, known_keys, offload)
        adapter = _add_adapter(backbone, checkpoint, preset, head_keys) if checkpoint.is_adapter else None
        second = None
        if preset.reading.needs == "log_ratio":
            second = _load_log_ratio_model(log_ratio_model, shared, checkpoint, preset, loading, offload)
        readout = CheckedReadOut(preset.reading, _Parts(backbone, heads, tokenizer))
    log_probs = preset.reading.needs == "log_probs"
    return Scorer(AdaptedBackbone(backbone, adapter), readout, second, log_probs)
