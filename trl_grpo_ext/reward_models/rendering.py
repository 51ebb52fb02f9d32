"""
Problem and steps to a reward model's ids, piece by piece, with the positions where its scores are.

The score positions are noted while the ids are put together, so that a text that looks like a tag adds none.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .encoding import chat_frame, continue_text, continue_with, encode_template, encode_text, one_id
from .plain_data import CheckedFields


class Rendered(NamedTuple):
    """
    One solution as a reward model's input.

    Args:
        ids (`list[int]`):
            The ids.
        prompt_length (`int`):
            Number of ids before the first step.
        score_positions (`list[int]`):
            Index into `ids` of each step's score, increasing. The steps that did not fit are the last ones, and have
            none.
    """

    ids: list[int]
    prompt_length: int
    score_positions: list[int]


class RenderedBatch(NamedTuple):
    """
    Rendered solutions, padded on the right.

    Args:
        input_ids_BL (`torch.Tensor` of shape `(B, L)`):
            Ids.
        attention_mask_BL (`torch.Tensor` of shape `(B, L)`):
            1 where attention may look.
        rows_R (`torch.Tensor` of shape `(R,)`):
            Row of each score position.
        columns_R (`torch.Tensor` of shape `(R,)`):
            Column of each score position.
        prompt_lengths_B (`torch.Tensor` of shape `(B,)`):
            Number of ids before the first step.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    rows_R: torch.Tensor
    columns_R: torch.Tensor
    prompt_lengths_B: torch.Tensor

    def at_score_positions(self, values_BL: torch.Tensor) -> torch.Tensor:
        """Values of shape `(B, L, ...)` at the score positions, of shape `(R, ...)`, in float32."""
        return values_BL[self.rows_R, self.columns_R].float()


def check_shape(values: torch.Tensor, expected: tuple[int, ...], what: str) -> None:
    """
    Raise `ValueError` if what a class of the user computes at the score positions has another shape than expected.

    Args:
        values (`torch.Tensor`):
            What was computed.
        expected (`tuple[int, ...]`):
            The shape, whose first axis is that of the score positions.
        what (`str`):
            Names the class in the error.
    """
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{what} returned a tensor of shape {tuple(values.shape)}; expected {expected}, with a row for each of "
            f"the {expected[0]} score positions."
        )


class RenderedStep(NamedTuple):
    """
    One step as a part of the input.

    Args:
        ids (`list[int]`):
            The step's ids, with its tag or its answer.
        score_offset (`int`):
            Index into `ids` of its score.
    """

    ids: list[int]
    score_offset: int


class Rendering(CheckedFields, ABC):
    """
    How a problem and the steps of a solution become a reward model's input.

    A preset in YAML names a rendering of your own by its import path.
    """

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the tokenizer does not suit, such as a tag that is not exactly one id."""

    @abstractmethod
    def prompt_ids(self, tokenizer: Any, problem: str) -> list[int]:
        """Ids before the first step."""

    @abstractmethod
    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step in turn."""

    def inputs(self, steps: Sequence[str]) -> list[Sequence[str]]:
        """The steps of each input that a solution becomes: all in one input, or an input for each step."""
        return [steps]

    def render(self, tokenizer: Any, problem: str, steps: Sequence[str], max_length: int | None = None) -> Rendered:
        """
        Put the input together from whole steps.

        Args:
            tokenizer (`PreTrainedTokenizerBase`):
                The reward model's own.
            problem (`str`):
                The problem.
            steps (`Sequence[str]`):
                The steps of one solution.
            max_length (`int`, *optional*):
                Largest number of ids; the first step that would pass it and all after it are left out.

        Returns:
            [`Rendered`]
        """
        ids = list(self.prompt_ids(tokenizer, problem))
        prompt_length = len(ids)
        score_positions = []
        for step in self.step_ids(tokenizer, steps):
            if max_length is not None and len(ids) + len(step.ids) > max_length:
                break
            score_positions.append(len(ids) + step.score_offset)
            ids += step.ids
        return Rendered(ids, prompt_length, score_positions)


def _numbered(text: str, number: int) -> str:
    """A preset's words at a step, with the step's number."""
    return text.replace("{number}", str(number))


