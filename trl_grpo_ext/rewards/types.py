"""
What a reward source may return for one completion, and how it is checked.

| word | meaning |
|---|---|
| unjudged | a completion for which a source gives no reward at all |
| unscored | a step whose value is `None`, in a completion that its source judges |
| withheld | a reward that a gate keeps from counting |
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class StepRewards:
    """
    One reward for each step of a completion, placed on the step's last token.

    Args:
        ends (`Sequence[int]`):
            Index into `completion_ids` of each step's last token, strictly increasing, in `[0, len(completion_ids))`.
        values (`Sequence[float | None]`):
            Reward of each step, finite, as many as `ends`; `None` for a step that was not scored.

    Example:

    ```python
    >>> def judge(completions, completion_ids, **kwargs):
    ...     return [StepRewards(ends=[4, 9, 14], values=[1.0, 1.0, 0.0]) for _ in completions]
    ```
    """

    ends: Sequence[int]
    values: Sequence[float | None]

    @property
    def scored(self) -> list[float]:
        """Rewards of the steps that were scored."""
        return [value for value in self.values if value is not None]


@runtime_checkable
class PreparableSource(Protocol):
    """A reward source that the trainer prepares: a model to place, or one that reads the policy's tokens."""

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """
        Take what the trainer has, and its `reward_batch_tokens`.

        Called when the trainer is made, and again before each batch, because another trainer may have prepared the
        same source since. So a second call with the same arguments must be cheap.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's call of a reward function."""


# What is left after parsing: a number for the whole completion, rewards on tokens, or no judgement
Reward = float | StepRewards | None


# TRL holds rewards in float32, where anything larger is infinite
_LARGEST = torch.finfo(torch.float32).max


def plain(value: Any) -> Any:
    """NumPy and torch scalars and arrays, also those in lists, as Python numbers and lists."""
    if isinstance(value, (list, tuple)):
        return [plain(element) for element in value]
    return value.tolist() if hasattr(value, "tolist") else value


def is_list_like(value: Any) -> bool:
    """Whether iterating over `value` gives its entries in order: not text, keys of a mapping or a set."""
    return isinstance(value, Iterable) and not isinstance(value, (str, Mapping, Set))


def check_finite(value: Any, what: str) -> float:
    """`value` as a float, or `ValueError` if float32 cannot hold it as a finite number."""
    # Also false for NaN
    if not abs(value) <= _LARGEST:
        raise ValueError(
            f"{what} is {value!r}; rewards must be finite (in float32), and None where nothing is judged."
        )
    return float(value)


def check_number(value: Any, what: str) -> float:
    """[`check_finite`] of what may be anything: `TypeError` if it is not a number."""
    if not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{what} is {value!r}, which is not a number.")
    return check_finite(value, what)


def _parse_steps(reward: StepRewards, length: int, where: str) -> StepRewards | None:
    for field, given in {"ends": reward.ends, "values": reward.values}.items():
        if not is_list_like(given):
            raise TypeError(f"{where}: StepRewards has {field}={given!r}; expected a list.")
    ends = plain(list(reward.ends))
    values = plain(list(reward.values))
    if len(ends) != len(values):
        raise ValueError(f"{where}: StepRewards has {len(ends)} `ends` but {len(values)} `values`.")
    values = [None if v is None else check_number(v, f"{where}: values[{k}]") for k, v in enumerate(values)]
    previous = -1
    for position, end in enumerate(ends):
        if isinstance(end, bool) or not isinstance(end, int):
            raise TypeError(f"{where}: ends[{position}] is {end!r}, which is not a token index.")
        if not 0 <= end < length:
            raise ValueError(f"{where}: ends[{position}] is {end}, outside the completion's {length} tokens.")
        if end <= previous:
            raise ValueError(f"{where}: ends[{position}] is {end} after {previous}; ends must increase.")
        previous = end
    return StepRewards(ends, values) if ends else None


def parse_reward(value: Any, length: int, where: str) -> Reward:
    """
    Check what a source returned for one completion and bring it to a plain form.

    A list of `length` floats becomes [`StepRewards`] with a step at every token. [`StepRewards`] without steps become
    `None`, since nothing was judged.

    Args:
        value (`float`, `Sequence[float]`, `StepRewards` or `None`):
            The returned value; NumPy and torch scalars and 1-d arrays count as numbers and lists.
        length (`int`):
            Number of tokens of the completion.
        where (`str`):
            Names the source and the completion in errors.

    Raises:
        TypeError: not one of the four forms.
        ValueError: rewards that are NaN, infinite or too large for float32, a token list of another length, or `ends`
            out of range or not increasing.
    """
    value = plain(value)
    if value is None:
        return None
    if isinstance(value, StepRewards):
        return _parse_steps(value, length, where)
    if isinstance(value, (Real, Decimal)):
        return check_finite(value, f"{where}: the reward")
    if isinstance(value, list):
        return _parse_tokens(value, length, where)
    raise TypeError(
        f"{where}: got {type(value).__name__}; a reward is a float, a list of floats as long as the completion, "
        "StepRewards or None."
    )


def parse_as_trl(value: Any) -> Any:
    """
    What TRL takes as one number: a list of one is that number, as of logits of shape `(N, 1)`, and NaN is `None`.

    Anything else is returned as it is, for [`parse_reward`]. Under outcome supervision whatever TRL takes is a reward.
    """
    value = plain(value)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    # The only number that differs from itself
    return None if isinstance(value, Real) and value != value else value


def _parse_tokens(values: list[Any], length: int, where: str) -> StepRewards | None:
    if len(values) == 2 and all(isinstance(part, list) for part in values):
        raise TypeError(f"{where}: got a pair of lists; for rewards of steps return StepRewards(ends, values).")
    if len(values) != length:
        hint = " For one reward of the whole completion return the number itself." if len(values) == 1 else ""
        raise ValueError(f"{where}: {len(values)} token rewards for a completion of {length} tokens.{hint}")
    numbers = [check_number(reward, f"{where}: token rewards[{token}]") for token, reward in enumerate(values)]
    return StepRewards(list(range(length)), numbers) if numbers else None


def place_rewards(rewards: Sequence[Reward], mask_BT: torch.Tensor) -> torch.Tensor:
    """
    Put one source's rewards on the tokens that carry them; NaN everywhere else.

    A float sits on the completion's last token inside the loss mask; a scored step's value on the step's last token.

    Args:
        rewards (`Sequence[float | StepRewards | None]` of length B):
            What [`parse_reward`] returned.
        mask_BT (`torch.Tensor` of shape `(B, T)`):
            Loss mask, 1 for tokens that are trained on.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32, on the device of the mask.
    """
    placed_BT = torch.full(mask_BT.shape, torch.nan)
    loss_tokens_BT = mask_BT.bool().cpu()
    for row, reward in enumerate(rewards):
        if isinstance(reward, StepRewards):
            values = [torch.nan if value is None else value for value in reward.values]
            placed_BT[row, torch.tensor(reward.ends)] = torch.tensor(values)
        elif reward is not None and loss_tokens_BT[row].any():
            placed_BT[row, loss_tokens_BT[row].nonzero()[-1]] = reward
    return placed_BT.to(mask_BT.device)
