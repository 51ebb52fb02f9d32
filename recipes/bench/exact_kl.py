"""
Time and peak memory of log-prob, entropy and exact KL with their gradient, as a training step needs them.

    python recipes/bench/exact_kl.py [--sizes smollm2 512x896x151936 ...] [--heads frozen trained] [--csv FILE]
    python recipes/bench/exact_kl.py --device cuda --dtype bfloat16

Compared: dense log-softmaxes; TRL's two chunked kernels, one after the other; the fused head, for any loss and for a
loss whose gradient is predicted; and the floor, the matrix products alone: 3 for a frozen head (LoRA), 4 for
a trained one. On a GPU with Triton the fused head runs with PyTorch's operations in place of its kernels too, and so
does PyTorch's `linear_cross_entropy`: no KL and one model, the nearest that PyTorch has. Times are medians of runs
that alternate between the methods in one process, and ratios to the floor of the same round. Memory is what a fresh
process needs on top of its inputs, without a trained head's own gradient.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from measuring import (
    Row,
    alternate,
    device,
    extra_mib,
    in_fresh_process,
    numbers,
    parser,
    ratios,
    row,
    seconds,
    table,
    write,
)
from rich.console import Console
from rich.progress import track
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_grpo_ext.kl.fused.row_operations import SWITCH
from trl_grpo_ext.kl.fused.token_stats import fused_token_stats, fused_token_stats_for_loss


# Tokens, hidden size, vocabulary
SIZES = {
    "smollm2": (1024, 576, 49_152),
    "smollm2 x2": (2048, 576, 49_152),
    "qwen0.5b": (512, 896, 151_936),
    "qwen7b": (256, 3584, 152_064),
}
HEADS = ("frozen", "trained")
VOCABULARY_CHUNK = 8192  # as TRL calls its kernel


def shape(size: str) -> tuple[int, ...]:
    """That of a name, or `512x896x151936`."""
    return SIZES.get(size) or numbers(size)


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


def case(size: str, trained: bool, dtype_name: str) -> Case:
    tokens, width, vocabulary = shape(size)
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device(), dtype=dtype)
    # In place: a second copy would raise the peak
    head = torch.randn(vocabulary, width, device=device(), dtype=dtype).div_(width**0.5).requires_grad_(trained)
    targets = torch.randint(vocabulary, (tokens,), device=device())
    g_logp = torch.randn(tokens, device=device())
    g_kl = torch.full((tokens,), 0.1, device=device())
    return Case(hidden.requires_grad_(), head, targets, hidden.detach() * 1.1, g_logp, g_kl)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def floor(c: Case) -> None:
    hidden = c.hidden.detach()
    head = c.head.detach()
    logits = hidden @ head.t()
    torch.mm(logits, head)
    if c.head.requires_grad:
        torch.mm(logits.t(), hidden)
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


def fused_predicted(c: Case) -> None:
    def predicted_gradient(logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return c.g_logp[rows], c.g_kl[rows]

    stats = fused_token_stats_for_loss(
        c.hidden, c.head, c.targets, c.ref_hidden, predicted_gradient=predicted_gradient
    )
    c.backward(stats.logp, stats.kl)


def without_triton(method: Callable[[Case], None], c: Case) -> None:
    with patch.dict(os.environ, {SWITCH: "0"}):
        method(c)


def cross_entropy(c: Case) -> None:
    loss = torch.nn.functional.linear_cross_entropy(c.hidden, c.head, c.targets, reduction="none")
    (loss * c.g_logp).sum().backward()


METHODS: dict[str, Callable[[Case], None]] = {
    "floor": floor,
    "dense": dense,
    "TRL's kernels": trl_kernels,
    "fused, any loss": fused_any,
    "fused, gradient predicted": fused_predicted,
}
ON_A_GPU: dict[str, Callable[[Case], None]] = {
    "fused, any loss, without Triton": partial(without_triton, fused_any),
    "fused, gradient predicted, without Triton": partial(without_triton, fused_predicted),
    "linear_cross_entropy, no KL": cross_entropy,
}


def methods() -> dict[str, Callable[[Case], None]]:
    return METHODS | (ON_A_GPU if device().type == "cuda" else {})


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def run(method: str, c: Case) -> float:
    """Seconds of one forward and backward."""
    c.hidden.grad = c.head.grad = None
    return seconds(partial(methods()[method], c))


def extra_memory(method: str, size: str, head: str, dtype_name: str) -> float:
    c = case(size, head == "trained", dtype_name)
    run(method, c.first(1))  # what libraries allocate once
    c.head.grad = torch.zeros_like(c.head) if c.head.requires_grad else None
    return extra_mib(partial(methods()[method], c))


def measure(arguments: argparse.Namespace) -> list[Row]:
    cells = [(method, size, head) for size in arguments.sizes for head in arguments.heads for method in methods()]
    memory = {cell: in_fresh_process(extra_memory, *cell, arguments.dtype) for cell in track(cells, "memory")}
    rows = []
    for size, head in dict.fromkeys(cell[1:] for cell in cells):
        c = case(size, head == "trained", arguments.dtype)
        times = alternate({method: partial(run, method, c) for method in methods()}, arguments.runs)
        sizes = dict(zip(("tokens", "hidden", "vocabulary"), shape(size), strict=True))
        for method in methods():
            add = partial(row, method=method, head=head, size=size, **sizes, dtype=arguments.dtype)
            rows.append(add("time", "s", times[method]))
            rows.append(add("time", "x floor", ratios(times[method], times["floor"])))
            rows.append(add("extra memory", "MiB", [memory[method, size, head]]))
    return rows


def main() -> None:
    options = parser("Benchmark of the exact KL: time and peak memory.", runs=5)
    options.add_argument("--sizes", nargs="+", default=list(SIZES), help=f"{', '.join(SIZES)}, or TOKENSxHIDDENxVOCAB")
    options.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    options.add_argument("--device", choices=("cpu", "cuda"), default=device().type)
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default bfloat16 on a GPU")
    arguments = options.parse_args()
    if arguments.device != device().type:
        options.error(
            f"--device {arguments.device}: the device here is {device().type}; CUDA_VISIBLE_DEVICES= hides GPUs"
        )
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    rows = measure(arguments)
    Console().print(table("Log-prob, entropy and exact KL with their gradient", rows, ("size", "head", "method")))
    write(rows, arguments)


if __name__ == "__main__":
    main()
