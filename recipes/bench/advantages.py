"""
Time and peak memory of discounted returns and of advantages.

    python recipes/bench/advantages.py [--shapes 8x1024 512x32768 ...] [--batches 512x8192x3 ...] [--dtype float64]
        [--json FILE] [--csv FILE]

Returns: the parallel scan against the plain loop over tokens. For orientation, a bare copy of the input: nothing that
returns a new tensor is faster. The difference is the largest to a loop in float64, of returns around 10: reward 1 at a
tenth of the tokens.

Advantages: each estimator in blocks of groups, and the same with all groups in one block. Groups have 8 completions of
a quarter of the longest length to all of it. All sources but the last give a reward every 64 tokens, the last one at
the end. What is computed is float64, the rewards are float32.

Times are medians of runs that alternate between the methods in one process. Memory is what a fresh process needs on
top of the input, the result included; of advantages also in units of the rewards.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from measuring import (
    MIB,
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

from trl_grpo_ext.advantages import combine
from trl_grpo_ext.advantages.estimators import ESTIMATORS
from trl_grpo_ext.advantages.returns import discounted_returns, plain_discounted_returns
from trl_grpo_ext.advantages.settings import AdvantageSettings


GAMMA = 0.99
SHAPES = ((8, 1024), (64, 4096), (64, 32768), (512, 32768))  # Completions, tokens
BATCHES = ((512, 8192, 3), (512, 32768, 3))  # Completions, tokens, sources
GROUP_SIZE = 8
STEP_TOKENS = 64

# ---------------------------------------------------------------------------------------------------------------------
# Returns


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


def measure_returns(arguments: argparse.Namespace) -> list[Row]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def cases() -> dict[str, AdvantageSettings]:
    """Each estimator as it is by default, and what is compared with the whole batch."""
    settings = {name: AdvantageSettings(name, GAMMA) for name in ESTIMATORS}
    settings["position, scale batch"] = AdvantageSettings("position", GAMMA, scale="batch")
    settings["position, normalize_then_sum"] = AdvantageSettings("position", GAMMA, aggregation="normalize_then_sum")
    return settings


def batch(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, mask and weights."""
    completions, tokens, sources = shape
    torch.manual_seed(0)
    lengths_N = torch.randint(math.ceil(tokens / 4), tokens + 1, (completions,))
    mask_NT = torch.arange(tokens) < lengths_N[:, None]
    rewards_KNT = torch.full((sources, completions, tokens), torch.nan)
    rewards_KNT[:-1, :, ::STEP_TOKENS] = torch.rand(sources - 1, completions, len(range(0, tokens, STEP_TOKENS)))
    rewards_KNT[-1].scatter_(1, lengths_N[:, None] - 1, torch.empty(completions, 1).bernoulli_(0.5))
    return rewards_KNT.to(device()), mask_NT.to(device()), torch.ones(sources, device=device())


def advantages(inputs: tuple[torch.Tensor, ...], settings: AdvantageSettings, in_blocks: bool) -> torch.Tensor:
    rewards_KNT, mask_NT, weights_K = inputs
    block_tokens = combine._BLOCK_TOKENS if in_blocks else rewards_KNT.numel()
    with patch.object(combine, "_BLOCK_TOKENS", block_tokens):
        return combine.process_advantages(rewards_KNT, mask_NT, weights_K, GROUP_SIZE, settings, dtype=torch.float64)


def extra_memory_of_advantages(case: str, in_blocks: bool, shape: tuple[int, ...]) -> float:
    advantages(batch((GROUP_SIZE, 2, shape[2])), cases()[case], in_blocks)  # what libraries allocate once
    return extra_mib(partial(advantages, batch(shape), cases()[case], in_blocks))


def measure_advantages(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    methods = {f"{case}, {how}": (case, how == "blocks") for case in cases() for how in ("one block", "blocks")}
    for shape in arguments.batches:
        memory = {
            m: in_fresh_process(extra_memory_of_advantages, *methods[m], shape) for m in track(methods, "memory")
        }
        inputs = batch(shape)
        calls = {m: partial(advantages, inputs, cases()[case], blocks) for m, (case, blocks) in methods.items()}
        times = alternate({m: partial(seconds, call) for m, call in calls.items()}, arguments.runs)
        own_mib = inputs[0].numel() * inputs[0].element_size() / MIB
        for method in methods:
            sizes = dict(zip(("completions", "tokens", "sources"), shape, strict=True))
            add = partial(row, method=method, **sizes, dtype="float32")
            rows.append(add("time", "ms", [1000 * one for one in times[method]]))
            rows.append(add("extra memory", "MiB", [memory[method]]))
            rows.append(add("extra memory", "x rewards", [memory[method] / own_mib]))
    return rows


def main() -> None:
    options = parser("Benchmark of discounted returns and advantages: time and peak memory.", runs=5)
    options.add_argument("--shapes", type=numbers, nargs="*", default=SHAPES, help="returns: completions x tokens")
    options.add_argument(
        "--batches", type=numbers, nargs="*", default=BATCHES, help="advantages: completions x tokens x sources"
    )
    options.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of returns")
    arguments = options.parse_args()
    returns = measure_returns(arguments)
    Console().print(table("Discounted returns", returns, ("completions", "tokens", "method")))
    of_estimators = measure_advantages(arguments)
    Console().print(table("Advantages", of_estimators, ("completions", "tokens", "sources", "method")))
    write([*returns, *of_estimators], arguments)


if __name__ == "__main__":
    main()
