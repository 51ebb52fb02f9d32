"""
Figure of the exact KL's benchmark: time over the bare matrix products and extra memory, by method, size and head.

    python recipes/bench/plot.py recipes/bench/exact_kl.csv exact_kl.png

The first file is what `exact_kl.py --csv` writes; the second may also end in .svg or .pdf.
"""

import csv
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


PANELS = {"x floor": "time / bare matrix products", "MiB": "extra memory, MiB"}  # By unit
BAR = 0.16  # Of the distance between two groups


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(axes: Axes, rows: list[dict[str, str]]) -> None:
    """A group of bars for each size and head, in it a bar for each method."""
    groups = list(dict.fromkeys((row["size"], row["head"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        places = [groups.index((row["size"], row["head"])) + (number - (len(methods) - 1) / 2) * BAR for row in own]
        axes.bar(places, [float(row["median"]) for row in own], BAR, label=method)
    axes.set_xticks(range(len(groups)), [f"{size}\n{head} head" for size, head in groups], fontsize=8)


def figure(rows: list[dict[str, str]]) -> Figure:
    result = Figure(figsize=(11, 4), layout="constrained")
    for axes, (unit, label) in zip(result.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        draw(axes, [row for row in rows if row["unit"] == unit])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    result.legend(*result.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    result.supxlabel(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}", fontsize=8)
    return result


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    figure(read(source)).savefig(target, dpi=150)


if __name__ == "__main__":
    main()
