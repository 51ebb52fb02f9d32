"""Reductions of a completion's step rewards to the one number that outcome supervision and TRL's logs take."""

import math
from collections.abc import Callable, Sequence


STEP_REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "min": min,
    "prod": math.prod,
    "last": lambda values: values[-1],
}
