"""Tensors of all processes, gathered and summed, and whole parameters of models that FSDP2 or ZeRO-3 shards."""

from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ._trl import SyncRefModelCallback, maybe_gather_lm_head_ctx


def is_main_process() -> bool:
    """Whether this is the process that speaks for all, also where no accelerator has been made."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


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
