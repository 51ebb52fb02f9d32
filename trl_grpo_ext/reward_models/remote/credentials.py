"""What a request may carry in its headers: the caller's own, and an API key from the environment."""

import os
import re
from collections.abc import Mapping


_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """The headers as a dictionary; `ValueError` names a header that HTTP cannot carry, without its value."""
    for name, value in (headers or {}).items():
        if not isinstance(value, str) or not value.isprintable() or not value.isascii():
            raise ValueError(f"the value of the header {name!r} is not printable ASCII text.")
    return dict(headers or {})


def read_api_key(variable: str, option: str) -> str:
    """
    The key in an environment variable.

    Args:
        variable (`str`):
            Name of the variable.
        option (`str`):
            Where the name was given, for errors.

    Raises:
        ValueError: not a variable's name, or one without a key. No error shows what may be a key.
    """
    if not _VARIABLE.fullmatch(variable):
        raise ValueError(f"{option} is the name of an environment variable in capitals, not the key itself.")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{option}: the environment variable {variable} holds no key.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{option}: the key in the environment variable {variable} is not printable ASCII text.")
    return key
