"""What a function that judges one completion at a time logs for it, as columns of TRL's completions table."""

from collections.abc import Callable
from typing import Any


class ExtraLogs:
    """
    The values that the judgements of a batch log, each in its completion's row.

    TRL's `log_extra(column, values)` appends values to a column, in the order of the calls. Judgements that run at the
    same time end in any order, and not every completion is judged. So the values are stored by row here, and TRL gets
    whole columns when the batch is judged, with `None` where a completion has logged nothing.

    Args:
        rows (`int`):
            Number of completions.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._columns: dict[str, list[Any]] = {}
        self._logged: set[tuple[str, int]] = set()

    def of_row(self, row: int, where: str) -> Callable[[str, list[Any]], None]:
        """
        The `log_extra` of one completion.

        Args:
            row (`int`):
                Index of the completion.
            where (`str`):
                Names it in errors.

        Returns:
            `Callable[[str, list], None]`: takes a column and a list of one value. It raises `ValueError` for anything
            but a list of one, and for a second value under one name.
        """

        def log_extra(column: str, values: list[Any]) -> None:
            if not isinstance(values, (list, tuple)) or len(values) != 1:
                raise ValueError(
                    f"{where}: log_extra({column!r}, {values!r}); this function judges one completion, so give a list "
                    f"with the one value of this completion, such as log_extra({column!r}, [value])."
                )
            if (column, row) in self._logged:
                raise ValueError(f"{where}: log_extra({column!r}, ...) is called twice for one completion.")
            self._logged.add((column, row))
            self._columns.setdefault(column, [None] * self._rows)[row] = values[0]

        return log_extra

    def hand_over(self, log_extra: Callable[[str, list[Any]], None]) -> None:
        """Give TRL's `log_extra` every column that was logged, one value for each completion."""
        for column, values in self._columns.items():
            log_extra(column, values)
