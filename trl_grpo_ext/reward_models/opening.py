"""What a bare model id in `reward_funcs` stands for, and how it is loaded."""

from collections.abc import Sequence
from typing import Any, cast

from accelerate import Accelerator, DistributedType, PartialState
from torch import nn
from transformers import AutoModelForSequenceClassification

from ..rewards.types import PreparedSource
from .base import RewardModel
from .batching import TokenBatchedModel
from .loading import Source, adapter_keys, find_source, resolve_preset, whole_on_every_process
from .models import OutcomeRewardModel, ProcessRewardModel
from .presets import Preset, find_preset


def load_reward_model(
    model: str, preset: Preset | str | None = None, **options: Any
) -> ProcessRewardModel | OutcomeRewardModel:
    """[`RewardModel.from_pretrained`] of the class that is of the preset's kind; by default that which fits."""
    preset = resolve_preset(model, preset, find_source(model, options).config)
    kind = ProcessRewardModel if preset.kind == "process" else OutcomeRewardModel
    return kind.from_pretrained(model, preset=preset, **options)


def open_reward_model(model: str, loading: dict[str, Any], opened: Sequence[Any] = ()) -> RewardModel | str:
    """
    What a bare id or folder in `reward_funcs` stands for.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        loading (`dict[str, Any]`):
            Arguments of `from_pretrained`.
        opened (`Sequence`, *optional*):
            Sources that are open already; a reward model among them with the same backbone shares it.

    Returns:
        A [`ProcessRewardModel`] or an [`OutcomeRewardModel`] where a preset knows the model, else, and for plain
        sequence classification, the id itself, for TRL to load.

    Raises:
        ValueError: the checkpoint has no classification head, so that one with random weights would judge.
    """
    # Presets never need remote code
    known = {name: value for name, value in loading.items() if name != "trust_remote_code"}
    source = find_source(model, known)
    preset = find_preset(model, source.config)
    if preset is None or preset.name == "sequence-classification":
        _check_classifier(source, loading)
        return source.model
    if PartialState().distributed_type != DistributedType.NO:
        # As TRL does for its own: "auto" spreads a model over the devices of other processes
        known["device_map"] = None
    for other in opened:
        if isinstance(other, RewardModel) and other.holds(source.base, vocabulary=preset.head is None):
            return load_reward_model(model, preset, weights_of=other, **source.where)
    return load_reward_model(model, preset, **known)


def open_reward_models(sources: Sequence[Any], loading: dict[str, Any]) -> list[Any]:
    """The sources of `reward_funcs`, ids opened by [`open_reward_model`] and backbones loaded once."""
    opened: list[Any] = []
    for source in sources:
        opened.append(open_reward_model(source, loading, opened) if isinstance(source, str) else source)
    return opened


def _check_classifier(source: Source, loading: dict[str, Any]) -> None:
    """Raise `ValueError` if TRL, loading the model, would draw some of its weights at random."""
    # No weights are read for the meta device
    loading = {**loading, **source.base_where, "num_labels": 1, "output_loading_info": True, "device_map": "meta"}
    with whole_on_every_process():
        _, info = cast(Any, AutoModelForSequenceClassification.from_pretrained(source.base, **loading))
    missing = set(info["missing_keys"]) - adapter_keys(source)
    if missing:
        raise ValueError(
            f"reward_funcs: '{source.model}' fits no preset, and as a sequence classifier its weights "
            f"{', '.join(sorted(missing))} would be random. Load it with ProcessRewardModel or "
            "OutcomeRewardModel and a Preset that says how it is fed and read."
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
            Reads the policy's `completion_ids`.
        batch_tokens (`int` or `None`):
            Largest number of padded tokens in one forward of a model; `None` for no bound.

    Returns:
        `list`: a sequence classifier is cut to `batch_tokens`, a [`~trl_grpo_ext.rewards.types.PreparedSource`] is
        prepared, a function is itself.
    """
    prepared: list[Any] = []
    for source in sources:
        if isinstance(source, nn.Module):
            prepared.append(source if batch_tokens is None else TokenBatchedModel(source, batch_tokens, accelerator))
            continue
        if isinstance(source, PreparedSource):
            source.prepare(accelerator, policy_tokenizer, batch_tokens)
        prepared.append(source)
    return prepared
