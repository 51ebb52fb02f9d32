"""Problem and steps to a reward model's ids, piece by piece, with the positions where its scores are read.

What the user and the policy wrote is tokenized apart from the tags and the template, and never as special tokens: text
that looks like a tag stays text, and the read positions are remembered while the ids are put together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple


# Stand-ins for the texts in a chat template: private-use characters, which no template treats in a special way
_TEXT = "\ue000text{}\ue001"

# The word boundary that SentencePiece tokenizers write, also before the first word of every text that they are given
_WORD_START = "▁"


class Rendered(NamedTuple):
    """
    One solution as a reward model reads it.

    Args:
        ids (`list[int]`):
            The model's input.
        prompt_length (`int`):
            Ids before the first step.
        read_positions (`list[int]`):
            Index into `ids` for each scored step, increasing; the steps that did not fit have none.
    """

    ids: list[int]
    prompt_length: int
    read_positions: list[int]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of its own; special tokens in it are plain text, and none are added."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def _encode_template(tokenizer: Any, text: str) -> list[int]:
    """Ids of what the template or the preset says, where special tokens are meant."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


@lru_cache(maxsize=16)
def _newline_anchor(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a newline, for a tokenizer that puts a space before every text; empty for one that does not."""
    if not tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "a"))[0].startswith(_WORD_START):
        return ()
    return tuple(encode_text(tokenizer, "\n"))


def _continued(tokenizer: Any, text: str, encode: Callable[[Any, str], list[int]]) -> list[int]:
    # SentencePiece puts a space before every text. A newline, which merges with nothing there, takes it and is cut off
    anchor = _newline_anchor(tokenizer)
    if not anchor or not text:
        return encode(tokenizer, text)
    ids = encode(tokenizer, "\n" + text)
    if tuple(ids[: len(anchor)]) != anchor:
        raise ValueError(f"this tokenizer merges the newline before {text!r}: {ids} does not start with {anchor}.")
    return ids[len(anchor) :]


def continue_text(tokenizer: Any, text: str) -> list[int]:
    """[`encode_text`] for a text that follows another: without the space that SentencePiece puts before a text."""
    return _continued(tokenizer, text, encode_text)


def one_id(tokenizer: Any, text: str, role: str) -> int:
    """
    The id of a tag or an answer, as it follows other text.

    Raises:
        ValueError: it is not exactly one id in this tokenizer; the message shows the ids.
    """
    ids = _continued(tokenizer, text, _encode_template)
    if len(ids) != 1:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"the {role} {text!r} must be one id in this tokenizer; it is {ids} ({tokens}).")
    return ids[0]


def chat_frame(tokenizer: Any, roles: Sequence[str], system: str | None = None) -> list[str]:
    """
    What a chat template puts around messages: `len(roles) + 1` strings, before, between and after their texts.

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


def _assemble(prompt: list[int], steps: Iterable[tuple[list[int], int]], max_length: int | None) -> Rendered:
    """Join a prompt and (ids, offset of the read position in them) of each step, as long as whole steps fit."""
    ids, positions = list(prompt), []
    for step_ids, offset in steps:
        if max_length is not None and len(ids) + len(step_ids) > max_length:
            break
        positions.append(len(ids) + offset)
        ids += step_ids
    return Rendered(ids, len(prompt), positions)


@dataclass(frozen=True)
class _Prompt:
    """
    What stands before the steps, and the fields that all renderings share.

    Args:
        prompt (`str`, *optional*, defaults to `"{problem}"`):
            The question; `{problem}` is replaced.
        first (`str`, *optional*, defaults to `""`):
            Written before the first step.
        between (`str`, *optional*, defaults to `""`):
            Written before each further step.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer's chat template frames question (user) and steps (assistant).
        system (`str`, *optional*):
            System message of the chat.
        bos (`bool`, *optional*, defaults to `False`):
            Whether the beginning-of-sequence id comes first, for a tokenizer that has one. A chat template writes its
            own.
    """

    prompt: str = "{problem}"
    first: str = ""
    between: str = ""
    chat: bool = False
    system: str | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        if "{problem}" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}; it must say where {{problem}} goes.")
        if self.chat and self.bos:
            raise ValueError("chat=True and bos=True: a chat template writes the beginning-of-sequence token itself.")
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs chat=True.")

    def _question(self, problem: str) -> str:
        return self.prompt.replace("{problem}", problem)

    def _open(self, tokenizer: Any, problem: str) -> tuple[list[int], list[int]]:
        """Ids before the first step and after the last one."""
        question = self._question(problem)
        if self.chat:
            before, between, after = chat_frame(tokenizer, ["user", "assistant"], self.system)
            ids = _encode_template(tokenizer, before) + continue_text(tokenizer, question)
            return ids + _encode_template(tokenizer, between), _encode_template(tokenizer, after)
        bos = [tokenizer.bos_token_id] if self.bos and tokenizer.bos_token_id is not None else []
        return bos + encode_text(tokenizer, question), []

    def _lead(self, number: int) -> str:
        return self.between if number else self.first


