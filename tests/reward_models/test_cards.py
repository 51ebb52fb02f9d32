"""386 solutions with the shapes of real step-by-step files, written by the presets as by the cards' own code."""

import re

import pytest

from tests.support import cards
from tests.support.documents import TEXTS, blocks
from tests.support.hub_folders import load_tokenizer, missing_packages, tokenizer_folder
from tests.support.solutions import solutions
from trl_grpo_ext.reward_models.heads import MLPHead
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.presets import PRESETS
from trl_grpo_ext.reward_models.renderings import Tagged


# In one process with the other tests of these tokenizers, which take seconds to load
pytestmark = [
    pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages())),
    pytest.mark.xdist_group("tokenizers of the Hub"),
]


def test_the_solutions_have_every_shape_and_are_the_same_every_time():
    found = solutions()
    assert len(found) == 386 and found == solutions.__wrapped__()
    text = "\n\n".join("\n".join(solution.steps) for solution in found)
    for shape in (
        "<<",
        "####",
        "\n\n",
        "\n- ",
        "```",
        "$$",
        "\\[\n",
        "步骤1：",
        "**Step 2.**",
        "\n2. ",
        "🤔",
        "\t",
        "   ",
    ):
        assert shape in text, shape
    assert all(part == part.strip() for solution in found for part in (solution.problem, *solution.steps))
    assert {len(solution.steps) for solution in found} >= set(range(1, 13))


def test_the_guide_has_a_row_for_each_preset():
    table = TEXTS["recipes/guide/reward_models.md"].partition("## The models that are known")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE) == list(PRESETS)


def test_the_preset_of_the_guide_is_one(tmp_path):
    (example,) = [block for block in blocks("yaml") if "kind: process" in block]
    file = tmp_path / "my_preset.yaml"
    file.write_text(example, encoding="utf-8")
    preset = Preset.from_yaml(file)
    assert preset.rendering == Tagged(tag=" ки", first=" Step {number}: ", between="\nStep {number}: ", bos=True)
    assert preset.head == MLPHead("v_head.summary", outputs=2, widths=(1024,))


@pytest.mark.parametrize("preset", PRESETS)
def test_ids_and_positions_are_the_cards(preset):
    tokenizer = load_tokenizer(tokenizer_folder(cards.FOLDERS[preset].family))
    rendering = PRESETS[preset].rendering
    for problem, steps in solutions():
        judged = steps if preset in cards.PROCESS_CARDS else ["\n\n".join(steps)]
        given = judged if preset in cards.PROCESS_CARDS else judged[0]
        ids, positions = cards.CARDS[preset](tokenizer, problem, given)
        written = rendering.render(tokenizer, problem, judged)
        assert written.score_positions == positions and len(positions) == len(judged)
        # What a template writes after the last score is left out, since no score depends on it
        assert written.ids == ids[: len(written.ids)] and len(written.ids) > positions[-1]
