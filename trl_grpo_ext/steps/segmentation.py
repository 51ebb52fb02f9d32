"""The steps of a text, and the policy's token that ends each step."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ..rewards.types import is_list_like, plain
from .alignment import AlignedText, end_token


# A step ends where a match of its pattern ends
_SEPARATORS = {
    "blank_line": re.compile(r"\n(?:[^\S\n]*\n)+"),
    "newline": re.compile(r"\n+"),
    "step_number": re.compile(r"^(?=[#>*_ \t-]*step[ \t]*\d+[*_ \t]*:)", re.IGNORECASE | re.MULTILINE),
}
_REGEX = "regex:"
_TOKENS = "tokens"
_TURN = "turn"

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
# The first alternative takes escaped backslashes and dollars away from the others: `\\[2pt]` is a line break
_DELIMITER = re.compile(r"\\[\\$]|\$\$|\\[\[\]]|\\(begin|end)\{(\w+\*?)\}")


class Span(NamedTuple):
    """The characters `text[start:end]` of a text."""

    start: int
    end: int


class Step(NamedTuple):
    """
    A step of a completion.

    Args:
        text (`str`):
            The step without white space at its two ends, the indentation of its first line included.
        last_token (`int`):
            Index into `completion_ids` of the token that ends the step. The separator after a step belongs to the
            step.
    """

    text: str
    last_token: int


@dataclass(frozen=True)
class Segmentation:
    r"""
    How a completion is cut into steps. A separator belongs to the step before it.

    Args:
        by (`str` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"blank_line"`):
            Where steps end.

            - `"blank_line"`: at each line that is empty or white space.
            - `"newline"`: at the end of each line.
            - `"step_number"`: before each line that begins with `Step k:`, also as a Markdown heading or in bold.
            - `"tokens"`: after every `window` tokens.
            - `"turn"`: where the policy's turn ends, at a tool's output or at the end of the completion.
            - `"regex:PATTERN"`: where a match of `PATTERN` ends. With `"regex:(?=PATTERN)"` a step ends before the
              match.
            - a callable that takes the text and returns the character indices where steps end, in increasing order.
              What follows the last index is a step too.

            Every turn ends a step, whatever `by` is, and tool output belongs to none.

            The first three never cut display maths (`$$..$$`, `\[..\]`, `\begin{..}..\end{..}`) and fenced code. A
            delimiter that is opened and never closed protects nothing; otherwise it would join all that follows.
        window (`int`, *optional*, defaults to `64`):
            Tokens per step for `"tokens"`.
        min_step_tokens (`int`, *optional*, defaults to `1`):
            A shorter step is joined with the next one of its turn, and a shorter last step with the one before.
        max_steps (`int`, *optional*):
            The largest number of steps. What follows is joined with the last of them.

    Raises:
        TypeError: a `by` that is neither a text nor a callable, or a number that is not whole.
        ValueError: an unknown `by`, a pattern that is not a regular expression, or a number below 1.
    """

    by: str | Callable[[str], Sequence[int]] = "blank_line"
    window: int = 64
    min_step_tokens: int = 1
    max_steps: int | None = None

    def __post_init__(self):
        if not isinstance(self.by, str) and (isinstance(self.by, type) or not callable(self.by)):
            raise TypeError(f"Segmentation: by is {self.by!r}; expected a text or a callable.")
        if isinstance(self.by, str) and self.by not in (_TOKENS, _TURN):
            _separator(self.by)
        numbers = {"window": self.window, "min_step_tokens": self.min_step_tokens}
        if self.max_steps is not None:
            numbers["max_steps"] = self.max_steps
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Segmentation: {name} is {value!r}; expected a whole number.")
            if value < 1:
                raise ValueError(f"Segmentation: {name} is {value}; it must be at least 1.")


# What is taken wherever a segmentation is asked for, see `as_segmentation`
SegmentationLike = str | Segmentation | Callable[[str], Sequence[int]]


def as_segmentation(value: Any) -> Segmentation:
    """
    The [`Segmentation`] that a user means, wherever one is asked for.

    Args:
        value ([`Segmentation`], `str`, `Callable[[str], Sequence[int]]` or `Mapping[str, Any]`):
            A segmentation, its argument `by`, or all its arguments as plain data.

    Raises:
        TypeError: none of these; or as [`Segmentation`], of which an unknown argument is another.
        ValueError: as [`Segmentation`].
    """
    if isinstance(value, Segmentation):
        return value
    return Segmentation(**value) if isinstance(value, Mapping) else Segmentation(value)


def _separator(by: str) -> re.Pattern[str]:
    if by in _SEPARATORS:
        return _SEPARATORS[by]
    if not by.startswith(_REGEX):
        known = ", ".join([*_SEPARATORS, _TOKENS, _TURN, f"{_REGEX}PATTERN"])
        raise ValueError(f"Segmentation: unknown by={by!r}; known: {known}, or a callable.")
    try:
        return re.compile(by.removeprefix(_REGEX))
    except re.error as error:
        raise ValueError(f"Segmentation: by={by!r} is not a regular expression: {error}.") from error


def _fenced_code(text: str) -> list[Span]:
    spans = []
    opening = None
    for line in _FENCE.finditer(text):
        fence, rest = line.groups()
        if opening is None:
            # Backticks after the fence make it code within a line
            if "`" not in rest:
                opening = line
        elif fence.startswith(opening[1]) and not rest.strip():
            spans.append(Span(opening.start(), line.end()))
            opening = None
    return spans


def _display_maths(text: str) -> list[Span]:
    """From each closing delimiter back to the last one of its kind that is still open."""
    spans = []
    opened: dict[str, list[int]] = {}
    for match in _DELIMITER.finditer(text):
        delimiter, command, environment = match.group(0, 1, 2)
        if delimiter in ("\\\\", r"\$"):
            continue
        waiting = opened.setdefault(environment or delimiter.replace("]", "["), [])
        closes = command == "end" or delimiter == r"\]" or (delimiter == "$$" and bool(waiting))
        if not closes:
            waiting.append(match.start())
        elif waiting:
            spans.append(Span(waiting.pop(), match.end()))
    return spans


def _protected(text: str) -> list[Span]:
    fences = _fenced_code(text)
    for fence in fences:
        # Blanked out, because what looks like maths in code is code
        text = text[: fence.start] + " " * (fence.end - fence.start) + text[fence.end :]
    return sorted(fences + _display_maths(text))


def _outside(cuts: Iterable[int], protected: Sequence[Span]) -> list[int]:
    """The cuts that lie within no span. Cuts and spans increase."""
    outside = []
    position = 0
    covered = 0
    for cut in cuts:
        while position < len(protected) and protected[position].start < cut:
            covered = max(covered, protected[position].end)
            position += 1
        if cut >= covered:
            outside.append(cut)
    return outside


def _called(by: Callable[[str], Sequence[int]], text: str) -> list[int]:
    returned = by(text)
    if not is_list_like(returned):
        raise TypeError(f"Segmentation: the callable returned {returned!r}; expected a list of character indices.")
    ends = plain(list(returned))
    for position, end in enumerate(ends):
        if isinstance(end, bool) or not isinstance(end, int):
            raise TypeError(
                f"Segmentation: the callable returned ends[{position}] = {end!r}; expected the index of a character."
            )
        before = ends[position - 1] if position else 0
        if not before <= end <= len(text):
            raise ValueError(
                f"Segmentation: the callable returned ends[{position}] = {end} after {before} for a text of "
                f"{len(text)} characters; ends must increase and stay within the text."
            )
    return ends


def _spans(text: str, cuts: Iterable[int]) -> list[Span]:
    """The pieces of a text. A piece of white space is joined with the one before, or with the first one."""
    kept: list[int] = []
    for start, end in pairwise([0, *cuts, len(text)]):
        if text[start:end].strip():
            kept.append(end)
        elif kept:
            kept[-1] = end
    return [Span(start, end) for start, end in pairwise([0, *kept])]


def split_text(text: str, by: str | Callable[[str], Sequence[int]]) -> list[Span]:
    """
    Cut a text into steps.

    Args:
        text (`str`):
            Text of a completion.
        by (`str` or `Callable[[str], Sequence[int]]`):
            As in [`Segmentation`], except `"tokens"`: a text alone has none.

    Returns:
        `list[Span]`: contiguous from 0 to `len(text)`, none of them white space alone. Empty for a text that is.

    Raises:
        TypeError: a callable that returns no list of whole numbers.
        ValueError: an unknown `by`, or a callable's ends that do not increase or leave the text.
    """
    if not isinstance(by, str):
        return _spans(text, _called(by, text))
    if by == _TURN:
        return _spans(text, [])
    cuts = [match.end() for match in _separator(by).finditer(text)]
    return _spans(text, _outside(cuts, _protected(text)) if by in _SEPARATORS else cuts)


def segment(aligned: AlignedText, segmentation: Segmentation) -> list[Step]:
    """
    Cut a turn into steps, each with the token that ends it.

    The texts of the steps cover the whole text except white space between them. Two steps that end in the same token
    are one step, because `ends` of [`StepRewards`] increase strictly.

    Args:
        aligned ([`AlignedText`]):
            What the policy wrote in the turn, from [`align_tokens`], without the special tokens at its end; see
            [`strip_special`]. A completion without tool output is one turn.
        segmentation ([`Segmentation`]):
            Where to cut, and which steps are joined.

    Returns:
        `list[Step]`: empty if the text is empty or white space. `last_token` is an index into the turn's tokens.
    """
    text, token_ends = aligned
    if segmentation.by == _TOKENS:
        spans = _spans(text, token_ends[segmentation.window - 1 :: segmentation.window])
    else:
        spans = split_text(text, segmentation.by)
    # Of several steps that end in one token, the last one's characters
    char_end_of_token = {end_token(token_ends, span.end): span.end for span in spans}
    steps = []
    start = 0
    for last_token in _join_steps(list(char_end_of_token), segmentation):
        end = char_end_of_token[last_token]
        steps.append(Step(text[start:end].strip(), last_token))
        start = end
    return steps


def _join_steps(last_tokens: list[int], segmentation: Segmentation) -> list[int]:
    """The last tokens that are left when steps are joined as `min_step_tokens` and `max_steps` say."""
    kept: list[int] = []
    previous = -1
    for last_token in last_tokens:
        if last_token - previous >= segmentation.min_step_tokens:
            kept.append(last_token)
            previous = last_token
    if segmentation.max_steps is not None:
        kept = kept[: segmentation.max_steps]
    # The last step takes what is too short to stand alone and what is beyond `max_steps`
    return [*kept[:-1], *last_tokens[-1:]]


def join_turns(steps: Sequence[Step], segmentation: Segmentation) -> list[Step]:
    """The steps of all turns of a completion: what is beyond `max_steps` is joined with the last step that is left."""
    if segmentation.max_steps is None or len(steps) <= segmentation.max_steps:
        return list(steps)
    first = segmentation.max_steps - 1
    return [*steps[:first], Step("\n\n".join(step.text for step in steps[first:]), steps[-1].last_token)]
