"""A preset: how a reward model is loaded, how its input is rendered and how its score is read, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..rewards.step_reductions import STEP_REDUCTIONS
from ..steps.segmentation import Segmentation, as_segmentation
from .heads import GatedObjectivesHead, Head, LinearHead, MLPHead
from .plain_data import build, build_typed, check_fields
from .readings import AnswerProbability, LabelSoftmax, LogRatio, Reading, SequenceScalar, Sigmoid, TokenPair
from .rendering import Rendering
from .renderings import Bare, Tagged, Turns


# The fields of a preset that are objects: what each must be, and the classes that need no import path
_TYPED_FIELDS: dict[str, tuple[type, list[type]]] = {
    "rendering": (Rendering, [Tagged, Turns, Bare]),
    "reading": (Reading, [LabelSoftmax, Sigmoid, SequenceScalar, TokenPair, AnswerProbability, LogRatio]),
    "head": (Head, [LinearHead, MLPHead, GatedObjectivesHead]),
}

# The fields of a preset that are lists of patterns
_PATTERNS = ("models", "architectures", "stray_keys")


@dataclass(frozen=True)
class Preset:
    """
    How a reward model is loaded, how a solution becomes its input, and how its output becomes scores.

    Args:
        name (`str`):
            Its name, as in `from_pretrained(..., preset="math-shepherd")`.
        kind (`str`):
            `"process"`, a score for each step, or `"outcome"`, one for the solution.
        rendering ([`~trl_grpo_ext.reward_models.rendering.Rendering`]):
            Problem and steps to ids: `Tagged`, `Turns`, `Bare` or a class of your own.
        reading ([`~trl_grpo_ext.reward_models.readings.Reading`]):
            The model's output to scores: `LabelSoftmax`, `Sigmoid`, `SequenceScalar`, `TokenPair`,
            `AnswerProbability`, `LogRatio` or a class of your own.
        head ([`~trl_grpo_ext.reward_models.heads.Head`], *optional*):
            The head on the backbone, for a reading that needs one: `LinearHead`, `MLPHead`, `GatedObjectivesHead` or a
            class of your own. Without one the model is a causal language model.
        models (`str` or `Sequence[str]`, *optional*):
            Patterns of model ids, such as `"Qwen/Qwen2.5-Math-PRM-*"`; a folder is known by its last part.
        architectures (`str` or `Sequence[str]`, *optional*):
            Patterns of the config's `architectures`, for models whose id says nothing.
        labels (`int`, *optional*):
            Number of labels that the config must have, for `architectures` that alone do not say enough.
        stray_keys (`str` or `Sequence[str]`, *optional*):
            Patterns of checkpoint keys that are known not to be used.
        segmentation ([`~trl_grpo_ext.steps.segmentation.Segmentation`] or its argument `by`, *optional*):
            How completions are split into steps.
        semantics (`str`, *optional*, defaults to `"correctness"`):
            `"value"` (can this still be solved), `"correctness"` (is this step right) or `"reward"`.
        reduce (`str`, *optional*, defaults to `"min"`):
            How steps become one number under outcome supervision: `last` suits values, `min` correctness.
        max_length (`int`, *optional*):
            Largest number of ids; the positions of the model's config by default.
        mask_tags (`bool`, *optional*, defaults to `False`):
            Whether tags are hidden from attention.
        log_ratio_model (`str`, *optional*):
            Id of the second model, for a reading that needs log-ratios.

    Raises:
        TypeError: a field of another type.
        ValueError: an unknown `kind` or `reduce`, or a head or a rendering that the reading does not take.
    """

    name: str
    kind: Literal["process", "outcome"]
    rendering: Rendering
    reading: Reading
    head: Head | None = None
    models: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    labels: int | None = None
    stray_keys: tuple[str, ...] = ()
    segmentation: Segmentation = Segmentation()
    semantics: Literal["value", "correctness", "reward"] = "correctness"
    reduce: str = "min"
    max_length: int | None = None
    mask_tags: bool = False
    log_ratio_model: str | None = None

    def __post_init__(self) -> None:
        try:
            self._bring_to_form()
            check_fields(self)
            self.reading.check_outputs(None if self.head is None else self.head.outputs)
            self.reading.check_rendering(self.rendering)
        except (TypeError, ValueError) as error:
            raise type(error)(f"preset '{self.name}': {error}") from None
        for field, value, known in (
            ("kind", self.kind, ("process", "outcome")),
            ("semantics", self.semantics, ("value", "correctness", "reward")),
            ("reduce", self.reduce, tuple(STEP_REDUCTIONS)),
        ):
            if value not in known:
                raise ValueError(f"preset '{self.name}': {field} is {value!r}; known: {', '.join(known)}.")

    def _bring_to_form(self) -> None:
        """What may be written in short: a single pattern, and a segmentation by its argument `by`."""
        for field in _PATTERNS:
            given = self.__dict__[field]
            patterns = (given,) if isinstance(given, str) else given
            object.__setattr__(self, field, tuple(patterns) if isinstance(patterns, list) else patterns)
        object.__setattr__(self, "segmentation", as_segmentation(self.segmentation))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preset":
        """
        A preset from plain data.

        Args:
            values (`Mapping[str, Any]`):
                The fields. `rendering`, `reading` and `head` are mappings with a `type`: the name of a class of this
                package, or the import path of one of your own, `my_package.my_module:MyReading`. Its module is
                imported, so a preset is as powerful as code.

        Raises:
            ValueError: not a mapping, or an unknown type or field; the message names the field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"preset: expected a mapping of its fields, got {values!r}.")
        fields = dict(values)
        for name, (base, known) in _TYPED_FIELDS.items():
            if fields.get(name) is not None:
                fields[name] = build_typed(fields[name], base, known, f"preset.{name}")
        # As the other fields that are objects, so that an unknown argument is named
        if isinstance(fields.get("segmentation"), Mapping):
            fields["segmentation"] = build(Segmentation, fields["segmentation"], "preset.segmentation")
        return build(cls, fields, "preset")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Preset":
        """[`Preset.from_dict`] of a YAML file, which every error names."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls.from_dict(yaml.safe_load(text))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error
