"""
Time and peak memory of log-prob, entropy and exact KL with their gradient, as a training step needs them.

    python recipes/bench/exact_kl.py [--sizes smollm2 qwen0.5b ...] [--heads frozen trained] [--json FILE] [--csv FILE]

Compared: dense log-softmaxes; TRL's two chunked kernels, one after the other; the fused head, for any loss and for a
loss whose gradient it is told beforehand; and the floor, the matrix products alone: 3 for a frozen head (LoRA), 4 for
a trained one. Times are medians of runs that alternate between the methods in one process, and ratios to the floor of
the same round. Memory is what a fresh process needs on top of its inputs, without a trained head's own gradient.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_grpo_ext.fused_head import fused_token_stats, fused_token_stats_for_loss


# Tokens, hidden size, vocabulary
SIZES = {
    "smollm2": (1024, 576, 49_152),
    "smollm2 x2": (2048, 576, 49_152),
    "qwen0.5b": (512, 896, 151_936),
    "qwen7b": (256, 3584, 152_064),
}
VOCABULARY_CHUNK = 8192  # as TRL calls its kernel
MIB = 2**20


class Case(NamedTuple):
    """Inputs, and the gradients of the loss with respect to each token's log-prob and KL."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    ref_hidden: torch.Tensor
    g_logp: torch.Tensor
    g_kl: torch.Tensor

    def backward(self, logp: torch.Tensor, kl: torch.Tensor) -> None:
        ((logp * self.g_logp).sum() + (kl * self.g_kl).sum()).backward()

    def first(self, tokens: int) -> "Case":
        hidden, head, *rest = self
        return Case(hidden.detach()[:tokens].requires_grad_(), head, *(x[:tokens] for x in rest))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(size: str, trained: bool) -> Case:
    tokens, width, vocabulary = SIZES[size]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device(), dtype=dtype)
    # In place: a second copy would raise the peak
    head = torch.randn(vocabulary, width, device=device(), dtype=dtype).div_(width**0.5).requires_grad_(trained)
    targets = torch.randint(vocabulary, (tokens,), device=device())
    g_logp, g_kl = torch.randn(tokens, device=device()), torch.full((tokens,), 0.1, device=device())
    return Case(hidden.requires_grad_(), head, targets, hidden.detach() * 1.1, g_logp, g_kl)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def floor(c: Case) -> None:
    hidden, head = c.hidden.detach(), c.head.detach()
    logits = hidden @ head.t()
    logits @ head
    if c.head.requires_grad:
        logits.t() @ hidden
    torch.mm(c.ref_hidden, head.t(), out=logits)


def dense(c: Case) -> None:
    logp_NV = torch.log_softmax((c.hidden @ c.head.t()).float(), -1)
    with torch.no_grad():
        ref_logp_NV = torch.log_softmax((c.ref_hidden @ c.head.t()).float(), -1)
    p_NV = logp_NV.exp()
    kl = (p_NV * (logp_NV - ref_logp_NV)).sum(-1)
    with torch.no_grad():
        (p_NV * logp_NV).sum(-1)
    c.backward(logp_NV.gather(-1, c.targets[:, None])[:, 0], kl)


def trl_kernels(c: Case) -> None:
    logp, *_ = ChunkedLogProbFunction.apply(
        c.hidden, c.head, None, c.targets, 1.0, VOCABULARY_CHUNK, None, 1.0, ("entropy",)
    )
    kl, _ = ChunkedDivergenceFunction.apply(c.hidden, c.head, None, c.ref_hidden, c.head.detach(), None, 1.0)
    c.backward(logp, kl)


def fused_any(c: Case) -> None:
    stats = fused_token_stats(c.hidden, c.head, c.targets, c.ref_hidden)
    c.backward(stats.logp, stats.kl)


def fused_foretold(c: Case) -> None:
    def expected(logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return c.g_logp[rows], c.g_kl[rows]

    stats = fused_token_stats_for_loss(c.hidden, c.head, c.targets, c.ref_hidden, expected=expected)
    c.backward(stats.logp, stats.kl)


METHODS: dict[str, Callable[[Case], None]] = {
    "floor": floor,
    "dense": dense,
    "TRL's kernels": trl_kernels,
    "fused, any loss": fused_any,
    "fused, loss foretold": fused_foretold,
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def run(method: str, c: Case) -> float:
    """Seconds of one forward and backward."""
    c.hidden.grad = c.head.grad = None
    start = time.perf_counter()
    METHODS[method](c)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes() -> int:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_memory(method: str, size: str, trained: bool) -> int:
    """Bytes over those of the inputs; only meaningful in a process that has done nothing else."""
    c = case(size, trained)
    run(method, c.first(1))  # what libraries allocate once
    c.head.grad = torch.zeros_like(c.head) if trained else None
    before = peak_bytes()
    METHODS[method](c)
    return peak_bytes() - before


def extra_memory_in_fresh_process(method: str, size: str, trained: bool) -> float:
    command = [sys.executable, __file__, "--cell", method, size, "trained" if trained else "frozen"]
    # A fixed threshold makes glibc return freed tiles at once, so that the peak is that of the tensors alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout) / MIB


def measure(sizes: list[str], heads: list[str], runs: int) -> list[dict[str, Any]]:
    groups = [(size, head) for size in sizes for head in heads]
    # Before anything is allocated here: a new process inherits its parent's peak
    memory = {
        (size, head, method): extra_memory_in_fresh_process(method, size, head == "trained")
        for size, head in track(groups, description="memory")
        for method in METHODS
    }
    rows = []
    for size, head in track(groups, description="time"):
        c = case(size, head == "trained")
        seconds = [{method: run(method, c) for method in METHODS} for _ in range(runs + 1)][1:]
        for method in METHODS:
            own = [one[method] for one in seconds]
            ratios = [one[method] / one["floor"] for one in seconds]
            tokens, width, vocabulary = SIZES[size]
            rows.append(
                {
                    **{"what": method, "head": head, "size": size},
                    **{"tokens": tokens, "hidden": width, "vocabulary": vocabulary},
                    **{"seconds": statistics.median(own), "seconds_min": min(own), "seconds_max": max(own)},
                    **{"times_floor": statistics.median(ratios), "extra_mib": memory[size, head, method]},
                }
            )
    return rows


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "bfloat16" if device().type == "cuda" else "float32",
    }


def table(rows: list[dict[str, Any]]) -> Table:
    context = machine()
    result = Table(
        title="Log-prob, entropy and exact KL with their gradient",
        caption=", ".join(f"{key} {value}" for key, value in context.items()),
    )
    for column in ("size", "head", "method", "median, s", "min - max", "x floor", "extra MiB"):
        result.add_column(column, justify="left" if column in ("size", "head", "method") else "right")
    for row in rows:
        spread = f"{row['seconds_min']:.2f} - {row['seconds_max']:.2f}"
        figures = f"{row['seconds']:.2f}", spread, f"{row['times_floor']:.2f}", f"{row['extra_mib']:.0f}"
        result.add_row(row["size"], row["head"], row["what"], *figures)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the exact KL: time and peak memory.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--heads", nargs="+", choices=("frozen", "trained"), default=["frozen", "trained"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        method, size, head = arguments.cell
        print(extra_memory(method, size, head == "trained"))
        return
    rows = [row | machine() for row in measure(arguments.sizes, arguments.heads, arguments.runs)]
    Console().print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
