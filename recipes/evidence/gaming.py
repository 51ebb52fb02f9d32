"""
A process reward model that can be gamed: how training with it collapses, and what prevents that.

    cd recipes && python -m evidence.gaming

`judge_equations` stands for such a model. It gives 0.9 to a step that is a true equation and 0.1 to any other, and
never looks at the problem. Steps that lead nowhere please it as much as those of a solution do, and each pays.
Beside it is `judge_answer`, which cannot be gamed.

The warmed-up policy hardly ever writes a step too many, and would take long to find out that it pays. It is trained
for a few more updates on solutions that repeat their last step now and then. Repeating is neither right nor wrong: the
answer counts. Completions may have twice the tokens that a solution without repetition takes.

The first seed's run of each arm leaves a log of credit, of which `python -m trl_grpo_ext.report` makes a page.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from quickstart import judge_answer
from running_sums.policy import WARM_UP_BATCH, complete, supervised_loss
from running_sums.task import (
    MAX_COMPLETION_LENGTH,
    right_answer,
    solution_steps,
    split_steps,
    text_of,
    worked_solution,
)
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import TrlParser

from evidence.figures import COLOURS, arms_of, curve, print_arms, save_figure, tidy
from evidence.runs import EvidenceArguments, Row, kept_policy, problems_of_run, read, run_arms, warmed_up
from trl_grpo_ext import StepRewards


REPETITION = 0.25
REPETITION_UPDATES = 30
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


def repeating_solution(problem: str, rng: random.Random) -> str:
    """The worked solution, its last step written again with probability 1/4, and again with probability 1/4, ..."""
    *steps, answer = solution_steps(worked_solution(problem))
    while rng.random() < REPETITION:
        steps.append(steps[-1])
    return "".join(steps) + answer


def repeating_policy(args: EvidenceArguments) -> Path:
    """Folder with the warmed-up policy of a seed, after some updates on solutions that repeat their last step."""
    policy = AutoModelForCausalLM.from_pretrained(warmed_up(args))
    # Those that the warm-up has not come to, or that it saw last
    problems = problems_of_run(args).warm_up[-REPETITION_UPDATES * WARM_UP_BATCH :]
    return kept_policy(args, "repeating", lambda: teach_to_repeat(policy, problems, random.Random(args.seed)))


def teach_to_repeat(policy: PreTrainedModel, problems: Sequence[str], rng: random.Random) -> PreTrainedModel:
    """Train a policy on solutions that repeat their last step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    for first in range(0, len(problems), WARM_UP_BATCH):
        batch = problems[first : first + WARM_UP_BATCH]
        supervised_loss(policy, batch, lambda problem: repeating_solution(problem, rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def share_of_right_answers(policy: PreTrainedModel, reference: PreTrainedModel, problems: Sequence[str]) -> Row:
    """Greedy decoding, with as many tokens as in training."""
    completions = complete(policy, problems, do_sample=False, max_new_tokens=SHARED["max_completion_length"])
    right = [right_answer(*pair) for pair in zip(problems, map(text_of, completions), strict=True)]
    return {"accuracy": sum(right) / len(right)}


SHARED: dict[str, Any] = {
    "supervision": "process",
    "gamma": 1.0,
    "learning_rate": 1e-4,
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

    max_steps: int = field(default=30, metadata={"help": "GRPO updates of a run."})
    evaluation_steps: int = field(default=10, metadata={"help": "GRPO updates from one evaluation to the next."})
    num_held_out: int = field(default=128, metadata={"help": "Problems to evaluate on."})


def runs_with_log(args: GamingArguments, path: Path) -> None:
    """The runs of all arms; the first seed's leave a log of credit each."""
    for seed in args.seeds:
        for arm, settings in ARMS.items():
            log = {"log_credit": 2, "output_dir": str(Path(args.output_dir) / f"gaming_{arm.replace(' ', '_')}")}
            own = settings | log if seed == args.seeds[0] else settings
            run_arms(
                replace(args, seeds=[seed]),
                path,
                {arm: own},
                measure=share_of_right_answers,
                reward_funcs=SOURCES,
                logged=LOGGED,
                start=repeating_policy,
            )


def figure(rows: list[dict[str, str]]) -> Figure:
    """Over the updates: right answers, steps per completion, and completions that do not end."""
    panels = {
        "accuracy": ("right answers on held-out problems (%)", 100),
        "steps": ("steps per completion, sampled", 1),
        "clipped_ratio": ("completions cut at 80 tokens (%)", 100),
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
    print_arms(rows, ["accuracy", "steps", "clipped_ratio"], base=ALONE)
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(GamingArguments).parse_args_and_config())
