"""What the experiments share: budget, seeds, one warmed-up policy for each seed, a run, and rows in CSV files."""

import csv
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import trl
from csv_rows import append
from datasets import Dataset
from quickstart import judge_answer, judge_steps
from running_sums.policy import evaluate, save, warm_up
from running_sums.task import TOKENIZER, Problems
from running_sums.training import SumsArguments, problems_for, start_process, training_settings
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer


HERE = Path(__file__).parent
VERSIONS = {"trl": trl.__version__, "torch": torch.__version__}
Row = dict[str, Any]
# Maps the policy, its reference and held-out problems to the columns of a row
Measure = Callable[[PreTrainedModel, PreTrainedModel, Sequence[str]], Row]


@dataclass
class EvidenceArguments(SumsArguments):
    """The budget of each run, which seeds, and where to write. A twelfth of the quickstart's completions."""

    output_dir: str = field(default="outputs/evidence", metadata={"help": "Folder of warmed-up policies and runs."})
    results: str = field(default=str(HERE), metadata={"help": "Folder of CSV files and figures."})
    max_steps: int = field(default=40, metadata={"help": "GRPO updates of a run."})
    num_prompts: int = field(default=4, metadata={"help": "Problems per GRPO update."})
    evaluation_steps: int = field(default=40, metadata={"help": "GRPO updates from one evaluation to the next."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of the runs that count."})
    grid_seeds: list[int] = field(default_factory=lambda: [10], metadata={"help": "Of runs that choose a rate."})


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_done(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether the file holds rows of a run: of these columns with these values."""
    wanted = {name: str(value) for name, value in run.items()}
    return any(wanted.items() <= row.items() for row in read(path))


# ---------------------------------------------------------------------------------------------------------------------
# A run


@cache
def problems_of(seed: int, **sizes: int) -> Problems:
    """The problems of a seed: the first of them are the same for any number of updates."""
    return problems_for(SumsArguments(seed=seed, **sizes))


def problems_of_run(args: EvidenceArguments) -> Problems:
    """The problems of a run, drawn once for all its arms."""
    names = ("max_steps", "num_prompts", "num_held_out", "warmup_steps")
    values = asdict(args)
    return problems_of(args.seed, **{name: values[name] for name in names})


def kept_policy(args: EvidenceArguments, name: str, train: Callable[[], PreTrainedModel]) -> Path:
    """Folder with a policy that all arms of a seed start from, which is trained where there is none."""
    folder = Path(args.output_dir) / f"{name}_{args.seed}_{args.warmup_steps}_{args.warmup_accuracy}"
    if not folder.exists():
        start_process(args.seed)
        policy = train()
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        save(policy, unfinished)
        os.replace(unfinished, folder)
    return folder


def warmed_up(args: EvidenceArguments) -> Path:
    """Folder with the warmed-up policy of a seed."""
    problems = problems_of_run(args)
    return kept_policy(
        args, "warmed_up", lambda: warm_up(problems.warm_up, problems.validation, stop_at=args.warmup_accuracy)
    )


def shares(policy: PreTrainedModel, reference: PreTrainedModel, problems: Sequence[str]) -> Row:
    """The measure of most experiments: shares of right answers and of right steps, with greedy decoding."""
    return evaluate(policy, problems)._asdict()


class Evaluations(TrainerCallback):
    """Measures the policy on held-out problems every few updates and after the last one."""

    def __init__(self, measure: Callable[[PreTrainedModel], Row], every: int):
        self.measure = measure
        self.every = every
        self.rows: dict[int, Row] = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.rows[state.global_step] = self.measure(model)


def logged_since(log: Sequence[Row], first: int, last: int, metrics: Mapping[str, str]) -> Row:
    """Means of logged metrics over these updates, under the names of their columns."""
    means = {}
    for column, metric in metrics.items():
        # A correlation is not logged where there is nothing to correlate
        values = [entry[metric] for entry in log if first <= entry["step"] <= last and metric in entry]
        means[column] = mean(values) if values else math.nan
    return means


@cache
def measured_before(folder: Path, measure: Measure, problems: tuple[str, ...]) -> Row:
    """What all runs of a seed start from."""
    policy = AutoModelForCausalLM.from_pretrained(folder)
    return measure(policy, policy, problems)


def run(
    args: EvidenceArguments,
    settings: Mapping[str, Any],
    measure: Measure = shares,
    reward_funcs: Sequence[Callable] = (judge_steps, judge_answer),
    logged: Mapping[str, str] | None = None,
    start: Callable[[EvidenceArguments], Path] = warmed_up,
) -> list[Row]:
    """
    Train the policy that all arms of a seed start from, with the quickstart's settings but for `settings`.

    Args:
        args ([`EvidenceArguments`]):
            Budget and seed.
        settings (`Mapping[str, Any]`):
            Fields of [`GRPOExtConfig`].
        measure (`Measure`, *optional*):
            What is measured on the held-out problems.
        reward_funcs (`Sequence[Callable]`, *optional*):
            By default those of the quickstart.
        logged (`Mapping[str, str]`, *optional*):
            Metrics of the trainer's log to add, by column: their mean over the updates since the evaluation before.
        start (`Callable`, *optional*):
            Gives the folder of the policy to start from.

    Returns:
        `list[Row]`: a row for each evaluation, with the seconds of the whole run.
    """
    folder = start(args)
    before = measured_before(folder, measure, tuple(problems_of_run(args).held_out))
    # Same completions in all runs of a seed as long as the policies are the same, however the runs before ended
    start_process(args.seed)
    problems = problems_of_run(args)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    defaults = training_settings(args) | {"beta": 0.01, "kl_estimator": "exact", "disable_tqdm": True}
    trainer = GRPOExtTrainer(
        model=str(folder),
        processing_class=TOKENIZER,
        reward_funcs=list(reward_funcs),
        args=GRPOExtConfig(**(defaults | dict(settings))),
        train_dataset=Dataset.from_dict({"prompt": problems.grpo}),
    )
    trainer.remove_callback(PrinterCallback)
    evaluations = Evaluations(lambda policy: measure(policy, reference, problems.held_out), args.evaluation_steps)
    trainer.add_callback(evaluations)
    began = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - began, 1)
    if trainer.args.log_credit:
        trainer.save_state()
    rows = []
    for update, measured in {0: before, **evaluations.rows}.items():
        # The completions of the first update are written by the policy that all runs start from
        first = rows[-1]["update"] + 1 if rows else 1
        means = logged_since(trainer.state.log_history, first, max(update, first), logged or {})
        rows.append({"update": update, **measured, **means, "seconds": seconds})
    return rows


def run_arms(
    args: EvidenceArguments,
    path: Path,
    arms: Mapping[str, Mapping[str, Any]],
    **options: Any,
) -> None:
    """
    Run every arm with every seed, unless its rows are in the file, and add its rows.

    Args:
        args ([`EvidenceArguments`]):
            Budget and seeds.
        path (`Path`):
            CSV file.
        arms (`Mapping[str, Mapping[str, Any]]`):
            Settings of each arm, `learning_rate` among them.
        options:
            For [`run`].
    """
    for seed in args.seeds:
        for arm, settings in arms.items():
            named = {"arm": arm, "learning_rate": settings["learning_rate"], "seed": seed}
            if is_done(path, named):
                continue
            rows = run(replace(args, seed=seed), settings, **options)
            append(path, [named | row | VERSIONS for row in rows])
            print(f"{path.stem}, seed {seed}, {arm}, {settings['learning_rate']:g}: {rows[-1]}", flush=True)
