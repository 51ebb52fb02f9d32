"""
Time and peak memory of discounted returns: the parallel scan against the plain loop over tokens.

    python recipes/bench/advantages.py [--shapes 8x1024 512x32768 ...] [--dtype float64] [--json FILE] [--csv FILE]

For orientation, a bare copy of the input: nothing that returns a new tensor is faster. Times are medians of runs that
alternate between the methods in one process. Memory is what a fresh process needs on top of the input, the result
included. The difference is the largest to a loop in float64, of returns around 10: reward 1 at a tenth of the tokens.
"""

import argparse
from collections.abc import Callable
from functools import partial

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

from trl_grpo_ext.advantages.returns import discounted_returns, plain_discounted_returns


GAMMA = 0.99
SHAPES = ((8, 1024), (64, 4096), (64, 32768), (512, 32768))  # Completions, tokens


def rewards(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device()).bernoulli_(0.1)


def copy(rewards_NT: torch.Tensor) -> torch.Tensor:
    return rewards_NT.clone()


def loop(rewards_NT: torch.Tensor) -> torch.Tensor:
    return plain_discounted_returns(rewards_NT, GAMMA)


def scan(rewards_NT: torch.Tensor) -> torch.Tensor:
    return discounted_returns(rewards_NT, GAMMA)


METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"copy": copy, "loop": loop, "discounted_returns": scan}


def extra_memory(method: str, shape: tuple[int, ...], dtype: str) -> float:
    rewards_NT = rewards(shape, dtype)
    METHODS[method](rewards_NT[:1, :2])  # what libraries allocate once
    return extra_mib(partial(METHODS[method], rewards_NT))


def measure(arguments: argparse.Namespace) -> list[Row]:
    shapes = arguments.shapes
    dtype = arguments.dtype
    cells = [(method, shape) for shape in shapes for method in METHODS]
    memory = {cell: in_fresh_process(extra_memory, *cell, dtype) for cell in track(cells, "memory")}
    rows = []
    for shape in shapes:
        rewards_NT = rewards(shape, dtype)
        exact_NT = loop(rewards_NT.double())
        times = alternate({m: partial(seconds, partial(METHODS[m], rewards_NT)) for m in METHODS}, arguments.runs)
        for method in METHODS:
            add = partial(row, method=method, completions=shape[0], tokens=shape[1], dtype=dtype)
            rows.append(add("time", "ms", [1000 * one for one in times[method]]))
            rows.append(add("time", "x copy", ratios(times[method], times["copy"])))
            rows.append(add("extra memory", "MiB", [memory[method, shape]]))
            if method != "copy":
                difference = (METHODS[method](rewards_NT) - exact_NT).abs().max().item()
                rows.append(add("difference", "reward", [difference]))
    return rows


def main() -> None:
    options = parser("Benchmark of discounted returns: time and peak memory.", runs=5)
    options.add_argument("--shapes", type=numbers, nargs="+", default=SHAPES, help="completions x tokens")
    options.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = options.parse_args()
    rows = measure(arguments)
    Console().print(table("Discounted returns", rows, ("completions", "tokens", "method")))
    write(rows, arguments)


if __name__ == "__main__":
    main()
