"""Small real models and tokenizers in Hub-shaped folders, made once per session."""

import gc
import os
import tempfile


# Read when torch and transformers are imported: no downloads, and no fight for the cores between workers, nor within
# one, where threads cost ten times what they gain on models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Trackio reads it when TRL imports it; nothing is there but during a test of it
os.environ["TRACKIO_DIR"] = os.path.join(tempfile.gettempdir(), f"trackio_of_test_{os.getpid()}")

import pytest

from tests.support.fork_server import fork_server


# Heavy imports stand in the fixtures: the process that hands out the tests reads this file and runs none of them


PYTHON = "PYTHON_OF_THE_FORK_SERVER"


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main():
    """One server for all workers, which find it by the environment."""
    if PYTHON in os.environ:
        return (yield)
    with fork_server() as python, pytest.MonkeyPatch.context() as patch:
        patch.setenv(PYTHON, python)
        return (yield)


@pytest.fixture(scope="session")
def forked_python() -> str:
    """The path of a Python that has imported TRL, in place of `sys.executable` where importing is not the point."""
    return os.environ[PYTHON]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a Llama with 2 layers and a character tokenizer."""
    from tests.support.tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def models_of_parts(tmp_path_factory):
    """Folder with the models of each part of `tests/support/two_processes.py`."""
    from tests.support.two_processes import save_models

    folder = tmp_path_factory.mktemp("models_of_parts")
    save_models(folder)
    return folder


@pytest.fixture(scope="session")
def two_processes(request, forked_python, models_of_parts, tmp_path_factory):
    """What two processes saw of all parts, started under the sharding that `two_processes.under` names."""
    from tests.support.two_processes import TwoProcesses

    return TwoProcesses.started(forked_python, request.param, models_of_parts, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", autouse=True)
def _package_metadata():
    from tests.support.package_metadata import read_package_metadata_once

    read_package_metadata_once()


@pytest.fixture(autouse=True)
def _seed():
    import torch

    # Of the CPU alone: to ask for every other device takes longer than many a test
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _imports_out_of_the_garbage_collector():
    # `Trainer.train` collects garbage, which otherwise walks all of torch and transformers each time
    gc.collect()
    gc.freeze()
