"""The steps of a text, and the policy's token that ends each step."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from ..rewards.types import is_list_like, plain
from .alignment import AlignedText, end_token
from .headings import says_something
from .numbering import numbered_starts
from .protected import code_spans, protected_spans
from .spans import Span, blank_out, outside
from .thinking import THINKING_TAGS, Thinking, called_thinking, find_thinking, without_tags


_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_NEWLINES = re.compile(r"\n+")


def _ends_of(pattern: re.Pattern[str]) -> Callable[[str], list[int]]:
    return lambda text: [match.end() for match in pattern.finditer(text)]


# Where the steps of a text end, by each way that has a name; none ends within code or display maths
_NAMED: dict[str, Callable[[str], list[int]]] = {
    "blank_line": _ends_of(_BLANK_LINES),
    "newline": _ends_of(_NEWLINES),
    "step_number": lambda text: numbered_starts(blank_out(text, code_spans(text))),
}
_REGEX = "regex:"
_TOKENS = "tokens"
_TURN = "turn"

_SCOPES = ("all", "answer", "thinking")


class Step(NamedTuple):
    """
    A step of a completion.

    Args:
        text (`str`):
            The step without white space at its two ends, the indentation of its first line included; with it where the
            segmentation has `strip=False`.
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
            - `"step_number"`: before each line that begins with the number of a step: `Step 2:`, `Step 2.`, `步骤2`,
              `第2步`, also as a Markdown heading or in bold. A text without these ends a step before each line that
              begins with `2.`, `2)`, `**2.**` or the like, where such lines count 1, 2, ... and are written alike. See
              `trl_grpo_ext.steps.numbering`.
            - `"tokens"`: after every `window` tokens.
            - `"turn"`: where the policy's turn ends, at a tool's output or at the end of the completion.
            - `"regex:PATTERN"`: where a match of `PATTERN` ends. With `"regex:(?=PATTERN)"` a step ends before the
              match.
            - a callable that takes the text and returns the character indices where steps end, in increasing order.
              What follows the last index is a step too.

            Every turn ends a step, whatever `by` is, and tool output belongs to none.

            The first three never cut fenced code, nor display maths (`$$..$$`, `\[..\]`, `\begin{..}..\end{..}`) that
            holds no blank line. A delimiter without its partner protects nothing, and one that is too many changes
            the steps of its own paragraph only. See `trl_grpo_ext.steps.protected`.
        window (`int`, *optional*, defaults to `64`):
            Tokens per step for `"tokens"`.
        min_step_tokens (`int`, *optional*, defaults to `1`):
            A shorter step is joined with the next one of its turn, and a shorter last step with the one before.
        max_steps (`int`, *optional*):
            The largest number of steps. What follows is joined with the last of them.
        scope (`str`, *optional*):
            Which part of a turn has steps. Tokens outside it belong to no step: they are neither scored nor paid, and
            take no room in the input of a reward model.

            - `"all"` (default): all of it, thinking too. A warning says once, by the name of the source, that thinking
              was found. `scope="all"` itself means it, without a warning.
            - `"answer"`: what follows thinking. A turn that is cut off while the policy thinks has no steps.
            - `"thinking"`: what stands between the tags.
        thinking (`Sequence[tuple[str, str]]` or `Callable[[str], Sequence[tuple[int, int]]]`, *optional*):
            How thinking is known: pairs of an opening and a closing tag, or a callable that takes the text of a turn
            and returns the `(start, end)` of each part that is thinking. By default the tags that are known, such as
            `<think>`; see `trl_grpo_ext.steps.thinking`, also for tags that are missing.
        join_headings (`bool`, *optional*, defaults to `True`):
            Whether a step that says nothing by itself is joined with the next one, and as the last step with the one
            before: `---`, a heading or a title in bold alone, `Step 3:` alone, a tag of thinking. For the first three
            ways to cut.

        strip (`bool`, *optional*, defaults to `True`):
            Whether the text of a step is without the white space at its two ends. With `False` the texts of all steps
            together are the text in scope, its blank lines and its indentation, for models that read these.

    Raises:
        TypeError: a `by` that is neither a text nor a callable, a number that is not whole, `thinking` that is neither
            pairs of texts nor a callable, or a `join_headings` or `strip` that is not true or false.
        ValueError: an unknown `by` or `scope`, a pattern that is not a regular expression, a number below 1, or an
            empty tag.

    Example:

    ```python
    >>> Segmentation(by="blank_line", scope="answer")
    >>> # Tags of your own; in YAML: {by: newline, scope: answer, thinking: [["<plan>", "</plan>"]]}
    >>> Segmentation(by="newline", scope="answer", thinking=[("<plan>", "</plan>")])
    ```
    """

    by: str | Callable[[str], Sequence[int]] = "blank_line"
    window: int = 64
    min_step_tokens: int = 1
    max_steps: int | None = None
    scope: Literal["all", "answer", "thinking"] | None = None
    thinking: Sequence[Sequence[str]] | Callable[[str], Sequence[Sequence[int]]] = THINKING_TAGS
    join_headings: bool = True
    strip: bool = True

    def __post_init__(self):
        if not isinstance(self.by, str) and (isinstance(self.by, type) or not callable(self.by)):
            raise TypeError(f"Segmentation: by is {self.by!r}; expected a text or a callable.")
        if isinstance(self.by, str) and self.by not in (*_NAMED, _TOKENS, _TURN):
            _pattern(self.by)
        numbers = {"window": self.window, "min_step_tokens": self.min_step_tokens}
        if self.max_steps is not None:
            numbers["max_steps"] = self.max_steps
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Segmentation: {name} is {value!r}; expected a whole number.")
            if value < 1:
                raise ValueError(f"Segmentation: {name} is {value}; it must be at least 1.")
        if self.scope not in (None, *_SCOPES):
            raise ValueError(f"Segmentation: scope is {self.scope!r}; known: {', '.join(_SCOPES)}.")
        for name, flag in (("join_headings", self.join_headings), ("strip", self.strip)):
            if not isinstance(flag, bool):
                raise TypeError(f"Segmentation: {name} is {flag!r}; expected true or false.")
        if not callable(self.thinking):
            # YAML has lists, and a segmentation is compared and hashed
            object.__setattr__(self, "thinking", _parse_tags(self.thinking))

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """Pairs of tags of thinking; none where a callable finds it."""
        return () if callable(self.thinking) else self.thinking  # type: ignore[return-value]

    def text_of(self, piece: str) -> str:
        """The text of the step that a piece is."""
        return piece.strip() if self.strip else piece

    def find_thinking(self, text: str, is_open: bool = False) -> list[Thinking]:
        """
        The parts of a turn's text that are thinking.

        Args:
            text (`str`):
                What the policy wrote in the turn.
            is_open (`bool`, *optional*, defaults to `False`):
                Whether the text before the turn ends with an opening tag.
        """
        if callable(self.thinking):
            return called_thinking(self.thinking, text)
        return find_thinking(text, self.tags, is_open)

    def in_scope(self, text: str, is_open: bool = False) -> list[Span]:
        """The parts of a turn's text that have steps, with the arguments of [`Segmentation.find_thinking`]."""
        has_all = self.scope in (None, "all")
        return self.parts_beside(text, [] if has_all else self.find_thinking(text, is_open))

    def parts_beside(self, text: str, thinking: Sequence[Thinking]) -> list[Span]:
        """The parts of a turn's text that have steps, where its thinking has been found."""
        if self.scope in (None, "all"):
            return [Span(0, len(text))]
        if self.scope == "thinking":
            return [part.inner for part in thinking]
        starts = [0, *(part.whole.end for part in thinking)]
        ends = [*(part.whole.start for part in thinking), len(text)]
        return [Span(start, end) for start, end in zip(starts, ends, strict=True)]


