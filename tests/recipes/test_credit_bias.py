"""The certificate of the estimators: its policy gradient, what is known on paper, and the committed table."""

import csv
import math
from pathlib import Path

import credit_bias
import plot_credit_bias
import pytest
import torch
from credit_bias import METHODS, PROCESSES, Setting


CSV = Path(credit_bias.__file__).with_suffix(".csv")
UNDIVIDED = ("none", "sum_then_normalize", 1.0, "token")
ALWAYS_JUDGED = [name for name in PROCESSES if "fails" not in name and name != "no spread"]


def share(name: str, estimator: str, baseline: str = "", **changed) -> float:
    process = PROCESSES[name]._replace(**changed)
    return credit_bias.certify(process, Setting(estimator, baseline, *UNDIVIDED)).share


@pytest.mark.parametrize("name", PROCESSES)
def test_the_policy_gradient_is_the_derivative_of_the_expected_return(name):
    process = PROCESSES[name]._replace(gammas=None)
    choices = {token.choice for row, _ in process.completions for token in row if token.choice}
    logits = {
        node: torch.tensor(process.logits.get(node, [0.0, 0.0]), dtype=torch.float64, requires_grad=True)
        for node in sorted({node for node, _ in choices})
    }
    expected = torch.tensor(0.0, dtype=torch.float64)
    for tokens, chance in process.completions:
        probability = torch.tensor(chance, dtype=torch.float64)
        for token in tokens:
            if token.choice:
                node, action = token.choice
                probability = probability * logits[node].softmax(0)[action]
        paid = sum(
            weight * reward
            for token in tokens
            for weight, reward in zip(process.weights, token.rewards, strict=True)
            if reward is not None
        )
        expected = expected + probability * paid
    found = credit_bias.policy_gradient(process, credit_bias.listed(process), 1.0, "token")
    if name == "no spread":
        assert found.norm() < 1e-12
        return
    gradient = torch.cat(torch.autograd.grad(expected, list(logits.values())))
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


# Measured before by sampling 200,000 groups; the last one of the second row, -0.006, is within that noise of 0.019
KNOWN = {
    ("position", "all"): (0.875, 0.875, 0.875, 0.875),
    ("position", "active"): (0.763, 0.751, 0.725, 0.019),
    ("pooled", ""): (0.0, 0.173, 0.581, 11.64),
    ("step", ""): (0.0, -0.022, -0.073, -1.47),
    ("min", ""): (0.057, 0.035, 0.0, -0.944),
}


@pytest.mark.parametrize("method", KNOWN, ids=" ".join)
def test_known_shares(method):
    found = [share(name, *method) for name in list(PROCESSES)[:4]]
    assert found == pytest.approx(KNOWN[method], rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", ALWAYS_JUDGED)
def test_leaving_one_out_is_unbiased_and_including_it_costs_a_factor(name, group_size):
    assert share(name, "position", "leave_one_out", group_size=group_size) == pytest.approx(1, abs=1e-12)
    assert share(name, "position", "all", group_size=group_size) == pytest.approx(1 - 1 / group_size, abs=1e-12)


def test_a_completion_that_alone_is_judged_is_not_compared():
    found = share("a judge that fails at random", "position", "leave_one_out", group_size=3)
    assert found == pytest.approx(1 - 0.3**2, abs=1e-12)


def committed() -> list[dict[str, str]]:
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_committed_table_is_what_the_package_does():
    rows = committed()
    assert {row["process"] for row in rows} == set(PROCESSES)
    checked = 0
    for name, process in PROCESSES.items():
        theirs = [row for row in rows if row["process"] == name]
        settings = credit_bias.settings_of(process)
        assert len(theirs) == len(settings)
        for row, setting in zip(theirs, settings, strict=True):
            # Batches of two groups are many calls: only of the smallest process
            if setting.is_of_batch and name != "one token, three arms":
                continue
            if process.group_size == 8 and setting.gamma == 1:
                continue
            certificate = credit_bias.certify(process, setting)
            for column in ("share", "cosine", "size"):
                expected = float(row[column])
                found = getattr(certificate, column)
                same = math.isnan(expected) and math.isnan(found)
                assert same or found == pytest.approx(expected, rel=1e-4, abs=1e-7), (name, setting, column)
            checked += 1
    assert checked > 400 and len(METHODS) == 7


def test_the_committed_figure_shows_the_committed_table(tmp_path):
    shown = plot_credit_bias.read(CSV)
    # There is no share of a gradient that is 0
    assert {row["process"] for row in shown} == set(PROCESSES) - {"no spread"}
    plot_credit_bias.figure(shown).savefig(tmp_path / "figure.svg", metadata={"Date": None})
    drawn = [text.split("<!-- ")[1].split(" -->")[0] for text in read_text(tmp_path / "figure.svg")]
    assert drawn == [text.split("<!-- ")[1].split(" -->")[0] for text in read_text(CSV.with_suffix(".svg"))]
    assert "11.6" in drawn and "min" in drawn


def read_text(path: Path) -> list[str]:
    """The texts of a figure, which lie in comments beside their outlines."""
    return [line for line in path.read_text().splitlines() if "<!-- " in line]
