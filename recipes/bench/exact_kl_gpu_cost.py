"""
What the exact KL costs on a GPU, predicted: every launch of a training step's head, counted, no GPU needed.

    python recipes/bench/exact_kl_gpu_cost.py [--size 8192x3584x152064] [--dtype bfloat16] [--json FILE]

The fused head runs on tensors without memory. Every operation is noted with its floating-point operations and the
bytes that it reads and writes; the two Triton kernels with the rows that they read and write and with the instructions
that their compiled loops have for each entry. From published peaks, a launch is predicted to take

    max(operations / peak, bytes / bandwidth, instructions / issue rate)

Matrix products are taken to reach 0.7 of the peak on an H100 and 0.8 on an A100, memory 0.9 of its bandwidth. The
floor is the bare products at the same efficiency: 3 for a frozen head (LoRA), 4 for a trained one. Launches follow
each other without gaps. The loss's gradient is predicted, and right for every token, as in the trainer under TRL's
clipped losses.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from measuring import Row, numbers, parser, row, table, write
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trl_grpo_ext.kl.fused import gradients, token_stats
from trl_grpo_ext.kl.fused.chunks import default_logits_bytes
from trl_grpo_ext.kl.fused.rows import LossGradients, Rows, Statistics


class GPU(NamedTuple):
    """
    A GPU's published figures, and the part of them that is taken to be reached.

    Args:
        flops (`float`):
            Dense bfloat16 or float16 operations per second.
        product_share (`float`):
            Part of them that matrix products reach.
        bandwidth (`float`):
            Bytes per second.
        instructions (`float`):
            Instructions of single threads per second: multiprocessors x 128 x clock.
        memory (`int`):
            Bytes.
    """

    flops: float
    product_share: float
    bandwidth: float
    instructions: float
    memory: int


GPUS = {
    "H100 SXM": GPU(989e12, 0.7, 3.35e12, 132 * 128 * 1.755e9, 80 * 10**9),
    "A100 80GB SXM": GPU(312e12, 0.8, 2.04e12, 108 * 128 * 1.41e9, 80 * 10**9),
}
BANDWIDTH_SHARE = 0.9
# Of the kernels for an entry of both rows, in code compiled for an H100: bfloat16, reverse KL, neither bias nor cap
STATISTICS_INSTRUCTIONS = 71
GRADIENT_INSTRUCTIONS = 39


class Launch(NamedTuple):
    """What one kernel on the GPU computes, reads and writes."""

    name: str
    flops: float
    bytes: int
    instructions: float = 0.0

    def seconds(self, gpu: GPU) -> float:
        return max(
            self.flops / (gpu.flops * gpu.product_share),
            self.bytes / (gpu.bandwidth * BANDWIDTH_SHARE),
            self.instructions / gpu.instructions,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def num_bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


class CountedRows:
    """[`~trl_grpo_ext.kl.fused.rows.RowOperations`] that note what Triton's kernels would read and write."""

    def __init__(self, launches: list[Launch]):
        self.launches = launches

    def block_bytes(self, device: torch.device) -> None:
        return None

    def first_pass(self, rows: Rows, statistics_M9: torch.Tensor) -> "CountedFirstPass":
        assert rows.ref_product is not None
        read = num_bytes(rows.product, rows.ref_product)
        instructions = STATISTICS_INSTRUCTIONS * rows.product.numel()
        self.launches.append(Launch("statistics kernel", 0, read + num_bytes(statistics_M9), instructions))
        return CountedFirstPass(self, rows, statistics_M9)

    def second_pass(self, rows: Rows, statistics: Statistics, loss: LossGradients) -> None:
        raise AssertionError("the gradient was predicted")


class CountedFirstPass:
    def __init__(self, operations: CountedRows, rows: Rows, statistics_M9: torch.Tensor):
        self.statistics = Statistics.columns(statistics_M9)
        self._operations = operations
        self._rows = rows
        self._small = num_bytes(statistics_M9)

    def _add(self, written: int) -> None:
        assert self._rows.ref_product is not None
        moved = num_bytes(self._rows.product, self._rows.ref_product) + written + self._small
        instructions = GRADIENT_INSTRUCTIONS * self._rows.product.numel()
        self._operations.launches.append(Launch("gradient kernel", 0, moved, instructions))

    def write_gradient(self, g_logp: torch.Tensor, g_kl: torch.Tensor) -> None:
        self._add(num_bytes(self._rows.product))

    def write_derivatives(self) -> None:
        self._add(2 * num_bytes(self._rows.product))


