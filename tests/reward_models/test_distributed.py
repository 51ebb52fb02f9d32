"""Two processes under DDP, FSDP2 and ZeRO-3 give the scores of one, with other numbers of forwards in each."""

import pytest

from tests.support import reward_model_worker
from tests.support.two_processes import SHARDINGS, under


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def one(models_of_parts, tmp_path_factory):
    """What one process sees."""
    return reward_model_worker.score(models_of_parts / "reward_models", tmp_path_factory.mktemp("one"))


@under(*SHARDINGS["reward_models"])
def test_two_processes_give_the_scores_of_one(two_processes, one):
    two = two_processes.seen("reward_models")
    # Each process holds a part of every weight, or all of them
    assert [seen["sharded"] for seen in (*two, one)] == [two_processes.sharding == "zero3"] * 2 + [False]
    for part in ("trainer", "uneven", "none"):
        for source, expected in enumerate(one[part]):
            found = [values for seen in two for values in seen[part][source]]
            assert len({value for values in expected for value in values}) > 5
            for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
                assert ours == pytest.approx(theirs, abs=1e-5), (part, source, row)
