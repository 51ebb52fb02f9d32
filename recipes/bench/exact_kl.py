"""
Peak memory and time of the exact KL, forward and backward: dense log-softmax against the fused head.

    python recipes/bench/exact_kl.py [--json FILE]

The head is frozen and shared, as under LoRA, so the gradient goes to the hidden states only. The second size has four
times the tokens: the dense version's memory grows with tokens x vocabulary, the fused head's does not. Memory is what
a fresh process needs on top of its inputs, time the median of runs that alternate between the two.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_grpo_ext.fused_head import fused_token_stats
from trl_grpo_ext.kl import exact_kl


HIDDEN, VOCABULARY = 576, 49_152  # those of SmolLM2-135M
TOKENS = (512, 2_048)
RUNS = 3
MIB = 2**20


def dense(hidden, head, targets, ref_hidden):
    with torch.no_grad():
        ref_logits = ref_hidden @ head.T
    return exact_kl(hidden @ head.T, ref_logits)


def fused(hidden, head, targets, ref_hidden):
    return fused_token_stats(hidden, head, targets, ref_hidden).kl


METHODS = {"dense": dense, "fused": fused}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device=device())
    head = torch.randn(VOCABULARY, HIDDEN, device=device()).div_(HIDDEN**0.5)  # a second copy would raise the peak
    targets = torch.zeros(tokens, dtype=torch.long, device=device())
    return hidden.requires_grad_(), head, targets, hidden.detach() + 0.1


def run(method: str, arguments: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    METHODS[method](*arguments).sum().backward()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes() -> int:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_memory(method: str, tokens: int) -> int:
    """Bytes over those of the inputs; only meaningful in a process that has done nothing else."""
    hidden, head, targets, ref_hidden = arguments = inputs(tokens)
    run(method, (hidden[:1], head, targets[:1], ref_hidden[:1]))  # what libraries allocate once
    before = peak_bytes()
    run(method, arguments)
    return peak_bytes() - before


def extra_memory_in_fresh_process(method: str, tokens: int) -> int:
    command = [sys.executable, __file__, "--cell", method, str(tokens)]
    # A fixed threshold makes glibc return freed tiles at once, so that the peak is that of the tensors alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def measure() -> list[dict]:
    cells = [{"method": method, "tokens": tokens} for tokens in TOKENS for method in METHODS]
    # Before anything is allocated here: a new process inherits its parent's peak
    for cell in track(cells, description="memory"):
        cell["extra_mib"] = extra_memory_in_fresh_process(cell["method"], cell["tokens"]) / MIB
        cell["logits_mib"] = cell["tokens"] * VOCABULARY * 4 / MIB
        cell["seconds"] = []
    for tokens in track(TOKENS, description="time"):
        arguments = inputs(tokens)
        for _ in range(RUNS):
            for cell in (cell for cell in cells if cell["tokens"] == tokens):
                cell["seconds"].append(run(cell["method"], arguments))
    return cells


def machine() -> dict:
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vocabulary": VOCABULARY,
        "hidden": HIDDEN,
        "dtype": "float32",
    }


def table(context: dict, cells: list[dict]) -> Table:
    result = Table(
        title="Exact KL, forward and backward: memory beyond the inputs, and time",
        caption=", ".join(f"{k} {v}" for k, v in context.items()),
    )
    for column in ("tokens", "logits, MiB", "method", "peak, MiB", "median, s", "min, s", "max, s"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for cell in cells:
        seconds = cell["seconds"]
        result.add_row(
            str(cell["tokens"]),
            f"{cell['logits_mib']:.0f}",
            cell["method"],
            f"{cell['extra_mib']:.0f}",
            *(f"{statistic(seconds):.2f}" for statistic in (statistics.median, min, max)),
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the exact KL: peak memory and time.")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(extra_memory(arguments.cell[0], int(arguments.cell[1])))
        return
    cells = measure()
    context = machine()
    Console().print(table(context, cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(context | {"cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
