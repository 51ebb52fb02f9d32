r"""
The parts of a text within which no step ends: fenced code and display maths.

A policy writes the text, so a delimiter may be missing or may be one too many. Such a delimiter changes nothing beyond
its own paragraph, because

| part | from | to | may hold a blank line |
|---|---|---|---|
| fenced code | a fence | a later fence of the same kind and length | yes |
| display maths | `$$` | the next `$$` | no |
| | `\[` | the next `\]` | no |
| | `\begin{name}` | its `\end{name}` | no |

and a delimiter without its partner protects nothing. Inline maths, tables and HTML tags protect nothing either.

Whether a fence opens or closes is seen from what stands around it:

| fence | opens | closes |
|---|---|---|
| with a language after it, or with text before it on its line | yes | never |
| after a blank line and before text | yes | if need be |
| after text and before a blank line | never | yes |
| any other | if need be | if need be |

Neighbours of one kind and length are paired so that the most fences do what the table says. Of several ways to do so
that with the most pairs is taken, and of those the one that protects the fewest characters. Fences within the code of
longer ones are part of it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from .spans import Span, blank_out, outside


# The line of a fence. A language is one word, and may have attributes
# The blanks before it are possessive: otherwise each would be tried as one after a fence without a language
_FENCE = re.compile(
    r"(?P<before>(?:(?!`{3}|~{3})[^\n])*)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*+(?P<language>[^\s`]+(?:[ \t]+[^\s`=]+=[^\s`]+)*|\{[^\n`]*\}|)[ \t\r]*$",
    re.MULTILINE,
)
_MARKS = re.compile(r"`{3,}|~{3,}")
_INDENTATION = re.compile(r"[ \t>]*")
_LIST_ITEM = re.compile(r"[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*")

# The first alternative takes escaped backslashes and dollars away from the others: `\\[2pt]` is a line break
_DELIMITER = re.compile(r"\\[\\$]|\$\$|\\[\[\]]|\\(begin|end)\{(\w+\*?)\}|(?P<blank>\n[^\S\n]*(?=\n))")


class _Fence(NamedTuple):
    """A fence: the span of its line, its characters, what it does by the table, and whether it may close at all."""

    line: Span
    marks: str
    opens: bool
    closes: bool
    may_close: bool


def protected_spans(text: str) -> list[Span]:
    """
    The parts of a text within which no step ends, in time linear in the text.

    Args:
        text (`str`):
            Text of a completion.

    Returns:
        `list[Span]`: fenced code and display maths, in increasing order; displays may lie within each other.
    """
    code = code_spans(text)
    # What looks like maths in code is code
    return sorted(code + _display_maths(blank_out(text, code)))


def code_spans(text: str) -> list[Span]:
    """The fenced code of a text, in increasing order; no two overlap."""
    alike: dict[str, list[_Fence]] = {}
    for fence in _fences(text):
        alike.setdefault(fence.marks, []).append(fence)
    spans: list[Span] = []
    # A longer fence may hold shorter ones
    for marks in sorted(alike, key=len, reverse=True):
        starts = set(outside([fence.line.start + 1 for fence in alike[marks]], spans))
        spans = sorted([*spans, *_pairs([fence for fence in alike[marks] if fence.line.start + 1 in starts])])
    return spans


def _fences(text: str) -> list[_Fence]:
    fences = []
    line_end = -1
    for marks in _MARKS.finditer(text):
        # The line may have been read for marks before these
        if marks.start() <= line_end:
            continue
        line_end = _line_end(text, marks.end())
        match = _FENCE.match(text, text.rfind("\n", 0, marks.start()) + 1)
        if match is None:
            continue
        before = match["before"]
        language = match["language"]
        # Tildes within a line are no fence
        if match["fence"].startswith("~") and not _LIST_ITEM.fullmatch(before):
            continue
        may_close = not language and _INDENTATION.fullmatch(before) is not None
        line_before = text[text.rfind("\n", 0, max(match.start() - 1, 0)) + 1 : match.start()]
        line_after = text[match.end() + 1 : _line_end(text, match.end() + 1)]
        after_blank = not line_before.strip()
        before_blank = not line_after.strip()
        fences.append(
            _Fence(
                line=Span(match.start(), match.end()),
                marks=match["fence"],
                opens=not may_close or (after_blank and not before_blank),
                closes=may_close and before_blank and not after_blank,
                may_close=may_close,
            )
        )
    return fences


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _pairs(fences: Sequence[_Fence]) -> list[Span]:
    """
    The pairs of neighbours that are taken.

    With best_i the best choice among the first i fences, and pair_i the pair of the fences i - 1 and i,

        best_i = max(best_(i-1), best_(i-2) + pair_i)

    where values are compared as (fences that do what they should, less those that do not; pairs; - characters).
    """
    values = [(0, 0, 0), (0, 0, 0)]
    is_taken = [False, False]
    for first, second in zip(fences, fences[1:], strict=False):
        as_said = first.opens + second.closes - second.opens
        before = values[-2]
        with_pair = (before[0] + as_said, before[1] + 1, before[2] - (second.line.end - first.line.start))
        takes = not first.closes and second.may_close and with_pair > values[-1]
        values.append(with_pair if takes else values[-1])
        is_taken.append(takes)
    spans = []
    position = len(fences)
    while position > 1:
        if is_taken[position]:
            spans.append(Span(fences[position - 2].line.start, fences[position - 1].line.end))
            position -= 1
        position -= 1
    return spans[::-1]


def _display_maths(text: str) -> list[Span]:
    """From each closing delimiter back to the last one of its kind that is still open in its paragraph."""
    spans = []
    opened: dict[str, list[int]] = {}
    for match in _DELIMITER.finditer(text):
        delimiter, command, environment = match.group(0, 1, 2)
        if match["blank"]:
            opened = {}
        if match["blank"] or delimiter in ("\\\\", r"\$"):
            continue
        waiting = opened.setdefault(environment or delimiter.replace("]", "["), [])
        closes = command == "end" or delimiter == r"\]" or (delimiter == "$$" and bool(waiting))
        if not closes:
            waiting.append(match.start())
        elif waiting:
            spans.append(Span(waiting.pop(), match.end()))
    return spans
