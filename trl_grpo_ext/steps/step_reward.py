"""Reward functions that judge the texts of a completion's steps."""

import copy
import functools
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

from .._trl import is_async_callable
from ..concurrency import run_together
from ..rewards.step_reductions import STEP_REDUCTIONS
from ..rewards.types import StepRewards, check_number, is_list_like, plain
from .extra_logs import ExtraLogs
from .named_arguments import NamedParameters, value_of_row
from .policy_text import last_user_text, place_on_tokens, policy_steps
from .segmentation import Segmentation, SegmentationLike, Step, as_segmentation


# Characters of a step that an error shows
_EXCERPT = 60

_LOG_EXTRA = "log_extra"
# What a function may name beside the columns of the dataset
_GIVEN = ("problem", "steps", "prompt", "completion", "trainer_state", _LOG_EXTRA, "log_metric", "environments")

_Judge = Callable[..., Any]


@overload
def step_reward(
    function: _Judge, /, *, by: SegmentationLike = ..., name: str | None = ..., reduce: str | None = ...
) -> "StepRewardFunction": ...
@overload
def step_reward(
    *, by: SegmentationLike = ..., name: str | None = ..., reduce: str | None = ...
) -> Callable[[_Judge], "StepRewardFunction"]: ...
def step_reward(
    function: _Judge | None = None,
    /,
    *,
    by: SegmentationLike = "blank_line",
    name: str | None = None,
    reduce: str | None = None,
) -> Any:
    """
    Make a reward function of a function that judges the texts of a completion's steps.

    With `steps[k]` the text of step k, and `ends[k]` the index into `completion_ids` of the token that ends step k, a
    completion earns

        StepRewards(ends, values=function(problem=problem, steps=steps, ...))

    The separator belongs to the step before it, so `ends[k]` is the token that ends the separator. White space at both
    ends of a step is left out of `steps[k]`, its indentation too. Steps are found in the text, because a separator may
    be part of a token, such as `".\\n\\n"`.

    With tools, the output of a tool belongs to no step, and every turn of the policy ends one. `by="turn"` makes each
    turn a step.

    The steps of a policy that thinks before it answers are those of both, unless the segmentation has a scope:
    `by=Segmentation(scope="answer")`.

    The function is called once for each completion that has steps. Its arguments are given by name:

    - `problem` (`str`): the prompt, or in a conversation what the user said last.
    - `steps` (`list[str]`): the texts of the steps.
    - `completion` (`str` or `list[dict]`): the whole completion as TRL gives it, with the outputs of tools.
    - `prompt` and every other column of the dataset: the value in the completion's row. A column that is called
      `problem` or `steps` is not given.
    - `trainer_state` and `log_metric`, as TRL gives them to every reward function.
    - `log_extra(column, [value])`: puts the value into the completion's row of TRL's completions table. Rows for which
      it is not called hold `None`.

    A function with `**columns` gets all of them, any other function those that it names. It returns one number for
    each step, `None` for a step that it does not score, or `None` in place of the list for a completion that it does
    not judge.

    An `async` function judges all completions of a batch at the same time. The first failure cancels the others.

    Args:
        function (`Callable`, *optional*):
            The function, a method or an object that can be called. Without it, a decorator is returned, so that
            `@step_reward`, `@step_reward()` and `@step_reward(by="newline")` all work. A decorated method is bound to
            its object, as methods are.
        by (`str`, [`Segmentation`] or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"blank_line"`):
            Where steps end: a [`Segmentation`], which also says which part of a completion has steps, or its argument
            `by`, or a mapping of all its arguments.
        name (`str`, *optional*):
            Name in logs, errors and `outcome_gate`; by default that of the function.
        reduce (`str`, *optional*):
            How the rewards of the steps become one number under outcome supervision: `"sum"`, `"mean"`, `"min"`,
            `"prod"` or `"last"`. By default the function's attribute `reduce`; without that, `"sum"`.

    Returns:
        [`StepRewardFunction`]: a reward function for [`GRPOExtTrainer`], which sets its attribute `policy_tokenizer`.
        Set it yourself to call the reward function elsewhere.

    Raises:
        TypeError: `function` is a class, or has no parameter `steps` that can be given by name; `by` is none of the
            three.
        ValueError: an unknown `by` or `reduce`.

    Example:

    ```python
    >>> @step_reward(by="blank_line")
    ... def mentions_the_answer(problem, steps, answer):
    ...     return [float(answer in step) for step in steps]
    ```
    """
    segmentation = as_segmentation(by)

    def decorate(judge: _Judge) -> StepRewardFunction:
        if not callable(judge) or inspect.isclass(judge):
            raise TypeError(
                f"step_reward takes a function or an object that can be called, got {judge!r}; `by` is given by name, "
                "and a class as an instance of it."
            )
        if isinstance(judge, StepRewardFunction):
            raise TypeError(f"step_reward: {judge.__name__!r} has been made a reward function of steps already.")
        kind = AsyncStepRewardFunction if is_async_callable(judge) else StepRewardFunction
        return kind(judge, segmentation, name, reduce)

    return decorate if function is None else decorate(function)


