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
    for name in values:
        getattr(owner, name)
    # A method is its class's, and is found there again once the instance has none
    own = {name: owner.__dict__[name] for name in values if name in owner.__dict__}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in values:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)
