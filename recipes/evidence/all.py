"""
All experiments, one after the other. Rows that are there already are not run again.

    cd recipes && python -m evidence.all --model_name_or_path FOLDER_OF_SMOLLM2
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from trl import TrlParser

from evidence import gaming, kl_budget, kl_estimators, reward_orders, supervision
from evidence.runs import HERE, EvidenceArguments


@dataclass
class AllArguments:
    """What all experiments understand; each script has more."""

    model_name_or_path: str = field(
        default=kl_estimators.KLArguments.model_name_or_path, metadata={"help": "SmolLM2: a Hub id or a folder."}
    )
    results: str = field(default=str(HERE), metadata={"help": "Folder of CSV files and figures."})
    seeds: list[int] | None = field(default=None, metadata={"help": "By default each experiment's own."})
    max_steps: int | None = field(default=None, metadata={"help": "By default each experiment's own."})


def main(args: AllArguments) -> None:
    """Run each script's `main`."""
    torch.set_num_threads(1)
    given: dict[str, Any] = {"results": args.results, "seeds": args.seeds, "max_steps": args.max_steps}
    given = {name: value for name, value in given.items() if value is not None}
    supervision.main(replace(EvidenceArguments(), **given))
    gaming.main(replace(gaming.GamingArguments(), **given))
    kl_budget.main(replace(EvidenceArguments(), **given))
    reward_orders.main(replace(EvidenceArguments(), **given))
    kl_estimators.main(replace(kl_estimators.KLArguments(), model_name_or_path=args.model_name_or_path, **given))


if __name__ == "__main__":
    main(*TrlParser(AllArguments).parse_args_and_config())
