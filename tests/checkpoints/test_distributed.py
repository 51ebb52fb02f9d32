"""Two processes, however they share the model, resume to what they would have been, which is what one process is."""

import pytest
import torch

from tests.support import resume_worker
from tests.support.two_processes import SHARDINGS, under


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def one(models_of_parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    resume_worker.main(models_of_parts / "resuming", folder)
    return torch.load(folder / "rank0.pt")


@under(*SHARDINGS["resuming"])
def test_two_processes_resume_with_the_reference_that_had_moved(two_processes, one):
    ranks = two_processes.seen("resuming")
    for case, alone in one["runs"].items():
        for rank in ranks:
            assert_resumed(case, rank["runs"][case], alone)
        for run in ("whole", "resumed"):
            # The processes' parts of a batch, one after the other
            both = zip(*(rank["runs"][case][run]["prompts"] for rank in ranks), strict=True)
            assert [first + second for first, second in both] == alone[run]["prompts"]
        first, second, third, fourth = alone["whole"]["prompts"]
        assert first + second != third + fourth, "the epochs differ"
        assert alone["resumed"]["prompts"] == [fourth]
    # Both processes generate anew where one has lost its part: another one would wait for the other
    both = zip(*(rank["prompts without a batch"] for rank in ranks), strict=True)
    assert [first + second for first, second in both] == one["prompts without a batch"]
    assert one["prompts without a batch"] == [one["runs"]["lora"]["whole"]["prompts"][2]]


def assert_resumed(case, runs, alone):
    for part in ("weights", "reference"):
        whole, resumed = runs["whole"][part], runs["resumed"][part]
        assert whole.keys() == resumed.keys() == alone["whole"][part].keys()
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-6, atol=1e-7, msg=f"{case} {name}")
            expected = alone["whole"][part][name]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=f"{case} {name}")
    kls = [entry["kl"] for entry in runs["whole"]["log"]]
    assert kls[0] < 1e-8 and min(kls[1:]) > 1e-6, "neither the policy nor its reference stands still"
    assert runs["resumed"]["step"] == resume_worker.STEPS
    for theirs, ours in zip(alone["whole"]["log"], runs["resumed"]["log"], strict=True):
        for name in ("loss", "kl", "kl_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (case, name)
