"""The arguments that a function of the user takes by name, out of those that are offered."""

import inspect
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from typing import Any, NamedTuple, Self


class NamedParameters(NamedTuple):
    """
    Parameters of a function that can be given by name.

    Args:
        names (`list[str]`):
            All of them.
        required (`list[str]`):
            Those without a default.
        has_kwargs (`bool`):
            Whether the function takes any other name too, by `**kwargs`.
    """

    names: list[str]
    required: list[str]
    has_kwargs: bool

    @classmethod
    def of(cls, function: Callable[..., Any], where: str) -> Self:
        """
        The parameters of a function.

        Args:
            function (`Callable`):
                Anything that can be called and has a signature.
            where (`str`):
                Names the function in the error.

        Raises:
            TypeError: a positional-only parameter, which cannot be given by name.
        """
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is Parameter.POSITIONAL_ONLY:
                raise TypeError(
                    f"{where}: parameter {parameter.name!r} is positional-only; arguments are given by name."
                )
        named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        return cls(
            names=[parameter.name for parameter in named],
            required=[parameter.name for parameter in named if parameter.default is Parameter.empty],
            has_kwargs=any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters),
        )

    def takes(self, name: str) -> bool:
        """Whether an argument of that name can be given."""
        return self.has_kwargs or name in self.names

    def check(self, offered: Collection[str], where: str) -> None:
        """Raise `TypeError` if a required one is not among the names that are offered."""
        for name in self.required:
            if name not in offered:
                raise TypeError(
                    f"{where} has a parameter {name!r}, which is no column of the dataset; a function may name: "
                    f"{', '.join(sorted(offered))}."
                )

    def select(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the function takes, out of those that are offered; see [`NamedParameters.check`]."""
        return {name: value for name, value in offered.items() if self.takes(name)}


def value_of_row(value: Any, row: int, rows: int, where: str, name: str) -> Any:
    """
    One completion's value of what TRL passes to a reward function for the whole batch.

    Args:
        value (`Any`):
            A column, as a list with one value for each completion, or anything else, which is for all of them.
        row, rows (`int`):
            Index of the completion, and the number of completions.
        where, name (`str`):
            The completion and the column, for the error.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != rows:
        raise ValueError(f"{where}: column {name!r} has {len(value)} values for {rows} prompts.")
    return value[row]