@runtime_checkable
class _Descriptor(Protocol):
    """What Python binds to the object whose attribute it is, such as a function."""

    def __get__(self, instance: Any, owner: type | None = None, /) -> Any: ...


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
        self._parameters = _parameters_of(function, self._where)
        # Without it `inspect` takes an object with `__get__` for a builtin
        self.__signature__ = inspect.signature(self.__call__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r})"

    def __reduce__(self) -> Any:
        # Pickle stores a function as its name, and the name of a decorated function leads to this object instead
        path = f"{self.function.__module__}:{self.function.__qualname__}" if inspect.isfunction(self.function) else ""
        if _resolve(path) is self:
            return _restore, (path, {**self.__dict__, "function": None})
        if inspect.ismethod(self.function):
            # The name of a decorated method leads to this object too
            owner = self.function.__self__
            name = self.function.__name__
            if isinstance(inspect.getattr_static(owner, name, None), StepRewardFunction):
                state = {key: value for key, value in self.__dict__.items() if key not in ("function", "_parameters")}
                return _restore_method, (owner, name, state)
        return super().__reduce__()

    def __get__(self, instance: Any, owner: type | None = None) -> "StepRewardFunction":
        """Of a decorated method: the reward function whose `self` is `instance`."""
        # An object that can be called is none, and is not bound by Python either
        if instance is None or not isinstance(self.function, _Descriptor):
            return self
        bound = copy.copy(self)
        bound.function = self.function.__get__(instance, owner)
        bound._parameters = _parameters_of(bound.function, self._where)
        return bound

    @property
    def required_columns(self) -> list[str]:
        """The parameters without a default that a column of the dataset must have the name of."""
        return [name for name in self._parameters.required if name not in _GIVEN]

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Take the tokenizer of the policy whose `completion_ids` will come."""
        self.policy_tokenizer = policy_tokenizer

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Any:
        """
        TRL's call of a reward function. The steps are those of `completion_ids`, without the tokens of tools.

        Returns:
            `list[StepRewards | None]`: [`StepRewards`] without steps where a completion has none.

        Raises:
            TypeError: the function needs something that is no column, or returned no list of numbers.
            ValueError: the policy's tokenizer is not set, or the function returned another number of rewards than
                there are steps, or one that is not finite.
        """
        logs = ExtraLogs(len(prompts))
        cut = self._cut(prompts, completion_ids, tool_mask, prompt_ids)
        to_judge = self._to_judge(prompts, completions, cut, columns, logs)
        rewards = [_parse(one, self.function(**one.arguments) if one.steps else []) for one in to_judge]
        if _LOG_EXTRA in columns:
            logs.hand_over(columns[_LOG_EXTRA])
        return rewards

    def _cut(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None,
        prompt_ids: Sequence[Sequence[int]] | None,
    ) -> list[list[Step]]:
        return policy_steps(
            self.policy_tokenizer, completion_ids, tool_mask, self.segmentation, self._where, prompts, prompt_ids
        )

    def _to_judge(
        self,
        prompts: Sequence[Any],
        texts: Sequence[Any] | None,
        steps_of_rows: Sequence[list[Step]],
        columns: dict[str, Any],
        logs: ExtraLogs,
    ) -> list[_Completion]:
        """All completions of a batch, before the first is judged: an error in the batch costs no judgement."""
        completions = []
        for row, (prompt, steps) in enumerate(zip(prompts, steps_of_rows, strict=True)):
            where = f"{self._where}, completion {row}"
            offered = {name: value_of_row(value, row, len(prompts), where, name) for name, value in columns.items()}
            offered["prompt"] = prompt
            offered["steps"] = [step.text for step in steps]
            if texts is not None:
                offered["completion"] = texts[row]
            if _LOG_EXTRA in columns:
                offered[_LOG_EXTRA] = logs.of_row(row, where)
            # Not every prompt has one: the last message may hold an image
            if self._parameters.takes("problem"):
                offered["problem"] = last_user_text(prompt)
            self._parameters.check({*offered, "problem"}, self._where)
            completions.append(_Completion(where, steps, self._parameters.select(offered)))
        return completions


class AsyncStepRewardFunction(StepRewardFunction):
    """[`StepRewardFunction`] of a coroutine function: judges all completions of a batch at the same time."""

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[StepRewards | None]:
        async def judge(completion: _Completion) -> StepRewards | None:
            return _parse(completion, await self.function(**completion.arguments) if completion.steps else [])

        logs = ExtraLogs(len(prompts))
        cut = self._cut(prompts, completion_ids, tool_mask, prompt_ids)
        to_judge = self._to_judge(prompts, completions, cut, columns, logs)
        rewards = await run_together([judge(one) for one in to_judge])
        if _LOG_EXTRA in columns:
            logs.hand_over(columns[_LOG_EXTRA])
        return rewards


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
    # Entries of a generator may be NumPy's or torch's
    values = plain(list(returned))
    if len(values) != len(steps):
        raise ValueError(f"{where}: {len(values)} rewards for {len(steps)} steps; use None for a step without one.")
    for position, (step, value) in enumerate(zip(steps, values, strict=True)):
        what = f"{where}: the reward of step {position}, {step.text[:_EXCERPT]!r},"
        if value is not None:
            check_number(value, what)
    return place_on_tokens(steps, values)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters, names and pickles


def _parameters_of(function: _Judge, where: str) -> NamedParameters:
    """The parameters of a function that judges steps; `TypeError` if `steps` is none of them."""
    parameters = NamedParameters.of(function, where)
    if not parameters.takes("steps"):
        raise TypeError(f"{where} has no parameter `steps`; expected function(problem, steps, **columns).")
    return parameters


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


def _restore_method(owner: Any, name: str, state: dict[str, Any]) -> StepRewardFunction:
    """A pickled copy of the decorated method `name` of an object."""
    restored = inspect.getattr_static(owner, name).__get__(owner, type(owner))
    restored.__dict__.update(state)
    return restored
