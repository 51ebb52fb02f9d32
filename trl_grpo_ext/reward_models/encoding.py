"""
Pieces of a reward model's input to ids: texts of users and policies, tags and answers, and chat templates.

A text of the user or the policy is tokenized by itself, apart from tags and template, and never as special tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any


# Stand-ins for the texts in a chat template: private-use characters, which no template treats in a special way
_TEXT = "\ue000text{}\ue001"

# The word boundary that SentencePiece tokenizers write, also before the first word of every text that they are given
_WORD_START = "▁"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by itself; special tokens in it are plain text, and none are added."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def encode_template(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of the chat template or the preset, in which special tokens are meant as such."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


@lru_cache(maxsize=16)
def _newline_anchor(tokenizer: Any) -> tuple[int, ...]:
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
    anchor = _newline_anchor(tokenizer)
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


def chat_frame(tokenizer: Any, roles: Sequence[str], system: str | None = None) -> list[str]:
    """
    The strings that a chat template puts around the texts of messages.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer with the template.
        roles (`Sequence[str]`):
            The role of each message.
        system (`str`, *optional*):
            A system message before them, which becomes a part of the first string.

    Returns:
        `list[str]` of length `len(roles) + 1`: before the first text, between the texts, after the last one.

    Raises:
        ValueError: the template drops or repeats a message.
    """
    # The template, which may be replaced, is part of the key
    return list(_chat_frame(tokenizer, str(tokenizer.chat_template), tuple(roles), system))


@lru_cache(maxsize=16)
def _chat_frame(tokenizer: Any, template: str, roles: tuple[str, ...], system: str | None) -> list[str]:
    marks = [_TEXT.format(number) for number in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    rest = tokenizer.apply_chat_template(messages, tokenize=False)
    frame = []
    for role, mark in zip(roles, marks, strict=True):
        if rest.count(mark) != 1:
            raise ValueError(f"the chat template writes a message of the {role} {rest.count(mark)} times, not once.")
        before, rest = rest.split(mark)
        frame.append(before)
    return [*frame, rest]