@dataclass(frozen=True)
class _Prompted(Rendering):
    """
    What stands before the steps, and the fields that the renderings of this module share.

    Args:
        prompt (`str`, *optional*, defaults to `"{problem}"`):
            The question; `{problem}` is replaced.
        first (`str`, *optional*, defaults to `""`):
            Written before the first step; `{number}` is replaced by the step's number, from 1.
        between (`str`, *optional*, defaults to `""`):
            Written before each further step; `{number}` as in `first`.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer's chat template frames question (user) and steps (assistant).
        system (`str`, *optional*):
            System message of the chat.
        bos (`bool`, *optional*, defaults to `False`):
            Whether the beginning-of-sequence id comes first, for a tokenizer that has one. A chat template writes its
            own.
        as_text (`bool`, *optional*, defaults to `False`):
            Whether what the chat template writes is tokenized as any text is. Before it then stands what the tokenizer
            puts before a text, such as a second beginning-of-sequence id.
    """

    prompt: str = "{problem}"
    first: str = ""
    between: str = ""
    chat: bool = False
    system: str | None = None
    bos: bool = False
    as_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{problem}" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}; it must say where {{problem}} goes.")
        if self.chat and self.bos:
            raise ValueError("chat=True and bos=True: a chat template writes the beginning-of-sequence token itself.")
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs chat=True.")
        if self.as_text and not self.chat:
            raise ValueError("as_text=True is about what a chat template writes; it needs chat=True.")

    def _question(self, problem: str) -> str:
        return self.prompt.replace("{problem}", problem)

    def _start_ids(self, tokenizer: Any) -> list[int]:
        """Ids before the question and its frame."""
        if self.as_text:
            return tokenizer.encode("")
        return [tokenizer.bos_token_id] if self.bos and tokenizer.bos_token_id is not None else []

    def prompt_ids(self, tokenizer: Any, problem: str) -> list[int]:
        """Ids of the question, in the frame of the chat template or after the beginning-of-sequence id."""
        question = self._question(problem)
        if self.chat:
            before, between, _ = chat_frame(tokenizer, ["user", "assistant"], self.system)
            ids = encode_template(tokenizer, before) + continue_text(tokenizer, question)
            return self._start_ids(tokenizer) + ids + encode_template(tokenizer, between)
        return self._start_ids(tokenizer) + encode_text(tokenizer, question)

    def _step_texts(self, steps: Sequence[str]) -> list[str]:
        """The steps, each after `first` or `between`."""
        texts = []
        for number, step in enumerate(steps, start=1):
            before = self.first if number == 1 else self.between
            texts.append(_numbered(before, number) + step)
        return texts


@dataclass(frozen=True)
class Tagged(_Prompted):
    """
    Every step is followed by a tag, and its score is at the tag.

    Args:
        tag (`str`, *optional*, defaults to `"\\n"`):
            The tag, exactly one id.
        single (`bool`, *optional*, defaults to `True`):
            `False` allows a separator of several ids; the score is at the last one.
    """

    tag: str = "\n"
    single: bool = True

    def _tag_ids(self, tokenizer: Any) -> list[int]:
        if self.single:
            return [one_id(tokenizer, self.tag, "tag")]
        return continue_with(tokenizer, self.tag, encode_template)

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the tag is not exactly one id."""
        self._tag_ids(tokenizer)

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step and its tag."""
        tag = self._tag_ids(tokenizer)
        for text in self._step_texts(steps):
            ids = continue_text(tokenizer, text) + tag
            yield RenderedStep(ids, len(ids) - 1)


