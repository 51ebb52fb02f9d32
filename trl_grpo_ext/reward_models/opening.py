"""What a bare model id in `reward_funcs` stands for, and how it is loaded."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from accelerate import Accelerator, DistributedType, PartialState
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from ..distributed import warn_once
from ..rewards.types import PreparableSource
from .base import RewardModel
from .checkpoint import ADAPTER_PREFIX, Checkpoint, locate_checkpoint, split_options, whole_on_every_process
from .models import OutcomeRewardModel, ProcessRewardModel
from .preset import Preset
from .presets import find_preset, resolve_preset, warn_of_assumption
from .token_budget import TokenBatchedModel


logger = logging.get_logger(__name__)

# Options that have nothing to do with the weights, which a reward model that shares another one's weights has too
_BESIDE_WEIGHTS = ("batch_tokens", "max_length", "segmentation", "problem")


def load_reward_model(
    model: str | os.PathLike[str] | Checkpoint, preset: Preset | str | os.PathLike[str] | None = None, **options: Any
) -> ProcessRewardModel | OutcomeRewardModel:
    """
    Load a process or an outcome reward model, as its preset says.

    Args:
        model (`str`, `os.PathLike` or [`~trl_grpo_ext.reward_models.checkpoint.Checkpoint`]):
            Id on the Hub, folder, or what [`~trl_grpo_ext.reward_models.checkpoint.locate_checkpoint`] has found.
        preset ([`Preset`], `str` or `os.PathLike`, *optional*):
            A preset, the name of one of `PRESETS`, or the path of a YAML file; found by id and config by default.
        **options:
            Further arguments of [`~trl_grpo_ext.ProcessRewardModel.from_pretrained`].

    Returns:
        [`ProcessRewardModel`] or [`OutcomeRewardModel`]
    """
    location, options = split_options(options)
    checkpoint = locate_checkpoint(model, location)
    preset = resolve_preset(checkpoint.name, preset, checkpoint.config)
    kind = ProcessRewardModel if preset.kind == "process" else OutcomeRewardModel
    return kind.from_pretrained(checkpoint, preset=preset, **options)


def open_reward_model(model: str, loading: dict[str, Any], opened: Sequence[Any] = ()) -> RewardModel | str:
    """
    What a bare id or folder in `reward_funcs` stands for.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        loading (`dict[str, Any]`):
            Arguments of [`~trl_grpo_ext.ProcessRewardModel.from_pretrained`], `preset` among them for a model that no
            preset of this package fits.
        opened (`Sequence`, *optional*):
            Sources that are open already; a reward model among them with the same backbone shares it.

    Returns:
        A [`ProcessRewardModel`] or an [`OutcomeRewardModel`] where a preset knows the model, else, and for plain
        sequence classification, the id itself, for TRL to load.

    Raises:
        ValueError: the checkpoint has no classification head, so that one with random weights would judge.
    """
    location, options = split_options(loading)
    checkpoint = locate_checkpoint(model, location)
    given = options.pop("preset", None)
    if given is None:
        preset = find_preset(checkpoint.name, checkpoint.config)
    else:
        preset = resolve_preset(checkpoint.name, given, checkpoint.config)
    # TRL loads plain sequence classifiers itself
    if preset is None or (given is None and preset.name == "sequence-classification"):
        _check_classifier(checkpoint, loading)
        _warn_of_unused(checkpoint.name, options)
        return checkpoint.name
    if given is None:
        warn_of_assumption(checkpoint.name, preset)
    vocabulary = preset.reading.needs_vocabulary
    for other in opened:
        if isinstance(other, RewardModel) and other.holds(checkpoint.base_name, vocabulary=vocabulary):
            beside_weights = {name: options[name] for name in _BESIDE_WEIGHTS if name in options}
            return load_reward_model(checkpoint, preset, weights_of=other, **beside_weights)
    # Presets never need remote code
    options.pop("trust_remote_code", None)
    if PartialState().distributed_type != DistributedType.NO:
        # As TRL does for its own: "auto" spreads a model over the devices of other processes
        options["device_map"] = None
    return load_reward_model(checkpoint, preset, **options)


def open_reward_models(sources: Sequence[Any], loading: dict[str, Any]) -> list[Any]:
    """
    The sources of `reward_funcs`, with ids opened.

    Args:
        sources (`Sequence`):
            Functions, models and ids.
        loading (`dict[str, Any]`):
            Arguments of [`~trl_grpo_ext.ProcessRewardModel.from_pretrained`] for all ids.

    Returns:
        `list`: what [`open_reward_model`] makes of each id, and all else as it is. A backbone that several ids have is
        loaded once.

    Raises:
        TypeError: `sources` is a single text.
    """
    if isinstance(sources, str):
        raise TypeError(f"sources is a text, {sources!r}; give a list of sources.")
    opened: list[Any] = []
    for source in sources:
        opened.append(open_reward_model(source, loading, opened) if isinstance(source, str) else source)
    return opened


def _warn_of_unused(name: str, options: Mapping[str, Any]) -> None:
    """Say once which options a classifier does not have that TRL loads and feeds."""
    unused = [option for option in _BESIDE_WEIGHTS if option in options]
    if unused:
        warn_once(
            logger,
            f"reward_funcs: '{name}' is a sequence classifier, which TRL loads and feeds itself. It is without "
            f"{', '.join(unused)}; OutcomeRewardModel.from_pretrained('{name}', ...) takes them. This is said once.",
        )


def _check_classifier(checkpoint: Checkpoint, loading: dict[str, Any]) -> None:
    """Raise `ValueError` if TRL, loading the model, would draw some of its weights at random."""
    # No weights are read for the meta device
    beside = {name: value for name, value in loading.items() if name not in _BESIDE_WEIGHTS}
    options = {**beside, **checkpoint.base_location, "num_labels": 1, "output_loading_info": True}
    options["device_map"] = "meta"
    with whole_on_every_process():
        _, info = cast(Any, AutoModelForSequenceClassification.from_pretrained(checkpoint.base_name, **options))
    brought = {key.removeprefix(ADAPTER_PREFIX) for key in checkpoint.adapter_weights()}
    missing = set(info["missing_keys"]) - brought
    if missing:
        raise ValueError(
            f"reward_funcs: '{checkpoint.name}' fits no preset, and as a sequence classifier its weights "
            f"{', '.join(sorted(missing))} would be random. Load it with ProcessRewardModel or "
            "OutcomeRewardModel and a Preset that says how it is loaded, rendered and read."
        )


def prepare_reward_sources(
    sources: Sequence[Any], *, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None
) -> list[Any]:
    """
    The sources of `reward_funcs` as the trainer calls them.

    Args:
        sources (`Sequence`):
            Functions, reward models and sequence classifiers.
        accelerator (`Accelerator`):
            Places reward models.
        policy_tokenizer (`PreTrainedTokenizerBase`):
            Decodes the policy's `completion_ids`.
        batch_tokens (`int` or `None`):
            Largest number of padded tokens in one forward of a model; `None` for no bound.

    Returns:
        `list`: a sequence classifier is cut to `batch_tokens`, a [`~trl_grpo_ext.rewards.types.PreparableSource`] is
        prepared, a function is itself. What is returned may be prepared again, which changes nothing but what another
        trainer has prepared since.
    """
    prepared: list[Any] = []
    for source in sources:
        if isinstance(source, nn.Module):
            if batch_tokens is not None and not isinstance(source, TokenBatchedModel):
                source = TokenBatchedModel(source, batch_tokens, accelerator)
            prepared.append(source)
            continue
        if isinstance(source, PreparableSource):
            source.prepare(accelerator, policy_tokenizer, batch_tokens)
        prepared.append(source)
    return prepared
