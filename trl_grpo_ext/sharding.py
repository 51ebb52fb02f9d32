"""Whole parameters out of, and into, models that FSDP2 or ZeRO-3 may have sharded; all processes take part."""

from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ._upstream import SyncRefModelCallback, maybe_gather_lm_head_ctx


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
