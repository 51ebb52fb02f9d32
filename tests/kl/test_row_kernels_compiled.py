"""
The Triton kernels as GPUs get them: compiled without one, for every dtype and divergence.

Needs triton. Not under its interpreter, in whose place the compiler would be.
"""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and TRITON_INTERPRET unset",
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {"A100": ("cuda", 80, 32), "H100": ("cuda", 90, 32), "MI300": ("hip", "gfx942", 64)}
# What a kernel is compiled for beside dtype and divergence: the least and the most that it can be asked to do
HEADS = {
    "plain": {"HAS_BIAS": False, "HAS_REF_BIAS": False, "HAS_CAP": False},
    "bias and cap": {"HAS_BIAS": True, "HAS_REF_BIAS": True, "HAS_CAP": True},
}
GRADIENTS = {
    "plain": [
        {"HAS_LOGP": True, "HAS_ENTROPY": False, "HAS_KL": True, "IS_SEPARATE": False},
        {"HAS_LOGP": False, "HAS_ENTROPY": False, "HAS_KL": True, "IS_SEPARATE": True},
    ],
    "bias and cap": [{"HAS_LOGP": True, "HAS_ENTROPY": True, "HAS_KL": True, "IS_SEPARATE": False}],
}


def compiled(kernel, dtype: str, target: str, **constants):
    """A kernel for products of a dtype, as `_launch` would have it compiled on that GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trl_grpo_ext.kl.fused.row_kernels import launch_options

    options = launch_options(DTYPES[dtype])
    constants["BLOCK"] = options.pop("BLOCK")
    products = dict.fromkeys(("product", "ref_product", "bias", "ref_bias"), f"*{dtype}")
    types = products | {"targets": "*i64", "stride": "i32", "V": "i32"}
    names = [name for name in kernel.arg_names if name not in constants]
    numbers = {"scale", "cap", "slope_scale"}
    signature = {name: types.get(name, "fp32" if name in numbers else "*fp32") for name in names}
    # Torch's allocations, and the padded rows
    aligned = [name for name in names if signature[name].startswith("*") or name == "stride"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def spilled_bytes(kernel, tmp_path: Path) -> int:
    """Stack and local memory of each thread of a compiled kernel: what did not fit into its registers."""
    if "cubin" not in kernel.asm:
        # AMD's compiler counts registers; a scratch segment is what its threads' memory is called there
        counts = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", kernel.asm["amdgcn"])
        assert len(counts) == 2
        return sum(map(int, counts))
    import triton

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    return sum(map(int, found))


def wide_and_narrow_loads(kernel) -> tuple[int, int]:
    """Numbers of loads of 128 bits, and of vectors or 16-bit entries that are not."""
    if "ptx" in kernel.asm:
        loads = re.findall(r"ld\.global\S*?\.(v4\.b32|v2\.b32|b16|v\d\.b16)", kernel.asm["ptx"])
        return loads.count("v4.b32"), len(loads) - loads.count("v4.b32")
    loads = re.findall(r"(?:global|buffer)_load_(dwordx4|dwordx2|ushort|short)", kernel.asm["amdgcn"])
    return loads.count("dwordx4"), len(loads) - loads.count("dwordx4")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("is_forward", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_fit_into_registers_and_load_128_bits_at_a_time(target, dtype, is_forward, head, tmp_path):
    from trl_grpo_ext.kl.fused.row_kernels import gradient_kernel, statistics_kernel

    kernels = [compiled(statistics_kernel, dtype, target, IS_FORWARD=is_forward, **HEADS[head])]
    for gradient in GRADIENTS[head]:
        kernels.append(compiled(gradient_kernel, dtype, target, IS_FORWARD=is_forward, **HEADS[head], **gradient))
    for kernel in kernels:
        assert spilled_bytes(kernel, tmp_path) == 0
        wide, narrow = wide_and_narrow_loads(kernel)
        assert wide >= 2
        if head == "plain":
            # Those of the target. A bias has as many entries as the vocabulary, which may be any number
            assert narrow <= (2 if kernel is kernels[0] else 0)
