"""Lists of texts. A single text where a list belongs would be read letter by letter."""

from typing import Any


def check_texts(values: Any, what: str) -> None:
    """
    Raise `TypeError` if something is no list or tuple of texts.

    Args:
        values (`Any`):
            What is asked for as a list of texts.
        what (`str`):
            Names it in the error.
    """
    if isinstance(values, str):
        raise TypeError(f"{what} is a text, {values!r}; give a list of texts.")
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{what} is {values!r}; give a list of texts.")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{what}[{index}] is {value!r}; it must be a text.")
