"""
Conversations to ids, as the model's own chat template writes them, and where in them the pieces of a message are.

A template may rewrite what it is given: trim it, take thinking out of it, or put an empty thought before it. So the
real messages are rendered, and the ids are those of the template's output. To find a piece in the output, the messages
are rendered once more with marks in them. A mark is made of a character that no message has. The places of the marks
count only if the output without them is the output of the real messages. No piece is sought by its text.
"""

import itertools
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..steps.spans import Span
from .encoding import continue_with, encode_template, encode_text, newline_anchor


# Private-use characters, which no template treats in a special way
_MARKS = range(0xF0000, 0x10FFFE)


class Piece(NamedTuple):
    """
    A part of what a message says.

    Args:
        text (`str`):
            The part.
        is_marked (`bool`):
            Whether its beginning is to be found in the template's output.
        is_meant (`bool`):
            Whether special tokens in it are meant as such. They are in a tag, and not in what a user or a policy says.
    """

    text: str
    is_marked: bool = False
    is_meant: bool = False


class Message(NamedTuple):
    """
    A message.

    Args:
        fields (`Mapping[str, Any]`):
            What the template is given beside `content`, `role` among them.
        pieces (`Sequence[Piece]`):
            What it says.
    """

    fields: Mapping[str, Any]
    pieces: Sequence[Piece]

    @property
    def content(self) -> str:
        """What it says, as one text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def spans(self) -> list[Span]:
        """The characters of each piece."""
        ends = [0, *itertools.accumulate(len(piece.text) for piece in self.pieces)]
        return [Span(start, end) for start, end in itertools.pairwise(ends)]


class WrittenChat(NamedTuple):
    """
    What a chat template makes of a conversation.

    Args:
        text (`str`):
            Its output.
        ids (`Sequence[int]`):
            The ids of `text`.
        spans (`Sequence[tuple[int, int]]`):
            The characters of each token, as start and end.
        last_start (`int`):
            Index into `text` of what it writes of the last message's content.
        marks (`Sequence[int | None]`):
            Index into `text` of each marked piece; `None` for one that it leaves out or rewrites.
        is_safe (`bool`):
            `False` where a text looks like a special token and the template rewrites it, so that nothing tells the
            two apart.
    """

    text: str
    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]
    last_start: int
    marks: Sequence[int | None]
    is_safe: bool = True

    def tokens_up_to(self, place: int) -> int:
        """Number of tokens that end at the character `place` or before it."""
        return bisect_right(self.spans, place, key=lambda span: span[1])

    def token_before(self, place: int) -> int:
        """The last token that begins before the character `place`, as an index into `ids`."""
        return bisect_left(self.spans, place, key=lambda span: span[0]) - 1


def named(tokenizer: Any) -> str:
    """A tokenizer in an error."""
    return f"the tokenizer '{tokenizer.name_or_path}'"


def special_tokens(tokenizer: Any) -> set[str]:
    """The special tokens of a tokenizer, those without a role among them."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of [`special_tokens`]."""
    return set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))


def write_chat(tokenizer: Any, messages: Sequence[Message], apart: bool = False) -> WrittenChat:
    """
    Write a conversation as the tokenizer's chat template does.

        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)

    The ids differ where a text of the user or the policy looks like a special token, which stays text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer with the template.
        messages (`Sequence[Message]`):
            The conversation.
        apart (`bool`, *optional*, defaults to `False`):
            Whether pieces that are marked and meant are tokenized apart from the text around them.

    Returns:
        [`WrittenChat`]

    Raises:
        ValueError: the template refuses the messages, does not write the last one, or writes it several times.
    """
    text = _apply(tokenizer, messages, [message.content for message in messages])
    last_start = len(os.path.commonprefix([text, _frame_before_last(tokenizer, messages)]))
    places = [[place for place, _ in _marked(message)] for message in messages]
    marks = _find(tokenizer, messages, places, text) or [None] * sum(map(len, places))
    special = _special_pattern(tokenizer)
    lookalikes = _find(tokenizer, messages, [_lookalikes(message, special) for message in messages], text)
    if lookalikes is None:
        return WrittenChat(text, [], [], last_start, marks, is_safe=False)
    pieces = [piece for message in messages for _, piece in _marked(message)]
    cuts = []
    for piece, mark in zip(pieces, marks, strict=True):
        if mark is not None and apart and piece.is_meant:
            cuts += [mark, mark + len(piece.text)]
    if not tokenizer.is_fast:
        # Where its tokens are in the text is not known, but where a text of its own ends is
        ends = [len(piece.text) * piece.is_meant for piece in pieces]
        cuts += [last_start, *(mark + end for mark, end in zip(marks, ends, strict=True) if mark is not None)]
    plain = _plain_runs(text, special, [place for place in lookalikes if place is not None])
    ids, spans = _tokenize(tokenizer, text, cuts, plain)
    return WrittenChat(text, ids, spans, last_start, marks)


def _apply(tokenizer: Any, messages: Sequence[Message], contents: Sequence[str]) -> str:
    given = [{**message.fields, "content": text} for message, text in zip(messages, contents, strict=True)]
    try:
        return tokenizer.apply_chat_template(given, tokenize=False)
    # A template is a program of the model's, and may raise anything. Its words, such as "System role not supported",
    # name neither the model nor what it was given
    except Exception as error:
        roles = ", ".join(message.fields["role"] for message in messages)
        raise ValueError(
            f"the chat template of {named(tokenizer)} refuses the roles {roles}: {error}. They are those of the "
            "preset's system message, the problem and the solution. problem='last_user', a column or a function of "
            "yours gives another problem, and a preset of yours another system message."
        ) from error