@dataclass(frozen=True)
class Tagged(_Prompt):
    """
    Every step is followed by a tag, and its score is read at the tag.

    Args:
        tag (`str`):
            The tag, exactly one id.
        single (`bool`, *optional*, defaults to `True`):
            `False` allows a separator of several ids; the score is read at the last one.
    """

    tag: str = "\n"
    single: bool = True

    def check(self, tokenizer: Any) -> list[int]:
        """Ids of the tag; `ValueError` if there is not exactly one."""
        if self.single:
            return [one_id(tokenizer, self.tag, "tag")]
        return _continued(tokenizer, self.tag, _encode_template)

    def render(self, tokenizer: Any, problem: str, steps: Sequence[str], max_length: int | None = None) -> Rendered:
        """Ids and read positions of one solution; steps that would pass `max_length` are left out, from the end."""
        tag = self.check(tokenizer)
        prompt, _ = self._open(tokenizer, problem)
        texts = (continue_text(tokenizer, self._lead(number) + step) for number, step in enumerate(steps))
        return _assemble(prompt, ((ids + tag, len(ids) + len(tag) - 1) for ids in texts), max_length)


@dataclass(frozen=True)
class Turns(_Prompt):
    """
    Every step is a message of the user, and its score is read where the model predicts the assistant's answer.

    The first message is the question, `first` and the first step.

    Args:
        answer (`str`, *optional*, defaults to `"+"`):
            What the assistant says after every step, exactly one id.
    """

    first: str = " "
    chat: bool = True
    answer: str = "+"

    def check(self, tokenizer: Any) -> list[int]:
        """Id of the answer; `ValueError` if there is not exactly one."""
        return [one_id(tokenizer, self.answer, "answer")]

    def render(self, tokenizer: Any, problem: str, steps: Sequence[str], max_length: int | None = None) -> Rendered:
        """Ids and read positions of one solution; steps that would pass `max_length` are left out, from the end."""
        answer = self.check(tokenizer)
        frame = chat_frame(tokenizer, ["user", "assistant"] * 2, self.system)
        opening, to_answer, to_user = (_encode_template(tokenizer, text) for text in frame[:3])
        prompt = opening + continue_text(tokenizer, self._question(problem))

        def turns() -> Iterable[tuple[list[int], int]]:
            for number, step in enumerate(steps):
                ids = (to_user if number else []) + continue_text(tokenizer, self._lead(number) + step) + to_answer
                yield ids + answer, len(ids) - 1

        return _assemble(prompt, turns(), max_length)


@dataclass(frozen=True)
class Bare(_Prompt):
    """
    Steps without tags; a score is read at each step's last token.

    Args:
        after (`str`, *optional*, defaults to `""`):
            Written after each step but the last; it belongs to the step.
        closing (`str`, *optional*, defaults to `"none"`):
            How much of what the chat template writes after the last step belongs to it: `"none"`, `"first"` (the token
            that ends the message) or `"all"`.
        apart (`bool`, *optional*, defaults to `False`):
            Whether each step is tokenized as a text of its own, for models whose training data was.
    """

    after: str = ""
    closing: Literal["none", "first", "all"] = "none"
    apart: bool = False

    def check(self, tokenizer: Any) -> list[int]:
        """Nothing has to be one id here."""
        return []

    def render(self, tokenizer: Any, problem: str, steps: Sequence[str], max_length: int | None = None) -> Rendered:
        """Ids and read positions of one solution; steps that would pass `max_length` are left out, from the end."""
        prompt, closing = self._open(tokenizer, problem)
        closing = {"none": [], "first": closing[:1], "all": closing}[self.closing]
        encode = encode_text if self.apart else continue_text

        def blocks() -> Iterable[tuple[list[int], int]]:
            for number, step in enumerate(steps):
                last = number == len(steps) - 1
                ids = encode(tokenizer, self._lead(number) + step + ("" if last else self.after))
                ids += closing if last else []
                yield ids, len(ids) - 1

        return _assemble(prompt, blocks(), max_length)


Rendering = Tagged | Turns | Bare
