"""Two processes compute what one computes, with a group in both and other lengths and numbers of steps in each."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed_worker
from tests.training import assert_same_gradients


pytestmark = pytest.mark.distributed

TIMEOUT = 180

# Of the figures that are logged, those that do not depend on how the batch is cut into micro-batches
SUMS = ("loss", "policy_loss", "kl_loss", "grad_norm", "reward", "completions", "advantages")


def run_workers(model_folder: str, output: Path) -> None:
    """Start two processes that talk over gloo, on a free port, and end both if they take too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.distributed_worker", model_folder, str(output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *worker],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"no end after {TIMEOUT} s:\n{printed[-5000:]}")
    assert process.returncode == 0, printed[-5000:]


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """What one process saw, and what each of two saw, for every case."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run_workers(tiny_model, two)
    distributed_worker.main(tiny_model, str(one))
    return torch.load(one / "rank0.pt"), [torch.load(two / f"rank{rank}.pt") for rank in (0, 1)]


def loss_tokens(seen: dict) -> list[torch.Tensor]:
    """Each completion's advantages, which differ in padding only."""
    if seen["advantages"].ndim == 1:
        return list(seen["advantages"])
    assert (seen["advantages"][seen["mask"] == 0] == 0).all()
    return [row[kept.bool()] for row, kept in zip(seen["advantages"], seen["mask"], strict=True)]


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes_equal_one(results, case):
    one, two = results[0][case], [seen[case] for seen in results[1]]
    assert two[0]["mask"].shape != two[1]["mask"].shape

    expected, found = loss_tokens(one), [row for seen in two for row in loss_tokens(seen)]
    assert sum(row.abs().sum() for row in expected) > 1
    assert (expected[4] == 0).all(), "row 4 is not judged"
    for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, row=row: f"row {row}: {text}")

    for rank, seen in enumerate(two):
        assert seen["table"] == pytest.approx(one["table"], abs=1e-5)
        for step, gradients in enumerate(one["gradients"]):
            assert_same_gradients(seen["gradients"][step], gradients, 1e-5)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(seen["weights"][name], weight, rtol=1e-5, atol=1e-5)
        for theirs, ours in zip(one["log"], seen["log"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in theirs.keys() - {"step_time", "epoch"}:
                if case in distributed_worker.MICRO_BATCHES and not name.startswith(SUMS):
                    continue
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (rank, name)
    assert one["log"][1]["kl"] > 1e-4
    assert one["log"][1]["clip_ratio/region_mean"] > 0, "off policy"
