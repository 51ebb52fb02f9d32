"""
The advantage estimators, as one table: a new one is one function and one row of [`ESTIMATORS`].

Conventions of the functions:

- Groups are consecutive blocks of G rows.
- Completions are packed: the L loss tokens of a completion are the first L columns of its row.
- Standard deviations have ddof 1.
- A set of values without spread, or of one completion, is normalised to exactly 0.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..tables import check_choice, find_row, import_by_path, import_path
from .normalization import Comparison, compare, completion_weights, grouped, mean_of_others, pack_order, standardize


STAGES = ("step_rewards", "returns")

# PURE's softmax temperature over step rewards
SOFT_MINIMUM_TEMPERATURE = 0.1


class EstimatorInputs(NamedTuple):
    """
    What an estimator's function normalises, and how.

    Attributes:
        values_NT (`torch.Tensor` of shape `(N, T)`):
            Step rewards, NaN on tokens without one, or returns, 0 outside the mask: as the estimator's row says.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            True on loss tokens.
        judged_N (`torch.Tensor` of shape `(N,)`):
            True for completions with at least one reward. The others must not enter a mean or a standard deviation.
        group_size (`int`):
            Completions per group.
        scale (`str`):
            `"group"`, `"batch"` or `"none"`: the values whose standard deviation is divided by.
        eps (`float`):
            Added to every standard deviation that is divided by.
    """

    values_NT: torch.Tensor
    mask_NT: torch.Tensor
    judged_N: torch.Tensor
    group_size: int
    scale: str
    eps: float


def _unchanged(rewards: torch.Tensor) -> torch.Tensor:
    return rewards


@dataclass(frozen=True)
class Estimator:
    """
    A row of [`ESTIMATORS`].

    Args:
        function (`Callable[..., torch.Tensor]`):
            Maps [`EstimatorInputs`], and the options as keywords, to normalised values `(N, T)`. What it returns on
            tokens without a step reward (if it normalises step rewards), or outside the mask and for completions that
            are not judged (if it normalises returns), is ignored.
        normalizes (`str`, *optional*, defaults to `"returns"`):
            `"returns"`: the returns come first, and the function gives the advantages. `"step_rewards"`: the function
            comes first, and the returns of what it gives are the advantages.
        options (`Mapping[str, Sequence[Any]]`, *optional*):
            The configuration's fields that the function takes as keywords, each with its allowed values. With no
            allowed values, `()`, the function checks the value itself. By default it takes none.
        shape_rewards (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
            Maps the step rewards `(..., T)` of each source, before anything else. It must keep NaN where it is. By
            default nothing is changed.
        description (`str`, *optional*, defaults to `""`):
            A few words for help texts.

    Raises:
        ValueError: `normalizes` is neither of its values.
    """

    function: Callable[..., torch.Tensor]
    normalizes: str = "returns"
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shape_rewards: Callable[[torch.Tensor], torch.Tensor] = _unchanged
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


def normalize_by_position(inputs: EstimatorInputs, *, position_baseline: str = "all") -> torch.Tensor:
    r"""
    Returns normalised across the group at each token index: return, then normalise.

    `A_{i,t} = (R_{i,t} - mean_j R_{j,t}) / (std_j R_{j,t} + eps)`

    over the judged completions j of i's group. Completions that ended before t count as return 0
    (`position_baseline="all"`) or not at all (`"active"`). With `"leave_one_out"` the mean is that of the other
    completions, ended ones counting as return 0:

    `A_{i,t} = (R_{i,t} - 1/(n-1) sum_{j != i} R_{j,t}) / (std_j R_{j,t} + eps)`

    The mean of `"all"` holds the completion's own return, so without a division its expected update is `1 - 1/n` of
    the policy gradient. That of `"leave_one_out"` is all of it. `"active"` has no such factor: which completions are
    compared depends on what they did.

    Reduces to TRL's advantages for one token per completion, and to RLOO with `"leave_one_out"` and `scale="none"`.
    """
    return _standardize(_by_position(inputs, position_baseline), inputs).flatten(0, 1)


def normalize_pooled(inputs: EstimatorInputs) -> torch.Tensor:
    r"""
    Step rewards normalised over all step rewards of the group (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

    `r~ = (r - mean(R)) / (std(R) + eps)`

    with R the step rewards of all completions of the group. A group with fewer than two judged completions has nothing
    to compare and gets 0.

    Reduces to TRL's advantages for one reward per completion.
    """
    normalized_PGT = _standardize(_all_together(inputs), inputs)
    return normalized_PGT.where(_has_several_judged(inputs), 0.0).flatten(0, 1)


def normalize_by_step(inputs: EstimatorInputs) -> torch.Tensor:
    r"""
    Step rewards normalised among the k-th steps of the group, for each k, as in LightRFT.

    `r~_{i,k} = (r_{i,k} - mean_j r_{j,k}) / (std_j r_{j,k} + eps)`

    over the completions j that have a k-th step. A k-th step that only one completion has gets 0.

    Reduces to TRL's advantages for one reward per completion.
    """
    order_NS = _step_order(inputs)
    normalized_PGS = _standardize(_by_step(inputs, order_NS), inputs)
    return torch.zeros_like(inputs.values_NT).scatter(1, order_NS, normalized_PGS.flatten(0, 1))


def normalize_against_others(inputs: EstimatorInputs) -> torch.Tensor:
    r"""
    Returns minus the mean token return of the group's other completions, over the std of the token returns.

    `A_{i,t} = (R_{i,t} - 1/(n-1) sum_{j != i} m_j) / (std + eps)`, `m_j = 1/L_j sum_t R_{j,t}`

    over the n judged completions of i's group. In the std every completion counts once: its tokens have weight
    `1 / L_j`. `scale="none"` leaves the division out.

    PURE (arXiv 2504.15275; the verl branch of its code) divides the sums of the others' returns by the padded length
    instead of by their own, so that its baseline depends on the padding.

    Reduces to RLOO for outcome rewards at gamma = 1 and `scale="none"`.
    """
    return _standardize(_against_others(inputs), inputs).flatten(0, 1)


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


# ---------------------------------------------------------------------------------------------------------------------
# What is compared with what


class _Compared(NamedTuple):
    """
    Values by group, and which of them are compared with each other.

    Args:
        values_PGT (`torch.Tensor` of shape `(P, G, T)`):
            Rewards or returns.
        weights_PGT (`torch.Tensor` of shape `(P, G, T)`):
            What each counts in means and standard deviations.
        group_dims (`tuple[int, ...]`):
            Axes of the values that are compared with each other.
        baseline (`torch.Tensor`, *optional*):
            What is subtracted, if not the mean of these.
    """

    values_PGT: torch.Tensor
    weights_PGT: torch.Tensor
    group_dims: tuple[int, ...]
    baseline: torch.Tensor | None = None


def _standardize(compared: _Compared, inputs: EstimatorInputs) -> torch.Tensor:
    values_PGT, weights_PGT, group_dims, baseline = compared
    return standardize(values_PGT, weights_PGT, group_dims, scale=inputs.scale, eps=inputs.eps, baseline=baseline)


def _compare(compared: _Compared, inputs: EstimatorInputs) -> Comparison:
    """The statistics of [`_standardize`], `(N, T)` each."""
    values_PGT, weights_PGT, group_dims, baseline = compared
    found = compare(values_PGT, weights_PGT, group_dims, scale=inputs.scale, eps=inputs.eps, baseline=baseline)
    return Comparison(*[statistic.expand_as(values_PGT).flatten(0, 1) for statistic in found])


def _by_position(inputs: EstimatorInputs, position_baseline: str) -> _Compared:
    counted_NT = inputs.judged_N[:, None].expand_as(inputs.mask_NT)
    if position_baseline == "active":
        counted_NT = counted_NT & inputs.mask_NT
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT, counted_NT.to(inputs.values_NT))
    baseline_PGT = mean_of_others(values_PGT, weights_PGT) if position_baseline == "leave_one_out" else None
    return _Compared(values_PGT, weights_PGT, (1,), baseline_PGT)


def _all_together(inputs: EstimatorInputs) -> _Compared:
    given_NT = ~inputs.values_NT.isnan()
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT.nan_to_num(), given_NT.to(inputs.values_NT))
    return _Compared(values_PGT, weights_PGT, (1, 2))


def _has_several_judged(inputs: EstimatorInputs) -> torch.Tensor:
    """Whether a group has anything to compare, `(P, 1, 1)`: the step rewards of a single completion do have spread."""
    return (inputs.judged_N.view(-1, inputs.group_size).sum(1) > 1)[:, None, None]


def _step_order(inputs: EstimatorInputs) -> torch.Tensor:
    """The token of each completion's k-th step reward in column k. Completions have far fewer steps than tokens."""
    given_NT = ~inputs.values_NT.isnan()
    most_steps = int(given_NT.sum(1).max())
    return pack_order(given_NT)[:, :most_steps]


def _by_step(inputs: EstimatorInputs, order_NS: torch.Tensor) -> _Compared:
    steps_NS = inputs.values_NT.gather(1, order_NS)
    values_PGS, weights_PGS = grouped(inputs.group_size, steps_NS.nan_to_num(), (~steps_NS.isnan()).to(steps_NS))
    return _Compared(values_PGS, weights_PGS, (1,))


def _against_others(inputs: EstimatorInputs) -> _Compared:
    weights_NT = completion_weights(inputs.mask_NT, inputs.judged_N, inputs.values_NT.dtype)
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT, weights_NT)
    means_PG1 = (weights_PGT * values_PGT).sum(2, keepdim=True)
    judged_PG1 = inputs.judged_N.view(-1, inputs.group_size, 1).to(means_PG1)
    return _Compared(values_PGT, weights_PGT, (1, 2), mean_of_others(means_PG1, judged_PG1))


def compare_by_position(inputs: EstimatorInputs, *, position_baseline: str = "all") -> Comparison:
    """The statistics of [`normalize_by_position`], `(N, T)` each."""
    return _compare(_by_position(inputs, position_baseline), inputs)


def compare_pooled(inputs: EstimatorInputs) -> Comparison:
    """The statistics of [`normalize_pooled`], `(N, T)` each."""
    found = _compare(_all_together(inputs), inputs)
    several_NT = _has_several_judged(inputs).expand(-1, inputs.group_size, found.counted.size(1)).flatten(0, 1)
    return found._replace(counted=found.counted & several_NT)


def compare_by_step(inputs: EstimatorInputs) -> Comparison:
    """The statistics of [`normalize_by_step`], `(N, T)` each; NaN, and not counted, on tokens that end no step."""
    order_NS = _step_order(inputs)
    mean_NS, std_NS, divisor_NS, counted_NS = _compare(_by_step(inputs, order_NS), inputs)

    def on_tokens(values_NS: torch.Tensor) -> torch.Tensor:
        return torch.full_like(inputs.values_NT, torch.nan).scatter(1, order_NS, values_NS)

    counted_NT = torch.zeros_like(inputs.mask_NT).scatter(1, order_NS, counted_NS)
    return Comparison(on_tokens(mean_NS), on_tokens(std_NS), on_tokens(divisor_NS), counted_NT)


def compare_against_others(inputs: EstimatorInputs) -> Comparison:
    """The statistics of [`normalize_against_others`], `(N, T)` each."""
    return _compare(_against_others(inputs), inputs)


_COMPARISONS: dict[Callable[..., torch.Tensor], Callable[..., Comparison]] = {
    normalize_by_position: compare_by_position,
    normalize_pooled: compare_pooled,
    normalize_by_step: compare_by_step,
    normalize_against_others: compare_against_others,
}


def find_comparison(row: Estimator) -> Callable[[EstimatorInputs], Comparison] | None:
    """
    What an estimator compares values with, as a function of what it normalises; `None` for a function of the user's.

    Args:
        row ([`Estimator`]):
            One whose options are bound, by [`~Estimator.with_options`].
    """
    bound = row.function
    if not isinstance(bound, partial) or bound.func not in _COMPARISONS:
        return None
    return partial(_COMPARISONS[bound.func], **bound.keywords)


# ---------------------------------------------------------------------------------------------------------------------
# The table


ESTIMATORS: dict[str, Estimator] = {
    "position": Estimator(
        normalize_by_position,
        normalizes="returns",
        options={"position_baseline": ("all", "active", "leave_one_out")},
        description="returns, normalised across the group at each token index",
    ),
    "pooled": Estimator(
        normalize_pooled,
        normalizes="step_rewards",
        description="step rewards, normalised over the whole group, then returns",
    ),
    "step": Estimator(
        normalize_by_step,
        normalizes="step_rewards",
        description="step rewards, the k-th steps of the group normalised together, then returns",
    ),
    "min": Estimator(
        normalize_against_others,
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
