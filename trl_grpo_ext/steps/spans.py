"""Pieces of a text by their characters."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """The characters `text[start:end]` of a text."""

    start: int
    end: int


def blank_out(text: str, spans: Sequence[Span]) -> str:
    """The text with spaces in place of the spans, which increase and do not overlap; all else stays where it is."""
    pieces = []
    reached = 0
    for start, end in spans:
        pieces += [text[reached:start], " " * (end - start)]
        reached = end
    return "".join([*pieces, text[reached:]])


def outside(cuts: Iterable[int], spans: Sequence[Span]) -> list[int]:
    """The cuts that lie within no span. Cuts and spans increase."""
    kept = []
    position = 0
    covered = 0
    for cut in cuts:
        while position < len(spans) and spans[position].start < cut:
            covered = max(covered, spans[position].end)
            position += 1
        if cut >= covered:
            kept.append(cut)
    return kept
