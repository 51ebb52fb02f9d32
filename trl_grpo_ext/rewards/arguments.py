"""The trainer's arguments about rewards, checked before anything is loaded."""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset, IterableDataset


# The argument of reward functions, beside TRL's own, that says which tokens the policy wrote
TOOL_MASK = "tool_mask"
# The one that holds the ids of each prompt, as the policy read them
PROMPT_IDS = "prompt_ids"

# What TRL and this package pass to reward functions beside the data set's columns
_RESERVED_COLUMNS = (
    *("prompts", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments", TOOL_MASK, PROMPT_IDS),
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


@runtime_checkable
class NamesColumns(Protocol):
    """A reward source that says which columns of the dataset it needs."""

    @property
    def required_columns(self) -> list[str]:
        """The names of the columns."""
        ...


def _named_parameters(source: Any) -> list[Parameter]:
    """The parameters of a reward function that can be given by name; empty where they are not known."""
    try:
        parameters = inspect.signature(source).parameters.values()
    except (TypeError, ValueError):
        # Some builtins have no signature
        return []
    return [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]


def required_arguments(source: Any) -> list[str]:
    """The arguments by name without which a call of a reward function fails; empty where they are not known."""
    return [p.name for p in _named_parameters(source) if p.default is Parameter.empty]


def names_argument(source: Any, name: str) -> bool:
    """Whether a reward function has a parameter of that name; `**kwargs` is none."""
    return name in [p.name for p in _named_parameters(source)]


def check_parameters(source: Any, offered: Collection[str], where: str) -> None:
    """
    Raise `TypeError` if a reward function has a required parameter that it would not be given.

    Args:
        source (`Callable`):
            The function.
        offered (`Collection[str]`):
            The names of what it is given.
        where (`str`):
            Names it in the error.
    """
    for name in required_arguments(source):
        if name not in offered:
            hint = " To judge the texts of a completion's steps, decorate it with @step_reward."
            raise TypeError(
                f"{where} has a parameter {name!r}, which is no column of the dataset; a reward function is given: "
                f"{', '.join(sorted(offered))}.{hint if name in ('problem', 'steps') else ''}"
            )


def check_source_columns(sources: Sequence[Any], names: Sequence[str], datasets: Mapping[str, Any]) -> None:
    """
    Raise `TypeError` if a reward source needs a column that a data set lacks.

    Args:
        sources (`Sequence`):
            Functions and models.
        names (`Sequence[str]`):
            Their names.
        datasets (`Mapping[str, Any]`):
            As for [`check_columns`].
    """
    for argument, columns in _known_columns(datasets):
        for source, name in zip(sources, names, strict=True):
            where = f"reward source '{name}'"
            needed = source.required_columns if isinstance(source, NamesColumns) else []
            missing = [column for column in needed if column not in columns]
            if missing:
                raise TypeError(
                    f"{where} needs the column {missing[0]!r}, which {argument} lacks; it has: {', '.join(columns)}."
                )


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
    for argument, columns in _known_columns(datasets):
        check_row(argument, columns, needs_prompt)


def _known_columns(datasets: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The argument and the columns of each data set that knows them before it is read."""
    for argument, dataset in datasets.items():
        parts = dataset.values() if isinstance(dataset, dict) else [dataset]
        for part in parts:
            columns = part.column_names if isinstance(part, (Dataset, IterableDataset)) else None
            # A transform that runs when a row is read makes columns of its own
            is_transformed = isinstance(part, Dataset) and part.format["type"] == "custom"
            if columns is not None and not is_transformed:
                yield argument, list(columns)


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


def check_tool_mask(tool_mask: Any, completion_ids: Sequence[Sequence[int]], extra_fields: Mapping[str, Any]) -> None:
    """
    Check which tokens a rollout function says that the policy wrote.

    Args:
        tool_mask (`list[list[int]]` or `None`):
            For each completion and each of its tokens, 1 if the policy wrote it; `None` if it wrote all of them.
        completion_ids (`Sequence[Sequence[int]]`):
            The completions.
        extra_fields (`Mapping[str, Any]`):
            What a rollout function returned beside them, for reward functions.

    Raises:
        ValueError: a mask of another length than its completion, or one under the wrong name.
    """
    if TOOL_MASK in extra_fields:
        raise ValueError(
            f"rollout_func returned a field '{TOOL_MASK}', under which reward functions get the mask of the policy's "
            "tokens. Return that mask as 'env_mask', or rename the field."
        )
    if tool_mask is None:
        return
    for index, (mask, ids) in enumerate(zip(tool_mask, completion_ids, strict=True)):
        if len(mask) != len(ids):
            raise ValueError(
                f"completion {index} has {len(ids)} tokens, and its mask of the policy's tokens has {len(mask)}. "
                "rollout_func has to return an entry of 'env_mask' for each token."
            )
