"""Small real models and tokenizers in Hub-shaped folders, made once per session."""

import gc
import os


# Read when torch and transformers are imported: no downloads, and no fight for the cores between workers, nor within
# one, where threads cost ten times what they gain on models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.support.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a Llama with 2 layers and a character tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _imports_out_of_the_garbage_collector():
    # `Trainer.train` collects garbage, which otherwise walks all of torch and transformers each time
    gc.collect()
    gc.freeze()
