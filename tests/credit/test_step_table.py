"""The table of steps: its numbers are those that were trained on, and no text breaks it."""

import functools
import io
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas import read_parquet
from rich.cells import cell_len
from rich.console import Console
from trl import GRPOTrainer

from tests.support.training import EOS, FixedCompletions, RecordingExtTrainer, make_trainer
from trl_grpo_ext import GRPOExtTrainer, StepRewards
from trl_grpo_ext.credit.step_table import (
    CompletionSteps,
    StepLine,
    advantage_colour,
    number_text,
    print_steps,
    printable,
    prompt_text,
    step_lines,
)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@given(st.data())
def test_lines_share_out_the_tokens(data):
    """Each token is in one line, with its reward and its advantage; a line has no step's end inside."""
    mask = data.draw(st.lists(st.booleans(), max_size=12))
    tokens = range(len(mask))
    ends = data.draw(st.sets(st.sampled_from(tokens))) if mask else set()
    numbers = st.floats(-2, 2)
    advantages = [data.draw(numbers) if counts else 0.0 for counts in mask]
    rewards = [data.draw(st.just(math.nan) | numbers) if counts else math.nan for counts in mask]
    lines = step_lines([f"<{token}>" for token in tokens], ends, mask, advantages, [rewards, [math.nan] * len(mask)])
    start = 0
    for line in lines:
        own = [int(token) for token in re.findall(r"<(\d+)>", line.text)]
        assert own and own == list(range(start, start + len(own)))
        assert not ends & set(own[:-1]) and len({mask[token] for token in own}) == 1
        given_here = [rewards[token] for token in own if not math.isnan(rewards[token])]
        assert line.rewards_K == [pytest.approx(math.fsum(given_here), abs=1e-12) if given_here else None, None]
        mean = math.fsum(advantages[token] for token in own) / len(own)
        assert line.advantage == (pytest.approx(mean, abs=1e-12) if mask[own[0]] else None)
        start += len(own)
    assert start == len(mask)


def test_numbers_have_trls_two_decimals_and_no_digit_is_lost():
    assert [number_text(value) for value in (0.126, -1.0, 999.0, None, math.nan)] == [
        "0.13",
        "-1.00",
        "999.00",
        "",
        "",
    ]
    assert number_text(123456.0) == "1.23e+05" and number_text(0.5, "+") == "+0.50"


def test_colours_differ_to_colour_blind_eyes_and_grow_with_the_advantage():
    def channels(advantage):
        return [int(advantage_colour(advantage, 2.0)[place : place + 2], 16) for place in (1, 3, 5)]

    (low_red, _, low_blue), (high_red, _, high_blue) = channels(-2.0), channels(2.0)
    # Red against green is what most colour-blind eyes confuse; orange and blue they tell apart
    assert low_red > 200 > 50 > low_blue and high_blue > 200 > 100 > high_red
    assert channels(0.0) == [128] * 3 and channels(1.0)[2] == round((128 + high_blue) / 2)
    assert advantage_colour(0.0, 0.0) == "#808080"


# ---------------------------------------------------------------------------------------------------------------------
# Text

NASTY = [
    "[bold]x[/]",
    "[/]",
    "[link=file:///etc]y",
    ":smile:",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb\x08\x0b\x0c\x00",
    "\u202eevil\u2066",
    "שלום 12",
    "مرحبا",
    "\ud800",
    "語" * 90,
    "👩‍🔬",
    "e\u0301",
    "\u2028",
    "a\tb",
    "x" * 10_000,
    "\n\n",
]
# The table's own lines could not be told from a text's
ANY = st.text(st.characters(exclude_characters="│┃"), max_size=12)
TEXTS = st.lists(st.sampled_from(NASTY) | ANY, max_size=4).map("".join)


