"""
Sum the sources, then normalise, or the other way round: with sources of the same and of another scale.

    cd recipes && python -m evidence.reward_orders

The sources are the quickstart's, one for the steps and one for the answer. In half of the arms the answer is given in
points out of a hundred, so that the rewards of one source are a hundred times those of the other.
"""

from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from quickstart import judge_answer, judge_steps
from trl import TrlParser

from evidence.figures import Rows, dots, print_arms, save_figure
from evidence.runs import EvidenceArguments, read, run_arms


def points(prompts: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
    """Outcome source: 100 for a right answer, else 0."""
    return [100 * reward for reward in judge_answer(prompts, completion_ids)]


SHARED = {"supervision": "process", "gamma": 0.8, "learning_rate": 3e-5}
ORDERS = ("sum_then_normalize", "normalize_then_sum")
SOURCES = {"answer 0 or 1": judge_answer, "answer 0 or 100": points}
BASE = "sum_then_normalize, answer 0 or 1"
# Settings and the source of the answer
ARMS = {
    f"{order}, {name}": (SHARED | {"multi_objective_aggregation": order}, source)
    for name, source in SOURCES.items()
    for order in ORDERS
}


def figure(rows: Rows) -> Figure:
    """Held-out accuracy that every arm gains."""
    return dots(rows, "accuracy", "right answers on held-out problems: points gained by GRPO", scale=100)


def main(args: EvidenceArguments) -> None:
    """The runs, the table and the figure."""
    path = Path(args.results) / "reward_orders.csv"
    for seed in args.seeds:
        for arm, (settings, source) in ARMS.items():
            run_arms(replace(args, seeds=[seed]), path, {arm: settings}, reward_funcs=(judge_steps, source))
    rows = read(path)
    print_arms(rows, ["accuracy", "right_steps"], base=BASE)
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(EvidenceArguments).parse_args_and_config())
