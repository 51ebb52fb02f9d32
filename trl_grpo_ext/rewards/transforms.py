"""Reward transforms: reshape a source's step rewards before they become advantages."""

import math
from collections.abc import Callable

from .types import StepRewards


# Values of one completion's steps in, as many values out
Transform = Callable[[list[float]], list[float]]

_CLIP_THRESHOLD = 0.5


def center(values: list[float]) -> list[float]:
    """`p1 - p0 = 2 p - 1`: a probability of being right, centred on 0."""
    return [2 * value - 1 for value in values]


def clip(values: list[float], threshold: float = _CLIP_THRESHOLD) -> list[float]:
    """`min(r - eta, 0)`: steps above the threshold earn nothing, so more steps never pay (arXiv 2410.15115)."""
    return [min(value - threshold, 0.0) for value in values]


def delta(values: list[float]) -> list[float]:
    """`r_k - r_{k+1}`, the last step 0: the undiscounted return at step k is `r_k - r_K` (arXiv 2410.15115)."""
    return [value - following for value, following in zip(values, values[1:], strict=False)] + [0.0] * bool(values)


def progress(values: list[float]) -> list[float]:
    """`r_k - r_{k-1}` with `r_0 = 0`: the undiscounted sum is the last step's value, whatever their number."""
    return [value - before for value, before in zip(values, [0.0, *values], strict=False)]


_ELEMENTWISE: dict[str, Transform] = {"none": list, "center": center, "clip": clip}
_SEQUENTIAL: dict[str, Transform] = {"delta": delta, "progress": progress}
NAMES = (*_ELEMENTWISE, "clip:ETA", *_SEQUENTIAL)


def parse_transform(name: str) -> Transform:
    """
    The transform of that name: `none`, `center`, `clip` (threshold 0.5), `clip:ETA`, `delta` or `progress`.

    Raises:
        ValueError: unknown name, or a threshold that is not a finite number.
    """
    base, _, argument = str(name).partition(":")
    if argument and base == "clip":
        try:
            threshold = float(argument)
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            raise ValueError(f"reward transform {name!r}: the threshold {argument!r} is not a finite number.")
        return lambda values: clip(values, threshold)
    transforms = _ELEMENTWISE | _SEQUENTIAL
    if name not in transforms:
        raise ValueError(f"unknown reward transform {name!r}; known: {', '.join(NAMES)}.")
    return transforms[name]


def transform_reward(reward: float | StepRewards | None, name: str, where: str) -> float | StepRewards | None:
    """Apply the transform `name` to one completion's reward; `delta` and `progress` need steps to compare."""
    if reward is None or name == "none":
        return reward
    transform = parse_transform(name)
    if isinstance(reward, StepRewards):
        transformed = iter(transform(reward.scored))
        return StepRewards(reward.ends, [None if value is None else next(transformed) for value in reward.values])
    if name in _SEQUENTIAL:
        raise ValueError(f"{where}: transform {name!r} compares steps, but the source returned one number.")
    return transform([reward])[0]
