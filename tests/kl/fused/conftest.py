"""Every test of the fused head meets both row operations."""

import os
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_grpo_ext.kl.fused import row_operations


INTERPRETS_TRITON = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    autouse=True,
    params=[
        "pytorch",
        pytest.param(
            "triton", marks=pytest.mark.skipif(not INTERPRETS_TRITON, reason="needs triton and TRITON_INTERPRET=1")
        ),
    ],
)
def operations(request):
    """PyTorch's operations on tiles, or Triton's kernels, which its interpreter runs on the CPU."""
    if request.param == "pytorch":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch, prepared_once(patch):
        patch.setattr(row_operations, "_runs_kernels", lambda device: True)
        yield request.param


@contextmanager
def prepared_once(patch):
    """Prepare Triton's language for a test, not for each call of a function, which takes half of the time."""
    from triton import language
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    patch.setattr(interpreter, "_convert_float", partial(rounded_to_nearest, interpreter._convert_float))
    yield
    scope.restore()


def rounded_to_nearest(convert, values, dtype, new_dtype, mode):
    """The interpreter cuts digits off where a GPU rounds to the nearest bfloat16."""
    if (dtype.name, new_dtype.name) != ("fp32", "bf16"):
        return convert(values, dtype, new_dtype, mode)
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy().reshape(values.shape)
