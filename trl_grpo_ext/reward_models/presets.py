"""The reward models that people use, as presets, and which preset a model has."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..distributed import warn_once
from ..steps.segmentation import Segmentation
from .heads import GatedObjectivesHead, LinearHead, MLPHead
from .preset import Preset
from .readings import AnswerProbability, LabelSoftmax, LogRatio, SequenceScalar, Sigmoid, TokenPair
from .renderings import Bare, Tagged, Turns


logger = logging.get_logger(__name__)

_QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_ACEMATH_SYSTEM = "Please reason step by step, and check your final answer within \\boxed{}."

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
        # The checkpoint of 1.5B has another form, with its head in a file of its own
        Preset(
            name="reasonflux-prm",
            models=("Gen-Verse/ReasonFlux-PRM-7B",),
            kind="process",
            rendering=Tagged(tag="<extra_0>", chat=True),
            reading=LabelSoftmax(indices=(1,)),
            head=MLPHead("score", outputs=2),
            stray_keys=("lm_head.*",),
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
        # One of the two is an adapter on Granite. The cards read the probability of Y itself, not against N
        Preset(
            name="granite-prm",
            models=("ibm-granite/granite-3.3-8b-lora-math-prm", "ibm-granite/granite-3.3-8b-math-prm-v2"),
            kind="process",
            rendering=Turns(after=" Is this response correct so far (Y/N)?", answer="Y"),
            reading=AnswerProbability(),
        ),
        Preset(
            name="skywork-prm",
            models=("Skywork/Skywork-o1-Open-PRM-*",),
            architectures=("Qwen2ForPrmModel",),
            kind="process",
            rendering=Tagged(tag="\n", prompt="{problem}\n", bos=True, each_line=True),
            reading=Sigmoid(),
            head=LinearHead("v_head.summary", outputs=1),
            stray_keys=("lm_head.*",),
            segmentation=Segmentation(by="newline", strip=False),
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
            log_ratio_model="Qwen/Qwen2.5-Math-7B-Instruct",
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
            mask_tags=True,
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
        # Its system message is empty. Without any, Qwen's template would write one of its own
        Preset(
            name="world-pm",
            models=("Qwen/WorldPM-72B*",),
            kind="outcome",
            rendering=Bare(chat=True, closing="all", system=""),
            reading=SequenceScalar(),
            head=MLPHead("score", outputs=1),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        Preset(
            name="inf-orm",
            models=("infly/INF-ORM-Llama3.1-*",),
            architectures=("INFORMForSequenceClassification",),
            kind="outcome",
            rendering=Bare(chat=True, closing="all"),
            reading=SequenceScalar(),
            head=MLPHead("score", outputs=1),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        # The code of the next two tokenizes what the template writes as a text, after a second beginning of sequence
        Preset(
            name="grm",
            models=("Ray2333/GRM-*-sftreg",),
            kind="outcome",
            rendering=Bare(chat=True, as_text=True, closing="all"),
            reading=SequenceScalar(),
            head=MLPHead("v_head.summary", outputs=1, widths=(1024,)),
            stray_keys=("lm_head.*",),
            semantics="reward",
        ),
        Preset(
            name="athene-rm",
            models=("Nexusflow/Athene-RM-*",),
            kind="outcome",
            rendering=Bare(chat=True, as_text=True, closing="all", end="{cls_token}"),
            reading=SequenceScalar(),
            head=LinearHead("v_head", outputs=1, bias=False),
            stray_keys=("lm_head.*",),
            semantics="reward",
            max_length=4096,
        ),
        Preset(
            name="rlhflow-orm",
            models=("RLHFlow/Llama3.1-8B-ORM-*",),
            kind="outcome",
            rendering=Turns(answer="+"),
            reading=TokenPair(good="+", bad="-"),
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
    name = model.rstrip("/").lower().replace("\\", "/")
    pattern = pattern.lower()
    # A folder, wherever it is, is known by its last part
    return fnmatch(name, pattern) or fnmatch(name.split("/")[-1], pattern.split("/")[-1])


def _written_name(model: str) -> str | None:
    """The id that the config in a folder names, as those of earlier versions of transformers do."""
    config = Path(model) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("_name_or_path") if config.is_file() else None


def _preset_by_id(model: str) -> Preset | None:
    names = [model, _written_name(model) or model]
    for preset in PRESETS.values():
        if any(_matches_id(pattern, name) for pattern in preset.models for name in names):
            return preset
    return None


def _preset_by_class(config: PreTrainedConfig) -> Preset | None:
    for preset in PRESETS.values():
        fits = any(fnmatch(name, pattern) for name in config.architectures or [] for pattern in preset.architectures)
        if fits and preset.labels in (None, config.num_labels):
            return preset
    return None


def find_preset(model: str, config: PreTrainedConfig | None = None) -> Preset | None:
    """
    The preset of a model, by its id or its folder's name, else by its class; `None` if it is not known.

    A class says which head a model has, and not which input it was trained on, see [`warn_of_assumption`].

    Args:
        model (`str`):
            Id on the Hub, or folder. A folder is also known by the id that its config names.
        config (`PreTrainedConfig`, *optional*):
            Its config, whose `architectures` name the class.
    """
    return _preset_by_id(model) or (None if config is None else _preset_by_class(config))


def warn_of_assumption(model: str, preset: Preset) -> None:
    """
    Say once for each model what is assumed where a preset was found by the model's class alone.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        preset ([`Preset`]):
            What [`find_preset`] has found.
    """
    if _preset_by_id(model) is None:
        warn_once(
            logger,
            f"No preset knows '{model}' by its id. By its class, which says nothing of its input, it is taken for "
            f"preset '{preset.name}': {preset.rendering}, steps by {preset.segmentation.by!r}, "
            f"{preset.reading}. If its card says the same, preset='{preset.name}' says so without this warning; else "
            "give preset= another name, a YAML file or a Preset of your own.",
        )


def resolve_preset(
    model: str, preset: Preset | str | os.PathLike[str] | None, config: PreTrainedConfig | None = None
) -> Preset:
    """
    The preset to load a model with.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        preset ([`Preset`], `str` or `os.PathLike`, *optional*):
            A preset, the name of one of `PRESETS`, or the path of a YAML file; the one that [`find_preset`] finds by
            default, with a warning if it is found by the model's class alone.
        config (`PreTrainedConfig`, *optional*):
            The model's config.

    Raises:
        TypeError: `preset` is none of these.
        ValueError: an unknown name, or a model that no preset fits.
    """
    if isinstance(preset, Preset):
        return preset
    if preset is not None and not isinstance(preset, (str, os.PathLike)):
        raise TypeError(f"preset is {preset!r}; pass a name, the path of a YAML file or a Preset.")
    preset = None if preset is None else os.fspath(preset)
    if preset is not None and preset.endswith((".yaml", ".yml")):
        return Preset.from_yaml(preset)
    found = find_preset(model, config) if preset is None else PRESETS.get(preset)
    if preset is None and found is not None:
        warn_of_assumption(model, found)
    if found is None:
        what = f"no preset fits '{model}'" if preset is None else f"there is no preset '{preset}'"
        raise ValueError(f"{what}; pass preset= as one of {', '.join(PRESETS)}, a YAML file or a Preset of your own.")
    return found
