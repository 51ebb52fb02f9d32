"""Processes that come together, as threads: what each of them gathers is what all of them gave."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch


T = TypeVar("T")

# One that waits for another in vain fails
SECONDS = 20


def in_threads(count: int, run: Callable[[int, Callable[[torch.Tensor], torch.Tensor]], T]) -> list[T]:
    """
    What each of several processes returns.

    Args:
        count (`int`):
            Number of processes.
        run (`Callable`):
            Takes the process's number and a function that gathers: it joins the tensors of all processes along the
            first axis. A process that gathers more often than another, or another shape, fails.
    """
    barrier = Barrier(count)
    given: list[torch.Tensor | None] = [None] * count

    def of_process(process: int) -> T:
        def gather(values: torch.Tensor) -> torch.Tensor:
            given[process] = values
            barrier.wait(SECONDS)
            shapes = {tuple(one.shape) for one in given if one is not None}
            assert len(shapes) == 1, f"gathered {shapes}"
            joined = torch.cat([one for one in given if one is not None])
            barrier.wait(SECONDS)
            return joined

        try:
            return run(process, gather)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(of_process, range(count)))
