"""
A process reward model that can be gamed: how training with it collapses, and what prevents that.

    cd recipes && python -m evidence.gaming

`judge_equations` stands for such a model. It gives 0.9 to a step that is a true equation and 0.1 to any other, and
never looks at the problem. `1+1=2;`, written again and again, pleases it as much as the steps of a solution do.
Beside it is `judge_answer`, which cannot be gamed. Completions may have twice the tokens that a solution takes.

The first seed's run of each arm leaves a log of credit, of which `python -m trl_grpo_ext.report` makes a page.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from quickstart import judge_answer
from running_sums.task import MAX_COMPLETION_LENGTH, split_steps
from trl import TrlParser

from evidence.figures import COLOURS, arms_of, curve, print_arms, save_figure, tidy
from evidence.runs import EvidenceArguments, read, run_arms
from trl_grpo_ext import StepRewards


EQUATION = re.compile(r"(\d+)([+-]\d+)=(-?\d+);")


def is_true_equation(step: str) -> bool:
    """Whether a step adds up, whatever the problem is."""
    found = EQUATION.fullmatch(step)
    return found is not None and int(found[1]) + int(found[2]) == int(found[3])


def judge_equations(completion_ids: list[list[int]], **columns) -> list[StepRewards]:
    """Process source that can be gamed: 0.9 for each step that is a true equation, 0.1 for any other step."""
    rewards = []
    for completion in completion_ids:
        steps = split_steps(completion)
        values = [0.9 if is_true_equation(step.text) else 0.1 for step in steps]
        rewards.append(StepRewards(ends=[step.end for step in steps], values=values))
    return rewards


SHARED = {
    "supervision": "process",
    "gamma": 1.0,
    # From the first update on, this rate would shake all arms alike
    "learning_rate": 2e-4,
    "warmup_steps": 10,
    "max_completion_length": 2 * MAX_COMPLETION_LENGTH,
}
SOURCES = (judge_equations, judge_answer)
ALONE = "answer alone"
ARMS: dict[str, dict[str, Any]] = {
    ALONE: SHARED | {"reward_weights": [0.0, 1.0]},
    "summed": SHARED,
    "centred": SHARED | {"reward_transforms": ["center", "none"]},
    "clipped": SHARED | {"reward_transforms": ["clip", "none"]},
    "min": SHARED | {"advantage_estimator": "min"},
    "gated": SHARED | {"outcome_gate": ["judge_answer", "none"]},
}
# Columns and the metrics that fill them
LOGGED = {
    "steps": "rewards/judge_equations/steps",
    "step_reward": "rewards/judge_equations/step_mean",
    "corr": "rewards/judge_equations/corr/judge_answer",
    "clipped_ratio": "completions/clipped_ratio",
}


@dataclass
class GamingArguments(EvidenceArguments):
    """As for the other experiments, with curves."""

    evaluation_steps: int = field(default=10, metadata={"help": "GRPO updates from one evaluation to the next."})
    num_held_out: int = field(default=128, metadata={"help": "Problems to evaluate on."})


def runs_with_log(args: EvidenceArguments, path: Path) -> None:
    """The runs of all arms; the first seed's leave a log of credit each."""
    for arm, settings in ARMS.items():
        folder = Path(args.output_dir) / f"gaming_{arm.replace(' ', '_')}"
        logged = settings | {"log_credit": 2, "output_dir": str(folder)}
        first = replace(args, seeds=args.seeds[:1])
        run_arms(first, path, {arm: logged}, reward_funcs=SOURCES, logged=LOGGED)
    others = replace(args, seeds=args.seeds[1:])
    run_arms(others, path, ARMS, reward_funcs=SOURCES, logged=LOGGED)


def figure(rows: list[dict[str, str]]) -> Figure:
    """Over the updates: right answers, steps per completion, and what the process reward model thinks of a step."""
    panels = {
        "accuracy": ("right answers on held-out problems (%)", 100),
        "steps": ("steps per completion, sampled", 1),
        "step_reward": ("mean step reward, sampled", 1),
    }
    result = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (column, (label, scale)) in zip(result.subplots(1, len(panels)), panels.items(), strict=True):
        for (arm, own), colour in zip(arms_of(rows).items(), COLOURS, strict=False):
            curve(axes, own, "update", column, arm, colour, scale)
        axes.set(xlabel="GRPO update", ylabel=label)
        tidy(axes)
    result.legend(*result.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    seeds = len({row["seed"] for row in rows})
    result.supxlabel(f"mean and standard deviation of {seeds} seeds", fontsize=8)
    return result


def main(args: EvidenceArguments) -> None:
    """The runs, the table and the figure."""
    path = Path(args.results) / "gaming.csv"
    runs_with_log(args, path)
    rows = read(path)
    print_arms(rows, ["accuracy", "steps", "step_reward"], base=ALONE)
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(GamingArguments).parse_args_and_config())