def printed(lines, prompt, names, width, extra=None, **terminal):
    count = len(names)
    logs = {
        "prompt": [prompt],
        "rewards": {name: [-0.25] for name in names},
        "advantages": [0.5],
        "extra": {name: [value] for name, value in (extra or {}).items()},
    }
    file = io.StringIO()
    console = Console(file=file, width=width, **{"force_terminal": False} | terminal)
    completion = [StepLine(text, [1.5] * count, advantage) for text, advantage in lines]
    print_steps(logs, [CompletionSteps(completion, True)], 7, None, console)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS, TEXTS, st.sampled_from([80, 200]), st.integers(1, 13))
def test_no_text_breaks_the_table(texts, prompt, name, width, count):
    names = [f"{name[:40]}{k}" for k in range(count)]
    output = printed([(text, -0.5) for text in texts], [{"role": "user", "content": prompt}], names, width, {name: 1})
    title, *rows, end = output.split("\n")
    assert title.strip() == "Step 7" and end == ""
    # One width for all, and nothing that moves the cursor or turns the direction of writing
    assert {cell_len(row) for row in rows} == {width}
    assert all(character.isprintable() or character in "\u200c\u200e" for row in rows for character in row)
    # Borders stand where they stand in the first row: none is pushed aside, none is added
    inside = [row for row in rows if row[0] == "│"]
    assert {row.count("│") for row in inside} == {row.count("┃") for row in rows if row[0] == "┃"}
    # All of the text is there, in order
    shown = re.sub(r"\s", "", "".join(row[1:].split("│")[0] for row in inside))
    expected = [f"user: {prompt}", *texts, "= completion", f"{name}: 1"]
    assert shown == re.sub(r"\s", "", "".join(map(printable, expected)))


def test_numbers_stand_beside_their_step_and_right_of_right_to_left_text():
    output = printed([("first\n\n", 1.0), ("שלום", -1.0), ("tool", None)], "12 + 1", ["judge"], 80)
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in output.split("\n") if row.startswith("│")]
    assert rows == [
        ["12 + 1", "", ""],
        ["first", "1.50", "+1.00"],
        ["שלום", "\u200e1.50", "\u200e-1.00"],
        ["tool", "1.50", ""],
        ["= completion", "-0.25", "+0.50"],
    ]


def test_colours_are_for_terminals_only():
    lines = [("up", 1.0), ("down", -1.0)]
    assert "\x1b" not in printed(lines, "p", ["judge"], 80)
    output = printed(lines, "p", ["judge"], 80, force_terminal=True, color_system="truecolor")
    assert re.search(r"38;2;64;132;224mup", output) and re.search(r"38;2;214;104;0mdown", output)


def test_a_terminal_that_lacks_a_character_shows_its_escape():
    assert printable("é語\x1b\u200c", "latin-1") == "é\\u8a9e\\x1b\\u200c"


# ---------------------------------------------------------------------------------------------------------------------
# Through the trainer

# Of a character tokenizer; the third and fourth completion have one step and none
COMPLETIONS = [[5, 6, 7, 8, EOS], [9, 10, 11, EOS], [12, 13, EOS], [14, EOS]]
ENDS = [[1, 3], [0, 2], [1], []]


def judge(row, **columns):
    return [StepRewards(ENDS[n], [0.5 + n + k for k in range(len(ENDS[n]))]) for n in row]


def answer(row, log_extra, **columns):
    log_extra("note", [f"[red]{n}" for n in row])
    return [float(n == 1) for n in row]


def every_token(completion_ids, **columns):
    return [[0.25 * token for token in range(len(ids))] for ids in completion_ids]


def run(trainer_class, model, folder, rewards, **config):
    trainer = make_trainer(
        trainer_class,
        model,
        rewards,
        folder,
        trainer_options={"rollout_func": FixedCompletions([[5, 6]] * 4, COMPLETIONS)},
        **{"per_device_train_batch_size": 4, "max_steps": 1, "log_completions": True} | config,
    )
    trainer.train()
    return trainer


def tables(output):
    """What is printed for each step: rows of cells."""
    found = []
    for table in re.split(r"Step \d+ *\n", output)[1:]:
        rows = [row for row in table.split("\n") if row.startswith("│")]
        found.append([[cell.strip() for cell in row.split("│")[1:-1]] for row in rows])
    return found


