"""What the experiments share of tables and figures: a mark for each seed, mean and standard deviation over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


Rows = Sequence[Mapping[str, str]]
# Of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The same file from the same rows, with texts that can be searched
REPRODUCIBLE = {"svg.hashsalt": "evidence", "svg.fonttype": "none"}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def last_updates(rows: Rows) -> list[Mapping[str, str]]:
    """The rows of the last evaluation."""
    last = max(int(row["update"]) for row in rows)
    return [row for row in rows if int(row["update"]) == last]


def arms_of(rows: Rows) -> dict[str, list[Mapping[str, str]]]:
    """Rows by arm, in the order of the file's first seed."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, with ddof 1; 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def by_seed(rows: Rows, column: str) -> dict[str, float]:
    return {row["seed"]: float(row[column]) for row in rows}


def differences(rows: Rows, base: Rows, column: str) -> list[float]:
    """What each seed has more than the same seed of another arm."""
    there = by_seed(base, column)
    return [value - there[seed] for seed, value in by_seed(rows, column).items() if seed in there]


def plus_minus(values: Sequence[float], digits: str = "z.3f", sign: str = "") -> str:
    """`mean ± standard deviation`; with the sign `+`, a mean above 0 has one."""
    return f"{mean(values):{sign}{digits}} ± {spread(values):{digits}}"


def table_of_arms(rows: Rows, columns: Sequence[str], base: str | None = None) -> list[list[str]]:
    """
    Head and lines of a table: an arm for each line, mean ± standard deviation over seeds after the last update.

    Args:
        rows (`Rows`):
            Of a CSV file.
        columns (`Sequence[str]`):
            Columns to show.
        base (`str`, *optional*):
            Arm that the others are compared with, seed by seed, in the first column.
    """
    arms = arms_of(last_updates(rows))
    versus = [f"{columns[0]} minus `{base}`", "seeds above it"] if base else []
    lines = [["arm", "learning rate", "seeds", *columns, *versus]]
    for arm, own in arms.items():
        rates = "/".join(dict.fromkeys(row["learning_rate"] for row in own))
        line = [arm, rates, str(len(own))]
        line += [plus_minus(list(by_seed(own, column).values())) for column in columns]
        if base:
            more = differences(own, arms[base], columns[0])
            line += [plus_minus(more, sign="+"), f"{sum(value > 0 for value in more)}/{len(more)}"]
        lines.append(line)
    return lines


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print a table whose first line is its head, as the README has it."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    print("\n".join([head, "|---" * len(lines[0]) + "|", *rest]), flush=True)


def print_arms(rows: Rows, columns: Sequence[str], base: str | None = None) -> None:
    """Print [`table_of_arms`]."""
    print_table(table_of_arms(rows, columns, base))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def tidy(axes: Axes) -> None:
    """Grid lines, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def gains(rows: Rows, column: str) -> dict[str, list[float]]:
    """What each seed has more after the last update than before GRPO, for each arm."""
    before = {row["seed"]: float(row[column]) for row in rows if int(row["update"]) == 0}
    arms = arms_of(last_updates(rows))
    return {arm: [float(row[column]) - before[row["seed"]] for row in own] for arm, own in arms.items()}


def dots(rows: Rows, column: str, label: str, scale: float = 1) -> Figure:
    """The [`gains`]: a line for each arm, a dot for each seed, a bar at the mean."""
    found = {arm: [scale * gain for gain in own] for arm, own in gains(rows, column).items()}
    result = Figure(figsize=(8, 0.36 * len(found) + 1.4), layout="constrained")
    axes = result.subplots()
    for line, values in enumerate(found.values()):
        middle = mean(values)
        axes.scatter(values, [line] * len(values), 22, COLOURS[0], alpha=0.55, linewidths=0, zorder=3)
        axes.scatter([middle], [line], 230, COLOURS[1], marker="|", linewidths=2, zorder=4)
        axes.plot([middle - spread(values), middle + spread(values)], [line, line], color=COLOURS[1], linewidth=1.5)
        at_the_edge = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f"{middle:+.1f} ± {spread(values):.1f}", (1.01, line), **at_the_edge)
    axes.axvline(0, color="#888888", linestyle=":", linewidth=1, zorder=1)
    arms = arms_of(last_updates(rows))
    rates = {arm: "/".join(dict.fromkeys(f"{float(row['learning_rate']):g}" for row in arms[arm])) for arm in found}
    axes.set_yticks(range(len(found)), [f"{arm}  ({rate})" for arm, rate in rates.items()], fontsize=9)
    axes.set_ylim(len(found) - 0.5, -0.5)
    tidy(axes)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    seeds = len({row["seed"] for row in rows})
    result.supxlabel(
        f"dots: {seeds} seeds; bar: mean ± standard deviation over seeds; in brackets: learning rate", fontsize=8
    )
    return result


def curve(axes: Axes, rows: Rows, x: str, y: str, label: str, colour: str, scale: float = 1) -> None:
    """An arm's mean over its seeds at each value of a column, with one standard deviation to each side."""
    places = sorted({float(row[x]) for row in rows})
    values = [[scale * float(row[y]) for row in rows if float(row[x]) == place] for place in places]
    means = [mean(at) for at in values]
    axes.plot(places, means, marker="o", markersize=3, color=colour, label=label)
    low = [middle - spread(at) for middle, at in zip(means, values, strict=True)]
    high = [middle + spread(at) for middle, at in zip(means, values, strict=True)]
    axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; an SVG file of the same rows has the same bytes."""
    with rc_context(REPRODUCIBLE):
        # A date would make each file another
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
