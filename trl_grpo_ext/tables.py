"""Names that stand for something: a value among those allowed, a row of a table, or a row by import path."""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar


Row = TypeVar("Row")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise a `ValueError` that names what is wrong and what is allowed, unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def import_by_path(what: str, path: str) -> Any:
    """
    What an import path `module:name` leads to.

    Args:
        what (`str`):
            Names it in the error.
        path (`str`):
            The import path.

    Raises:
        ValueError: the path leads nowhere.
    """
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be imported ({type(error).__name__}: {error}). Its module must be installed, in the "
            "working directory or on PYTHONPATH."
        ) from error


def import_path(what: str, function: Callable[..., Any]) -> str:
    """
    The import path `module:name` of a function.

    Args:
        what (`str`):
            Names it in the error.
        function (`Callable`):
            The function.

    Raises:
        ValueError: the path does not lead to the function, as for a lambda or a function within a function.
    """
    path = f"{function.__module__}:{function.__qualname__}"
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise ValueError(
            f"{what} is a function that cannot be found again as {path!r}. Define it at the top level of a module."
        )
    return path


def find_row(name: str, value: Any, table: Mapping[str, Row], row_type: type[Row]) -> Row:
    """
    The row that a setting means.

    Args:
        name (`str`):
            The setting's name, for messages.
        value (`str` or `Row`):
            A key of the table, the import path `module:name` of a row, or a row.
        table (`Mapping[str, Row]`):
            Rows by name.
        row_type (`type`):
            What a row has to be.

    Raises:
        ValueError: the table has no such row, or the import path leads nowhere.
        TypeError: what is found is not a row.
    """
    row = value
    if isinstance(value, str) and ":" in value:
        row = import_by_path(f"{name}={value!r}", value)
    elif not isinstance(value, row_type):
        check_choice(name, value, tuple(table))
        row = table[value]
    if not isinstance(row, row_type):
        raise TypeError(f"{name}={value!r} is a {type(row).__name__}; it has to be of type {row_type.__name__}.")
    return row
