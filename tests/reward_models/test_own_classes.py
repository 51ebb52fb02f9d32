"""Readings, heads and renderings of the user's own, in two files outside of the package: a module and a preset."""

import asyncio
import json
import sys

import httpx
import pytest
import torch
import uvicorn
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.hub_folders import WIDTH, save_hub_folder
from trl_grpo_ext.reward_models.opening import load_reward_model, open_reward_models
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.remote.server import main


MODULE = '''
"""What a user writes outside of the package."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_grpo_ext.reward_models.encoding import encode_text
from trl_grpo_ext.reward_models.heads import Head
from trl_grpo_ext.reward_models.readings import AnswerReading, HeadReading, LogRatioReading
from trl_grpo_ext.reward_models.rendering import RenderedStep, Rendering


@dataclass(frozen=True)
class Rating(AnswerReading):
    """Mean of the grades that the model would answer with."""

    grades: Sequence[str]

    def answer_texts(self):
        return self.grades

    def scores(self, logits_RO):
        grades_O = torch.tensor([float(grade) for grade in self.grades], device=logits_RO.device)
        return logits_RO.softmax(-1) @ grades_O


@dataclass(frozen=True)
class MeanLogRatio(LogRatioReading):
    """Mean log-ratio of the answer's tokens."""

    def scores(self, log_ratios_BL, batch):
        lengths_R = batch.columns_R + 1 - batch.prompt_lengths_B[batch.rows_R]
        return batch.at_score_positions(log_ratios_BL.cumsum(-1)) / lengths_R


class Bilinear(Head):
    """Outputs `h A h` for several matrices; a plain class, without dataclass."""

    def __init__(self, matrices):
        self.outputs = matrices

    def attach(self, model, config):
        for number in range(self.outputs):
            width = config.hidden_size
            model.register_parameter(f"bilinear_{number}", nn.Parameter(torch.zeros(width, width)))

    def logits(self, heads, hidden_BLH, batch):
        hidden_RH = batch.at_score_positions(hidden_BLH)
        matrices = [heads.get_parameter(f"bilinear_{number}") for number in range(self.outputs)]
        return torch.stack([((hidden_RH @ matrix) * hidden_RH).sum(-1) for matrix in matrices], dim=-1)


@dataclass(frozen=True)
class Margin(HeadReading):
    """The first output minus the second."""

    head_outputs = 2

    def scores(self, logits_RO):
        return logits_RO[:, 0] - logits_RO[:, 1]


@dataclass(frozen=True)
class Numbered(Rendering):
    """Every step after its number."""

    sign: str = ")"

    def prompt_ids(self, tokenizer, problem):
        return encode_text(tokenizer, problem)

    def step_ids(self, tokenizer, steps):
        for number, step in enumerate(steps):
            ids = encode_text(tokenizer, f"{number + 1}{self.sign}{step}")
            yield RenderedStep(ids, len(ids) - 1)


class NotAReading:
    """Something else."""
'''

