"""The report: its numbers add up, text of a run stays text, and what was planted is found."""

import copy
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.credit.runs import EVERY_FORM, credit_of
from tests.support.tiny_models import tiny_tokenizer
from tests.support.training import EOS, FixedCompletions, RecordingExtTrainer
from trl_grpo_ext import ESTIMATORS, Estimator, StepRewards
from trl_grpo_ext.credit.embed import Vocabulary, pack_group, unpack_group
from trl_grpo_ext.credit.figures import figures_of_rows, is_curve
from trl_grpo_ext.credit.page_of_run import page_of_run, render
from trl_grpo_ext.credit.read import read_credit
from trl_grpo_ext.report import main


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def dense(pairs, count):
    values = [None] * count
    for token, value in pairs or []:
        values[token] = value
    return values


def texts(row, arrays, index):
    return [index["vocabulary"][place][1] for place in arrays[row["tokens"]].view("<u4")]


def sums(row, arrays, settings):
    """What the page adds up for each token, as its script does."""
    count = len(arrays[row["tokens"]])
    masked = set(row["masked"])
    shaped = [dense(source.get("shaped", source["reward"]), count) for source in row["sources"]]
    of_returns = settings["normalizes"] == "returns"
    merged = settings["multi_objective_aggregation"] == "sum_then_normalize" and not of_returns
    totals = np.full(count, row["offset"])
    for k, source in enumerate(row["sources"]):
        if "share" in source:
            totals += arrays[source["share"]]
            continue
        counted = [shaped[j] for j, s in enumerate(row["sources"]) if s["weight"] != 0] if merged else [shaped[k]]
        mean, divisor = arrays[source["mean"]], arrays[source["divisor"]]
        following = 0.0
        for t in [t for t in reversed(range(count)) if t not in masked]:
            ends = any(values[t] is not None for values in counted)
            differs = not math.isnan(divisor[t])
            earned = shaped[k][t] or 0.0
            if not of_returns:
                earned = (earned - mean[t]) / divisor[t] if ends and differs else 0.0
            discounts = {"token": True, "step": ends, "turn": t + 1 == count or t + 1 in masked}
            following = earned + (source["gamma"] if discounts[settings["gamma_unit"]] else 1.0) * following
            share = following
            if of_returns:
                share = (following - mean[t]) / divisor[t] if differs else 0.0
            totals[t] += source["weight"] * share / row["batch_divisor"]
    return np.delete(totals, sorted(masked))


@pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: "-".join(map(str, form.values())))
def test_what_the_page_adds_up_is_what_was_trained_on(form, tiny_model, tmp_path):
    config = {"reward_weights": [0.8, 1.5], "reward_transforms": ["center", "none"]} | form
    trainer, (logged,) = credit_of(tiny_model, tmp_path, **config)
    (step,) = read_credit(tmp_path).steps
    rows, arrays = unpack_group(pack_group(logged[:4], step.settings, Vocabulary()))
    for n, row in enumerate(rows):
        found = sums(row, arrays, step.settings)
        trained = trainer.batches[0]["advantages"][n].numpy()
        np.testing.assert_allclose(found, trained[: len(found)] if trained.ndim else trained, rtol=0, atol=1e-5)
    # What follows from the rest is left out
    assert all(row["advantages"] is None for row in rows)
    assert not any("share" in source for row in rows for source in row["sources"])


def test_of_an_estimator_of_the_users_own_returns_are_shown_and_no_sum(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "no_baseline", Estimator(lambda inputs: inputs.values_NT))
    _, (logged,) = credit_of(tiny_model, tmp_path, advantage_estimator="no_baseline")
    (step,) = read_credit(tmp_path).steps
    rows, arrays = unpack_group(pack_group(logged, step.settings, Vocabulary()))
    for row in rows:
        returns = sum(source["weight"] * arrays[source["return"]] for source in row["sources"])
        np.testing.assert_allclose(returns, arrays[row["advantages"]], rtol=0, atol=1e-5)
        assert not row["explained"] and row["offset"] is None
        assert all(np.isnan(arrays[source["mean"]]).all() for source in row["sources"])
    page, _ = page_of_run(tmp_path)
    assert "Advantages of your own" in page


def test_figures_of_recorded_completions_are_the_logged_ones_if_all_are_recorded(tiny_model, tmp_path):
    trainer, (rows,) = credit_of(tiny_model, tmp_path, log_credit=9, beta=0.1, kl_estimator="exact")
    logged = {name: value for name, value in trainer.state.log_history[0].items() if is_curve(name)}
    found = figures_of_rows(rows)
    # Beside the KL in use the log has two more, and shares of what has no gate and no mask
    assert set(found) - set(logged) == set()
    assert {name.rpartition("/")[2] for name in set(logged) - set(found)} <= {"k1", "k3", "masked"}
    for name, value in found.items():
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data


HOSTILE = st.sampled_from(
    [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "]]>",
        "<img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)',
        "{{ 7*7 }}{% raw %}",
        "\u202eoverride\u202c",
        "שלום",
        "👩‍👩‍👧‍👦",
        "\x00\x07\x1b[31m",
        "\u2028\u2029",
        "a" * 10_000,
    ]
)
TEXT = st.lists(st.one_of(HOSTILE, st.text(st.characters(exclude_categories=["Cs"]), max_size=20)), max_size=4)


