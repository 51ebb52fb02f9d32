"""
Time and peak memory of a whole GRPO step: TRL's trainer with its sampled KL against this package's with the exact KL.

    python recipes/bench/step.py [--model FOLDER_OR_ID] [--dtype bfloat16] [--json FILE] [--csv FILE]

LoRA of rank 16 on all linear layers of a model of SmolLM2-135M's shape, with random weights unless `--model` names
others. Every prompt has the same number of tokens, and so has every completion, so that both trainers do the same work
up to the loss. Measured for `num_iterations` 1 and 4: seconds per optimizer step with generation shared among the
steps that it is for, the same without generation (scoring, loss, gradient, update), and what a fresh process needs on
top of the trainer. Runs alternate between the trainers in one process; ratios are to TRL's of the same round.
"""

import argparse
import tempfile
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from measuring import Row, alternate, device, extra_mib, in_fresh_process, now, parser, ratios, row, table, write
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer


SMOLLM2_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
WORD = "and"  # A token of its own in most tokenizers
TRL = "k3, TRL"
OURS = "exact, trl_grpo_ext"
METHODS: dict[str, tuple[type[GRPOTrainer], type[GRPOConfig], dict[str, Any]]] = {
    TRL: (GRPOTrainer, GRPOConfig, {}),
    OURS: (GRPOExtTrainer, GRPOExtConfig, {"kl_estimator": "exact"}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Trainers


def tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """That of a model, or one that knows a single word."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, WORD: 2}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def policy(name: str | None, dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    config = LlamaConfig(**SMOLLM2_135M, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def mean_token_id(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that costs nothing and differs between completions."""
    return [fmean(ids) for ids in completion_ids]


class Seconds(NamedTuple):
    """Of an optimizer step."""

    step: float
    without_generation: float


class Stopwatch(TrainerCallback):
    """Sums up the time of optimizer steps, and that of the generation within them."""

    def __init__(self):
        self.steps = self.generation = self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += now() - self.start

    def watch_generation(self, model: Any) -> None:
        generate = model.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            output = generate(*args, **kwargs)
            self.generation += now() - start
            return output

        model.generate = timed


class Run:
    """A trainer that takes its steps for one generated batch whenever it is called."""

    def __init__(self, method: str, num_iterations: int, options: argparse.Namespace):
        trainer_class, config_class, settings = METHODS[method]
        self.stopwatch = Stopwatch()
        self.num_iterations = num_iterations
        args = config_class(
            beta=0.04,
            num_iterations=num_iterations,
            max_steps=num_iterations,
            per_device_train_batch_size=options.prompts * options.generations,
            num_generations=options.generations,
            max_completion_length=options.completion_tokens,
            generation_kwargs={"min_new_tokens": options.completion_tokens},
            gradient_checkpointing=options.gradient_checkpointing,
            lr_scheduler_type="constant",
            bf16=options.dtype == "bfloat16",
            use_cpu=device().type == "cpu",
            output_dir=tempfile.gettempdir(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        self.trainer = trainer_class(
            policy(options.model, options.dtype),
            reward_funcs=mean_token_id,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [" ".join([WORD] * options.prompt_tokens)] * options.prompts}),
            processing_class=tokenizer(options.model),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.stopwatch],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.stopwatch.watch_generation(self.trainer.model)

    def __call__(self) -> Seconds:
        self.stopwatch.steps = self.stopwatch.generation = 0.0
        self.trainer.train()
        steps = self.stopwatch.steps
        generation = self.stopwatch.generation
        return Seconds(steps / self.num_iterations, (steps - generation) / self.num_iterations)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def extra_memory(method: str, num_iterations: int, options: argparse.Namespace) -> float:
    """MiB over those of the built trainer."""
    return extra_mib(Run(method, num_iterations, options))


def measure(options: argparse.Namespace) -> list[Row]:
    cells = [(method, iterations) for iterations in options.num_iterations for method in METHODS]
    memory = {cell: in_fresh_process(extra_memory, *cell, options) for cell in track(cells, "memory")}
    names = ("prompts", "generations", "prompt_tokens", "completion_tokens", "gradient_checkpointing", "dtype")
    about = {"model": options.model or "SmolLM2-135M's shape"} | {name: vars(options)[name] for name in names}
    rows = []
    for iterations in options.num_iterations:
        runs = alternate({method: Run(method, iterations, options) for method in METHODS}, options.runs)
        for method in METHODS:
            add = partial(row, method=method, num_iterations=iterations, **about)
            for what, of in (("step", 0), ("without generation", 1)):
                own, base = ([one[of] for one in runs[name]] for name in (method, TRL))
                rows += [add(what, "s", own), add(what, "x TRL", ratios(own, base))]
            own, base = ([memory[name, iterations]] for name in (method, TRL))
            rows += [add("extra memory", "MiB", own), add("extra memory", "x TRL", ratios(own, base))]
    return rows


def main() -> None:
    options = parser("Benchmark of a GRPO step: time and peak memory.", runs=3)
    options.add_argument("--model", help="folder or Hub id; by default random weights of SmolLM2-135M's shape")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--num_iterations", type=int, nargs="+", default=[1, 4])
    options.add_argument("--prompts", type=int, default=2)
    options.add_argument("--generations", type=int, default=4)
    options.add_argument("--prompt_tokens", type=int, default=64)
    options.add_argument("--completion_tokens", type=int, default=128)
    options.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    arguments = options.parse_args()
    rows = measure(arguments)
    Console().print(table("A GRPO step", rows, ("num_iterations", "method")))
    write(rows, arguments)


if __name__ == "__main__":
    main()
