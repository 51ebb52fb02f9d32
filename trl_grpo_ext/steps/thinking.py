"""
Where a policy thinks in its text, and where it answers.

A turn is thinking

| what is found | from | to |
|---|---|---|
| an opening tag and its closing tag | the opening tag | the end of the closing tag |
| a closing tag first, because the prompt has opened thinking | the start of the turn | the end of the closing tag |
| an opening tag first that is never closed, as in a turn that is cut off | the opening tag | the end of the turn |
| no tag, where the prompt has opened thinking | the start of the turn | the end of the turn |

and all else is the answer. Any other tag is text: a closing tag after thinking is over, and an opening tag in the
answer that is never closed.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..rewards.types import is_list_like, plain
from .spans import Span


# The pairs of tags that are known, by the models that write them
THINKING_TAGS = (
    # DeepSeek-R1, QwQ, Qwen3 and most others
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    # Sky-T1 and other models trained on its format
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    # Magistral
    ("[THINK]", "[/THINK]"),
    # Kimi
    ("◁think▷", "◁/think▷"),
    # Command A
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    # Seed
    ("<seed:think>", "</seed:think>"),
    # Gemma
    ("<|channel>thought", "<channel|>"),
    # gpt-oss, whose answer is another channel
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)

Tags = tuple[tuple[str, str], ...]


class Thinking(NamedTuple):
    """
    A part of a text in which the policy thinks.

    Args:
        whole (`Span`):
            The part, with its tags.
        inner (`Span`):
            What stands between the tags.
    """

    whole: Span
    inner: Span


def find_thinking(text: str, tags: Tags, is_open: bool = False) -> list[Thinking]:
    """
    The parts of a turn in which the policy thinks, by the table of this module; in time linear in the text.

    Args:
        text (`str`):
            What the policy wrote in the turn.
        tags (`tuple[tuple[str, str], ...]`):
            Pairs of an opening and a closing tag.
        is_open (`bool`, *optional*, defaults to `False`):
            Whether the text before the turn, such as the generation prompt of a chat template, ends with an opening
            tag.

    Returns:
        `list[Thinking]`: in increasing order; no two overlap.
    """
    closing_of = dict(tags)
    found: list[Thinking] = []
    start = Span(0, 0)
    # The tags that close what is open: any of them, if the prompt has opened it
    awaited = set(closing_of.values()) if is_open else set()
    for match in _any_tag(tags).finditer(text):
        tag = match.group()
        if tag in closing_of and not awaited:
            start = Span(*match.span())
            awaited = {closing_of[tag]}
        elif tag in awaited or (tag not in closing_of and not awaited and not found):
            begin = start if awaited else Span(0, 0)
            found.append(Thinking(Span(begin.start, match.end()), Span(begin.end, match.start())))
            awaited = set()
    answered = text[found[-1].whole.end if found else 0 : start.start]
    if awaited and not answered.strip():
        found.append(Thinking(Span(start.start, len(text)), Span(start.end, len(text))))
    return found


def called_thinking(find: Callable[[str], Iterable[Sequence[int]]], text: str) -> list[Thinking]:
    """
    The parts of a turn that a callable of the user finds.

    Raises:
        TypeError: it returns no list of pairs of whole numbers.
        ValueError: parts that leave the text, overlap or decrease.
    """
    returned = find(text)
    if not is_list_like(returned):
        raise TypeError(f"Segmentation: `thinking` returned {returned!r}; expected a list of (start, end).")
    found: list[Thinking] = []
    reached = 0
    for number, part in enumerate(plain(list(returned))):
        is_pair = is_list_like(part) and len(part) == 2
        if not is_pair or not all(isinstance(end, int) and not isinstance(end, bool) for end in part):
            raise TypeError(f"Segmentation: `thinking` returned part {number} = {part!r}; expected (start, end).")
        span = Span(*part)
        if not reached <= span.start <= span.end <= len(text):
            raise ValueError(
                f"Segmentation: `thinking` returned part {number} = {part!r} after {reached} for a text of "
                f"{len(text)} characters; parts must increase and stay within the text."
            )
        found.append(Thinking(span, span))
        reached = span.end
    return found


def opens_thinking(before: str, tags: Tags) -> bool:
    """Whether the text before a turn ends with an opening tag, white space aside."""
    return before.rstrip().endswith(tuple(opening for opening, _ in tags))


def is_unclosed(thinking: Sequence[Thinking], text: str) -> bool:
    """Whether a turn ends while the policy thinks."""
    return bool(thinking) and thinking[-1].inner.end == thinking[-1].whole.end == len(text)


def without_tags(text: str, tags: Tags) -> str:
    """A text without any of the tags."""
    return _any_tag(tags).sub("", text) if tags else text


@lru_cache(maxsize=16)
def _any_tag(tags: Tags) -> re.Pattern[str]:
    # Longer ones first: one tag may begin as another one does
    every = sorted({tag for pair in tags for tag in pair}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, every)))