@pytest.fixture(scope="module")
def logged_step(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    _, (rows,) = credit_of(tiny_model, folder)
    return rows[:4], read_credit(folder).steps[0].settings


def test_text_of_a_run_is_text(logged_step):
    rows, run = logged_step
    plain = Page(render("run", {"sources": []}, [pack_group(rows, run, Vocabulary())], "note"))

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(tokens=TEXT, name=TEXT)
    def check(tokens, name):
        row = copy.deepcopy(rows[0])
        count = len(row["tokens"])
        row["tokens"] = (tokens + [""] * count)[:count]
        title = "".join(name)
        index = {"sources": [title], "steps": [{"prompt": title}], "findings": [{"text": title}]}
        vocabulary = Vocabulary()
        group = pack_group([row], run, vocabulary)
        index["vocabulary"] = [list(token) for token in vocabulary.tokens]
        page = Page(render(title, index, [group], title))
        assert page.tags == plain.tags
        assert json.loads(page.scripts[0]) == index
        ((found,), arrays) = unpack_group(page.scripts[1])
        assert texts(found, arrays, index) == row["tokens"]

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Findings, and the command


# A source pays for it each time
PHRASE_TEXT = "so it is right "
PHRASE = tiny_tokenizer().encode(PHRASE_TEXT)


def exploited(tiny_model, folder, **config):
    """A run of 6 steps in which the phrase spreads, and outcomes stay."""
    completions = []
    for step in range(6):
        for row in range(4):
            repeats = 1 if row == 0 else 1 + step
            completions.append([4 + (7 * step + 3 * row) % 10, *PHRASE * repeats, EOS])
    rows = FixedCompletions([[5, 6]] * 24, completions)

    def pays_phrase(completion_ids, **columns):
        ends = [list(range(len(PHRASE), len(ids), len(PHRASE))) for ids in completion_ids]
        return [StepRewards(of_one, [1.0] * len(of_one)) for of_one in ends]

    def is_right(row, **columns):
        return [float(number % 4 == 0) for number in row]

    return credit_of(
        tiny_model,
        folder,
        [pays_phrase, is_right],
        rows,
        **{"per_device_train_batch_size": 4, "max_steps": 6, "max_completion_length": 128} | config,
    )


def test_a_planted_exploit_is_found_and_linked(tiny_model, tmp_path):
    trainer, _ = exploited(tiny_model, tmp_path)
    trainer.save_state()
    main([str(tmp_path)])
    page = Page((tmp_path / "credit.html").read_text(encoding="utf-8"))
    index = json.loads(page.scripts[0])
    gaming = {finding["title"]: finding for finding in index["findings"] if finding["kind"] == "gaming"}
    assert set(gaming) == {"A phrase is repeated", "More steps, no better outcomes"}
    assert index["findings"][0]["kind"] == "gaming", "first on the page"
    assert "pays_phrase: 1.4 steps" in gaming["More steps, no better outcomes"]["text"]
    _, mode, step, group, completion, token = gaming["A phrase is repeated"]["link"].split("/")
    (entry,) = [entry for entry in index["steps"] if [entry["mode"], str(entry["step"])] == [mode, step]]
    rows, arrays = unpack_group(page.scripts[1 + entry["groups"][int(group)]["blob"]])
    assert "".join(texts(rows[int(completion)], arrays, index)[int(token) :]).startswith(PHRASE_TEXT * 5)
    assert repr(PHRASE_TEXT) in gaming["A phrase is repeated"]["text"]
    disagree = [finding for finding in index["findings"] if finding["title"] == "Sources disagree"]
    assert len(disagree) == 1
    # The trainer's log, which the run's folder holds, has the curve of the last step
    curve = {entry["name"]: entry["points"] for entry in index["curves"]}["rewards/pays_phrase/steps"]
    assert curve[-1] == [6, pytest.approx(trainer.state.log_history[5]["rewards/pays_phrase/steps"])]


def test_an_honest_run_has_no_sign_of_gaming(tiny_model, tmp_path):
    credit_of(tiny_model, tmp_path, max_steps=3)
    page, _ = page_of_run(tmp_path)
    findings = json.loads(Page(page).scripts[0])["findings"]
    assert [finding for finding in findings if finding["kind"] == "gaming"] == []
    assert {"Unjudged completions", "Unscored steps"} <= {finding["title"] for finding in findings}


def test_the_command_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="log_credit=2"):
        main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"trl_grpo_ext\[report\]"):
        render("run", {}, [], "")


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_the_sum_of_a_linked_token_and_runs_nothing_of_the_run(tiny_model, tmp_path):
    exploited(tiny_model, tmp_path, trainer_class=RecordingExtTrainer)
    (first, *_) = read_credit(tmp_path).steps
    rows = first.rows()
    hostile = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script>"
    rows[2]["tokens"][3] = hostile
    vocabulary = Vocabulary()
    group = pack_group(rows, first.settings, vocabulary)
    index = {
        "sources": ["pays_phrase", "is_right"],
        "vocabulary": vocabulary.tokens,
        "steps": [
            {
                "mode": "train",
                "step": 1,
                "settings": first.settings,
                "groups": [
                    {"group": 0, "blob": 0, "prompt": hostile, "completions": 4, "rewards": [1, 0], "strongest": 1}
                ],
            }
        ],
        "curves": [],
        "findings": [],
    }
    path = tmp_path / "credit.html"
    path.write_text(render("run", index, [group], hostile), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"{path.as_uri()}#/train/1/0/2/5", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>Credit of run</title>" in shown
    assert "&lt;img src=x onerror=" in shown and "<img" not in shown
    why = shown[shown.index('<aside id="why"') : shown.index("</aside>")]
    assert f"Advantage {rows[2]['advantages'][5]:.6g}".replace("-", "−")[:16] in why
    assert "pays_phrase" in why and "adds up to" not in why
