"""Reward functions that judge the texts of a completion's steps."""

import asyncio
import functools
import inspect
import pkgutil
from collections.abc import Callable, Coroutine, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, TypeVar, overload

from .._trl import is_async_callable
from ..rewards.step_reductions import STEP_REDUCTIONS
from ..rewards.types import StepRewards, check_finite, is_list_like, plain
from .named_arguments import NamedParameters, value_of_row
from .policy_text import last_user_text, place_on_tokens, policy_steps
from .segmentation import Segmentation, Step


_Result = TypeVar("_Result")

# Characters of a step that an error shows
_EXCERPT = 60

_Judge = Callable[..., Any]
_By = str | Segmentation | Callable[[str], Sequence[int]]


@overload
def step_reward(
    function: _Judge, /, *, by: _By = ..., name: str | None = ..., reduce: str | None = ...
) -> "StepRewardFunction": ...
@overload
def step_reward(
    *, by: _By = ..., name: str | None = ..., reduce: str | None = ...
) -> Callable[[_Judge], "StepRewardFunction"]: ...
def step_reward(
    function: _Judge | None = None,
    /,
    *,
    by: _By = "blank_line",
    name: str | None = None,
    reduce: str | None = None,
) -> Any:
    """
    Make a reward function of a function that judges the texts of a completion's steps.

    With `steps[k]` the text of step k, and `ends[k]` the index into `completion_ids` of the token with the last
    character of step k, a completion earns

        StepRewards(ends, values=function(problem=problem, steps=steps, ...))

    The white space between two steps belongs to the first of them: it counts for `ends[k]` and is left out of
    `steps[k]`. Steps are found in the text, because a separator may be part of a token, such as `".\\n\\n"`.

    The function is called once for each completion that has steps. Its arguments are given by name:

    - `problem` (`str`): the prompt, or in a conversation what the user said last.
    - `steps` (`list[str]`): the texts of the steps.
    - `prompt` and every other column of the dataset: the value in the completion's row. A column that is called
      `problem` or `steps` is not given.
    - `trainer_state`, `log_extra` and `log_metric`, as TRL gives them to every reward function.

    A function with `**columns` gets all of them, any other function those that it names. It returns one number for
    each step, `None` for a step that it does not score, or `None` in place of the list for a completion that it does
    not judge.

    An `async` function judges all completions of a batch at the same time. The first failure cancels the others.

    Args:
        function (`Callable`, *optional*):
            The function, a bound method or an object that can be called. Without it, a decorator is returned, so that
            `@step_reward`, `@step_reward()` and `@step_reward(by="newline")` all work.
        by (`str`, [`Segmentation`] or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"blank_line"`):
            Where steps end: a [`Segmentation`], or its argument `by`.
        name (`str`, *optional*):
            Name in logs, errors and `outcome_gate`; by default that of the function.
        reduce (`str`, *optional*):
            How the rewards of the steps become one number under outcome supervision: `"sum"`, `"mean"`, `"min"`,
            `"prod"` or `"last"`. By default the function's attribute `reduce`; without that, `"sum"`.

    Returns:
        [`StepRewardFunction`]: a reward function for [`GRPOExtTrainer`], which sets its attribute `policy_tokenizer`.
        Set it yourself to call the reward function elsewhere.

    Raises:
        TypeError: `function` is a class, or has no parameter `steps` that can be given by name.
        ValueError: an unknown `by` or `reduce`.

    Example:

    ```python
    >>> @step_reward(by="blank_line")
    ... def mentions_the_answer(problem, steps, answer):
    ...     return [float(answer in step) for step in steps]
    ```
    """
    segmentation = by if isinstance(by, Segmentation) else Segmentation(by)

    def decorate(judge: _Judge) -> StepRewardFunction:
        if not callable(judge) or inspect.isclass(judge):
            raise TypeError(
                f"step_reward takes a function or an object that can be called, got {judge!r}; `by` is given by name, "
                "and a class as an instance of it."
            )
        kind = AsyncStepRewardFunction if is_async_callable(judge) else StepRewardFunction
        return kind(judge, segmentation, name, reduce)

    return decorate if function is None else decorate(function)


class _Completion(NamedTuple):
    """A completion to be judged: its name in errors, its steps, and the arguments of the function."""

    where: str
    steps: list[Step]
    arguments: dict[str, Any]


