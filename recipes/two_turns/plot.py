"""
Figure of the calculator's comparison: held-out accuracy and right calls over the tokens that the policy has written.

    python recipes/two_turns/plot.py recipes/two_turns/comparison.csv comparison.svg

The first file is what `calculator.py --csv` writes; the second may also end in .png or .pdf.
"""

import csv
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


PANELS = {"accuracy": "right answers (%)", "right_calls": "right calls (%)"}  # By column
# The same file from the same rows
REPRODUCIBLE = {"svg.hashsalt": "two_turns", "svg.fonttype": "none"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(rows: list[dict[str, str]]) -> str:
    """Name of a method's curve."""
    rates = "/".join(dict.fromkeys(f"{float(row['learning_rate']):g}" for row in rows))
    return f"{rows[0]['method']} (learning rate {rates})"


def draw(axes: Axes, rows: list[dict[str, str]], column: str) -> None:
    """A method's mean over its seeds, with one standard deviation to each side."""
    updates = sorted({int(row["update"]) for row in rows})
    by_update = [[row for row in rows if int(row["update"]) == update] for update in updates]
    tokens = [mean(int(row["tokens"]) for row in at) / 1000 for at in by_update]
    values = [[100 * float(row[column]) for row in at] for at in by_update]
    means = [mean(at) for at in values]
    spread = [stdev(at) if len(at) > 1 else 0.0 for at in values]
    (line,) = axes.plot(tokens, means, marker="o", markersize=3, label=label(rows))
    low = [middle - one for middle, one in zip(means, spread, strict=True)]
    high = [middle + one for middle, one in zip(means, spread, strict=True)]
    axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def figure(rows: list[dict[str, str]]) -> Figure:
    """A panel for each of [`PANELS`], in it a curve for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    result = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, (column, text) in zip(result.subplots(1, len(PANELS), sharex=True), PANELS.items(), strict=True):
        for method in methods:
            draw(axes, [row for row in rows if row["method"] == method], column)
        axes.set(ylabel=text, xlabel="tokens that the policy has written (thousands)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    result.legend(*result.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    result.supxlabel(f"mean and standard deviation of {seeds} seeds; held-out problems, greedy decoding", fontsize=8)
    return result


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    # A date would make each file another
    metadata = {"Date": None} if target.suffix == ".svg" else None
    with rc_context(REPRODUCIBLE):
        figure(read(source)).savefig(target, dpi=150, metadata=metadata)


if __name__ == "__main__":
    main()
