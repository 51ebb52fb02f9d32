"""Package metadata is read once in a test process."""

import functools
import importlib.metadata


def read_package_metadata_once() -> None:
    """
    Remember what `importlib.metadata.metadata` returns.

    accelerate asks at each unwrapping of a model whether PEFT is installed, and each time the file is parsed anew: a
    seventh of the time of the trainer's tests.
    """
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
