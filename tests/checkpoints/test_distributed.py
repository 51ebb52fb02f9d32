"""Two processes, however they share the model, resume to what they would have been, which is what one process is."""

import pytest
import torch

from tests.support import resume_worker
from tests.support.launching import LAUNCHERS, launch


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def one(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    resume_worker.main(tiny_model, str(folder))
    return torch.load(folder / "rank0.pt")


@pytest.mark.parametrize("sharding", LAUNCHERS)
def test_two_processes_resume_with_the_reference_that_had_moved(sharding, one, tiny_model, tmp_path):
    launch(sharding, "tests.support.resume_worker", tiny_model, str(tmp_path))
    for seen in (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)):
        for case, runs in seen.items():
            for part in ("weights", "reference"):
                whole, resumed = runs["whole"][part], runs["resumed"][part]
                assert whole.keys() == resumed.keys() == one[case]["whole"][part].keys()
                for name, value in whole.items():
                    torch.testing.assert_close(resumed[name], value, rtol=1e-6, atol=1e-7, msg=f"{case} {name}")
                    expected = one[case]["whole"][part][name]
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=f"{case} {name}")
            kls = [entry["kl"] for entry in runs["whole"]["log"]]
            assert kls[0] < 1e-8 and min(kls[1:]) > 1e-6, "neither the policy nor its reference stands still"
            assert runs["resumed"]["step"] == resume_worker.STEPS
            for theirs, ours in zip(one[case]["whole"]["log"], runs["resumed"]["log"], strict=True):
                for name in ("loss", "kl", "kl_loss", "grad_norm"):
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (case, name)
