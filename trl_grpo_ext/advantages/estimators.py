"""The advantage estimators, as one table: a new one is one function and one row of [`ESTIMATORS`]."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..tables import check_choice, find_row, import_by_path, import_path
from .comparisons import (
    Compared,
    EstimatorInputs,
    compare_against_others,
    compare_by_position,
    compare_by_step,
    compare_pooled,
)


STAGES = ("step_rewards", "returns")

# PURE's softmax temperature over step rewards
SOFT_MINIMUM_TEMPERATURE = 0.1


def _unchanged(rewards: torch.Tensor) -> torch.Tensor:
    return rewards


@dataclass(frozen=True)
class Estimator:
    """
    A row of [`ESTIMATORS`].

    Args:
        function (`Callable`):
            Maps [`~trl_grpo_ext.advantages.comparisons.EstimatorInputs`], and the options as keywords, to normalised
            values `(N, T)`. It is called with the whole batch, of all processes. Completions are packed: their loss
            tokens come first. What it returns on tokens without a step reward (if it normalises step rewards), or
            outside the mask and for completions that are not judged (if it normalises returns), is ignored.
        normalizes (`str`, *optional*, defaults to `"returns"`):
            `"returns"`: the returns come first, and the function gives the advantages. `"step_rewards"`: the function
            comes first, and the returns of what it gives are the advantages.
        options (`Mapping[str, Sequence[Any]]`, *optional*):
            The configuration's fields that the function takes as keywords, each with its allowed values. With no
            allowed values, `()`, the function checks the value itself. By default it takes none.
        shape_rewards (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
            Maps the step rewards `(..., T)` of each source, before anything else. It must keep NaN where it is, and
            treat each row by itself. By default nothing is changed.
        compares (`bool`, *optional*, defaults to `False`):
            The function returns a [`~trl_grpo_ext.advantages.comparisons.Compared`] instead: which values of a group
            are compared with each other. The package then normalises them, by the scale. As each group is compared
            with nothing else, the function is called with some groups at a time, and a process needs its own only.
        description (`str`, *optional*, defaults to `""`):
            A few words for help texts.

    Raises:
        ValueError: `normalizes` is neither of its values.
    """

    function: Callable[..., Any]
    normalizes: str = "returns"
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shape_rewards: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    compares: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        check_choice("normalizes", self.normalizes, STAGES)

    def with_options(self, options: Mapping[str, Any]) -> "Estimator":
        """
        This estimator, its function bound to those of the options that it reads.

        Options that only other estimators read are ignored, so that a caller may pass all that the configuration has.

        Args:
            options (`Mapping[str, Any]`):
                Values by name.

        Returns:
            `Estimator`: one whose function needs no keywords.

        Raises:
            ValueError: a value that is not allowed, or a name that neither this estimator nor any of the table reads.
        """
        known = dict.fromkeys(name for row in (self, *ESTIMATORS.values()) for name in row.options)
        for name in options:
            check_choice("an option of the advantage estimators", name, tuple(known))
        chosen = {name: options[name] for name in self.options if name in options}
        for name, value in chosen.items():
            if self.options[name]:
                check_choice(name, value, self.options[name])
        return replace(self, function=partial(self.function, **chosen))

    def compare(self, inputs: EstimatorInputs) -> Compared:
        """
        What the function of an estimator that compares returns.

        Raises:
            TypeError: it is something else.
        """
        compared = self.function(inputs)
        if not isinstance(compared, Compared):
            raise TypeError(
                f"the advantage estimator's function returned a {type(compared).__name__}; with compares=True it "
                "has to return a Compared."
            )
        return compared


def soft_minimum_rewards(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Step rewards weighted towards the completion's worst step, so that their sum is close to the lowest of them.

    `r*_k = r_k softmax_k(-r_k / 0.1)`

    over the step rewards of a completion, the last axis; NaN where there is none. `sum_k r*_k` approaches `min_k r_k`
    as the temperature, here PURE's 0.1, approaches 0 (arXiv 2504.15275).
    """
    given = ~rewards.isnan()
    logits = (-rewards / SOFT_MINIMUM_TEMPERATURE).where(given, -torch.inf)
    # Without any reward the softmax is NaN, as is the result
    return (torch.softmax(logits, dim=-1) * rewards).where(given, torch.nan)


ESTIMATORS: dict[str, Estimator] = {
    "position": Estimator(
        compare_by_position,
        compares=True,
        normalizes="returns",
        options={"position_baseline": ("all", "active", "leave_one_out")},
        description="returns, normalised across the group at each token index",
    ),
    "pooled": Estimator(
        compare_pooled,
        compares=True,
        normalizes="step_rewards",
        description="step rewards, normalised over the whole group, then returns",
    ),
    "step": Estimator(
        compare_by_step,
        compares=True,
        normalizes="step_rewards",
        description="step rewards, the k-th steps of the group normalised together, then returns",
    ),
    "min": Estimator(
        compare_against_others,
        compares=True,
        normalizes="returns",
        shape_rewards=soft_minimum_rewards,
        description="returns of the soft minimum over the steps, minus the mean return of the other completions",
    ),
}


def find_estimator(estimator: Any, name: str = "estimator") -> Estimator:
    """
    The row of [`ESTIMATORS`] with that name, or what is at that import path.

    Args:
        estimator (`str`, [`Estimator`] or `Callable`):
            An estimator is returned as it is. A function stands for one that normalises returns and has no options.
        name (`str`, *optional*, defaults to `"estimator"`):
            Of the setting, for messages.

    Raises:
        ValueError: the table has no such row, or the import path leads nowhere.
        TypeError: what is found is neither an [`Estimator`] nor a function.
    """
    found = estimator
    if isinstance(estimator, str) and ":" in estimator:
        found = import_by_path(f"{name}={estimator!r}", estimator)
    if inspect.isroutine(found):
        return Estimator(found)
    return find_row(name, estimator, ESTIMATORS, Estimator)


def estimator_name(estimator: Any) -> Any:
    """
    A text for an estimator, since a configuration is saved as text: its key in [`ESTIMATORS`], or its import path.

    Raises:
        ValueError: an estimator that has neither.
    """
    for key, row in ESTIMATORS.items():
        if estimator is row or estimator is row.function:
            return key
    if isinstance(estimator, Estimator):
        raise ValueError(
            "advantage_estimator is an Estimator that is not in ESTIMATORS, and a configuration is saved as text. Add "
            "the row, ESTIMATORS['my_name'] = ..., and give its name; or give its import path, 'module:NAME'."
        )
    return import_path("advantage_estimator", estimator) if inspect.isroutine(estimator) else estimator
