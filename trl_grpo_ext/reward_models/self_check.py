"""A right and a corrupted solution, and whether a reward model tells one from the other."""

from typing import Any


PROBLEM = "Tom has 3 bags with 4 apples each and eats 2 of the apples. How many apples are left?"
GOOD_STEPS = (
    "Step 1: There are 3 * 4 = 12 apples in the bags.",
    "Step 2: Tom eats 2 of them, so 12 - 2 = 10 apples are left.",
    "Step 3: The answer is \\boxed{10}.",
)
BAD_STEPS = (
    "Step 1: There are 3 * 4 = 12 apples in the bags.",
    "Step 2: Tom eats 2 of them, so 12 - 2 = 34 apples are left.",
    "Step 3: The answer is \\boxed{34}.",
)
# The first step that differs
CORRUPTED = 1


def check_order(model: Any, *, good: float, bad: float, shown: str) -> None:
    """
    Compare the scores of the right and of the corrupted solution.

    Args:
        model ([`~trl_grpo_ext.reward_models.base.RewardModel`]):
            The reward model, for the error.
        good (`float`):
            Score of the right solution.
        bad (`float`):
            Score of the corrupted one.
        shown (`str`):
            What the reward model returned, for the error.

    Raises:
        ValueError: `good` is not above `bad`, or one of them is NaN.
    """
    # Also false for NaN
    if not good > bad:
        raise ValueError(
            f"self_check of '{model.name}' (preset '{model.preset.name}'): a right and a corrupted solution score "
            f"{shown}; the corrupted one must score lower. Is this the right preset, and the right checkpoint?"
        )
