"""Package metadata is read once in a test process."""

import functools
from importlib.metadata import Distribution


def read_package_metadata_once() -> None:
    """
    Remember each installed package and its metadata.

    accelerate asks at each unwrapping of a model whether PEFT is installed, and each model card asks for versions.
    Each time the package's file is parsed anew: a seventh of the time of the trainer's tests, and a twelfth.
    """
    Distribution.from_name = functools.cache(Distribution.from_name)  # type: ignore[method-assign]
    Distribution.metadata = property(functools.cache(Distribution.metadata.fget))  # type: ignore[method-assign]
