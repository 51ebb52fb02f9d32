"""Reward functions whose token and step rewards are remembered while TRL sees one number per completion."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._trl import is_async_callable
from .arguments import PROMPT_IDS, TOOL_MASK, check_parameters, names_argument
from .step_reductions import STEP_REDUCTIONS
from .transforms import transform_reward
from .turns import TurnRewards, land_on_policy_tokens, place_turn_rewards
from .types import Reward, StepRewards, check_finite, is_list_like, parse_as_trl, parse_reward, plain


class StepCounts(NamedTuple):
    """
    How many steps a source found in a batch.

    Args:
        steps (`int`):
            Number of steps; 0 for a source of outcome rewards.
        unscored (`int`):
            How many of them have no value.
        with_several (`int`):
            Number of completions with more than one step.
        without_step (`int`):
            Number of completions whose rewards are those of steps, and which have none.
    """

    steps: int = 0
    unscored: int = 0
    with_several: int = 0
    without_step: int = 0


class RewardSource:
    """
    A reward function as TRL calls it, which also remembers the token and step rewards of its last batch.

    TRL expects one number per completion. The returned rewards are checked, transformed and stored in `rewards`. TRL
    gets a float as it is, and step rewards brought to one number by the function's attribute `reduce`: `"sum"`
    (default), `"mean"`, `"min"`, `"prod"` or `"last"`.

    Args:
        function (`Callable`):
            The user's reward function.
        name (`str`):
            Its name in logs and errors.
        transform (`str`, *optional*, defaults to `"none"`):
            A reward transform, see [`~trl_grpo_ext.rewards.transforms.parse_transform`].
        is_outcome (`bool`, *optional*, defaults to `False`):
            Whether supervision is by outcome, under which whatever TRL takes is a reward.
        tool_mask (`Sequence[Sequence[int]]`, *optional*):
            For each completion of the batch and each of its tokens, 1 if the policy wrote it, 0 if it is a tool's
            output. A function with a parameter of this name gets it too. By default the policy wrote all of them.
        prompt_ids (`Sequence[Sequence[int]]`, *optional*):
            Token ids of each completion's prompt. A function with a parameter of this name gets them.

    Raises:
        ValueError: the function has an attribute `reduce` that is not in `STEP_REDUCTIONS`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        transform: str = "none",
        is_outcome: bool = False,
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ):
        self.function = function
        self.name = name
        # TRL's messages show it
        self.__name__ = name
        self.transform = transform
        self.is_outcome = is_outcome
        self.tool_mask = tool_mask
        self.prompt_ids = prompt_ids
        chosen = _reduce_attributes(function)
        self.chose_reduce = bool(chosen)
        (self.reduce,) = chosen or ["sum"]
        if self.reduce not in STEP_REDUCTIONS:
            known = ", ".join(map(repr, STEP_REDUCTIONS))
            raise ValueError(f"reward source '{name}': `reduce` is {self.reduce!r}; known: {known}.")
        self.rewards: list[Reward] = []
        # The same before the transform
        self.returned: list[Reward] = []
        # How many completions of the last batch came back as `StepRewards` or a token list without a step
        self._without_step = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def parse(
        self, returned: Any, tool_mask: Sequence[Sequence[int]], completions: Sequence[Any] = ()
    ) -> list[float | None]:
        """
        Store what the function returned for a batch and give TRL one number, or `None`, per completion.

        Args:
            returned (`Any`):
                What the function returned.
            tool_mask (`Sequence[Sequence[int]]`):
                For each completion and each of its tokens, 1 if the policy wrote it.
            completions (`Sequence[str | list[dict]]`, *optional*):
                The completions as TRL gives them to reward functions, for rewards of tool calls.

        Raises:
            TypeError: not a list, or an entry that is no reward; the message names source and completion.
            ValueError: another number of rewards than of completions, or a reward that
                [`~trl_grpo_ext.rewards.types.parse_reward`] or [`~trl_grpo_ext.rewards.turns.place_turn_rewards`]
                refuses.
        """
        returned = plain(returned)
        if not is_list_like(returned):
            raise TypeError(
                f"reward source '{self.name}' returned {type(returned).__name__}; expected a list with one reward per "
                "completion."
            )
        returned = (
            [parse_as_trl(value) for value in returned] if self.is_outcome else [plain(value) for value in returned]
        )
        if len(returned) != len(tool_mask):
            raise ValueError(
                f"reward source '{self.name}' returned {len(returned)} rewards for {len(tool_mask)} completions."
            )
        self._without_step = 0
        self.rewards = []
        self.returned = []
        numbers = []
        for index, (value, mask) in enumerate(zip(returned, tool_mask, strict=True)):
            where = f"reward source '{self.name}', completion {index}"
            if isinstance(value, TurnRewards):
                parsed = place_turn_rewards(value, mask, completions[index], where)
            else:
                parsed = parse_reward(value, len(mask), where)
            reward = transform_reward(parsed, self.transform, where)
            # `None` is another matter: the steps may have been found, and not judged
            self._without_step += parsed is None and isinstance(value, (StepRewards, list))
            numbers.append(self._to_number(reward, where))
            # A list has a reward for each token on purpose: those of a tool's tokens do not count
            if isinstance(parsed, StepRewards) and isinstance(reward, StepRewards) and not isinstance(value, list):
                parsed = land_on_policy_tokens(parsed, mask)
                reward = land_on_policy_tokens(reward, mask)
            self.returned.append(parsed)
            self.rewards.append(reward)
        return numbers

    def _to_number(self, reward: Reward, where: str) -> float | None:
        if not isinstance(reward, StepRewards):
            return reward
        if not reward.scored:
            return None
        return check_finite(STEP_REDUCTIONS[self.reduce](reward.scored), f"{where}: the {self.reduce} of its steps")

    def count_steps(self) -> StepCounts:
        """The steps of the last batch."""
        with_steps = [reward for reward in self.rewards if isinstance(reward, StepRewards)]
        steps = sum(len(reward.values) for reward in with_steps)
        return StepCounts(
            steps=steps,
            unscored=steps - sum(len(reward.scored) for reward in with_steps),
            with_several=sum(len(reward.values) > 1 for reward in with_steps),
            without_step=self._without_step,
        )

    def _mask_of(self, completion_ids: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return [[1] * len(ids) for ids in completion_ids] if self.tool_mask is None else self.tool_mask

    def _arguments(self, offered: dict[str, Any], tool_mask: Sequence[Sequence[int]]) -> dict[str, Any]:
        """
        What the function is called with: what TRL offers, `tool_mask` and `prompt_ids` if it has such parameters.

        Raises:
            TypeError: a required parameter that is not offered.
        """
        # Not through `**kwargs`: there a function finds what TRL gives it
        if names_argument(self.function, TOOL_MASK):
            offered = {**offered, TOOL_MASK: [list(mask) for mask in tool_mask]}
        if self.prompt_ids is not None and names_argument(self.function, PROMPT_IDS):
            offered = {**offered, PROMPT_IDS: [list(ids) for ids in self.prompt_ids]}
        check_parameters(self.function, offered, f"reward source '{self.name}'")
        return offered

    def __call__(self, *, completion_ids: list[list[int]], **kwargs: Any) -> Any:
        # Before the call: a function may change the lists that it gets
        tool_mask = self._mask_of(completion_ids)
        arguments = self._arguments({"completion_ids": completion_ids, **kwargs}, tool_mask)
        return self.parse(self.function(**arguments), tool_mask, kwargs.get("completions", ()))


class AsyncRewardSource(RewardSource):
    """[`RewardSource`] of a coroutine function; TRL awaits all of them together."""

    async def __call__(self, *, completion_ids: list[list[int]], **kwargs: Any) -> Any:
        tool_mask = self._mask_of(completion_ids)
        arguments = self._arguments({"completion_ids": completion_ids, **kwargs}, tool_mask)
        return self.parse(await self.function(**arguments), tool_mask, kwargs.get("completions", ()))


def _reduce_attributes(function: Callable[..., Any]) -> list[Any]:
    """The user's choice, an attribute that most reward functions do not have: empty then."""
    while isinstance(function, functools.partial):
        function = function.func
    return [function.reduce] if hasattr(function, "reduce") else []  # type: ignore[attr-defined]


def wrap_source(function: Callable[..., Any], *arguments: Any) -> RewardSource:
    """
    The [`RewardSource`] of a reward function, or the [`AsyncRewardSource`] of a coroutine function.

    Args:
        function (`Callable`):
            The user's reward function.
        *arguments:
            The other arguments of [`RewardSource`].
    """
    source_class = AsyncRewardSource if is_async_callable(function) else RewardSource
    return source_class(function, *arguments)


def parse_model_scores(
    scores_N: torch.Tensor, name: str, transform: str = "none", is_outcome: bool = False
) -> torch.Tensor:
    """Check and transform the scores of a sequence classifier, as [`RewardSource`] does for what functions return."""
    parsed = []
    for index, value in enumerate(scores_N.tolist()):
        where = f"reward source '{name}', completion {index}"
        reward = parse_reward(parse_as_trl(value) if is_outcome else value, 0, where)
        parsed.append(torch.nan if reward is None else transform_reward(reward, transform, where))
    return scores_N.new_tensor(parsed)