PROBLEM = "2 + 3 * 4?"
STEPS = ["3 * 4 = 12", "so 14", "<extra_0>"]
TAGGED = {"type": "Tagged", "tag": "<extra_0>"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    matrices = {f"bilinear_{number}": (WIDTH, WIDTH) for number in range(2)}
    save_hub_folder(root / "causal", "bytes", "Qwen2ForCausalLM")
    save_hub_folder(root / "second", "bytes", "Qwen2ForCausalLM", seed=1)
    save_hub_folder(root / "bilinear", "bytes", "Qwen2ForOwnReward", head=matrices)
    return root


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """The module, where Python finds it."""
    (tmp_path / "own_readings.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_readings", raising=False)


def write_preset(folder, **fields):
    file = folder / "preset.yaml"
    file.write_text(yaml.safe_dump({"name": "own", "kind": "process", "rendering": TAGGED, **fields}))
    return str(file)


@torch.no_grad()
def hidden_and_log_probs(folder, ids):
    """Of a causal language model, in float64 from the hidden states on."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    return hidden, hidden @ model.lm_head.weight.double().T


def served(arguments, body, monkeypatch):
    """What the server of a command line answers."""
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.update(app=app))
    main(arguments)

    async def post():
        transport = httpx.ASGITransport(app=started["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/get_reward", content=json.dumps(body))

    return asyncio.run(post()).json()


def rendered(tokenizer):
    """Ids of [`STEPS`] with a tag after each, and where the tags are, put together by hand."""
    tag = tokenizer.convert_tokens_to_ids("<extra_0>")
    ids = tokenizer.encode(PROBLEM)
    places = []
    for step in STEPS:
        ids = [*ids, *tokenizer.encode(step, split_special_tokens=True), tag]
        places.append(len(ids) - 1)
    return ids, places


def test_a_reading_of_answers_scores_and_is_served(hub, tmp_path, monkeypatch):
    reading = {"type": "own_readings:Rating", "grades": ["1", "3", "9"]}
    file = write_preset(tmp_path, reading=reading)
    model = load_reward_model(str(hub / "causal"), file)
    assert type(model.preset.reading).__name__ == "Rating" and model.preset.reading.grades == ("1", "3", "9")

    tokenizer = AutoTokenizer.from_pretrained(hub / "causal")
    ids, places = rendered(tokenizer)
    _, logits = hidden_and_log_probs(hub / "causal", ids)
    grades = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    probabilities = logits[:, tokenizer.convert_tokens_to_ids(["1", "3", "9"])].softmax(-1)
    expected = (probabilities @ grades)[places].tolist()
    assert len({round(value, 3) for value in expected}) == 3
    assert model.score_steps([PROBLEM], [STEPS])[0] == pytest.approx(expected, abs=1e-5)

    body = {"query": [PROBLEM], "prompts": [PROBLEM], "steps": [STEPS]}
    answer = served([str(hub / "causal"), "--preset", file, "--device", "cpu"], body, monkeypatch)
    assert answer["step_scores"][0] == pytest.approx(expected, abs=1e-5)
    assert answer["rewards"] == pytest.approx([min(expected)], abs=1e-5)


def test_ids_in_reward_funcs_take_a_preset_and_options_from_plain_data(hub, tmp_path):
    file = write_preset(tmp_path, reading={"type": "own_readings:Rating", "grades": ["1", "3", "9"]})
    options = {"preset": file, "batch_tokens": 77, "max_length": 55, "dtype": "float32"}
    first, second = open_reward_models([str(hub / "causal")] * 2, options)
    for model in (first, second):
        assert type(model.preset.reading).__name__ == "Rating"
        assert (model.batch_tokens, model.max_length) == (77, 55)
    assert first.scorer.backbone is second.scorer.backbone


def test_a_reading_of_log_ratios_scores(hub, tmp_path):
    file = write_preset(tmp_path, reading={"type": "own_readings:MeanLogRatio"}, log_ratio_model=str(hub / "second"))
    scores = load_reward_model(str(hub / "causal"), file).score_steps([PROBLEM], [STEPS])[0]
    ids, places = rendered(AutoTokenizer.from_pretrained(hub / "causal"))
    own, second = (hidden_and_log_probs(hub / name, ids)[1].log_softmax(-1) for name in ("causal", "second"))
    first = len(PROBLEM)
    ratios = [float(own[t - 1, ids[t]] - second[t - 1, ids[t]]) for t in range(first, len(ids))]
    expected = [sum(ratios[: place + 1 - first]) / (place + 1 - first) for place in places]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_a_head_and_a_rendering_of_ones_own_beside_a_reading(hub, tmp_path):
    file = write_preset(
        tmp_path,
        rendering={"type": "own_readings:Numbered", "sign": "."},
        reading={"type": "own_readings:Margin"},
        head={"type": "own_readings:Bilinear", "matrices": 2},
    )
    model = load_reward_model(str(hub / "bilinear"), file)
    scores = model.score_steps([PROBLEM], [STEPS])[0]
    ids = [*PROBLEM.encode()]
    places = []
    for number, step in enumerate(STEPS):
        ids += [*f"{number + 1}.{step}".encode()]
        places.append(len(ids) - 1)
    tokenizer = AutoTokenizer.from_pretrained(hub / "bilinear")
    ids = [tokenizer.encode(chr(byte))[0] for byte in ids]
    assert model._render(PROBLEM, STEPS).ids == ids
    # The backbone's weights are the causal model's, drawn with the same seed
    hidden = hidden_and_log_probs(hub / "causal", ids)[0][places]
    weights = load_file(hub / "bilinear" / "model.safetensors")
    first, second = (((hidden @ weights[f"bilinear_{n}"].double()) * hidden).sum(-1) for n in range(2))
    assert scores == pytest.approx((first - second).tolist(), abs=1e-4)


def test_lists_become_tuples_so_that_two_presets_of_one_file_are_equal(tmp_path):
    file = write_preset(tmp_path, reading={"type": "own_readings:Rating", "grades": ["1", "2"]})
    assert Preset.from_yaml(file) == Preset.from_yaml(file)


LABELS = {"type": "LabelSoftmax"}
SCORE = {"type": "LinearHead", "name": "score", "outputs": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reading": {"type": "no_such:Reading"}},
            r"preset.reading: type 'no_such:Reading' .*No module named 'no_suc",
        ),
        ({"reading": {"type": "own_readings:Ratin"}}, r"preset.reading: type 'own_readings:Ratin' .*no attribute"),
        ({"reading": {"type": "own_readings:"}}, "preset.reading: type 'own_readings:' is no subclass"),
        (
            {"reading": {"type": "own_readings:NotAReading"}},
            r"preset.reading: type 'own_readings:NotAReading' is no subclass of .*readings:Reading",
        ),
        (
            {"reading": LABELS, "head": {"type": "own_readings:Rating", "grades": []}},
            r"preset.head: type 'own_readings:Rating' is no subclass of .*heads:Head",
        ),
        ({"reading": {"type": "Rating"}}, "preset.reading: unknown type 'Rating'; known: LabelSoftmax.*import path"),
        ({"reading": {"indices": [1]}}, "preset.reading: unknown type None"),
        ({"reading": "LabelSoftmax"}, "preset.reading: expected a mapping with a `type`, got 'LabelSoftmax'"),
        ({"reading": {"type": "own_readings:Rating"}}, "preset.reading: field 'grades' of Rating is missing"),
        (
            {"reading": {"type": "own_readings:Margin", "sharp": 1}},
            "preset.reading: unknown field 'sharp' of Margin; known: none",
        ),
        (
            {"reading": LABELS, "head": SCORE, "rendering": {**TAGGED, "prompt": "Question"}},
            r"preset.rendering: .*renderings:Tagged: prompt is 'Question'",
        ),
        (
            {"reading": LABELS, "head": SCORE, "rendering": {"type": "Bare", "closing": "last"}},
            "preset.rendering: .*closing is 'last'; known: none, first, all",
        ),
        ({"reading": LABELS}, "preset 'own': the reading LabelSoftmax needs a head; set `head`"),
        (
            {"reading": {"type": "TokenPair"}, "head": SCORE},
            "preset 'own': the reading TokenPair takes the model's vocabulary instead of a head; leave `head` out",
        ),
        (
            {"reading": {**LABELS, "indices": [0, 2]}, "head": SCORE},
            "preset 'own': the reading LabelSoftmax takes label 2 of a head with 2 outputs",
        ),
        (
            {"reading": {"type": "Sigmoid"}, "head": SCORE},
            "preset 'own': the reading Sigmoid takes a head whose `outputs` is 1, not 2",
        ),
        ({"reading": LABELS, "head": SCORE, "kind": "proces"}, "kind is 'proces'; known: process, outcome"),
        ({"reading": LABELS, "head": SCORE, "reduce": "max"}, "reduce is 'max'; known: sum, mean, min, prod, last"),
        (
            {"reading": LABELS, "head": SCORE, "segmentation": {"bye": "newline"}},
            "preset.segmentation: unknown field 'bye' of Segmentation",
        ),
        ({"head": SCORE}, "preset: field 'reading' of Preset is missing"),
    ],
)
def test_an_error_names_the_field_and_the_class(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Preset.from_yaml(write_preset(tmp_path, **fields))


def test_answers_of_ones_own_must_be_one_id_each(hub, tmp_path):
    file = write_preset(tmp_path, reading={"type": "own_readings:Rating", "grades": ["1", "10"]})
    with pytest.raises(ValueError, match=r"the answer '10' must be one id in this tokenizer; it is \["):
        load_reward_model(str(hub / "causal"), file)
