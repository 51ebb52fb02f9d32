"""
Process against outcome supervision, every advantage estimator and reward transform, each with its best learning rate.

    cd recipes && python -m evidence.supervision

The task and the settings are the quickstart's: running sums, `judge_steps` and `judge_answer`. Each arm tries the
learning rates of [`RATES`] on the grid's seeds. The rate with the best held-out accuracy, in the mean of these seeds,
is then used on the other seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from trl import TrlParser

from evidence.figures import Rows, dots, last_updates, print_arms, save_figure
from evidence.runs import EvidenceArguments, read, run_arms


RATES = (3e-6, 1e-5, 3e-5, 1e-4)
OUTCOME = "outcome: answer"
PROCESS = {"supervision": "process", "gamma": 0.8}
ARMS: dict[str, dict[str, Any]] = {
    OUTCOME: {"supervision": "outcome", "reward_weights": [0.0, 1.0]},
    # The same judgements as under process supervision, as one number for each completion
    "outcome: answer + sum of steps": {"supervision": "outcome"},
    "position, all": PROCESS,
    "position, active": PROCESS | {"position_baseline": "active"},
    "position, leave_one_out": PROCESS | {"position_baseline": "leave_one_out"},
    "pooled": PROCESS | {"advantage_estimator": "pooled"},
    "step": PROCESS | {"advantage_estimator": "step"},
    "min": PROCESS | {"advantage_estimator": "min"},
    "position, all; center": PROCESS | {"reward_transforms": ["center", "none"]},
    "position, all; clip": PROCESS | {"reward_transforms": ["clip", "none"]},
    "position, all; delta": PROCESS | {"reward_transforms": ["delta", "none"]},
    "position, all; progress": PROCESS | {"reward_transforms": ["progress", "none"]},
}


def best_rates(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """The learning rate with the best mean accuracy, for each arm of the grid; the smaller one of two that tie."""
    rates = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in last_updates(rows) if row["arm"] == arm]
        tried = sorted({float(row["learning_rate"]) for row in own})
        rates[arm] = max(
            tried, key=lambda rate: mean(float(row["accuracy"]) for row in own if float(row["learning_rate"]) == rate)
        )
    return rates


def figure(rows: Rows) -> Figure:
    """Held-out accuracy that every arm gains."""
    return dots(rows, "accuracy", "right answers on held-out problems: points gained by GRPO", scale=100)


def main(args: EvidenceArguments) -> None:
    """The grid, the runs with the best rates, the table and the figure."""
    grid = Path(args.results) / "supervision_grid.csv"
    path = Path(args.results) / "supervision.csv"
    for rate in RATES:
        arms = {arm: settings | {"learning_rate": rate} for arm, settings in ARMS.items()}
        run_arms(replace(args, seeds=args.grid_seeds), grid, arms)
    rates = best_rates(read(grid))
    run_arms(args, path, {arm: settings | {"learning_rate": rates[arm]} for arm, settings in ARMS.items()})
    rows = read(path)
    print_arms(rows, ["accuracy", "right_steps"], base=OUTCOME)
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(EvidenceArguments).parse_args_and_config())
