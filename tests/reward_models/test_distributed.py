"""Two processes under DDP, FSDP2 and ZeRO-3 give the scores of one, with other numbers of forwards in each."""

import pytest
import torch

from tests.support import reward_model_worker
from tests.support.launching import launch


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    reward_model_worker.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one(models, tmp_path_factory):
    """What one process sees."""
    return reward_model_worker.score(models, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_two_processes_give_the_scores_of_one(name, models, one, tmp_path):
    launch(name, "tests.support.reward_model_worker", str(models), str(tmp_path))
    two = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    # Each process holds a part of every weight, or all of them
    assert [seen["sharded"] for seen in (*two, one)] == [name == "zero3"] * 2 + [False]
    for part in ("trainer", "uneven", "none"):
        for source, expected in enumerate(one[part]):
            found = [values for seen in two for values in seen[part][source]]
            assert len({value for values in expected for value in values}) > 5
            for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
                assert ours == pytest.approx(theirs, abs=1e-5), (part, source, row)