def _parse_tags(thinking: Any) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in thinking if is_list_like(thinking) else [thinking]:
        if not is_list_like(pair) or [type(tag) for tag in pair] != [str, str]:
            raise TypeError(
                f"Segmentation: thinking holds {pair!r}; expected an opening and a closing tag. Or give a callable."
            )
        opening, closing = pair
        if not opening.strip() or not closing.strip() or opening == closing:
            raise ValueError(f"Segmentation: thinking holds {pair!r}; the two tags must differ and not be empty.")
        pairs.append((opening, closing))
    if not pairs:
        raise ValueError("Segmentation: thinking holds no tags; leave it out for those that are known.")
    return tuple(pairs)


# What is taken wherever a segmentation is asked for, see `as_segmentation`
SegmentationLike = str | Segmentation | Callable[[str], Sequence[int]] | Mapping[str, Any]


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


def _pattern(by: str) -> re.Pattern[str]:
    if not by.startswith(_REGEX):
        known = ", ".join([*_NAMED, _TOKENS, _TURN, f"{_REGEX}PATTERN"])
        raise ValueError(f"Segmentation: unknown by={by!r}; known: {known}, or a callable.")
    try:
        return re.compile(by.removeprefix(_REGEX))
    except re.error as error:
        raise ValueError(f"Segmentation: by={by!r} is not a regular expression: {error}.") from error


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


