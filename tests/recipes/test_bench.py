"""The benchmarks of recipes/bench: each runs at a tiny size and writes rows that say what they are."""

import csv
import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import save_tiny_model
from trl_grpo_ext import ESTIMATORS
from trl_grpo_ext.credit.read import read_credit


BENCH = Path(__file__).parents[2] / "recipes" / "bench"
FIELDS = {"what", "unit", "median", "min", "max", "method", "dtype", "device", "threads"}
FIELDS |= {"python", "torch", "trl", "transformers"}


# In one process, so that torch is imported once, and the server that forks processes to measure memory starts once
pytestmark = pytest.mark.xdist_group("bench")


@pytest.fixture
def run(monkeypatch):
    """Run a benchmark as from the command line."""

    def run_script(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(f"recipes.bench.{name}").main()

    return run_script


@pytest.fixture
def measured(run, tmp_path):
    """The rows that a benchmark writes as JSON, which must be those of its CSV."""

    def measured_rows(name: str, *arguments: str) -> list[dict]:
        files = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "csv")}
        run(name, "--runs", "1", "--json", str(files["json"]), "--csv", str(files["csv"]), *arguments)
        rows = json.loads(files["json"].read_text())
        with files["csv"].open(newline="") as file:
            assert [float(row["median"]) for row in csv.DictReader(file)] == [row["median"] for row in rows]
        return rows

    return measured_rows


def check(rows: list[dict], sizes: set[str], quantities: set[tuple[str, str]], methods: set[str]) -> None:
    """Every quantity of every method, with its context; times and ratios of times are positive."""
    assert {(row["what"], row["unit"], row["method"]) for row in rows} == {
        (*q, m) for q in quantities for m in methods
    }
    for row in rows:
        assert row.keys() >= FIELDS | sizes
        assert 0 <= row["min"] <= row["median"] <= row["max"] < math.inf
        # A tiny tensor may fit into pages that are there already
        assert row["min"] > 0 or row["what"] in ("extra memory", "difference")


