"""
Sum the sources, then normalise, or the other way round: with sources of the same and of another scale.

    cd recipes && python -m evidence.reward_orders

The sources are the quickstart's, one for the steps and one for the answer. In half of the arms the answer is given in
points out of a hundred, so that the rewards of one source are a hundred times those of the other.
"""

from pathlib import Path
from typing import Any

from quickstart import judge_answer, judge_steps
from trl import TrlParser

from evidence.figures import dots, print_arms, save_figure
from evidence.runs import EvidenceArguments, read, run_arms


def points(prompts: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
    """Outcome source: 100 for a right answer, else 0."""
    return [100 * reward for reward in judge_answer(prompts, completion_ids)]


SHARED = {"supervision": "process", "gamma": 0.8, "learning_rate": 1e-4}
ORDERS = ("sum_then_normalize", "normalize_then_sum")
SOURCES = {"answer 0 or 1": judge_answer, "answer 0 or 100": points}
BASE = "sum_then_normalize, answer 0 or 1"


def settings_of(order: str) -> dict[str, Any]:
    return SHARED | {"multi_objective_aggregation": order}


def main(args: EvidenceArguments) -> None:
    """The runs, the table and the figure."""
    path = Path(args.results) / "reward_orders.csv"
    for name, source in SOURCES.items():
        arms = {f"{order}, {name}": settings_of(order) for order in ORDERS}
        run_arms(args, path, arms, reward_funcs=(judge_steps, source))
    rows = read(path)
    print_arms(rows, ["accuracy", "right_steps"], base=BASE)
    figure = dots(rows, "accuracy", "right answers on held-out problems (%)", scale=100)
    save_figure(figure, path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(EvidenceArguments).parse_args_and_config())
