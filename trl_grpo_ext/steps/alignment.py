"""The text that token ids spell, and the character at which each token ends."""

import os.path
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Tokens decoded together. Every number gives the same ends; this one is fast
_WINDOW = 4

# What a decoder writes for bytes that are not UTF-8, and for the first bytes of a character without its last ones
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class AlignedText(NamedTuple):
    """
    A completion's text and the end of each of its tokens.

    Args:
        text (`str`):
            The decoded ids, with special tokens, and without any clean-up of spaces.
        token_ends (`list[int]`):
            For each token, the number of characters of `text` that are complete after it. The numbers never decrease,
            and the last one is `len(text)`. A character whose bytes lie in several tokens is complete after the token
            with its last byte.
    """

    text: str
    token_ends: list[int]


def align_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> AlignedText:
    """
    Decode token ids and find where the text of each token ends. Nothing is encoded again.

        token_ends[i] = length of the longest common beginning of decode(ids[: i + 1]) and decode(ids)

    where a character that is not complete after token i does not count.

    Decoding every beginning takes quadratic time, so windows of a few tokens are decoded instead, each after the
    tokens of the character before it. The windows' texts may not add up to `decode(ids)`: byte fallback can take back
    bytes that it has written, and some tokenizers strip or clean up what they decode. Then every beginning is decoded.
    Both ways are exact.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer, fast or slow.
        ids (`Sequence[int]`):
            Token ids of one completion. [`strip_special`] takes away the special tokens at its end.

    Returns:
        [`AlignedText`]: the text and one end for each id.
    """
    ids = list(ids)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer

        def decode(ids: list[int]) -> str:
            return backend.decode(ids, skip_special_tokens=False)
    else:

        def decode(ids: list[int]) -> str:
            return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decode(ids)
    in_windows = _align_windows(decode, ids)
    if in_windows.text == text:
        return in_windows
    return AlignedText(text, _ends([decode(ids[: stop + 1]) for stop in range(len(ids))]))


def _align_windows(decode: Callable[[list[int]], str], ids: list[int]) -> AlignedText:
    pieces = []
    token_ends: list[int] = []
    reached = 0
    # A window begins at `start`, and is decoded from `context` on
    start = 0
    context = 0
    while start < len(ids):
        known = len(decode(ids[context:start])) if start else 0
        prefixes = _decode_window(decode, ids, context, start)
        token_ends += [reached + max(end - known, 0) for end in _ends(prefixes)]
        pieces.append(prefixes[-1][known:])
        reached += len(pieces[-1])
        # The next window follows complete characters only: bytes without their first ones would decode differently
        complete = [index for index, prefix in enumerate(prefixes[:-1]) if not prefix.endswith(_REPLACEMENT)]
        if complete:
            context = start + complete[-1] + 1
        start += len(prefixes)
    return AlignedText("".join(pieces), token_ends)


def _decode_window(decode: Callable[[list[int]], str], ids: list[int], context: int, start: int) -> list[str]:
    """The growing texts from `context` on, one for each token of the window, which ends with a complete character."""
    prefixes: list[str] = []
    for stop in range(start + 1, len(ids) + 1):
        prefixes.append(decode(ids[context:stop]))
        if len(prefixes) >= _WINDOW and not prefixes[-1].endswith(_REPLACEMENT):
            break
    return prefixes


def _ends(prefixes: list[str]) -> list[int]:
    """How many characters of the last prefix are complete in each of the growing prefixes."""
    ends: list[int] = []
    reached = 0
    text = prefixes[-1] if prefixes else ""
    for prefix, following in pairwise(prefixes):
        end = len(prefix) if text.startswith(prefix) else len(os.path.commonprefix([prefix, text]))
        # After the next token it is still one replacement character, so it was not complete yet
        if end == len(prefix) >= len(following) and prefix.endswith(_REPLACEMENT):
            end -= 1
        reached = max(reached, end)
        ends.append(reached)
    return [*ends, len(text)] if prefixes else []


def end_token(token_ends: Sequence[int], char_end: int) -> int:
    """
    Index of the token that holds the last of the first `char_end` characters.

        min {i : token_ends[i] >= char_end}

    Args:
        token_ends (`Sequence[int]`):
            From [`align_tokens`].
        char_end (`int`):
            A number of characters, at most `token_ends[-1]`.
    """
    return bisect_left(token_ends, char_end)


def strip_special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """
    A completion without the special tokens at its end, such as end of sequence and padding, which belong to no step.

    Special tokens before the last ordinary token stay, so that indices into the result are indices into `ids`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer.
        ids (`Sequence[int]`):
            Token ids of the completion.
    """
    special = set(tokenizer.all_special_ids)
    stop = len(ids)
    while stop > 0 and ids[stop - 1] in special:
        stop -= 1
    return list(ids[:stop])