class StepRewardFunction:
    """
    A reward function that judges the texts of a completion's steps. Made by [`step_reward`].

    Args:
        function (`Callable`):
            Judges the steps of one completion.
        segmentation ([`Segmentation`]):
            How completions are cut into steps.
        name (`str`, *optional*):
            Name in logs and errors; by default that of the function.
        reduce (`str`, *optional*):
            How the rewards of the steps become one number under outcome supervision.
    """

    reduce: str

    def __init__(
        self, function: _Judge, segmentation: Segmentation, name: str | None = None, reduce: str | None = None
    ):
        self.function = function
        self.segmentation = segmentation
        # The trainer sets it
        self.policy_tokenizer: Any = None
        _copy_metadata(function, self)
        if name is not None:
            self.__name__ = name
        self._where = f"reward source '{self.__name__}'"
        # Without a choice there is no attribute, by which the trainer knows that nothing was chosen
        if reduce is not None:
            self.reduce = reduce
        if reduce not in (None, *STEP_REDUCTIONS):
            raise ValueError(f"{self._where}: reduce={reduce!r}; known: {', '.join(map(repr, STEP_REDUCTIONS))}.")
        self._parameters = NamedParameters.of(function, self._where)
        if not self._parameters.takes("steps"):
            raise TypeError(f"{self._where} has no parameter `steps`; expected function(problem, steps, **columns).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r})"

    def __reduce__(self) -> Any:
        # Pickle stores a function as its name, and the name of a decorated function leads to this object instead
        path = f"{self.function.__module__}:{self.function.__qualname__}" if inspect.isfunction(self.function) else ""
        if _resolve(path) is self:
            return _restore, (path, {**self.__dict__, "function": None})
        return super().__reduce__()

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Take the tokenizer of the policy whose `completion_ids` will come."""
        self.policy_tokenizer = policy_tokenizer

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Any:
        """
        TRL's call of a reward function. The steps are those of `completion_ids`; `completions` is not read.

        Returns:
            `list[StepRewards | None]`: [`StepRewards`] without steps where a completion has none.

        Raises:
            TypeError: the function needs something that is no column, or returned no list of numbers.
            ValueError: the policy's tokenizer is not set, or the function returned another number of rewards than
                there are steps, or one that is not finite.
        """
        to_judge = self._to_judge(prompts, completion_ids, columns)
        return [_parse(one, self.function(**one.arguments) if one.steps else []) for one in to_judge]

    def _to_judge(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], columns: dict[str, Any]
    ) -> list[_Completion]:
        """All completions of a batch, before the first is judged: an error in the batch costs no judgement."""
        completions = []
        for row, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
            where = f"{self._where}, completion {row}"
            steps = policy_steps(self.policy_tokenizer, ids, self.segmentation, self._where)
            offered = {name: value_of_row(value, row, len(prompts), where, name) for name, value in columns.items()}
            offered["prompt"] = prompt
            offered["steps"] = [step.text for step in steps]
            # Not every prompt has one: the last message may hold an image
            if self._parameters.takes("problem"):
                offered["problem"] = last_user_text(prompt)
            completions.append(_Completion(where, steps, self._parameters.select(offered, self._where)))
        return completions


class AsyncStepRewardFunction(StepRewardFunction):
    """[`StepRewardFunction`] of a coroutine function: judges all completions of a batch at the same time."""

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[StepRewards | None]:
        async def judge(completion: _Completion) -> StepRewards | None:
            return _parse(completion, await self.function(**completion.arguments) if completion.steps else [])

        return await _gather([judge(one) for one in self._to_judge(prompts, completion_ids, columns)])


# ---------------------------------------------------------------------------------------------------------------------
# What the function returns


def _parse(completion: _Completion, returned: Any) -> StepRewards | None:
    """The returned rewards on the steps' last tokens."""
    where, steps, _ = completion
    returned = plain(returned)
    if returned is None:
        return None
    if not is_list_like(returned):
        raise TypeError(f"{where}: got {returned!r}; expected a list with one reward for each step, or None.")
    values = list(returned)
    if len(values) != len(steps):
        raise ValueError(f"{where}: {len(values)} rewards for {len(steps)} steps; use None for a step without one.")
    for position, (step, value) in enumerate(zip(steps, values, strict=True)):
        what = f"{where}: the reward of step {position}, {step.text[:_EXCERPT]!r},"
        if value is not None and not isinstance(value, (Real, Decimal)):
            raise TypeError(f"{what} is {value!r}, which is not a number.")
        if value is not None:
            check_finite(value, what)
    return place_on_tokens(steps, values)


async def _gather(judgements: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of coroutines that run at the same time; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(judgement) for judgement in judgements]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # A cancelled task may still have something to close
        await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------------------
# Names and pickles


def _copy_metadata(function: _Judge, target: StepRewardFunction) -> None:
    """Name, docstring and `reduce` of a function; an object that can be called is named after its class, as in TRL."""
    while isinstance(function, functools.partial):
        function = function.func
    target.__name__ = type(function).__name__
    functools.update_wrapper(target, function, assigned=("__name__", "__doc__", "reduce"), updated=())
    # Through it `inspect.signature` would show the function's parameters, not those of TRL's call
    target.__dict__.pop("__wrapped__")


def _resolve(path: str) -> Any:
    """What lies at `module:name`, `None` if nothing does, as for a function in a function."""
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError, ValueError):
        return None


def _restore(path: str, state: dict[str, Any]) -> StepRewardFunction:
    """A pickled copy of the decorated function that lies at `path`."""
    found = pkgutil.resolve_name(path)
    restored = object.__new__(type(found))
    restored.__dict__.update({**state, "function": found.function})
    return restored
