"""The text that token ids spell, and the character at which each token ends."""

import os.path
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Tokens decoded together. Any number from 4 on, the largest number of bytes of a character, gives the same ends
_WINDOW = 4
# In a longer window only its last token gets an end of its own
_LONGEST_WINDOW = 64

# What a decoder writes for bytes that are not UTF-8, and for the first bytes of a character without its last ones
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_Decode = Callable[[list[int]], str]


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

    Decoding every beginning takes quadratic time, so windows of a few tokens are decoded instead, each after some
    tokens before it. What a window adds has to be what the text goes on with. Where that is not so, the window and the
    tokens before it are doubled. The reasons for that are local: a character of several tokens, spaces that a
    tokenizer strips, and byte fallback, which takes back all bytes of a run when one of them is wrong.

    Time is linear in the number of tokens. Ends are exact, with one exception: in a window of more than 64 tokens all
    characters end in its last token. Runs of that many invalid bytes or spaces make one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer, fast or slow.
        ids (`Sequence[int]`):
            Token ids of one completion. [`strip_special`] takes away the special tokens at its end.

    Returns:
        [`AlignedText`]: the text and one end for each id.
    """
    ids = list(ids)
    windows = _Windows(_decoder(tokenizer), ids)
    token_ends: list[int] = []
    # The tokens that windows begin with
    starts: list[int] = []
    while len(token_ends) < len(ids):
        starts.append(len(token_ends))
        reached = token_ends[-1] if token_ends else 0
        token_ends += windows.ends_from(starts, reached)
        skipped = windows.text[reached : token_ends[-1]].strip().strip(_REPLACEMENT)
        if len(token_ends) - starts[-1] > _LONGEST_WINDOW and skipped:
            logger.warning_once(
                f"{type(tokenizer).__name__} does not decode a part of a completion as it decodes the whole, so that "
                f"{len(token_ends) - starts[-1]} tokens count as one that spells {skipped[:60]!r}. Steps that end "
                "among them are joined. This is said once."
            )
    return AlignedText(windows.text, token_ends)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> _Decode:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        return lambda ids: backend.decode(ids, skip_special_tokens=False)
    return lambda ids: cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Windows:
    """
    The windows of one completion, each decoded after tokens before it, its context.

    A window from `start` to `stop` fits if `decode(ids[context:stop])` goes on after `decode(ids[context:start])` as
    the text does, and ends with a complete character.
    """

    def __init__(self, decode: _Decode, ids: list[int]):
        self.decode = decode
        self.ids = ids
        self.text = decode(ids)

    def ends_from(self, starts: list[int], reached: int) -> list[int]:
        """The ends of a window's tokens, from `starts[-1]` on, before which `reached` characters are complete."""
        start = starts[-1]
        size = _WINDOW
        while size <= _LONGEST_WINDOW:
            context = _context(starts, size)
            known = self._known(context, start)
            stops = range(start + 1, min(start + size, len(self.ids)) + 1)
            prefixes = [self.decode(self.ids[context:stop]) for stop in stops]
            while prefixes and not self._fits(start + len(prefixes), prefixes[-1], known, reached):
                prefixes.pop()
            if prefixes:
                return [reached + max(end - known, 0) for end in _ends(prefixes)]
            size *= 2
        stop = self._far_stop(starts, reached)
        context = _context(starts, stop - start)
        end = reached + len(self.decode(self.ids[context:stop])) - self._known(context, start)
        return [reached] * (stop - start - 1) + [len(self.text) if stop == len(self.ids) else end]

    def _known(self, context: int, start: int) -> int:
        return len(self.decode(self.ids[context:start])) if context < start else 0

    def _fits(self, stop: int, prefix: str, known: int, reached: int) -> bool:
        if stop == len(self.ids):
            return prefix[known:] == self.text[reached:]
        return self.text.startswith(prefix[known:], reached) and not prefix.endswith(_REPLACEMENT)

    def _far_stop(self, starts: list[int], reached: int) -> int:
        """
        The stop of a window that is longer than `_LONGEST_WINDOW`: about the first one that fits, else the end.

        Lengths are doubled until one fits, and then halved between it and the one before.
        """
        start = starts[-1]
        low = start + _LONGEST_WINDOW
        high = low
        found = None
        while found is None and high < len(self.ids):
            low = high
            high = min(start + 2 * (high - start), len(self.ids))
            found = self._stop_near(high, low, starts, reached)
        high = len(self.ids) if found is None else found
        while high - low > 1:
            middle = (low + high) // 2
            found = self._stop_near(middle, low, starts, reached)
            if found is None:
                low = middle
            else:
                high = found
        return high

    def _stop_near(self, stop: int, low: int, starts: list[int], reached: int) -> int | None:
        """The last of the `_WINDOW` stops up to this one, after `low`, that fits: some may lie within a character."""
        context = _context(starts, stop - starts[-1])
        known = self._known(context, starts[-1])
        for near in range(stop, max(stop - _WINDOW, low), -1):
            if self._fits(near, self.decode(self.ids[context:near]), known, reached):
                return near
        return None


def _context(starts: list[int], size: int) -> int:
    """The last token that a window began with and that lies at least `size` tokens before the newest window."""
    return starts[max(bisect_right(starts, starts[-1] - size) - 1, 0)]


def _ends(prefixes: list[str]) -> list[int]:
    """How many characters of the last prefix are complete in each of the growing prefixes."""
    ends: list[int] = []
    reached = 0
    text = prefixes[-1]
    for prefix, following in pairwise(prefixes):
        end = len(prefix) if text.startswith(prefix) else len(os.path.commonprefix([prefix, text]))
        # After the next token it is still one replacement character, so it was not complete yet
        if end == len(prefix) >= len(following) and prefix.endswith(_REPLACEMENT):
            end -= 1
        reached = max(reached, end)
        ends.append(reached)
    return [*ends, len(text)]


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


def strip_special(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], keep: Sequence[Sequence[str]] = ()
) -> list[int]:
    """
    A completion without the special tokens at its end, such as end of sequence and padding, which belong to no step.

    Special tokens before the last ordinary token stay, so that indices into the result are indices into `ids`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer.
        ids (`Sequence[int]`):
            Token ids of the completion.
        keep (`Sequence[Sequence[str]]`, *optional*):
            Pairs of tags of thinking, which stay where they are special tokens.
    """
    kept = {tag for pair in keep for tag in pair}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    special = {token_id for token_id, token in named if token not in kept}
    stop = len(ids)
    while stop > 0 and ids[stop - 1] in special:
        stop -= 1
    return list(ids[:stop])
