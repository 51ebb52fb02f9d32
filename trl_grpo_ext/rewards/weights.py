"""Weights of reward sources that change during training."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


_CONSTANT = "constant"
# How far the weight has gone from its first to its last value, by how much of the schedule is over, in [0, 1]
_PATHS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "step": lambda share: float(share >= 1),
}


class WeightSchedule(NamedTuple):
    """
    The weight of a reward source over a share of training.

    With p the share of training that is over:

        weight(p) = first + (last - first) path(min(p / over, 1))

        path(x) = x ("linear"), (1 - cos(pi x)) / 2 ("cosine"), 0 before x = 1 and 1 from there on ("step")

    Args:
        path (`str`):
            `"linear"`, `"cosine"` or `"step"`; `"constant"` for a weight that stays at its first value.
        first, last (`float`):
            The weight at the beginning and at the end.
        over (`float`, *optional*, defaults to 1.0):
            The share of training, in (0, 1], after which the weight stays at its last value.
    """

    path: str
    first: float
    last: float
    over: float = 1.0

    @property
    def changes(self) -> bool:
        """Whether it is not constant."""
        return self.path != _CONSTANT

    def at(self, progress: float) -> float:
        """The weight when a share `progress`, in [0, 1], of training is over."""
        if not self.changes:
            return self.first
        return self.first + (self.last - self.first) * _PATHS[self.path](min(progress / self.over, 1.0))


def parse_weight(value: Any) -> WeightSchedule:
    """
    The weight that a number, or the text of a number or of a schedule stands for.

    A schedule is `PATH:FIRST:LAST` or `PATH:FIRST:LAST:OVER`.

    Raises:
        ValueError: anything else.
    """
    path, *texts = value.split(":") if isinstance(value, str) else [value]
    try:
        numbers = [float(text) for text in texts or [path]]
    except (TypeError, ValueError):
        numbers = [math.nan]
    is_finite = all(map(math.isfinite, numbers)) and not isinstance(value, bool)
    if is_finite and not texts:
        return WeightSchedule(_CONSTANT, numbers[0], numbers[0])
    if is_finite and path in _PATHS and len(numbers) in (2, 3):
        schedule = WeightSchedule(path, *numbers)
        # The last batch is generated before the end, where such a step would lie
        if 0 < schedule.over <= 1 and (path != "step" or schedule.over < 1):
            return schedule
    raise ValueError(
        f"{value!r} is no weight: a finite number, or PATH:FIRST:LAST or PATH:FIRST:LAST:OVER, with PATH one of "
        f"{', '.join(_PATHS)} and OVER a share of training in (0, 1], below 1 for a step."
    )
