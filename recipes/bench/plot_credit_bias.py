"""
Figure of the certificate: each estimator's share of the policy gradient in every decision process.

    python recipes/bench/plot_credit_bias.py recipes/bench/credit_bias.csv credit_bias.svg

The first file is what `credit_bias.py --csv` writes; the second may also end in .png or .pdf. Shown are undiscounted
updates that are not divided by a standard deviation. A share beyond the axis is written at its edge.
"""

import csv
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


METHODS = {
    ("position", "leave_one_out"): "position, leave_one_out",
    ("position", "all"): "position, all",
    ("position", "active"): "position, active",
    ("pooled", ""): "pooled",
    ("step", ""): "step",
    ("min", ""): "min",
}
# Of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ["#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73"]
MARKERS = ["|", "o", "s", "^", "v", "D"]
LOWEST = -1.6
HIGHEST = 1.6


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are shown."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        row
        for row in rows
        if (row["scale"], row["aggregation"], row["gamma_unit"]) == ("none", "sum_then_normalize", "token")
        and row["gamma"] != "0.9"
        and row["share"] != "nan"
        and (row["estimator"], row["baseline"]) in METHODS
    ]


def figure(rows: list[dict[str, str]]) -> Figure:
    """A line for each process, on it a mark for each estimator."""
    # The same picture has the same bytes
    matplotlib.rcParams["svg.hashsalt"] = "credit_bias"
    processes = list(dict.fromkeys(row["process"] for row in rows))
    result = Figure(figsize=(10, 0.3 * len(processes) + 1.5), layout="constrained")
    axes = result.subplots()
    for line in range(len(processes)):
        axes.axhline(line, color="#dddddd", linewidth=0.8, zorder=0)
    for (method, label), colour, marker in zip(METHODS.items(), COLOURS, MARKERS, strict=True):
        own = [row for row in rows if (row["estimator"], row["baseline"]) == method]
        shares = [float(row["share"]) for row in own]
        lines = [processes.index(row["process"]) for row in own]
        inside = [min(max(share, LOWEST), HIGHEST) for share in shares]
        size = 130 if marker == "|" else 26
        axes.scatter(inside, lines, size, colour, marker=marker, label=label, alpha=0.9, clip_on=False, zorder=3)
        for share, line in zip(shares, lines, strict=True):
            if not LOWEST <= share <= HIGHEST:
                edge = HIGHEST if share > 0 else LOWEST
                axes.text(edge * 0.95, line, f"{share:.1f}", va="center", ha="center", fontsize=7)
    axes.axvline(1, color="#888888", linewidth=0.8, zorder=1)
    axes.axvline(0, color="#888888", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_yticks(range(len(processes)), processes, fontsize=8)
    axes.set_xlim(LOWEST, HIGHEST)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("share of the policy gradient in the expected update; 1 is unbiased")
    result.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return result


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure(read(source)).savefig(target, dpi=120, metadata=metadata)


if __name__ == "__main__":
    main()
