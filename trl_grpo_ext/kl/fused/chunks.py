"""
The heads' matrix products, a chunk of tokens at a time, and the logits that they become.

Two sizes bound the memory, whatever the number of tokens:

- a chunk is as many tokens as fit into the memory allowed; each matrix product is over one chunk,
- a block is as many tokens of a chunk as fit into the processor's cache; the elementwise work is over one block. For
  Triton's kernels, which have no tiles to fit in, the chunk is one block.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch


# Upper bound of the block-sized tiles alive at the worst moment
_BLOCK_TILES = 7
# Chunk-sized tiles: the two models' products, which are overwritten by what their gradient is made from
_CHUNK_TILES = 2
# Entries: with rows that begin at multiples of it, a GPU loads 128 bits at a time
_ROW_MULTIPLE = 16

# Where nothing else is asked for
_CPU_LOGITS_BYTES = 256 * 2**20
_GPU_CHUNK_TOKENS = 2048
_GPU_SHARE = 8

# From weight and bias of a head to the context in which they are gathered from all processes
GatherHead = Callable[..., AbstractContextManager[Any]]


class LogitsMemory(NamedTuple):
    """
    What tensors with a row of V entries for each token may take.

    Args:
        total_bytes (`int`):
            All of them together, at one moment.
        block_bytes (`int` or `None`):
            A tile of one block in float32; `None` where a chunk is one block and there are no tiles.
    """

    total_bytes: int
    block_bytes: int | None


def default_logits_bytes(vocabulary: int, itemsize: int, block_bytes: int | None, gpu_bytes: int | None) -> int:
    """
    Bytes for logits where the user names no number.

    A chunk of tokens reads the whole head from memory. On a GPU it takes about 1,000 tokens until the products keep
    the processors busy meanwhile, so a chunk has 2,048 tokens, unless they take more than an eighth of the GPU's
    memory:

        2048 tokens * 2 products * vocabulary * itemsize + tiles

    On a CPU, 256 MiB.

    Args:
        vocabulary (`int`):
            V, rows of the head.
        itemsize (`int`):
            Bytes of an entry of the products.
        block_bytes (`int` or `None`):
            As in [`LogitsMemory`].
        gpu_bytes (`int` or `None`):
            All memory of the GPU; `None` on a CPU.
    """
    if gpu_bytes is None:
        return _CPU_LOGITS_BYTES
    tiles = _BLOCK_TILES * (block_bytes or 0)
    return min(_GPU_CHUNK_TOKENS * _CHUNK_TILES * _row_length(vocabulary) * itemsize + tiles, gpu_bytes // _GPU_SHARE)


def gpu_bytes(device: torch.device) -> int | None:
    """All memory of a GPU; `None` for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _row_length(vocabulary: int) -> int:
    """Entries from one row of products to the next."""
    return -(-vocabulary // _ROW_MULTIPLE) * _ROW_MULTIPLE


class HeadOptions(NamedTuple):
    """
    From the head's product `y = h W^T + b` to the logits:

        z = softcap * tanh(y * logit_scale / softcap) / temperature

    and `z = y * logit_scale / temperature` where `softcap` is `None`.
    """

    temperature: float
    logit_scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    memory: LogitsMemory

    def logits_(self, y: torch.Tensor) -> torch.Tensor:
        """`z`, in the place of `y`."""
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
    """The hidden states of one model's M tokens and its head, in the dtype of the matrix product."""

    hidden_MH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    options: HeadOptions

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matrix products: float32, or float64 for float64 hidden states."""
        return torch.promote_types(self.hidden_MH.dtype, torch.float32)

    @property
    def may_exclude(self) -> bool:
        """Whether a logit may be -inf: a bias can say so, and float16 overflows."""
        return self.bias_V is not None or self.hidden_MH.dtype == torch.float16

    def product(self, tokens: slice, out: torch.Tensor) -> torch.Tensor:
        """The product of some tokens, in the first rows of `out`: new memory for each chunk would be slow."""
        return torch.mm(self.hidden_MH[tokens], self.weight_VH.t(), out=out[: tokens.stop - tokens.start])

    def logits_(self, product: torch.Tensor) -> torch.Tensor:
        """The logits of a product, in its place where the dtypes are the same."""
        # Widened after product and bias, as TRL does, so that the log-probs are TRL's
        if self.bias_V is not None:
            product += self.bias_V
        return self.options.logits_(product.to(self.dtype))

    @property
    def _chunk_and_block_tokens(self) -> tuple[int, int]:
        vocabulary = self.weight_VH.shape[0]
        memory, block_bytes = self.options.memory
        product_bytes = _CHUNK_TILES * _row_length(vocabulary) * self.hidden_MH.itemsize
        if block_bytes is None:
            chunk = max(1, memory // product_bytes)
            return chunk, chunk
        tile_bytes = vocabulary * self.dtype.itemsize
        block = max(1, min(block_bytes, memory // (_BLOCK_TILES + _CHUNK_TILES)) // tile_bytes)
        chunk = (memory - _BLOCK_TILES * block * tile_bytes) // product_bytes
        return max(1, chunk), block

    def new_product_buffer(self) -> torch.Tensor:
        """Memory for the products of one chunk."""
        chunk, _ = self._chunk_and_block_tokens
        vocabulary = self.weight_VH.shape[0]
        tokens = min(chunk, self.hidden_MH.shape[0])
        return self.hidden_MH.new_empty(tokens, _row_length(vocabulary))[:, :vocabulary]

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """All tokens in chunks, each with its blocks; slices of the M tokens."""
        num_tokens = self.hidden_MH.shape[0]
        chunk, block = self._chunk_and_block_tokens
        # No token still makes one (empty) chunk, so that empty outputs come out of the same code
        for start in range(0, max(num_tokens, 1), chunk):
            stop = min(start + chunk, num_tokens)
            yield slice(start, stop), [slice(s, min(s + block, stop)) for s in range(start, max(stop, 1), block)]


def head_models(tensors, options: HeadOptions) -> tuple[HeadModel, HeadModel]:
    """Policy and reference from their hidden states, weights and biases; a shared head is cast once."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors

    def model(hidden, weight, bias) -> HeadModel:
        dtype = options.matmul_dtype
        return HeadModel(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), options)

    policy = model(hidden, weight, bias)
    if ref_weight is None:
        return policy, policy._replace(hidden_MH=ref_hidden.to(options.matmul_dtype))
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
