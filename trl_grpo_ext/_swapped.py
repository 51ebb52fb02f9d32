"""Attributes of an upstream object that differ for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """
    `owner` with other values of some attributes inside the context, and with its own again outside.

    It lets an upstream method run on another value of a setting without a copy of the method's body.

    Raises:
        AttributeError: `owner` has no attribute of a given name.
    """
    own = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)