def _frame_before_last(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the template writes before the last message's content, where that is a stand-in."""
    contents = [message.content for message in messages[:-1]]
    stand_in = _unused_character("".join(contents))
    frame, *others = _apply(tokenizer, messages, [*contents, stand_in]).split(stand_in)
    if len(others) != 1:
        role = messages[-1].fields["role"]
        raise ValueError(
            f"the chat template of {named(tokenizer)} writes a message of the {role} {len(others)} times, not once."
        )
    return frame


def _marked(message: Message) -> list[tuple[int, Piece]]:
    """The marked pieces of a message, and where they begin."""
    pairs = zip(message.spans, message.pieces, strict=True)
    return [(span.start, piece) for span, piece in pairs if piece.is_marked]


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _lookalikes(message: Message, special: re.Pattern[str]) -> list[int]:
    """Places within what looks like a special token and is not meant as one."""
    spans = message.spans
    starts = [span.start for span in spans]
    places = []
    for match in special.finditer(message.content):
        # The last piece that begins before it or with it, so that pieces without text are none
        own = bisect_right(starts, match.start()) - 1
        if not message.pieces[own].is_meant or spans[own].end < match.end():
            places.append(match.start() + 1)
    return places


def _find(
    tokenizer: Any, messages: Sequence[Message], places: Sequence[Sequence[int]], text: str
) -> list[int | None] | None:
    """
    Where places of the messages' contents are in the template's output.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer with the template.
        messages (`Sequence[Message]`):
            The conversation.
        places (`Sequence[Sequence[int]]`):
            Indices into the content of each message, increasing.
        text (`str`):
            The template's output.

    Returns:
        `list[int | None]` or `None`: a place in `text` for each, `None` for one that is left out. `None` instead of
        the list where marks change what the template writes, or are written in another order.
    """
    count = sum(map(len, places))
    if not count:
        return []
    contents = [message.content for message in messages]
    sign = _unused_character("".join([text, *contents]))
    numbers = itertools.count()
    signed = [
        _signed(content, [(place, f"{sign}{next(numbers)}{sign}") for place in own])
        for content, own in zip(contents, places, strict=True)
    ]
    # Texts and numbers by turns
    parts = re.split(f"{sign}([0-9]+){sign}", _apply(tokenizer, messages, signed))
    if "".join(parts[::2]) != text:
        return None
    found = [int(number) for number in parts[1::2]]
    if sorted(set(found)) != found:
        return None
    ends = itertools.accumulate(map(len, parts[:-1:2]))
    place_of = dict(zip(found, ends, strict=True))
    return [place_of.get(number) for number in range(count)]


def _signed(content: str, marks: Sequence[tuple[int, str]]) -> str:
    """A content with marks in it, which are given with their places in increasing order."""
    reached = 0
    pieces = []
    for place, mark in marks:
        pieces += [content[reached:place], mark]
        reached = place
    return "".join([*pieces, content[reached:]])


def _unused_character(text: str) -> str:
    return next(chr(code) for code in _MARKS if chr(code) not in text)


def _plain_runs(text: str, special: re.Pattern[str], lookalikes: Sequence[int]) -> list[Span]:
    """The stretches between special tokens in which something only looks like one."""
    if not lookalikes:
        return []
    found = [Span(*match.span()) for match in special.finditer(text)]
    true = [span for span in found if not _holds_any(span, lookalikes)]
    starts = [0, *(span.end for span in true)]
    ends = [*(span.start for span in true), len(text)]
    runs = [Span(start, end) for start, end in zip(starts, ends, strict=True)]
    return [run for run in runs if _holds_any(run, lookalikes)]


def _holds_any(span: Span, places: Sequence[int]) -> bool:
    """Whether one of increasing places is within a span, and not at its ends."""
    return bisect_right(places, span.start) < bisect_left(places, span.end)


def _tokenize(
    tokenizer: Any, text: str, cuts: Sequence[int], plain: Sequence[Span]
) -> tuple[list[int], list[tuple[int, int]]]:
    """
    The ids of a text that is cut at some places, and the characters of each.

    In the spans `plain` nothing is a special token. A tokenizer without offsets gives every token of a piece all of
    the piece's characters, so that the last token of a piece is the last one that begins before the piece's end.
    """
    edges = {edge for span in plain for edge in span}
    starts = [span.start for span in plain]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for start, end in itertools.pairwise(sorted({0, len(text), *cuts, *edges})):
        own = bisect_right(starts, start) - 1
        is_plain = own >= 0 and end <= plain[own].end
        piece = text[start:end]
        if not tokenizer.is_fast:
            encode = encode_text if is_plain else encode_template
            own_ids = continue_with(tokenizer, piece, encode) if start else encode(tokenizer, piece)
            own_spans = [(0, len(piece))] * len(own_ids)
        else:
            own_ids, own_spans = _with_offsets(tokenizer, piece, is_plain, follows=start > 0)
        ids += own_ids
        spans += [(start + first, start + last) for first, last in own_spans] if start else own_spans
    return ids, spans


def _with_offsets(tokenizer: Any, text: str, is_plain: bool, follows: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, which follows another one as in [`continue_with`] or not, and the characters of each."""
    lead = "\n" if follows and newline_anchor(tokenizer) else ""
    encoding = tokenizer(
        lead + text, add_special_tokens=False, split_special_tokens=is_plain, return_offsets_mapping=True
    )
    ids = encoding["input_ids"]
    spans = encoding["offset_mapping"]
    if lead:
        of_lead = sum(end <= len(lead) for _, end in spans)
        ids = ids[of_lead:]
        spans = [(start - len(lead), end - len(lead)) for start, end in spans[of_lead:]]
    return ids, spans