class Launches(TorchDispatchMode):
    """Notes PyTorch's operations, those left out that only name a part of a tensor or its memory."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            # The tokens whose prediction was wrong
            return torch.empty(0, args[0].dim(), dtype=torch.long)
        result = func(*args, **(kwargs or {}))
        written = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        returned = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        if is_view or not written or "empty" in func.__name__:
            return result
        read = [x for x in tree_iter(args) if isinstance(x, torch.Tensor)]
        flops = 2 * read[0].shape[0] * read[0].shape[1] * read[1].shape[1] if func is torch.ops.aten.mm.out else 0
        name = "logits" if flops else func.__name__
        self.launches.append(Launch(name, flops, num_bytes(*read, *written)))
        return result


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Note what the fused head launches on a GPU."""
    launches: list[Launch] = []

    def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        # As on a GPU: one product, summed in float32
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        launches.append(Launch("gradients", flops, num_bytes(total, total, a, b)))

    with (
        patch.object(token_stats, "row_operations", lambda *_: CountedRows(launches)),
        patch.object(gradients, "add_product_", add_product_),
        Launches(launches),
    ):
        yield launches


def fused_launches(size: tuple[int, ...], dtype: torch.dtype, trained: bool, gpu: GPU) -> list[Launch]:
    """All launches of forward and backward."""
    tokens, width, vocabulary = size
    with FakeTensorMode():
        hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        head = torch.empty(vocabulary, width, dtype=dtype, requires_grad=trained)
        targets = torch.empty(tokens, dtype=torch.long)
        g = torch.empty(tokens)
        with counting() as launches:
            stats = token_stats.fused_token_stats_for_loss(
                hidden,
                head,
                targets,
                hidden.detach(),
                predicted_gradient=lambda logp, part: (g[part], g[part]),
                logits_memory_bytes=default_logits_bytes(vocabulary, dtype.itemsize, None, gpu.memory),
            )
            torch.autograd.backward([stats.logp, stats.kl], [g, g])
    return launches


def floor(size: tuple[int, ...], dtype: torch.dtype, trained: bool) -> list[Launch]:
    """The bare products, each over all tokens at once."""
    tokens, width, vocabulary = size
    flops = 2 * tokens * width * vocabulary
    moved = dtype.itemsize * (tokens * width + width * vocabulary + tokens * vocabulary)
    return [Launch("product", flops, moved)] * (4 if trained else 3)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def predictions(size: tuple[int, ...], dtype: torch.dtype) -> list[Row]:
    rows = []
    for name, gpu in GPUS.items():
        for trained in (False, True):
            about = {"method": "fused, predicted", "gpu": name, "head": "trained" if trained else "frozen"}
            about |= dict(zip(("tokens", "hidden", "vocabulary"), size, strict=True))
            launches = fused_launches(size, dtype, trained, gpu)
            seconds = sum(launch.seconds(gpu) for launch in launches)
            least = sum(launch.seconds(gpu) for launch in floor(size, dtype, trained))
            kernels = sum(launch.seconds(gpu) for launch in launches if launch.name.endswith("kernel"))
            products = [launch for launch in launches if launch.flops]
            quantities = {
                ("predicted time", "ms"): 1e3 * seconds,
                ("of it the kernels", "ms"): 1e3 * kernels,
                ("predicted time", "x floor"): seconds / least,
                ("products", "M x H x V"): sum(launch.flops for launch in products)
                / (2 * size[0] * size[1] * size[2]),
                ("bytes moved", "GB"): sum(launch.bytes for launch in launches) / 1e9,
                ("launches", ""): float(len(launches)),
            }
            rows += [row(what, unit, [x], **about, dtype=str(dtype)[6:]) for (what, unit), x in quantities.items()]
    return rows


def main() -> None:
    options = parser("Cost of the exact KL on a GPU, predicted from counts.", runs=1)
    options.add_argument("--size", type=numbers, default=(8192, 3584, 152_064), help="TOKENSxHIDDENxVOCABULARY")
    options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the products")
    arguments: argparse.Namespace = options.parse_args()
    rows = predictions(arguments.size, getattr(torch, arguments.dtype))
    Console().print(table("Exact KL with its gradient, predicted, not measured", rows, ("gpu", "head")))
    write(rows, arguments)


if __name__ == "__main__":
    main()
