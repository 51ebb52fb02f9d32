"""
Two turns: a small policy learns to call a calculator and to use what it says. Offline, on a CPU, in minutes.

    pip install -e ".[recipes]" && python recipes/calculator.py

The task: asked `a=7,b=3,c=5,d=4:b*c+a`, the policy calls `calculator(expression=3*5+7)`, is told `22`, and answers
with the sum of the digits, `4`. TRL's own loop, `tools=[calculator]`, runs the calls. A right call can be followed by
a wrong answer, and a wrong call by the right answer, by luck. The policy, a Llama of 0.2 million parameters, is first
fine-tuned on worked solutions until nearly half of its answers are right. Then GRPO trains it.

The question: does it matter where the rewards are placed? [`METHODS`] lists what is compared. All methods but the last
have the same two judgements, 1 for a right call and 1 for a right answer:

1. The judgement of the call on the call's last token, that of the answer on the last token (two ways of comparing).
2. Their sum as one number for all tokens of the completion.
3. The judgement of the answer alone.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
import trl
from csv_rows import append
from datasets import Dataset
from running_sums.training import SumsArguments, start_process, training_settings
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import TrlParser
from two_turns.policy import WARM_UP_BATCH, Score, evaluate, warm_up
from two_turns.task import (
    MAX_COMPLETION_LENGTH,
    TOKENIZER,
    Message,
    Problems,
    calculator,
    is_right_answer,
    is_right_call,
    question,
    split_problems,
)

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, TurnRewards


def judge_call(problem: list[str], completions: list[list[Message]], **columns) -> list[TurnRewards]:
    """Turn source: a reward on the first turn, 1 if it calls the calculator with the right expression, else 0."""
    rewards = []
    for asked, completion in zip(problem, completions, strict=True):
        # Each message of the policy is a turn. The second one, the answer, is the other source's
        num_turns = [message["role"] for message in completion].count("assistant")
        rewards.append(TurnRewards([float(is_right_call(asked, completion)), *[None] * (num_turns - 1)]))
    return rewards


judge_call.reduce = "sum"  # Under outcome supervision: the turns' rewards become one number


def judge_answer(problem: list[str], completions: list[list[Message]], **columns) -> list[float]:
    """Outcome source: a reward for the whole completion, 1 if its last message is the right answer, else 0."""
    return [float(is_right_answer(asked, completion)) for asked, completion in zip(problem, completions, strict=True)]


# Where the same two judgements are placed. With gamma 1 nothing is discounted between the turns. The learning rates
# are the best of `two_turns/grid.csv`
METHODS: dict[str, dict[str, Any]] = {
    # MT-GRPO (arXiv 2505.11821): each turn's rewards compared with those of the same turn of the other completions
    "turns, by step": {
        "supervision": "process",
        "advantage_estimator": "step",
        "gamma": 1.0,
        "gamma_unit": "turn",
        "learning_rate": 2e-4,
    },
    # The return from each token on, compared with the other completions' at the same token
    "turns, by position": {
        "supervision": "process",
        "position_baseline": "leave_one_out",
        "gamma": 1.0,
        "gamma_unit": "turn",
        "learning_rate": 2e-4,
    },
    # TRL's own: one advantage for all tokens of a completion, from the sum of both rewards, or from the answer alone
    "sum per completion": {"supervision": "outcome", "learning_rate": 4e-4},
    "answer only": {"supervision": "outcome", "reward_weights": [0.0, 1.0], "learning_rate": 4e-4},
}


@dataclass
class CalculatorArguments(SumsArguments):
    """What to compare, for how long, and where to write."""

    output_dir: str = field(default="outputs/calculator", metadata={"help": "Folder of the trainer."})
    max_steps: int = field(default=80, metadata={"help": "GRPO updates."})
    num_prompts: int = field(default=8, metadata={"help": "Problems per GRPO update."})
    num_held_out: int = field(default=256, metadata={"help": "Problems to evaluate on."})
    warmup_steps: int = field(default=400, metadata={"help": "Most updates of the supervised warm-up."})
    evaluation_steps: int = field(default=20, metadata={"help": "GRPO updates from one evaluation to the next."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Names in METHODS."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each is a warm-up, then all methods."})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Train each method with each of these, in place of its own."}
    )
    csv: str | None = field(default=None, metadata={"help": "File that rows are added to, after each run."})


class Evaluations(TrainerCallback):
    """Evaluates the policy on held-out problems before the training and every few updates."""

    def __init__(self, problems: list[str], every: int):
        self.problems = problems
        self.every = every
        self.scores: dict[int, Score] = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.scores[0] = evaluate(model, self.problems)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            self.scores[state.global_step] = evaluate(model, self.problems)


def make_trainer(
    args: CalculatorArguments,
    method: str,
    policy: LlamaForCausalLM,
    problems: list[str],
    learning_rate: float | None = None,
) -> GRPOExtTrainer:
    """
    A trainer that uses TRL's tool loop.

    Args:
        args (`CalculatorArguments`):
            Lengths and batch sizes.
        method (`str`):
            A key of [`METHODS`].
        policy (`LlamaForCausalLM`):
            Is trained in place.
        problems (`list[str]`):
            To train on.
        learning_rate (`float`, *optional*):
            In place of the method's own.
    """
    settings = training_settings(args) | {"max_completion_length": MAX_COMPLETION_LENGTH} | METHODS[method]
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    return GRPOExtTrainer(
        model=policy,
        processing_class=TOKENIZER,
        reward_funcs=[judge_call, judge_answer],
        args=GRPOExtConfig(max_tool_calling_iterations=1, disable_tqdm=True, **settings),
        train_dataset=Dataset.from_dict({"prompt": [question(problem) for problem in problems], "problem": problems}),
        tools=[calculator],
    )


def generated_tokens(trainer: GRPOExtTrainer) -> list[int]:
    """Tokens that the policy has written after each number of updates, 0 included; what the tool says not counted."""
    per_update = trainer.args.per_device_train_batch_size
    name = "completions/mean_length"
    lengths = [entry[name] for entry in trainer.state.log_history if name in entry]
    return [0, *(round(tokens) for tokens in accumulate(per_update * length for length in lengths))]


def run(
    args: CalculatorArguments,
    method: str,
    policy: LlamaForCausalLM,
    problems: Problems,
    learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Train a copy of the policy as [`make_trainer`] says, and return a row for each evaluation."""
    trainer = make_trainer(args, method, copy.deepcopy(policy), problems.grpo, learning_rate)
    trainer.remove_callback(PrinterCallback)
    evaluations = Evaluations(problems.held_out, args.evaluation_steps)
    trainer.add_callback(evaluations)
    start = time.perf_counter()
    trainer.train()
    tokens = generated_tokens(trainer)
    run_columns = {"method": method, "learning_rate": trainer.args.learning_rate, "seed": args.seed}
    context = {"seconds": round(time.perf_counter() - start, 1), "trl": trl.__version__, "torch": torch.__version__}
    return [
        run_columns | {"update": update, "tokens": tokens[update]} | score._asdict() | context
        for update, score in evaluations.scores.items()
    ]


def print_run(rows: list[dict[str, Any]]) -> None:
    """A line for a run."""
    accuracies = " -> ".join(f"{row['accuracy']:.0%}" for row in rows)
    last = rows[-1]
    name = f"seed {last['seed']}, {last['method']}, learning rate {last['learning_rate']:g}"
    print(f"{name}: accuracy {accuracies}, {last['tokens']} tokens in {last['seconds']:.0f} s", flush=True)


def main(args: CalculatorArguments) -> None:
    for seed in args.seeds:
        args = replace(args, seed=seed)
        start_process(seed)
        problems = split_problems(
            seed,
            held_out=args.num_held_out,
            validation=256,
            warm_up=args.warmup_steps * WARM_UP_BATCH,
            grpo=args.max_steps * args.num_prompts,
        )
        policy = warm_up(problems.warm_up, problems.validation, stop_at=args.warmup_accuracy)
        for method, learning_rate in product(args.methods, args.learning_rates or [None]):
            rows = run(args, method, policy, problems, learning_rate)
            print_run(rows)
            if args.csv:
                append(Path(args.csv), rows)


if __name__ == "__main__":
    main(*TrlParser(CalculatorArguments).parse_args_and_config())
