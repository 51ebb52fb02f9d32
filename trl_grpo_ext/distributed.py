"""Tensors of all processes, gathered and summed, and whole parameters of models that FSDP2 or ZeRO-3 shards."""

from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ._trl import SyncRefModelCallback, maybe_gather_lm_head_ctx


# Of the rows of all processes that are there at a time
_GATHERED_BYTES = 2**25


def is_main_process() -> bool:
    """Whether this is the process that speaks for all, also where no accelerator has been made."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def warn_once(logger: Any, message: str) -> None:
    """
    Log a warning that has not been logged yet, on the process that speaks for all.

    Args:
        logger:
            From `transformers.utils.logging.get_logger`.
        message (`str`):
            The warning.
    """
    if is_main_process():
        logger.warning_once(message)


def gather(accelerator: Accelerator, values_B: torch.Tensor) -> torch.Tensor:
    """Values of all processes along the first axis, in rank order."""
    return cast(torch.Tensor, accelerator.gather(values_B))


def gather_groups(accelerator: Accelerator, values_B: torch.Tensor, padding: float, group_size: int) -> torch.Tensor:
    """
    The rows of those groups that this process has a part of, the last axis padded to the longest of all processes.

    Where no group lies in two processes, nothing is sent. Otherwise a few rows of all processes are there at a time.

    Args:
        accelerator (`Accelerator`):
            To gather with.
        values_B (`torch.Tensor` of shape `(B, ..., T)`):
            This process's rows.
        padding (`float`):
            Of the last axis.
        group_size (`int`):
            Rows of a group, consecutive in the batch of all processes.
    """
    padded_B = cast(
        torch.Tensor,
        accelerator.pad_across_processes(values_B, dim=values_B.ndim - 1, pad_index=padding),  # type: ignore[arg-type]
    )
    own = own_rows(accelerator, len(values_B))
    wanted = group_rows(own, group_size)
    if len(values_B) % group_size == 0:
        return padded_B
    found = padded_B.new_empty((len(wanted), *padded_B.shape[1:]))
    row_bytes = padded_B[0].numel() * padded_B.element_size() * accelerator.num_processes
    rows_at_once = max(1, _GATHERED_BYTES // max(1, row_bytes))
    for start in range(0, len(own), rows_at_once):
        parts = gather(accelerator, padded_B[start : start + rows_at_once]).chunk(accelerator.num_processes)
        for process, part in enumerate(parts):
            first = process * len(own) + start
            shared = range(max(first, wanted.start), min(first + len(part), wanted.stop))
            if shared:
                found[shared.start - wanted.start : shared.stop - wanted.start] = part[
                    shared.start - first : shared.stop - first
                ]
    return found


def own_rows(accelerator: Accelerator, count: int) -> range:
    """The numbers of this process's rows in the batch of all processes, which have equally many."""
    return range(accelerator.process_index * count, (accelerator.process_index + 1) * count)


def group_rows(own: range, group_size: int) -> range:
    """The numbers of the rows of all groups that some rows lie in."""
    return range(own.start - own.start % group_size, own.stop + -own.stop % group_size)


def local_rows(accelerator: Accelerator, values_N: torch.Tensor) -> torch.Tensor:
    """The rows of gathered values that are this process's own."""
    return values_N.view(accelerator.num_processes, -1, *values_N.shape[1:])[accelerator.process_index]


def total(accelerator: Accelerator, values: torch.Tensor) -> list[Any]:
    """Sum of each value over all processes."""
    return cast(torch.Tensor, accelerator.reduce(values, reduction="sum")).tolist()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter's values on the CPU."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().to("cpu", copy=True).contiguous()
    with maybe_gather_lm_head_ctx(cast(nn.Parameter, parameter)):
        return parameter.detach().to("cpu", copy=True).contiguous()


def assign_whole(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Set a parameter to whole `values`."""
    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    new = nn.Parameter(values, requires_grad=False)
    # Under ZeRO-3 it gathers what it sets
    SyncRefModelCallback.sync_target_model(nn.ParameterList([new]), nn.ParameterList([parameter]), 1.0)
