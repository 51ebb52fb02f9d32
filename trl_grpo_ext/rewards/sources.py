"""Reward functions whose token and step rewards are remembered while TRL sees one number per completion."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .._trl import is_async_callable
from ..reward_models.batching import TokenBatchedModel
from .transforms import transform_reward
from .types import PreparedSource, Reward, StepRewards, check_finite, is_list_like, plain, read_reward


REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "min": min,
    "prod": math.prod,
    "last": lambda values: values[-1],
}


class RewardSource:
    """
    A reward function as TRL calls it, which also keeps the token and step rewards of its last batch.

    TRL expects one number per completion. The rewards are checked, transformed and kept in `rewards`; TRL gets floats
    as they are, and steps brought to one number by the function's attribute `reduce`: `"sum"` (default), `"mean"`,
    `"min"`, `"prod"` or `"last"`.

    Args:
        function (`Callable`):
            The user's reward function.
        name (`str`):
            Its name in logs and errors.
        transform (`str`, *optional*, defaults to `"none"`):
            A reward transform, see [`~trl_grpo_ext.rewards.transforms.parse_transform`].
    """

    def __init__(self, function: Callable[..., Any], name: str, transform: str = "none"):
        self.function = function
        self.name = name
        self.transform = transform
        while isinstance(function, functools.partial):
            function = function.func
        # An attribute of the user's function, absent on most
        self.reduce = getattr(function, "reduce", "sum")
        if self.reduce not in REDUCTIONS:
            raise ValueError(
                f"reward source '{name}': `reduce` is {self.reduce!r}; known: {', '.join(map(repr, REDUCTIONS))}."
            )
        self.rewards: list[Reward] = []

    def read(self, returned: Any, lengths: Sequence[int]) -> list[float | None]:
        """Keep what the function returned for this batch and give TRL one number, or None, per completion."""
        returned = plain(returned)
        if not is_list_like(returned):
            raise TypeError(
                f"reward source '{self.name}' returned {type(returned).__name__}; expected a list with one reward per "
                "completion."
            )
        returned = list(returned)
        if len(returned) != len(lengths):
            raise ValueError(
                f"reward source '{self.name}' returned {len(returned)} rewards for {len(lengths)} completions."
            )
        self.rewards, numbers = [], []
        for index, (value, length) in enumerate(zip(returned, lengths, strict=True)):
            where = f"reward source '{self.name}', completion {index}"
            reward = transform_reward(read_reward(value, length, where), self.transform, where)
            self.rewards.append(reward)
            if isinstance(reward, StepRewards):
                scored, what = reward.scored, f"{where}: the {self.reduce} of its steps"
                reward = check_finite(REDUCTIONS[self.reduce](scored), what) if scored else None
            numbers.append(reward)
        return numbers

    def count_steps(self) -> tuple[int, int]:
        """How many steps of the last batch were not scored, and how many there were."""
        steps = [reward for reward in self.rewards if isinstance(reward, StepRewards)]
        given = sum(len(reward.values) for reward in steps)
        return given - sum(len(reward.scored) for reward in steps), given

    def __call__(self, *, completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        # Before the call: a function may change the lists that it gets
        lengths = [len(ids) for ids in completion_ids]
        return self.read(self.function(completion_ids=completion_ids, **kwargs), lengths)


class AsyncRewardSource(RewardSource):
    """[`RewardSource`] of a coroutine function; TRL awaits all of them together."""

    async def __call__(self, *, completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:  # type: ignore[override]
        lengths = [len(ids) for ids in completion_ids]
        return self.read(await self.function(completion_ids=completion_ids, **kwargs), lengths)


def wrap_source(
    source: Any, name: str, transform: str, batch_tokens: int | None, accelerator: Accelerator, policy_tokenizer: Any
) -> RewardSource | nn.Module:
    """
    A source of `reward_funcs` as the trainer uses it.

    A function becomes a [`RewardSource`]; a model stays, or gets its forwards cut to `batch_tokens`.
    """
    if isinstance(source, nn.Module):
        return source if batch_tokens is None else TokenBatchedModel(source, batch_tokens, accelerator)
    if isinstance(source, PreparedSource):
        source.prepare(accelerator, policy_tokenizer, batch_tokens)
    return (AsyncRewardSource if is_async_callable(source) else RewardSource)(source, name, transform)


def read_model_rewards(rewards_N: torch.Tensor, name: str, transform: str) -> torch.Tensor:
    """Check and transform the scores of a reward model, as [`RewardSource`] does for what functions return."""
    read = []
    for index, value in enumerate(rewards_N.tolist()):
        where = f"reward source '{name}', completion {index}"
        read.append(transform_reward(read_reward(value, 0, where), transform, where))
    return rewards_N.new_tensor(read)
