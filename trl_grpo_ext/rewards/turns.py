"""
The turns of a completion, and rewards that belong to a turn.

A turn is what the policy wrote without an interruption: a maximal run of its tokens between the outputs of tools or
of an environment. A completion without such outputs is one turn.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from .types import StepRewards, check_number, is_list_like, plain


_PER = ("turn", "tool_call")

# In a mask with a byte for each token
_OWN_TOKENS = re.compile(rb"[^\0]+")


@dataclass(frozen=True)
class TurnRewards:
    """
    One reward for each turn of a completion, or for each of its tool calls.

    Each lands on the last token of its turn: the last one that the policy wrote before a tool's output, or at the end
    of the completion. The rewards of calls in the same turn are added up there.

    Args:
        values (`Sequence[float | None]`):
            Rewards, finite; `None` for a turn or a call that was not scored. As many as the completion has turns, or
            tool calls. A last turn may call tools that no longer run, because the completion has become too long or
            `max_tool_calling_iterations` is reached. The values of such calls may be left out, so that there is one
            value for each message of the role `tool`.
        per (`str`, *optional*, defaults to `"turn"`):
            `"turn"` or `"tool_call"`. Tool calls are those of the completion's messages.

    Example:

    ```python
    >>> def judge_results(completions, **columns):
    ...     return [
    ...         TurnRewards([float("error" not in m["content"]) for m in c if m["role"] == "tool"], per="tool_call")
    ...         for c in completions
    ...     ]
    ```
    """

    values: Sequence[float | None]
    per: Literal["turn", "tool_call"] = "turn"


class Turn(NamedTuple):
    """The tokens `completion_ids[start:end]` of a completion."""

    start: int
    end: int


def find_turns(tool_mask: Sequence[int]) -> list[Turn]:
    """
    The turns of a completion.

    Args:
        tool_mask (`Sequence[int]`):
            For each token 1 if the policy wrote it, 0 if it is a tool's or an environment's output.
    """
    # A search in bytes: a loop over the tokens takes six times as long
    return [Turn(*match.span()) for match in _OWN_TOKENS.finditer(bytes(list(tool_mask)))]


def turn_indices(mask_NT: torch.Tensor) -> torch.Tensor:
    """For each loss token the index of its turn, a maximal run of loss tokens; -1 for other tokens, `(N, T)`."""
    mask_NT = mask_NT.bool()
    starts_NT = mask_NT & ~F.pad(mask_NT[:, :-1], (1, 0))
    return (starts_NT.cumsum(1) - 1).where(mask_NT, -1)


def turn_ends(mask_NT: torch.Tensor) -> torch.Tensor:
    """True on the last loss token of each turn, `(N, T)`."""
    mask_NT = mask_NT.bool()
    return mask_NT & ~F.pad(mask_NT[:, 1:], (0, 1))


def place_turn_rewards(
    rewards: TurnRewards, tool_mask: Sequence[int], completion: Any, where: str
) -> StepRewards | None:
    """
    Rewards of turns or tool calls as those of steps. The rewards of calls in one turn have the same end.

    Args:
        rewards ([`TurnRewards`]):
            What a source returned.
        tool_mask (`Sequence[int]`):
            As for [`find_turns`].
        completion (`str` or `list[dict]`):
            The completion as TRL gives it to reward functions.
        where (`str`):
            Names the source and the completion in errors.

    Returns:
        [`StepRewards`], or `None` where there is nothing to judge.

    Raises:
        TypeError: `values` is not a list of numbers.
        ValueError: an unknown `per`, another number of values than of turns or tool calls, or a value that is not
            finite.
    """
    if rewards.per not in _PER:
        raise ValueError(f"{where}: TurnRewards has per={rewards.per!r}; known: {', '.join(map(repr, _PER))}.")
    if not is_list_like(rewards.values):
        raise TypeError(f"{where}: TurnRewards has values={rewards.values!r}; expected a list.")
    values = plain(list(rewards.values))
    turns = find_turns(tool_mask)
    if rewards.per == "turn":
        owners = list(range(len(turns)))
        if len(values) != len(turns):
            raise ValueError(f"{where}: TurnRewards has {len(values)} values for {len(turns)} turns of the policy.")
    else:
        owners = _turns_of_calls(completion, len(turns), where)
        answered = sum(message["role"] == "tool" for message in completion)
        if len(values) not in (answered, len(owners)):
            raise ValueError(
                f"{where}: TurnRewards has {len(values)} values for {len(owners)} tool calls, of which {answered} "
                "have a result."
            )
    scored = [None if v is None else check_number(v, f"{where}: values[{k}]") for k, v in enumerate(values)]
    # Calls without a result are the last ones
    ends = [turns[owner].end - 1 for owner in owners[: len(values)]]
    return StepRewards(ends, scored) if scored else None


def _turns_of_calls(completion: Any, turns: int, where: str) -> list[int]:
    """For each tool call of a completion, the index of the turn that made it."""
    if isinstance(completion, str):
        raise ValueError(
            f"{where}: TurnRewards has per='tool_call', and the completion is a text, which has no tool calls. Use "
            "conversational prompts, or per='turn'."
        )
    messages = [message for message in completion if message["role"] == "assistant"]
    if len(messages) != turns:
        raise ValueError(
            f"{where}: TurnRewards has per='tool_call', and which turn made which call is not known: {len(messages)} "
            f"messages of the policy for {turns} turns. Use per='turn'."
        )
    return [turn for turn, message in enumerate(messages) for _ in message.get("tool_calls") or []]


def land_on_policy_tokens(rewards: StepRewards, tool_mask: Sequence[int]) -> StepRewards:
    """
    Move each reward on a tool's output to the last token that the policy wrote before. There rewards add up.

    Args:
        rewards ([`StepRewards`]):
            Ends that do not decrease.
        tool_mask (`Sequence[int]`):
            As for [`find_turns`].

    Returns:
        [`StepRewards`] with strictly increasing ends. A sum leaves out `None`; of nothing but `None` it is `None`. A
        reward before the policy's first token stays where it is.
    """
    turns = find_turns(tool_mask)
    starts = [turn.start for turn in turns]
    sums: dict[int, float | None] = {}
    for end, value in zip(rewards.ends, rewards.values, strict=True):
        turn = bisect_right(starts, end) - 1
        token = end if turn < 0 else min(end, turns[turn].end - 1)
        before = sums.get(token)
        sums[token] = value if before is None else before if value is None else before + value
    return StepRewards(list(sums), list(sums.values()))
