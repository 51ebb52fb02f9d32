"""Who does the work on the logit rows: Triton's kernels on a GPU, PyTorch's operations everywhere else."""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from ..divergences import DIVERGENCES, Divergence
from .rows import SWITCH, RowOperations
from .tiles import TileOperations


logger = logging.getLogger(__name__)

# The rows as they are defined. One of the user's own under the same name has no kernel
_WITH_KERNELS = (DIVERGENCES["reverse"], DIVERGENCES["forward"])
_FORWARD = DIVERGENCES["forward"]


def row_operations(device: torch.device, dtype: torch.dtype, divergence: Divergence) -> RowOperations:
    """
    The operations for products of this dtype on this device.

    Raises:
        ValueError: the environment variable [`SWITCH`] is neither `0` nor `1`.
    """
    if not _runs_kernels(device) or dtype == torch.float64:
        return TileOperations(divergence)
    if divergence not in _WITH_KERNELS:
        _say_that_there_is_no_kernel(divergence)
        return TileOperations(divergence)
    # Only now, since Triton is not installed everywhere
    from .row_kernels import KernelOperations

    return KernelOperations(is_forward=divergence == _FORWARD)


def _runs_kernels(device: torch.device) -> bool:
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"The environment variable {SWITCH} must be 0 or 1, got {switch!r}.")
    # "cuda" is ROCm's name too
    return switch == "1" and device.type == "cuda" and find_spec("triton") is not None


@cache
def _say_that_there_is_no_kernel(divergence: Divergence) -> None:
    logger.warning(
        "The exact KL has Triton kernels for kl_direction 'reverse' and 'forward' only. For the divergence in use, "
        "%r, PyTorch's operations work on the logits, which takes longer on a GPU.",
        divergence,
    )
