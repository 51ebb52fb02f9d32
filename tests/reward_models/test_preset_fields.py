"""What is refused in a preset and of classes of the user's own: fields of other types, and outputs of other shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
import yaml
from torch import nn

from tests.support.hub_folders import WIDTH, save_hub_folder
from trl_grpo_ext import (
    OutcomeRewardModel,
    ProcessRewardModel,
    RemoteOutcomeRewardModel,
    RemoteProcessRewardModel,
    load_reward_model,
    open_reward_models,
)
from trl_grpo_ext.reward_models.heads import Head, LinearHead
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.presets import PRESETS, find_preset, resolve_preset
from trl_grpo_ext.reward_models.readings import AnswerReading, HeadReading, LabelSoftmax, LogRatio, Reading, TokenPair
from trl_grpo_ext.reward_models.renderings import Bare, Tagged
from trl_grpo_ext.steps.segmentation import Segmentation


if TYPE_CHECKING:
    from decimal import Decimal


TAGGED = Tagged(tag="<extra_0>")
URL = "http://127.0.0.1:1"


def preset(**fields):
    return Preset(**{"name": "own", "kind": "process", "rendering": TAGGED, "reading": TokenPair(), **fields})


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "causal"
    save_hub_folder(folder, "bytes", "Qwen2ForCausalLM")
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Fields


@pytest.mark.parametrize("field", ["models", "architectures", "stray_keys"])
@pytest.mark.parametrize("given", ["org/my-*", ["org/my-*"], ("org/my-*",)])
def test_a_single_pattern_is_a_list_of_one(field, given, monkeypatch):
    own = preset(**{field: given})
    assert own == preset(**{field: ("org/my-*",)})
    monkeypatch.setitem(PRESETS, "own", own)
    assert find_preset("other/thing") is None


def test_a_segmentation_may_be_given_by_its_argument():
    assert preset(segmentation="newline") == preset(segmentation=Segmentation("newline"))
    plain = {"name": "own", "kind": "process", "rendering": {"type": "Bare"}, "reading": {"type": "TokenPair"}}
    for given in ("newline", {"by": "newline"}):
        assert Preset.from_dict({**plain, "segmentation": given}).segmentation == Segmentation("newline")
    assert RemoteProcessRewardModel(URL, segmentation="newline").segmentation == Segmentation("newline")
    with pytest.raises(ValueError, match="unknown by='newlines'"):
        RemoteProcessRewardModel(URL, segmentation="newlines")


def test_a_loaded_model_takes_a_segmentation_by_its_argument(causal):
    loaded = ProcessRewardModel.from_pretrained(causal, preset=preset(), segmentation="newline")
    assert loaded.split("a\nb\n\nc") == ["a", "b", "c"]
    with pytest.raises(TypeError, match="by is 5"):
        ProcessRewardModel.from_pretrained("there/is-no-such-model", segmentation=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": 5}, "models is 5; expected a list, each of whose entries is a text"),
        ({"stray_keys": [1]}, r"stray_keys is \(1,\); expected a list"),
        ({"max_length": "100"}, "max_length is '100'; expected a whole number or nothing"),
        ({"max_length": True}, "max_length is True"),
        ({"labels": 1.0}, "labels is 1.0; expected a whole number or nothing"),
        ({"mask_tags": "no"}, "mask_tags is 'no'; expected true or false"),
        ({"log_ratio_model": 5}, "log_ratio_model is 5; expected a text or nothing"),
        ({"segmentation": 5}, "Segmentation: by is 5"),
        ({"reading": TokenPair}, "reading is <class .*TokenPair'>; expected an object of the class Reading"),
        ({"head": "score"}, "head is 'score'; expected an object of the class Head or nothing"),
    ],
)
def test_a_field_of_another_type_is_named(fields, message):
    with pytest.raises(TypeError, match=f"preset 'own': {message}"):
        preset(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenPair(good=1), "good is 1; expected a text"),
        (lambda: LabelSoftmax(indices=5), "indices is 5; expected a list, each of whose entries is a whole number"),
        (lambda: LabelSoftmax(indices="12"), "indices is '12'; expected a list"),
        (lambda: LogRatio(beta="0.1"), "beta is '0.1'; expected a number"),
        (lambda: LinearHead(1, outputs=2), "name is 1; expected a text"),
        (lambda: LinearHead("score", outputs="2"), "outputs is '2'; expected a whole number"),
        (lambda: Tagged(tag=5), "tag is 5; expected a text"),
        (lambda: Bare(prompt=5), "prompt is 5; expected a text"),
        (lambda: Bare(bos="yes"), "bos is 'yes'; expected true or false"),
    ],
)
def test_an_argument_of_a_class_of_the_package_is_checked(make, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        make()


def test_a_class_of_the_user_is_checked_as_far_as_its_annotations_say():
    class Asked(Protocol):
        """A protocol that cannot be asked of an object."""

        def ask(self): ...

    @dataclass(frozen=True)
    class Own(HeadReading):
        names: list[str]
        factor: float | None = None
        other: Any = None
        asked: Asked | None = None

        def scores(self, logits_RO):
            return logits_RO[:, 0]

    assert Own(["a"], factor=1, other=object(), asked=object()).factor == 1
    with pytest.raises(TypeError, match="names is 'a'; expected a list, each of whose entries is a text"):
        Own("a")
    assert Annotated("any").value == "any"


@dataclass(frozen=True)
class Annotated(HeadReading):
    """An annotation that is not there when the program runs."""

    value: "Decimal"

    def scores(self, logits_RO):
        return logits_RO[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_preset_may_be_given_by_the_path_of_its_file(tmp_path):
    path = tmp_path / "own.yaml"
    own = {"name": "own", "kind": "process", "rendering": {"type": "Bare"}, "reading": {"type": "TokenPair"}}
    path.write_text(yaml.safe_dump({**own, "models": "org/my-*"}))
    expected = preset(rendering=Bare(), models=("org/my-*",))
    assert resolve_preset("org/my-model", path) == resolve_preset("org/my-model", str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"own.yaml: preset: expected a mapping of its fields, got \['a', 'b'\]"),
        ("", "own.yaml: preset: expected a mapping of its fields, got None"),
        ("a: [\n", "own.yaml: while parsing"),
        (
            "{name: own, kind: process, rendering: {type: Bare}, reading: {type: TokenPair, good: 1}}",
            "own.yaml: preset.reading: .*TokenPair: good is 1; expected a text",
        ),
    ],
)
def test_an_error_in_a_file_names_the_file(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Preset.from_yaml(tmp_path / "own.yaml")


def test_what_is_no_preset_is_named():
    with pytest.raises(TypeError, match="preset is 5; pass a name, the path of a YAML file or a Preset"):
        resolve_preset("org/model", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no preset 'x.json'"):
        resolve_preset("org/model", Path("x.json"))


# ---------------------------------------------------------------------------------------------------------------------
# A text where a list of texts belongs


@pytest.mark.parametrize("given", ["ab", None, [1, 2], {"a", "b"}])
def test_problems_and_solutions_are_lists_of_texts(causal, given):
    process = load_reward_model(causal, preset())
    outcome = load_reward_model(causal, preset(kind="outcome"))
    assert isinstance(process, ProcessRewardModel) and isinstance(outcome, OutcomeRewardModel)
    calls = [
        lambda: process.score("p", given),
        lambda: process.score_steps(given, [["a"], ["b"]]),
        lambda: outcome.score("p", given),
        lambda: outcome.score_batch(given, ["a", "b"]),
        lambda: outcome.score_batch(["p", "q"], given),
        lambda: RemoteProcessRewardModel(URL).score_steps(given, [["a"], ["b"]]).send(None),
        lambda: RemoteProcessRewardModel(URL).score_steps(["p"], [given]).send(None),
        lambda: RemoteOutcomeRewardModel(URL).score_batch(given, ["a", "b"]).send(None),
        lambda: RemoteOutcomeRewardModel(URL).score_batch(["p", "q"], given).send(None),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"give a list of texts|\[0\] is 1; it must be a text"):
            call()


def test_reward_models_are_opened_from_a_list():
    with pytest.raises(TypeError, match="sources is a text, 'org/model'; give a list of sources"):
        open_reward_models("org/model", {})


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class Shaped(AnswerReading):
    """Scores of any shape."""

    change: Any
    answers: Any = ("+", "-")

    def answer_texts(self):
        return self.answers

    def scores(self, logits_RO):
        return self.change(logits_RO)


class Built(Reading):
    """A direct subclass."""

    def __init__(self, needs: Any, built: Any):
        self.needs = needs
        self.built = built

    def build(self, parts):
        return self.built


class Listing(nn.Module):
    """Scores that are no tensor."""

    def forward(self, outputs, batch):
        return [0.0] * len(batch.rows_R)


@pytest.mark.parametrize(
    ("reading", "error", "message"),
    [
        (Shaped(lambda logits: logits), ValueError, r"Shaped returned a tensor of shape \(2, 2\); expected \(2,\)"),
        (Shaped(lambda logits: logits[:-1, 0]), ValueError, r"shape \(1,\); expected \(2,\), with a row for each"),
        (Shaped(lambda logits: logits.sum()), ValueError, r"shape \(\); expected \(2,\)"),
        (Shaped(None, answers="+-"), TypeError, r"answer_texts\(\) of the reading Shaped is a text, '\+-'"),
        (Built("vocabulary", None), TypeError, "the reading Built has built None; expected an nn.Module"),
        (Built("vocabulary", Listing()), TypeError, "the reading Built returned list; expected a tensor"),
    ],
)  # fmt: skip
def test_a_reading_whose_output_has_another_shape_is_named(causal, reading, error, message):
    with pytest.raises(error, match=message):
        load_reward_model(causal, preset(reading=reading)).score("p", ["a\n\nb"])


@pytest.mark.parametrize("needs", [None, "heads"])
def test_a_reading_that_does_not_say_what_it_needs_is_named(needs):
    with pytest.raises(
        ValueError, match=f"the reading Built has needs = {needs!r}; known: head, vocabulary, log_probs, log_ratio"
    ):
        preset(reading=Built(needs, None))


class Wide(Head):
    """A head with one output more than it says."""

    outputs = 1

    def attach(self, model, config):
        model.add_module("score", nn.Linear(WIDTH, 2, bias=False))

    def logits(self, heads, hidden_BLH, batch):
        return heads.get_submodule("score")(batch.at_score_positions(hidden_BLH))


@dataclass(frozen=True)
class First(HeadReading):
    """The first output."""

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        return logits_RO[:, 0]


def test_a_head_whose_output_has_another_shape_is_named(tmp_path):
    folder = tmp_path / "wide"
    save_hub_folder(folder, "bytes", "Qwen2ForOwnReward", head={"score.weight": (2, WIDTH)})
    own = preset(reading=First(), head=Wide())
    with pytest.raises(ValueError, match=r"the head Wide returned a tensor of shape \(2, 2\); expected \(2, 1\)"):
        load_reward_model(str(folder), own).score("p", ["a\n\nb"])
