"""A run's folder, trained once."""

import shutil

import pytest

from tests.checkpoints.runs import make


@pytest.fixture(scope="session")
def saved(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make("lora", tiny_model, folder, max_steps=2).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """Folder of a run with two checkpoints, both saved during the updates on one generated batch."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"