@dataclass(frozen=True)
class Turns(_Prompted):
    """
    Every step is a message of the user, and its score is where the model predicts the assistant's answer.

    The first message is the question, `first` and the first step.

    Args:
        after (`str`, *optional*, defaults to `""`):
            Written after each step, in its message; `{number}` as in `first`.
        answer (`str`, *optional*, defaults to `"+"`):
            What the assistant says after every step, exactly one id.
    """

    first: str = " "
    chat: bool = True
    after: str = ""
    answer: str = "+"

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the answer is not exactly one id."""
        one_id(tokenizer, self.answer, "answer")

    def _frame(self, tokenizer: Any) -> list[list[int]]:
        """Ids before the first message, before an answer, and between an answer and the next step."""
        frame = chat_frame(tokenizer, ["user", "assistant"] * 2, self.system)
        return [encode_template(tokenizer, text) for text in frame[:3]]

    def prompt_ids(self, tokenizer: Any, problem: str) -> list[int]:
        """Ids of the question, which begins the first message."""
        opening, _, _ = self._frame(tokenizer)
        return self._start_ids(tokenizer) + opening + continue_text(tokenizer, self._question(problem))

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step and of the answer to it."""
        answer = one_id(tokenizer, self.answer, "answer")
        _, to_answer, to_user = self._frame(tokenizer)
        for number, text in enumerate(self._step_texts(steps), start=1):
            opening = to_user if number > 1 else []
            ids = opening + continue_text(tokenizer, text + _numbered(self.after, number)) + to_answer
            # The answer is predicted at the token before it
            yield RenderedStep([*ids, answer], len(ids) - 1)


@dataclass(frozen=True)
class Bare(_Prompted):
    """
    Steps without tags; the score is at each step's last token.

    Args:
        after (`str`, *optional*, defaults to `""`):
            Written after each step but the last; it belongs to the step. `{number}` as in `first`.
        closing (`str`, *optional*, defaults to `"none"`):
            How much of what the chat template writes after the last step belongs to it: `"none"`, `"first"` (the token
            that ends the message) or `"all"`.
        end (`str`, *optional*, defaults to `""`):
            Written at the very end, where the score of the last step then is. Special tokens in it are meant as such,
            and `{eos_token}`, `{cls_token}` and the like stand for the tokenizer's own.
        apart (`bool`, *optional*, defaults to `False`):
            Whether each step is tokenized as a text by itself, for models whose training data was.
        prefixes (`bool`, *optional*, defaults to `False`):
            Whether the steps up to each step are an input of their own with one score, for sequence classifiers that
            judge unfinished solutions. A solution of K steps then takes K inputs.
    """

    after: str = ""
    closing: Literal["none", "first", "all"] = "none"
    end: str = ""
    apart: bool = False
    prefixes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.closing not in ("none", "first", "all"):
            raise ValueError(f"closing is {self.closing!r}; known: none, first, all.")
        if self.apart and self.prefixes:
            raise ValueError("apart=True and prefixes=True: the steps of a prefix are tokenized as one text.")

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if `end` names a token that the tokenizer does not have."""
        self._end_ids(tokenizer)

    def inputs(self, steps: Sequence[str]) -> list[Sequence[str]]:
        """One input with all steps; with `prefixes` one for each step, with the steps up to it."""
        return [steps[: number + 1] for number in range(len(steps))] if self.prefixes else [steps]

    def _end_ids(self, tokenizer: Any) -> list[int]:
        text = self.end
        for name, token in tokenizer.special_tokens_map.items():
            text = text.replace(f"{{{name}}}", str(token))
        if missing := re.search(r"\{\w+_token\}", text):
            raise ValueError(f"end is {self.end!r}, but this tokenizer has no {missing[0][1:-1]}.")
        return continue_with(tokenizer, text, encode_template)

    def _closing_ids(self, tokenizer: Any) -> list[int]:
        if not self.chat or self.closing == "none":
            return []
        ids = encode_template(tokenizer, chat_frame(tokenizer, ["user", "assistant"], self.system)[-1])
        return ids[:1] if self.closing == "first" else ids

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step and of what is written after it."""
        encode = encode_text if self.apart else continue_text
        texts = self._step_texts(steps)
        for index in range(len(texts) - 1):
            texts[index] += _numbered(self.after, index + 1)
        if self.prefixes:
            texts = ["".join(texts)]
        for text in texts[:-1]:
            ids = encode(tokenizer, text)
            yield RenderedStep(ids, len(ids) - 1)
        for text in texts[-1:]:
            ids = encode(tokenizer, text) + self._closing_ids(tokenizer) + self._end_ids(tokenizer)
            yield RenderedStep(ids, len(ids) - 1)
