r"""
The parts of a text within which no step ends: fenced code and display maths.

A policy writes the text, so a delimiter may be missing or may be one too many. Such a delimiter changes nothing beyond
its own paragraph, because

| part | from | to | may hold a blank line |
|---|---|---|---|
| fenced code | a fence | the next fence of its kind that is at least as long | yes |
| display maths | `$$` | the next `$$` | no |
| | `\[` | the next `\]` | no |
| | `\begin{name}` | its `\end{name}` | no |

and a delimiter without its partner protects nothing. Inline maths, tables and HTML tags protect nothing either.

Two fences in a row are a pair or are not. What stands around a fence says what it does:

| fence | does |
|---|---|
| with a language after it, or with text before it on its line | opens, and closes nothing |
| after a blank line, and before text | opens |
| after text, and before a blank line | closes |
| any other | opens or closes |

Of all ways to pair fences the one is taken in which the most fences do what the table says; of several, that with the
most pairs; of several, that which protects the fewest characters.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from .spans import Span, blank_out


# The line of a fence. A language is one word, and may have attributes
_FENCE = re.compile(
    r"^(?P<before>(?:(?!`{3}|~{3})[^\n])*)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*(?P<language>[^\s`]+(?:[ \t]+[^\s`]+=[^\s`]+)*|\{[^\n`]*\}|)[ \t\r]*$",
    re.MULTILINE,
)
_INDENTATION = re.compile(r"[ \t>]*")
_LIST_ITEM = re.compile(r"[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*")
# Fences that are longer than that count as that long: each length takes a pass over the text's fences
_LONGEST_FENCE = 6

# The first alternative takes escaped backslashes and dollars away from the others: `\\[2pt]` is a line break
_DELIMITER = re.compile(r"\\[\\$]|\$\$|\\[\[\]]|\\(begin|end)\{(\w+\*?)\}|(?P<blank>\n[^\S\n]*\n)")


class _Fence(NamedTuple):
    """A fence: the span of its line, its kind and length, and what the text around it says that it does."""

    line: Span
    kind: str
    length: int
    opens: bool
    closes: bool
    cannot_close: bool


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
    fences = _fences(text)
    spans: list[Span] = []
    # A longer fence may hold shorter ones
    for length in sorted({fence.length for fence in fences}, reverse=True):
        for kind in ("`", "~"):
            apart = [fence for fence in fences if fence.kind == kind and fence.length >= length]
            found = _pairs(apart, length)
            spans = sorted([*spans, *found])
            fences = _outside(fences, found)
    return spans


def _fences(text: str) -> list[_Fence]:
    fences = []
    for match in _FENCE.finditer(text):
        before = match["before"]
        language = match["language"]
        kind = match["fence"][0]
        # Tildes within a line are no fence
        if kind == "~" and not _LIST_ITEM.fullmatch(before):
            continue
        cannot_close = bool(language) or not _INDENTATION.fullmatch(before)
        line_before = text[text.rfind("\n", 0, max(match.start() - 1, 0)) + 1 : match.start()]
        end_after = text.find("\n", match.end() + 1)
        line_after = text[match.end() + 1 : len(text) if end_after < 0 else end_after]
        after_blank = not line_before.strip()
        before_blank = not line_after.strip()
        fences.append(
            _Fence(
                line=Span(match.start(), match.end()),
                kind=kind,
                length=min(len(match["fence"]), _LONGEST_FENCE),
                opens=cannot_close or (after_blank and not before_blank),
                closes=not cannot_close and before_blank and not after_blank,
                cannot_close=cannot_close,
            )
        )
    return fences


def _pairs(fences: Sequence[_Fence], length: int) -> list[Span]:
    """
    The pairs of neighbours that are taken, of which the first has the given length.

    With best_i the best choice among the first i fences, and pair_i the pair of the fences i - 1 and i,

        best_i = max(best_(i-1), best_(i-2) + pair_i)

    Values are compared as (fences that do what they should, less those that do not; pairs; - characters).
    """
    values = [(0, 0, 0), (0, 0, 0)]
    is_taken = [False, False]
    for first, second in zip(fences, fences[1:], strict=False):
        as_said = first.opens - first.closes + second.closes - second.opens
        before = values[-2]
        with_pair = (before[0] + as_said, before[1] + 1, before[2] - (second.line.end - first.line.start))
        takes = first.length == length and not second.cannot_close and with_pair > values[-1]
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


def _outside(fences: Sequence[_Fence], spans: Sequence[Span]) -> list[_Fence]:
    """The fences that lie within no span."""
    kept = []
    position = 0
    for fence in fences:
        while position < len(spans) and spans[position].end <= fence.line.start:
            position += 1
        if position == len(spans) or fence.line.start < spans[position].start:
            kept.append(fence)
    return kept


def _display_maths(text: str) -> list[Span]:
    """From each closing delimiter back to the last one of its kind that is still open in its paragraph."""
    spans = []
    opened: dict[str, list[int]] = {}
    position = 0
    while match := _DELIMITER.search(text, position):
        position = match.end()
        delimiter, command, environment = match.group(0, 1, 2)
        if match["blank"]:
            opened = {}
            # The newline that ends a blank line begins the next one
            position -= 1
            continue
        if delimiter in ("\\\\", r"\$"):
            continue
        waiting = opened.setdefault(environment or delimiter.replace("]", "["), [])
        closes = command == "end" or delimiter == r"\]" or (delimiter == "$$" and bool(waiting))
        if not closes:
            waiting.append(match.start())
        elif waiting:
            spans.append(Span(waiting.pop(), match.end()))
    return spans
