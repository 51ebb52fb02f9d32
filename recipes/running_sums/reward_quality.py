"""How well the scores of reward models tell right from wrong, measured by exact arithmetic."""

import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from running_sums.mistakes import EQUATION, MISTAKES
from running_sums.task import EOS, NUM_OPERATIONS, right_answer, right_steps, solution_steps, worked_solution
from trl_grpo_ext import OutcomeRewardModel, ProcessRewardModel


class Quality(NamedTuple):
    """
    Scores against the truth.

    Args:
        balanced_accuracy (`float`):
            Mean of two shares: of right ones with a score above 0.5, and of wrong ones with a score of at most 0.5.
            Guessing gives 0.5, however many of the steps or solutions are right.
        auc (`float`):
            Probability that a right one scores higher than a wrong one; a tie counts half. Guessing gives 0.5.
        right_share (`float`):
            Share that is right.
        mean_score (`float`):
            Mean of the scores.
    """

    balanced_accuracy: float
    auc: float
    right_share: float
    mean_score: float


def compare(scores: Sequence[float], right: Sequence[bool]) -> Quality:
    """The quality of scores, given which of the scored steps or solutions are right."""
    values = torch.tensor(scores)
    is_right = torch.tensor(right)
    good = values[is_right]
    bad = values[~is_right]
    accuracy = ((good > 0.5).float().mean() + (bad <= 0.5).float().mean()) / 2
    auc = (good[:, None] > bad).float().mean() + (good[:, None] == bad).float().mean() / 2
    return Quality(accuracy.item(), auc.item(), is_right.float().mean().item(), values.mean().item())


def prm_quality(prm: ProcessRewardModel, problems: list[str], solutions: list[str]) -> Quality:
    """Quality of a PRM's scores over all steps of these solutions, the answers included."""
    steps = [prm.split(solution) for solution in solutions]
    scores = []
    right = []
    for problem, own_steps, own_scores in zip(problems, steps, prm.score_steps(problems, steps), strict=True):
        scores += own_scores
        right += right_steps(problem, own_steps)
    return compare(scores, right)


def orm_quality(orm: OutcomeRewardModel, problems: list[str], solutions: list[str]) -> Quality:
    """Quality of an ORM's scores of these solutions."""
    pairs = zip(problems, solutions, strict=True)
    right = [right_answer(problem, solution + EOS) for problem, solution in pairs]
    return compare(orm.score_batch(problems, solutions), right)


def caught_mistakes(prm: ProcessRewardModel, problems: list[str], rng: random.Random) -> dict[str, float]:
    """Of each kind of mistake, made after right steps, the share to which the PRM gives less than 0.5."""
    caught = {}
    for mistake in MISTAKES:
        solutions = []
        for problem in problems:
            steps = solution_steps(worked_solution(problem))[: rng.randint(1, NUM_OPERATIONS)]
            value, term, _ = EQUATION.fullmatch(steps.pop()).groups()
            solutions.append([*steps, mistake(value, term, rng)])
        scores = prm.score_steps(problems, solutions)
        caught[mistake.__name__] = fmean(own[-1] < 0.5 for own in scores)
    return caught


def print_qualities(qualities: Mapping[str, Quality]) -> None:
    """Print a row for each set of scores."""
    table = Table(title="Reward models against exact arithmetic")
    for column in ("", "balanced accuracy", "AUC", "truly right", "mean score"):
        table.add_column(column, justify="right" if column else "left")
    for name, quality in qualities.items():
        table.add_row(name, *(f"{value:.1%}" for value in quality))
    Console().print(table)