def test_exact_kl_and_its_figure(run, measured, tmp_path):
    rows = measured("exact_kl", "--sizes", "64x32x1000", "--heads", "frozen")
    quantities = {("time", "s"), ("time", "x floor"), ("extra memory", "MiB")}
    methods = {"floor", "dense", "TRL's kernels", "fused, any loss", "fused, gradient predicted"}
    check(rows, {"size", "head", "tokens", "hidden", "vocabulary"}, quantities, methods)
    assert all((row["tokens"], row["hidden"], row["vocabulary"]) == (64, 32, 1000) for row in rows)
    run("plot", str(tmp_path / "rows.csv"), str(tmp_path / "figure.svg"))
    assert "fused, gradient predicted" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_rows_for_a_gpu_run(measured, monkeypatch, dtype):
    exact_kl = importlib.import_module("recipes.bench.exact_kl")
    # In this process, where they are known
    monkeypatch.setattr(exact_kl, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(exact_kl, "METHODS", {"floor": exact_kl.floor} | exact_kl.ON_A_GPU)
    rows = measured("exact_kl", "--sizes", "8x4x50", "--heads", "trained", "--dtype", dtype, "--device", "cpu")
    assert {row["method"] for row in rows} == {"floor", *exact_kl.ON_A_GPU}
    assert {row["dtype"] for row in rows} == {dtype}


def test_the_predicted_cost_on_a_gpu(measured):
    rows = measured("exact_kl_gpu_cost")
    found = {(row["gpu"], row["head"], row["what"], row["unit"]): row["median"] for row in rows}
    for gpu in {row["gpu"] for row in rows}:
        for head, products in (("frozen", 3), ("trained", 4)):
            assert found[gpu, head, "products", "M x H x V"] == pytest.approx(products)
            assert 1 < found[gpu, head, "predicted time", "x floor"] < (1.15 if head == "frozen" else 1.2)


def test_committed_figures_can_be_drawn(run, tmp_path):
    run("plot", str(BENCH / "exact_kl.csv"), str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_advantages(measured):
    rows = measured("advantages", "--shapes", "3x70", "--batches", "16x70x2")
    of_returns, of_batches = ([row for row in rows if ("sources" in row) == yes] for yes in (False, True))
    of_copy, others = ([row for row in of_returns if (row["method"] == "copy") == yes] for yes in (True, False))
    quantities = {("time", "ms"), ("time", "x copy"), ("extra memory", "MiB")}
    check(of_copy, {"completions", "tokens"}, quantities, {"copy"})
    check(others, {"completions", "tokens"}, quantities | {("difference", "reward")}, {"loop", "discounted_returns"})
    # Returns of up to about 10, in float32
    assert all(row["max"] < 1e-5 for row in rows if row["what"] == "difference")
    cases = [*ESTIMATORS, "position, scale batch", "position, normalize_then_sum"]
    methods = {f"{case}, {how}" for case in cases for how in ("blocks", "one block")}
    quantities = {("time", "ms"), ("extra memory", "MiB"), ("extra memory", "x rewards")}
    check(of_batches, {"completions", "tokens", "sources"}, quantities, methods)


def test_reward_models(measured):
    rows = measured("reward_models", "--solutions", "2", "--longest", "80", "--completions", "2")
    scoring = [row for row in rows if row["what"] != "CPU time"]
    memory, seconds = ([row for row in scoring if row["unit"] == unit] for unit in ("MiB", "s"))
    check(memory, {"solutions", "batch_tokens"}, {("extra memory", "MiB")}, {"one padded batch", "by tokens"})
    check(seconds, {"solutions", "padded_tokens", "largest_batch"}, {("time", "s")}, {"by solutions", "by tokens"})
    steps = [row for row in rows if row["what"] == "CPU time"]
    # Of the tokenizers that are installed
    check(steps, {"completions", "tokens", "steps"}, {("CPU time", "s")}, {row["method"] for row in steps})


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "model")


def test_step(measured, tiny_model):
    options = ("--num_iterations", "2", "--prompts", "1", "--generations", "2")
    tokens = ("--prompt_tokens", "3", "--completion_tokens", "5")
    rows = measured("step", "--model", tiny_model, *options, *tokens)
    whats = ("step", "without generation", "extra memory")
    quantities = {(what, unit) for what in whats for unit in ("MiB" if what == "extra memory" else "s", "x TRL")}
    sizes = {"model", "num_iterations", "prompts", "generations", "prompt_tokens", "completion_tokens"}
    check(rows, sizes | {"gradient_checkpointing"}, quantities, {"k3, TRL", "exact, trl_grpo_ext"})
    for method in ("k3, TRL", "exact, trl_grpo_ext"):
        whole, part = (
            [r["median"] for r in rows if (r["method"], r["what"], r["unit"]) == (method, what, "s")]
            for what in whats[:2]
        )
        assert part < whole


def test_the_log_of_credit_that_is_made_up_has_a_report(run, tmp_path, capsys):
    run("credit_report", str(tmp_path), "--completions", "32", "--tokens", "50")
    assert "credit.html (0.1 MB)" in capsys.readouterr().out
    assert len(read_credit(tmp_path).steps) == 2
    assert all(row["explained"] for step in read_credit(tmp_path).steps for row in step.rows())


def test_a_training_whose_server_is_killed_ends_with_the_same_weights(tmp_path, capsys):
    measure = importlib.import_module("recipes.bench.server_outage").measure
    # As many steps as take longer than the 0.2 s within which the kill comes; a wait is reported from 2 s on
    assert measure(tmp_path, steps=24, kills=1, away=3.0)
    printed = capsys.readouterr().out
    assert "24 steps, 1 kills, away for 3 s" in printed and "12 of 12 tensors bit-equal, 12 of them moved" in printed
    # The kill was seen: the client waited, and was answered again
    assert re.search(r"waits seen by the client: \['\d+ s\.'\]", printed)
