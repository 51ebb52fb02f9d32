"""The heads' matrix products, a chunk of tokens at a time, and the logits that they become."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from .predicted_gradient import PredictedGradient, SecondPassCount


# Elementwise work goes over blocks of this many bytes: what the cache holds on a CPU, and enough for a kernel on a GPU
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_ELSEWHERE = 32 * 2**20
# Upper bound of the block-sized tiles alive at the worst moment
_BLOCK_TILES = 7
# Chunk-sized tiles: the two models' logits, which make place for what their gradient is made from
_CHUNK_TILES = 2

# From weight and bias of a head to the context in which they are whole
GatherHead = Callable[..., AbstractContextManager[Any]]


class HeadOptions(NamedTuple):
    """From the head's product `y` to the logits, `z = softcap * tanh(y * logit_scale / softcap) / temperature`."""

    temperature: float
    logit_scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    logits_memory_bytes: int
    predicted_gradient: PredictedGradient | None
    gather_head: GatherHead
    second_pass: SecondPassCount

    def logits_(self, y: torch.Tensor) -> torch.Tensor:
        if self.softcap is not None:
            return y.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.logit_scale / self.temperature
        return y if factor == 1 else y.mul_(factor)

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """`dz / dy` at the logits `z`."""
        factor = self.logit_scale / self.temperature
        if self.softcap is None:
            return factor
        return z.mul(self.temperature / self.softcap).square_().neg_().add_(1).mul_(factor)


class HeadModel(NamedTuple):
    """One model's hidden states and head, in the dtype of the matrix product."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: HeadOptions

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matrix products: float32, or float64 for float64 hidden states."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def excludes(self) -> bool:
        """Whether a logit may be -inf: a bias can say so, and float16 overflows."""
        return self.bias is not None or self.hidden.dtype == torch.float16

    def product(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """The head's product of some rows, in the first rows of `out`: fresh memory for each chunk would be slow."""
        return torch.mm(self.hidden[rows], self.weight.t(), out=out[: rows.stop - rows.start])

    def logits_(self, product: torch.Tensor) -> torch.Tensor:
        # Widened after product and bias, as TRL does, so that the log-probabilities are TRL's
        if self.bias is not None:
            product += self.bias
        return self.options.logits_(product.to(self.dtype))

    @property
    def _sizes(self) -> tuple[int, int]:
        """Rows of a chunk and of a block."""
        vocabulary, memory = self.weight.shape[0], self.options.logits_memory_bytes
        row = vocabulary * self.dtype.itemsize
        cache = _BLOCK_BYTES.get(self.hidden.device.type, _BLOCK_BYTES_ELSEWHERE)
        block = max(1, min(cache, memory // (_BLOCK_TILES + _CHUNK_TILES)) // row)
        chunk = (memory - _BLOCK_TILES * block * row) // (_CHUNK_TILES * vocabulary * self.hidden.itemsize)
        return max(1, chunk), block

    def buffer(self) -> torch.Tensor:
        """Place for the products of a chunk."""
        return self.hidden.new_empty(min(self._sizes[0], self.hidden.shape[0]), self.weight.shape[0])

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """The tokens in chunks, for the matrix products, and each chunk in blocks, for the elementwise work."""
        n_tokens, (chunk, block) = self.hidden.shape[0], self._sizes
        # No token still makes one (empty) chunk, so that empty outputs come out of the same code
        for start in range(0, max(n_tokens, 1), chunk):
            stop = min(start + chunk, n_tokens)
            yield slice(start, stop), [slice(s, min(s + block, stop)) for s in range(start, max(stop, 1), block)]


def head_models(tensors, options: HeadOptions) -> tuple[HeadModel, HeadModel]:
    """Policy and reference from their hidden states, weights and biases; a shared head is cast once."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors

    def model(hidden, weight, bias) -> HeadModel:
        dtype = options.matmul_dtype
        return HeadModel(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), options)

    policy = model(hidden, weight, bias)
    if ref_weight is None:
        return policy, policy._replace(hidden=ref_hidden.to(options.matmul_dtype))
    return policy, model(ref_hidden, ref_weight, ref_bias)


def matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """That of the hidden states, or autocast's."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` without rounding the product to the dtype of `a`: that rounding, per chunk, drifts training."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
