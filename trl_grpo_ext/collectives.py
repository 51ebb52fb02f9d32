"""Tensors of all processes: what accelerate gathers and sums, with the shapes that this package needs."""

from typing import Any, cast

import torch
from accelerate import Accelerator


def gather(accelerator: Accelerator, values_B: torch.Tensor) -> torch.Tensor:
    """Values of all processes along the first axis, in rank order."""
    return cast(torch.Tensor, accelerator.gather(values_B))


def gather_tokens(accelerator: Accelerator, values: torch.Tensor, padding: int | float) -> torch.Tensor:
    """Gather `(B, ..., T)` of all processes along the first axis, the last one padded to the longest T."""
    padded = accelerator.pad_across_processes(values, dim=values.ndim - 1, pad_index=padding)  # type: ignore[arg-type]
    return gather(accelerator, cast(torch.Tensor, padded))


def local_rows(accelerator: Accelerator, values_N: torch.Tensor) -> torch.Tensor:
    """The rows of gathered values that are this process's own."""
    return values_N.view(accelerator.num_processes, -1, *values_N.shape[1:])[accelerator.process_index]


def total(accelerator: Accelerator, values: torch.Tensor) -> list[Any]:
    """Sum of each value over all processes."""
    return cast(torch.Tensor, accelerator.reduce(values, reduction="sum")).tolist()
