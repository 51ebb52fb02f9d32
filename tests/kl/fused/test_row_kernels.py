"""What only the Triton kernels have: a compiler that can fail, and bytes that the cost on a GPU is predicted from."""

import pytest
import torch

from tests.kl.fused.problems import fused, predicting, problem
from trl_grpo_ext.kl.fused.row_operations import SWITCH


@pytest.fixture(autouse=True)
def kernels(operations):
    if operations != "triton":
        pytest.skip("of the kernels alone")


def test_a_kernel_that_cannot_be_compiled_is_an_error_that_names_the_switch(monkeypatch):
    from trl_grpo_ext.kl.fused import row_kernels

    class Broken:
        def __getitem__(self, grid):
            raise OSError("no ptxas")

    monkeypatch.setattr(row_kernels, "statistics_kernel", Broken())
    with pytest.raises(RuntimeError, match=f"no ptxas.*Set the environment variable {SWITCH}=0") as caught:
        fused(problem(2, 4, 9))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("head", ["frozen, predicted", "frozen, any loss"])
def test_the_kernels_read_and_write_what_the_predicted_cost_counts(monkeypatch, head):
    from triton.runtime.interpreter import InterpreterBuilder

    from recipes.bench.exact_kl_gpu_cost import counting

    moved = []
    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(InterpreterBuilder, name)

        def counted(builder, pointers, *arguments, original=original, name=name):
            mask = arguments[0 if name.endswith("load") else 1]
            itemsize = pointers.dtype.element_ty.primitive_bitwidth // 8
            moved.append(int(mask.data.sum()) * itemsize)
            return original(builder, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    p = problem(3, 4, 4_000, bias=False)
    p.hidden.requires_grad_()
    options = {"predicted_gradient": predicting(p)} if head == "frozen, predicted" else {}
    fused(p, **options)
    seen = sum(moved)
    with counting() as launches:
        fused(p, **options)
    expected = sum(launch.bytes for launch in launches if launch.name.endswith("kernel"))
    # Statistics, targets and gradients of the loss are a few bytes for each token
    assert seen == pytest.approx(expected, abs=3 * 1_000)
    assert torch.isfinite(torch.tensor(seen))
