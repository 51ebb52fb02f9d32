"""Which preset a model has, by its id, its folder or its class, and that a class alone is said to be an assumption."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config

from tests.support.hub_folders import missing_packages, save_hub_folder, skywork_tokenizer
from tests.support.solutions import solutions
from trl_grpo_ext import ProcessRewardModel
from trl_grpo_ext.reward_models import presets as presets_module
from trl_grpo_ext.reward_models.opening import load_reward_model, open_reward_model
from trl_grpo_ext.reward_models.presets import PRESETS, find_preset, resolve_preset
from trl_grpo_ext.steps.alignment import align_tokens
from trl_grpo_ext.steps.segmentation import Segmentation, segment, split_text


needs_tokenizers = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))

TWO_LABELS = LlamaConfig(architectures=["LlamaForTokenClassification"], num_labels=2)
REWARD = Qwen2Config(architectures=["Qwen2ForRewardModel"])


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(presets_module.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize(
    ("model", "config", "preset"),
    [
        ("Qwen/Qwen2.5-Math-RM-72B", REWARD, "qwen-math-rm"),
        ("/data/Qwen2.5-Math-PRM-7B/", None, "qwen-math-prm"),
        ("Qwen/WorldPM-72B-UltraFeedback", REWARD, "world-pm"),
        ("Skywork/Skywork-Reward-V2-Llama-3.1-8B", LlamaConfig(), "sequence-classification"),
    ],
)
def test_a_known_id_has_its_preset_without_a_word(said, model, config, preset):
    assert resolve_preset(model, None, config).name == preset
    assert said == []


def test_a_folder_is_known_by_the_id_that_its_config_names(said, tmp_path):
    fields = {"architectures": ["Qwen2ForRewardModel"], "_name_or_path": "Qwen/WorldPM-72B"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert resolve_preset(str(tmp_path), None, REWARD).name == "world-pm"
    assert said == []


@pytest.mark.parametrize(
    ("config", "preset", "assumed"),
    [
        (REWARD, "qwen-math-rm", r"Please reason step by step, and put your final answer within \\boxed{}."),
        (TWO_LABELS, "trl-prm", r"Tagged(prompt='{problem}'"),
    ],
)
def test_a_known_class_alone_is_an_assumption_that_is_said(said, config, preset, assumed):
    assert find_preset("org/my-rm", config) is PRESETS[preset] and said == []
    assert resolve_preset("org/my-rm", None, config) is PRESETS[preset]
    (message,) = said
    assert "No preset knows 'org/my-rm' by its id" in message and assumed in message
    assert f"preset '{preset}'" in message and f"preset='{preset}' says so without this warning" in message
    assert resolve_preset("org/my-rm", preset, config) is PRESETS[preset] and len(said) == 1


def test_an_unknown_class_is_an_error_and_other_labels_are_one(said):
    for config in (LlamaConfig(architectures=["LlamaForCausalLM"]), LlamaConfig()):
        with pytest.raises(ValueError, match="no preset fits 'org/my-llm'; pass preset= as one of"):
            resolve_preset("org/my-llm", None, config)
    three = LlamaConfig(architectures=["LlamaForTokenClassification"], num_labels=3)
    with pytest.raises(ValueError, match="no preset fits"):
        resolve_preset("org/my-prm", None, three)
    assert said == []


def test_an_assumption_is_said_by_every_way_to_open_and_not_where_trl_loads(said, tmp_path):
    head = {"score.weight": (2, 16), "score.bias": (2,)}
    folder = save_hub_folder(tmp_path / "mine", "bytes", "Qwen2ForTokenClassification", head, num_labels=2)
    for number, opening in enumerate(
        (lambda: ProcessRewardModel.from_pretrained(folder), lambda: open_reward_model(str(folder), {})), start=1
    ):
        assert opening().preset is PRESETS["trl-prm"] and len(said) == number
    load_reward_model(folder, preset="trl-prm")
    one = save_hub_folder(
        tmp_path / "one", "bytes", "Qwen2ForSequenceClassification", {"score.weight": (1, 16)}, num_labels=1
    )
    assert open_reward_model(str(one), {}) == str(one)
    assert len(said) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Skywork: every line is a step on the card, blank ones too


def as_the_card(tokenizer, problem, response):
    """Ids, and for each line its text and where its score is: `prepare_input` of the authors' inference code."""
    ids = tokenizer.encode(tokenizer.bos_token + problem + "\n")
    newline = tokenizer.encode("\n")[-1]
    lines = []
    for line in response.split("\n"):
        ids = ids + (tokenizer.encode(line) if line else []) + [newline]
        lines.append((line, len(ids) - 1))
    return ids, lines


LINES = st.lists(
    st.sampled_from(["", "", "  ", "2 + 3 = 5.", "  so 5", "## Title", "```py", "```", "$$", "- a\t", "\t"]),
    min_size=1,
).map("\n".join)


@needs_tokenizers
@pytest.mark.xdist_group("tokenizers of the Hub")
@settings(max_examples=100, deadline=None)
@given(response=LINES.filter(str.strip))
def test_skywork_reads_each_line_of_a_response_as_on_its_card(response):
    check_as_the_card("What is 2 + 3?", response)


@needs_tokenizers
@pytest.mark.xdist_group("tokenizers of the Hub")
def test_skywork_reads_386_responses_as_on_its_card():
    differ = 0
    for problem, steps in solutions():
        for response in ("\n\n".join(steps), "\n".join(steps)):
            check_as_the_card(problem, response)
            differ += "\n\n" in response
    assert differ > 300


def check_as_the_card(problem, response):
    preset = PRESETS["skywork-prm"]
    pieces = [response[start:end] for start, end in split_text(response, preset.segmentation)]
    assert "".join(pieces) == response
    rendered = preset.rendering.render(skywork_tokenizer(), problem, pieces)
    ids, lines = as_the_card(skywork_tokenizer(), problem, response)
    assert rendered.ids == ids
    # A step is scored where its last line is that says something
    reached = 0
    ends = []
    for piece in pieces:
        reached += piece.rstrip().count("\n")
        ends.append(lines[reached][1])
        reached += piece.count("\n") - piece.rstrip().count("\n")
    assert rendered.score_positions == ends and all(a < b for a, b in pairwise(ends))


@needs_tokenizers
def test_the_texts_of_steps_that_are_not_stripped_are_the_text():
    text = "\n  a\n\n\tb \n"
    for by in ("newline", "blank_line", "regex:\n+"):
        segmentation = Segmentation(by=by, strip=False)
        assert "".join(segmentation.text_of(text[start:end]) for start, end in split_text(text, segmentation)) == text
        aligned = align_tokens(skywork_tokenizer(), skywork_tokenizer().encode(text))
        assert "".join(step.text for step in segment(aligned, segmentation)) == text
    with pytest.raises(TypeError, match="Segmentation: strip is 'no'; expected true or false"):
        Segmentation(strip="no")  # type: ignore[arg-type]
