"""What the benchmarks share: times of calls that alternate, memory of fresh processes, rows, tables and files."""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from rich.table import Table


MIB = 2**20

T = TypeVar("T")
Row = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Time


def now() -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def alternate(measures: dict[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """What each measure gives in each round, after a round that warms up; all meet the machine in the same state."""
    rounds = [{name: measure() for name, measure in measures.items()} for _ in track(range(runs + 1), "time")][1:]
    return {name: [one[name] for one in rounds] for name in measures}


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each sample over that of the same round."""
    return [sample / of_base for sample, of_base in zip(samples, base, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes() -> int:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """From here on the peak is that of what comes, where the system can do so: not on macOS."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def extra_mib(call: Callable[[], object]) -> float:
    """What a call needs on top of what is there already; only meaningful in a process that has done little else."""
    forget_peak()
    before = peak_bytes()
    call()
    return (peak_bytes() - before) / MIB


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a new process."""
    # A fixed threshold makes glibc return freed tensors at once, so that the peak is that of the tensors alive
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    # A server forks faster than a new process imports, but CUDA does not outlive a fork
    context = get_context("spawn" if device().type == "cuda" else "forkserver")
    context.set_forkserver_preload(["trl_grpo_ext"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------------------------
# Rows, tables and files


def row(what: str, unit: str, samples: Sequence[float], **about: Any) -> Row:
    """A quantity with its spread and all that it depends on."""
    figures = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return {"what": what, "unit": unit, **figures, **about, **machine()}


def machine() -> Row:
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU ({platform.machine()})"
    versions = {package: version(package) for package in ("torch", "trl", "transformers")}
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def table(title: str, rows: Iterable[Row], keys: Sequence[str]) -> Table:
    """A line for each combination of `keys`, a column for each quantity."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for one in rows:
        line = lines.setdefault(tuple(str(one[key]) for key in keys), {})
        line[f"{one['what']}, {one['unit']}"] = figure(one)
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    result = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in machine().items()))
    for column in (*keys, *columns):
        result.add_column(column, justify="right" if column in columns else "left", overflow="fold")
    for line_keys, line in lines.items():
        result.add_row(*line_keys, *(line.get(column, "") for column in columns))
    return result


def figure(one: Row) -> str:
    """The median, and the spread where there is one, to three digits or whole numbers."""
    median, low, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (one["median"], one["min"], one["max"])
    )
    return median if low == high else f"{median} ({low} - {high})"


def parser(description: str, runs: int) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--runs", type=int, default=runs, help="rounds to take times in, after one that warms up")
    result.add_argument("--json", type=Path, help="also write the rows here")
    result.add_argument("--csv", type=Path, help="also write the rows here")
    return result


def numbers(text: str) -> tuple[int, ...]:
    """`512x1024` as sizes."""
    return tuple(int(number) for number in text.split("x"))


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for one in rows for name in one)))
            writer.writeheader()
            writer.writerows(rows)
