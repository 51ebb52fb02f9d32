"""Policy token ids and the text that they spell: where, in characters, each token ends."""

import os.path
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Tokens decoded together. Any number gives the same ends; this one is fast
_WINDOW = 4

# What decoders write for bytes that are not UTF-8, or not yet
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class AlignedText(NamedTuple):
    """
    A completion's text and the end of each of its tokens.

    Args:
        text (`str`):
            Decoded ids, special tokens kept and no spaces cleaned up.
        token_ends (`list[int]`):
            For each token, the number of characters of `text` that are complete after it: never decreasing, the last
            one `len(text)`. A character that is split over several tokens belongs to the one with its last byte.
    """

    text: str
    token_ends: list[int]


def align_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> AlignedText:
    """
    Decode token ids and find where each token's text ends, from the ids alone: nothing is encoded again.

    `token_ends[i]` is the length of the longest complete beginning that `decode(ids[: i + 1])` shares with
    `decode(ids)`. Windows of a few tokens are decoded, each after the tokens of the character before it. Where their
    texts do not add up to the decoded whole (bytes that a byte fallback takes back, tokenizers that strip or tidy up
    what they decode), all beginnings are decoded instead: exact too, but quadratic.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer, fast or slow.
        ids (`Sequence[int]`):
            Token ids of one completion; see [`strip_special`] for those that end it.

    Returns:
        [`AlignedText`]
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
    reached = context = start = 0
    while start < len(ids):
        known = len(decode(ids[context:start])) if start else 0
        prefixes = []
        for stop in range(start + 1, len(ids) + 1):
            prefixes.append(decode(ids[context:stop]))
            complete = not prefixes[-1].endswith(_REPLACEMENT)
            if complete and len(prefixes) >= _WINDOW:
                break
        token_ends += [reached + max(end - known, 0) for end in _ends(prefixes)]
        pieces.append(prefixes[-1][known:])
        reached += len(pieces[-1])
        # The next window follows whole characters only: bytes without their first ones would decode to something else
        whole = [position for position, prefix in enumerate(prefixes[:-1]) if not prefix.endswith(_REPLACEMENT)]
        context = start + whole[-1] + 1 if whole else context
        start += len(prefixes)
    return AlignedText("".join(pieces), token_ends)


def _ends(prefixes: list[str]) -> list[int]:
    """Where each of the growing decoded prefixes ends in the last one."""
    ends: list[int] = []
    reached = 0
    text = prefixes[-1] if prefixes else ""
    for prefix, following in pairwise(prefixes):
        end = len(prefix) if text.startswith(prefix) else len(os.path.commonprefix([prefix, text]))
        # Still the same character after the next token, hence not complete before it
        if end == len(prefix) >= len(following) and prefix.endswith(_REPLACEMENT):
            end -= 1
        reached = max(reached, end)
        ends.append(reached)
    return [*ends, len(text)] if prefixes else []


def end_token(token_ends: Sequence[int], char_end: int) -> int:
    """Index of the first token that ends at or past `char_end`: the one with the character before it."""
    return bisect_left(token_ends, char_end)


def strip_special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """
    The completion without the special tokens that end it (end of sequence, padding), which belong to no step.

    Special tokens before the last ordinary one are kept, so that indices stay those of `completion_ids`.
    """
    special = set(tokenizer.all_special_ids)
    stop = next((stop for stop in range(len(ids), 0, -1) if ids[stop - 1] not in special), 0)
    return list(ids[:stop])
