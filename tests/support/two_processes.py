"""
Parts of the tests that run in each of two processes. The processes are started once for all of them, since starting
and importing take longer than any part does.

A part finds its models in a folder of its name, and leaves what it saw in another: `rank0.pt` and `rank1.pt`, or
`rank0.txt` and `rank1.txt` with the traceback of a failure.
"""

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support import distributed_worker, resume_worker, reward_model_worker
from tests.support.launching import LAUNCHERS, launch
from tests.support.package_metadata import read_package_metadata_once


PARTS = {"training": distributed_worker, "resuming": resume_worker, "reward_models": reward_model_worker}
# ZeRO-2 leaves weights whole, and a reward model has nothing else
SHARDINGS = {"training": [*LAUNCHERS], "resuming": [*LAUNCHERS], "reward_models": ["ddp", "fsdp2", "zero3"]}


def under(*shardings: str) -> Any:
    """
    Run a test on what two processes saw, under each of these shardings.

    The tests of one sharding, in all files, run in one worker of pytest, so that its processes are started once.
    """
    parameters = [pytest.param(sharding, marks=pytest.mark.xdist_group(sharding)) for sharding in shardings]
    return pytest.mark.parametrize("two_processes", parameters, indirect=True)


class TwoProcesses(NamedTuple):
    """What two processes left that were started under a sharding."""

    sharding: str
    folder: Path

    @classmethod
    def started(cls, python: str, sharding: str, models: Path, folder: Path) -> "TwoProcesses":
        """Start them, and wait until they have run all parts."""
        for part in PARTS:
            (folder / part).mkdir()
        launch(python, sharding, "tests.support.launched", str(models), str(folder), sharding)
        return cls(sharding, folder)

    def seen(self, part: str) -> list[Any]:
        """What each process saw in a part; a failure if the part failed in one of them."""
        failures = [path.read_text() for path in sorted((self.folder / part).glob("rank*.txt"))]
        assert not failures, "\n".join(failures)
        return [torch.load(self.folder / part / f"rank{rank}.pt") for rank in (0, 1)]


def save_models(folder: Path) -> None:
    """The models of each part."""
    for name, part in PARTS.items():
        part.save_models(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# In the processes


def run_parts(models: Path, output: Path, sharding: str, environments: list[dict[str, str]]) -> None:
    """Run the parts one after the other, each in one new process for each of the environments."""
    # Before the forks, so that it is read and imported once
    read_package_metadata_once()
    if sharding.startswith("zero"):
        # Its marks for a profiler cost more than the models of the parts
        importlib.import_module("deepspeed.utils.nvtx").enable_nvtx = False
    # `Trainer.train` and `save_model` collect garbage, which in a fork would copy every page of what was imported
    gc.collect()
    gc.freeze()
    for part in [name for name in PARTS if sharding in SHARDINGS[name]]:
        # A process group of its own: what another part did to its group, or failed to do, is not seen
        group = {"MASTER_PORT": free_port(), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        processes = [
            multiprocessing.get_context("fork").Process(
                target=run, args=(part, models / part, output / part, sharding, environment | group)
            )
            for environment in environments
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def run(part: str, models: Path, output: Path, sharding: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    try:
        PARTS[part].main(models, output, sharding)
    except BaseException:
        (output / f"rank{os.environ['RANK']}.txt").write_text(traceback.format_exc())
        raise


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
