"""The reward models that people use, as data: what each is fed, where its score is read, and how it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedConfig

from ..steps.segmentation import Segmentation
from .heads import GatedObjectivesHead, Head, LinearHead, MLPHead
from .readings import LabelSoftmax, LogRatio, Reading, SequenceScalar, TokenPair, Sigmoid
from .rendering import Bare, Rendering, Tagged, Turns


_QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_ACEMATH_SYSTEM = "Please reason step by step, and check your final answer within \\boxed{}."

# Classes that a preset may name in YAML
_TYPES = {
    cls.__name__: cls
    for cls in (
        *(Tagged, Turns, Bare, Segmentation),
        *(LinearHead, MLPHead, GatedObjectivesHead),
        *(LabelSoftmax, TokenPair, Sigmoid, LogRatio, SequenceScalar),
    )
}


@dataclass(frozen=True)
class Preset:
    """
    How a reward model is loaded, fed and read.

    Args:
        name (`str`):
            Its name, as in `from_pretrained(..., preset="math-shepherd")`.
        kind (`str`):
            `"process"`, a score for each step, or `"outcome"`, one for the solution.
        rendering ([`Tagged`], [`Turns`] or [`Bare`]):
            Problem and steps to ids.
        reading ([`LabelSoftmax`], [`TokenPair`], [`Sigmoid`], [`LogRatio`] or [`SequenceScalar`]):
            Hidden states to scores.
        head ([`LinearHead`], [`MLPHead`] or [`GatedObjectivesHead`], *optional*):
            What stands on the backbone. Without one the model is a causal language model.
        models (`tuple[str, ...]`, *optional*):
            Patterns of model ids, such as `"Qwen/Qwen2.5-Math-PRM-*"`; a folder is known by its last part.
        architectures (`tuple[str, ...]`, *optional*):
            Patterns of the config's `architectures`, for models whose id says nothing.
        labels (`int`, *optional*):
            Number of labels that the config must have, for `architectures` that alone do not say enough.
        stray_keys (`tuple[str, ...]`, *optional*):
            Patterns of checkpoint keys that are known not to be used.
        segmentation ([`Segmentation`], *optional*):
            How completions are split into steps.
        semantics (`str`, *optional*):
            `"value"` (can this still be solved), `"correctness"` (is this step right) or `"reward"`.
        reduce (`str`, *optional*, defaults to `"min"`):
            How steps become one number under outcome supervision: `last` suits values, `min` correctness.
        max_length (`int`, *optional*):
            Longest input; the positions of the model's config by default.
        mask_reads (`bool`, *optional*, defaults to `False`):
            Whether tags are hidden from attention.
        reference (`str`, *optional*):
            Id of the second model of a [`LogRatio`].
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
    mask_reads: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        reads_vocabulary = isinstance(self.reading, (TokenPair, LogRatio))
        if reads_vocabulary == (self.head is not None):
            need = "reads the vocabulary and takes no head" if reads_vocabulary else "needs a head"
            raise ValueError(f"preset '{self.name}': {type(self.reading).__name__} {need}; head is {self.head}.")
        if isinstance(self.head, LinearHead) and isinstance(self.reading, LabelSoftmax):
            wrong = [index for index in self.reading.indices if not 0 <= index < self.head.outputs]
            if wrong:
                raise ValueError(f"preset '{self.name}': label {wrong[0]} of a head with {self.head.outputs} outputs.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preset":
        """
        A preset from plain data, in which rendering, reading, head and segmentation are mappings with a `type`.

        Raises:
            ValueError: an unknown type or field.
        """
        return _build(cls, values, "preset")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Preset":
        """[`Preset.from_dict`] of a YAML file."""
        return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected fields of {cls.__name__}, got {values!r}.")
    known = {field.name: field for field in fields(cls)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where}: unknown field '{unknown[0]}' of {cls.__name__}; known: {', '.join(known)}.")
    missing = [name for name in ("name", "kind", "rendering", "reading") if cls is Preset and name not in values]
    if missing:
        raise ValueError(f"{where}: field '{missing[0]}' is missing.")
    return cls(**{name: _value(value, f"{where}.{name}") for name, value in values.items()})


def _value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    fields_of = dict(value)
    name = fields_of.pop("type", None)
    if name is None and where.endswith(".segmentation"):
        name = "Segmentation"
    if name not in _TYPES:
        raise ValueError(f"{where}: unknown type {name!r}; known: {', '.join(_TYPES)}.")
    return _build(_TYPES[name], fields_of, where)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="qwen-math-prm",
            models=("Qwen/Qwen2.5-Math-PRM-*", "Qwen/Qwen2.5-Math-7B-PRM800K"),
            architectures=("Qwen2ForProcessRewardModel",),
            kind="process",
            rendering=Tagged(tag="<extra_0>", chat=True, system=_QWEN_MATH_SYSTEM),
            reading=LabelSoftmax(indices=(1,)),
            head=MLPHead("score", outputs=2),
            stray_keys=("lm_head.*",),
            max_length=4096,
        ),
        Preset(
            name="math-shepherd",
            models=("peiyi9979/math-shepherd-mistral-7b-prm",),
            kind="process",
            rendering=Tagged(tag=" ки", first=" ", between="\n", bos=True),
            reading=TokenPair(good=" +", bad=" -"),
            segmentation=Segmentation(by="newline"),
            semantics="value",
            reduce="last",
        ),
        Preset(
            name="rlhflow-prm",
            models=("RLHFlow/Llama3.1-8B-PRM-*",),
            kind="process",
            rendering=Turns(answer="+"),
            reading=TokenPair(good="+", bad="-"),
            semantics="value",
            reduce="last",
        ),
        Preset(
            name="skywork-prm",
            models=("Skywork/Skywork-o1-Open-PRM-*",),
            architectures=("Qwen2ForPrmModel",),
            kind="process",
            rendering=Tagged(tag="\n", prompt="{problem}\n", bos=True),
            reading=Sigmoid(),
            head=LinearHead("v_head.summary", outputs=1),
            stray_keys=("lm_head.*",),
            segmentation=Segmentation(by="newline"),
            semantics="value",
            reduce="last",
        ),
        Preset(
            name="eurus-prm",
            models=("PRIME-RL/EurusPRM-Stage*",),
            kind="process",
            rendering=Bare(chat=True, after="\n\n", closing="first"),
            reading=LogRatio(beta=0.001),
            semantics="reward",
            reduce="last",
            reference="Qwen/Qwen2.5-Math-7B-Instruct",
        ),
        Preset(
            name="trl-prm",
            architectures=("*ForTokenClassification",),
            labels=2,
            kind="process",
            rendering=Tagged(tag="\n", bos=True, single=False),
            reading=LabelSoftmax(indices=(1,)),
            head=LinearHead("score", outputs=2),
        ),
        Preset(
            name="versa-prm",
            models=("UW-Madison-Lee-Lab/*VersaPRM*", "UW-Madison-Lee-Lab/Llama-PRM800K"),
            kind="process",
            rendering=Tagged(tag=" \n\n\n\n", prompt="{problem} \n\n", bos=True),
            reading=TokenPair(good="+", bad="-"),
        ),
        Preset(
            name="openr-qwen-prm",
            models=("openreasoner/Math-psa",),
            kind="process",
            rendering=Tagged(tag=" \n\n\n\n\n", first=" "),
            reading=TokenPair(good=" +", bad=" -"),
            mask_reads=True,
        ),
        Preset(
            name="reason-eval",
            models=("GAIR/ReasonEval-*",),
            architectures=("ReasonEval_*",),
            kind="process",
            rendering=Bare(
                prompt="Question:\n{problem}\nAnswer:\nLet's think step by step.\n",
                bos=True,
                apart=True,
            ),
            reading=LabelSoftmax(indices=(1, 2)),
            head=LinearHead("score_head", outputs=3, bias="use_bias"),
            stray_keys=("lm_head.*",),
        ),
        Preset(
            name="acemath-rm",
            models=("nvidia/AceMath-*-RM",),
            kind="outcome",
            rendering=Bare(chat=True, closing="all", system=_ACEMATH_SYSTEM),
            reading=SequenceScalar(),
            head=LinearHead("score", outputs=1, bias=False),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        Preset(
            name="qwen-math-rm",
            models=("Qwen/Qwen2.5-Math-RM-*",),
            architectures=("Qwen2ForRewardModel",),
            kind="outcome",
            rendering=Bare(chat=True, closing="all", system=_QWEN_MATH_SYSTEM),
            reading=SequenceScalar(),
            head=MLPHead("score", outputs=1),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        Preset(
            name="armo-rm",
            models=("RLHFlow/ArmoRM-Llama3-8B-*",),
            architectures=("LlamaForRewardModelWithGating",),
            kind="outcome",
            rendering=Bare(chat=True, closing="all"),
            reading=SequenceScalar(),
            # <|eot_id|>, then <|start_header_id|> assistant <|end_header_id|> and a blank line
            head=GatedObjectivesHead(gate_offset=5),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        # Skywork-Reward-V2 and every other plain sequence classification with one label and a chat template
        Preset(
            name="sequence-classification",
            models=("Skywork/Skywork-Reward-V2-*",),
            architectures=("*ForSequenceClassification",),
            labels=1,
            kind="outcome",
            rendering=Bare(chat=True, closing="all"),
            reading=SequenceScalar(),
            head=LinearHead("score", outputs=1, bias=False),
            semantics="reward",
        ),
    )
}


def _matches_id(pattern: str, model: str) -> bool:
    # A folder, wherever it is, is known by its last part
    name, last = model.rstrip("/").lower(), pattern.lower().split("/")[-1]
    return fnmatch(name, pattern.lower()) or fnmatch(name.replace("\\", "/").split("/")[-1], last)


def find_preset(model: str, config: PreTrainedConfig | None = None) -> Preset | None:
    """
    The preset of a model, by its id or its folder's name, else by its config; `None` if it is not known.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        config (`PreTrainedConfig`, *optional*):
            Its config, whose `architectures` are looked at.
    """
    for preset in PRESETS.values():
        if any(_matches_id(pattern, model) for pattern in preset.models):
            return preset
    architectures = [] if config is None else (config.architectures or [])
    for preset in PRESETS.values():
        fits = any(fnmatch(name, pattern) for name in architectures for pattern in preset.architectures)
        if config is not None and fits and preset.labels in (None, config.num_labels):
            return preset
    return None
