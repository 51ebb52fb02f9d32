"""Attributes of an upstream object that differ for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """`owner` with these attributes inside the context, and its own again outside."""
    own = {name: vars(owner)[name] for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(own)