def test_each_step_has_what_was_trained_on(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = {"supervision": "process", "logging_steps": 1}
    trainer = run(RecordingExtTrainer, tiny_model, tmp_path, [judge, answer], **config)
    output = capsys.readouterr().out
    # TRL's own table is not printed beside it
    assert "\x1b" not in output and "Completion" not in output
    rows = tables(output)[0]
    (batch,) = trainer.batches
    expected = [[trainer._logs["prompt"][0], "", "", ""]]
    for n, (ids, ends) in enumerate(zip(COMPLETIONS, ENDS, strict=True)):
        start = 0
        for k, end in enumerate(sorted({*ends, len(ids) - 1})):
            text = trainer._tokenizer.decode(ids[start : end + 1]).strip()
            step = f"{0.5 + n + k:.2f}" if end in ends else ""
            outcome = f"{float(n == 1):.2f}" if end == len(ids) - 1 else ""
            mean = batch["advantages"][n, start : end + 1].double().mean().item()
            expected.append([text, step, outcome, f"{mean:+.2f}"])
            start = end + 1
        total = sum(0.5 + n + k for k in range(len(ends)))
        mean = batch["advantages"][n, : len(ids)].double().mean().item()
        whole = f"{total:.2f}" if ends else ""
        expected += [["= completion", whole, f"{float(n == 1):.2f}", f"{mean:+.2f}"], [f"note: [red]{n}", "", "", ""]]
        if n < 3 and trainer._logs["prompt"][n + 1] != trainer._logs["prompt"][n]:
            expected.append([trainer._logs["prompt"][n + 1], "", "", ""])
    assert rows == expected
    # What TRL writes of the completions stays
    (file,) = (tmp_path / "completions").iterdir()
    assert list(read_parquet(file)) == ["step", "prompt", "completion", "judge", "answer", "note", "advantage"]


@pytest.mark.parametrize(("limit", "completions"), [(2, 2), (4, 4), (9, 4), (0, 0)])
def test_as_many_completions_as_trl_would_print(tiny_model, tmp_path, capsys, limit, completions):
    config = {"supervision": "process", "num_completions_to_print": limit}
    trainer = run(GRPOExtTrainer, tiny_model, tmp_path, [judge], **config)
    assert capsys.readouterr().out.count("= completion") == 2 * completions
    assert trainer.num_completions_to_print == limit


@pytest.mark.parametrize(
    "rewards",
    [[answer, every_token], [answer]],
    ids=["a reward for each token", "outcome sources"],
)
def test_without_steps_it_is_trls_table(tiny_model, tmp_path, capsys, rewards):
    run(GRPOExtTrainer, tiny_model, tmp_path, rewards, supervision="process")
    output = capsys.readouterr().out
    assert "Completion" in output and "= completion" not in output


def test_under_outcome_supervision_it_is_trls_table_to_the_letter(tiny_model, tmp_path, capsys):
    def sums(row, **columns):
        return [[2.0, 4.0, 2.5, None][n] for n in row]

    run(GRPOTrainer, tiny_model, tmp_path / "theirs", [sums])
    theirs = capsys.readouterr().out
    sums_of_steps = functools.update_wrapper(lambda row, **columns: judge(row), sums)
    run(GRPOExtTrainer, tiny_model, tmp_path / "ours", [sums_of_steps])
    found = [output[output.index("╭") : output.index("╯")] for output in (capsys.readouterr().out, theirs)]
    assert found[0] == found[1] and "sums" in found[0]


def test_what_a_prompt_or_an_advantage_may_be_is_printed():
    call = {"role": "assistant", "content": [{"type": "text", "text": None}], "tool_calls": [{"name": "f"}]}
    assert prompt_text([call]) == "assistant: {'name': 'f'}"
    assert advantage_colour(float("nan"), 1.0) == advantage_colour(1.0, float("inf")) == advantage_colour(0.0, 1.0)
