"""The trainer's arguments about rewards, checked before anything is loaded."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset


# What TRL passes to reward functions beside the data set's columns
_RESERVED_COLUMNS = (
    *("prompts", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)


def list_sources(reward_funcs: Any) -> list[Any]:
    """
    The reward sources as a list of our own.

    Raises:
        TypeError: a class where an object belongs, or something that cannot be called; the message names it.
    """
    sources = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    for index, source in enumerate(sources):
        if inspect.isclass(source):
            raise TypeError(
                f"reward_funcs[{index}] is the class {source.__name__}; pass an object of it, {source.__name__}(...), "
                "or a function."
            )
        if not (callable(source) or isinstance(source, str)):
            raise TypeError(
                f"reward_funcs[{index}] is {source!r}, of type {type(source).__name__}; a reward source is a "
                "function, a model, or a model's id or folder as text."
            )
    return sources


def check_columns(datasets: Mapping[str, Any], needs_prompt: bool) -> None:
    """
    Raise `ValueError` if a data set's columns would not reach the reward functions, or if it has no prompts.

    Args:
        datasets (`Mapping[str, Any]`):
            Data sets, dictionaries of such, or `None`, by the name of the argument. One that does not know its
            columns before it is read is not checked here, but row by row with [`check_row`].
        needs_prompt (`bool`):
            Whether prompts come from the data set, and not from an environment.
    """
    for argument, dataset in datasets.items():
        parts = dataset.values() if isinstance(dataset, dict) else [dataset]
        for part in parts:
            columns = part.column_names if isinstance(part, (Dataset, IterableDataset)) else None
            if columns is not None:
                check_row(argument, columns, needs_prompt)


def check_row(argument: str, columns: Iterable[str], needs_prompt: bool) -> None:
    """Raise `ValueError` if a column of the data set of that argument would not arrive, or none holds the prompts."""
    columns = list(columns)
    reserved = [name for name in columns if name in _RESERVED_COLUMNS]
    if reserved:
        raise ValueError(
            f"{argument} has a column '{reserved[0]}', a name under which reward functions get something else. Rename "
            "the column."
        )
    if needs_prompt and "prompt" not in columns:
        raise ValueError(f"{argument} has no column 'prompt'; it has: {', '.join(columns)}. Rename the right one.")
