"""
Pieces of a reward model's input to ids: texts of users and policies, tags and answers.

A text of the user or the policy is tokenized by itself, apart from tags, and never as special tokens. What a chat
template writes is tokenized by [`~trl_grpo_ext.reward_models.chat.write_chat`].
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any


# The word boundary that SentencePiece tokenizers write, also before the first word of every text that they are given
_WORD_START = "▁"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by itself; special tokens in it are plain text, and none are added."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def encode_template(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of the chat template or the preset, in which special tokens are meant as such."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


@lru_cache(maxsize=16)
def newline_anchor(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a newline, for a tokenizer that puts a space before every text; empty for one that does not."""
    if not tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "a"))[0].startswith(_WORD_START):
        return ()
    return tuple(encode_text(tokenizer, "\n"))


def continue_with(tokenizer: Any, text: str, encode: Callable[[Any, str], list[int]]) -> list[int]:
    """
    Ids of a text that follows another one: without the space that SentencePiece puts before every text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        text (`str`):
            The text.
        encode (`Callable`):
            [`encode_text`] or [`encode_template`].

    Raises:
        ValueError: the tokenizer merges a newline with the text after it.
    """
    # The space then stands before a newline, which is cut off again
    anchor = newline_anchor(tokenizer)
    if not anchor or not text:
        return encode(tokenizer, text)
    ids = encode(tokenizer, "\n" + text)
    if tuple(ids[: len(anchor)]) != anchor:
        raise ValueError(f"this tokenizer merges the newline before {text!r}: {ids} does not start with {anchor}.")
    return ids[len(anchor) :]


def continue_text(tokenizer: Any, text: str) -> list[int]:
    """[`encode_text`] for a text that follows another one, see [`continue_with`]."""
    return continue_with(tokenizer, text, encode_text)


def one_id(tokenizer: Any, text: str, role: str) -> int:
    """
    The id of a tag or an answer, as it follows other text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        text (`str`):
            The tag or the answer.
        role (`str`):
            Names it in the error.

    Raises:
        ValueError: it is not exactly one id in this tokenizer; the message shows the ids.
    """
    ids = continue_with(tokenizer, text, encode_template)
    if len(ids) != 1:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"the {role} {text!r} must be one id in this tokenizer; it is {ids} ({tokens}).")
    return ids[0]
