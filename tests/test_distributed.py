"""
Two processes compute what one computes, with a group in both and other lengths and numbers of steps in each, however
the model is shared among them.
"""

import pytest
import torch

from tests.support import distributed_worker
from tests.support.distributed_worker import CASES, LOSSES, WEIGHTS
from tests.support.training import assert_same_gradients
from tests.support.two_processes import SHARDINGS, under


pytestmark = pytest.mark.distributed

# Of the figures that are logged, those that do not depend on how the batch is cut into micro-batches
SUMS = ("loss", "policy_loss", "kl_loss", "grad_norm", "reward", "completions", "advantages")
TIMES = {"step_time", "epoch"}

# What accelerate calls each
NAMES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(scope="session")
def one(models_of_parts, tmp_path_factory):
    """What one process sees, for every case."""
    folder = tmp_path_factory.mktemp("one")
    distributed_worker.main(models_of_parts / "training", folder)
    return torch.load(folder / "rank0.pt")


@pytest.fixture(scope="module")
def two(two_processes):
    """The sharding, and what each of two processes sees, for every case that it is run with."""
    return two_processes.sharding, two_processes.seen("training")


def loss_tokens(seen: dict, batch: int) -> list[torch.Tensor]:
    """Each completion's advantages, which differ in padding only."""
    advantages, mask = seen["advantages"][batch], seen["mask"][batch]
    if advantages.ndim == 1:
        return list(advantages)
    assert (advantages[mask == 0] == 0).all()
    return [row[kept.bool()] for row, kept in zip(advantages, mask, strict=True)]


def change(seen: dict) -> dict[str, torch.Tensor]:
    return {name: weight - seen["before"][name] for name, weight in seen["after"].items()}


@under(*SHARDINGS["training"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_two_processes_equal_one(two, one, case):
    assert_equal(two, one, case)


@under("ddp")
@pytest.mark.parametrize("case", LOSSES)
def test_two_processes_equal_one_for_each_loss(two, one, case):
    assert_equal(two, one, case)


@under("ddp")
def test_two_processes_log_the_credit_that_one_logs(two, one):
    expected = one["position"]["credit"]
    # Two updates on the first batch, of which the first is recorded, and one on the second
    assert [rows[0]["step"] for rows in expected] == [1, 3] and [len(rows) for rows in expected] == [8, 8]
    # The second process is not the one that writes, and reads when it is done with the last step
    found = two[1][0]["position"]["credit"]
    assert_same_values(found, expected)


@under("ddp")
def test_two_processes_print_the_steps_that_one_prints(two, one):
    expected = one["position"]["steps"]
    assert len(expected) == 12 and max(map(len, expected)) > 2
    assert_same_values([seen["position"]["steps"] for seen in two[1]], [expected, expected])


def assert_same_values(found, expected):
    """The same texts and numbers of tokens, and floats up to rounding, however deep."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_values(*pair)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def assert_equal(two: tuple[str, list[dict]], one: dict, case: str) -> None:
    sharding, ranks = two
    one, ranks = one[case], [seen[case] for seen in ranks]
    for seen in ranks:
        assert seen["sharding"] == NAMES[sharding]
        assert seen["whole"] == (0 if sharding in ("fsdp2", "zero3") else seen["parameters"])

    for batch in range(len(one["advantages"])):
        assert ranks[0]["mask"][batch].shape != ranks[1]["mask"][batch].shape
        expected = loss_tokens(one, batch)
        found = [row for seen in ranks for row in loss_tokens(seen, batch)]
        assert sum(row.abs().sum() for row in expected) > 1
        assert (expected[4] == 0).all(), "row 4 is not judged"
        for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(ours, theirs), (batch, row, ours - theirs)

    for rank, seen in enumerate(ranks):
        assert seen["table"] == pytest.approx(one["table"], abs=1e-6)
        for step, gradients in enumerate(one["gradients"] if sharding == "ddp" else []):
            assert_same_gradients(seen["gradients"][step], gradients, 1e-5)
        for name, weight in one["before"].items():
            torch.testing.assert_close(seen["before"][name], weight, rtol=0, atol=0)
        assert_same_gradients(change(seen), change(one), 1e-4)
        for step, (theirs, ours) in enumerate(zip(one["log"], seen["log"], strict=True)):
            assert ours.keys() == theirs.keys()
            for name in theirs.keys() - TIMES:
                if CASES[case].micro_batches > 1 and not name.startswith(SUMS):
                    continue
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (rank, step, name)
    for seen in (one, *ranks):
        if CASES[case].policy == CASES[case].reference and CASES[case].settings.get("kl_estimator") is None:
            assert abs(seen["log"][0]["kl"]) < 1e-8
    assert one["log"][1]["kl"] > 1e-4
    assert one["log"][1]["clip_ratio/region_mean"] > 0, "off policy"