def _with_headings(text: str, spans: Sequence[Span], segmentation: Segmentation) -> list[Span]:
    """The spans, each of those that say nothing joined with the next one, and at the end with the one before."""
    tags = segmentation.tags
    by_number = segmentation.by == "step_number"
    joined: list[Span] = []
    start = 0
    has_tags = without_tags(text, tags) != text
    for span in spans:
        piece = text[span.start : span.end]
        if says_something(without_tags(piece, tags) if has_tags else piece, by_number):
            joined.append(Span(start, span.end))
            start = span.end
    if spans and start < spans[-1].end:
        last = joined.pop() if joined else spans[0]
        joined.append(Span(last.start, spans[-1].end))
    return joined


def split_text(text: str, segmentation: Segmentation) -> list[Span]:
    """
    Cut a text into steps.

    Args:
        text (`str`):
            What the policy wrote in one turn, or the part of it that is in scope.
        segmentation ([`Segmentation`]):
            Where to cut, except by `"tokens"`, of which a text alone has none. `min_step_tokens`, `max_steps` and
            `scope` do nothing here.

    Returns:
        `list[Span]`: contiguous from 0 to `len(text)`, none of them white space alone. Empty for a text that is.

    Raises:
        TypeError: a callable that returns no list of whole numbers.
        ValueError: a callable's ends that do not increase or leave the text.
    """
    by = segmentation.by
    if not isinstance(by, str):
        return _spans(text, _called(by, text))
    if by == _TURN:
        return _spans(text, [])
    if by not in _NAMED:
        return _spans(text, [match.end() for match in _pattern(by).finditer(text)])
    spans = _spans(text, outside(_NAMED[by](text), protected_spans(text)))
    return _with_headings(text, spans, segmentation) if segmentation.join_headings else spans


def segment(
    aligned: AlignedText, segmentation: Segmentation, thinking: Sequence[Thinking] | None = None
) -> list[Step]:
    """
    Cut a turn into steps, each with the token that ends it.

    The texts of the steps cover the part of the text that is in scope, except white space between them. Two steps that
    end in the same token are one step, because `ends` of [`StepRewards`] increase strictly.

    Args:
        aligned ([`AlignedText`]):
            What the policy wrote in the turn, from [`align_tokens`], without the special tokens at its end; see
            [`strip_special`]. A completion without tool output is one turn.
        segmentation ([`Segmentation`]):
            Where to cut, which steps are joined, and which part of the turn has steps.
        thinking (`Sequence[Thinking]`, *optional*):
            What [`Segmentation.find_thinking`] has found in the turn. By default it is looked for here.

    Returns:
        `list[Step]`: empty if the text in scope is empty or white space. `last_token` is an index into the turn's
        tokens.
    """
    text = aligned.text
    parts = segmentation.in_scope(text) if thinking is None else segmentation.parts_beside(text, thinking)
    steps: list[Step] = []
    for part in parts:
        for step in _segment_part(aligned, part, segmentation):
            # Parts that are next to each other may end in one token
            between = "\n\n" if segmentation.strip else ""
            before = steps.pop().text + between if steps and steps[-1].last_token == step.last_token else ""
            steps.append(Step(before + step.text, step.last_token))
    return join_turns(steps, segmentation)


def _segment_part(aligned: AlignedText, part: Span, segmentation: Segmentation) -> list[Step]:
    text = aligned.text[part.start : part.end]
    if segmentation.by == _TOKENS:
        within = [min(end, part.end) - part.start for end in aligned.token_ends if end > part.start]
        spans = _spans(text, within[segmentation.window - 1 :: segmentation.window])
    else:
        spans = split_text(text, segmentation)
    # Of several steps that end in one token, the last one's characters
    char_end_of_token = {end_token(aligned.token_ends, part.start + span.end): span.end for span in spans}
    steps = []
    start = 0
    first_token = end_token(aligned.token_ends, part.start + 1)
    for last_token in _join_steps(list(char_end_of_token), first_token, segmentation):
        end = char_end_of_token[last_token]
        steps.append(Step(segmentation.text_of(text[start:end]), last_token))
        start = end
    return steps


def _join_steps(last_tokens: list[int], first_token: int, segmentation: Segmentation) -> list[int]:
    """The last tokens that are left when steps are joined as `min_step_tokens` and `max_steps` say."""
    kept: list[int] = []
    previous = first_token - 1
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
