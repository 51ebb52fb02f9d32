"""
The renderings of the known models: steps that are tagged, steps that are turns of a chat, and steps as they are.

Where a chat template frames the solution, the ids are those of the template's own output, see
[`~trl_grpo_ext.reward_models.chat.write_chat`].
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from .chat import Message, Piece, WrittenChat, named, special_ids, write_chat
from .encoding import continue_text, continue_with, encode_template, encode_text, one_id
from .rendering import Problem, Rendered, RenderedStep, Rendering


# A rendering is tried on these before a model is loaded
_TRIED_PROBLEM = "2 + 3 * 4?"
_TRIED_STEPS = ("3 * 4 = 12.", "2 + 12 = 14.")


class _Place(NamedTuple):
    """Where the score of a step is in the ids, and where the ids end that its score needs."""

    score: int
    end: int


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
            Whether the tokenizer's chat template writes question (user) and steps (assistant). A problem may then be a
            conversation, whose last message of the user is the question.
        system (`str`, *optional*):
            System message of the chat, in place of which a conversation may bring its own.
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

    @property
    def takes_conversations(self) -> bool:
        """Chat templates write conversations."""
        return self.chat

    def _question(self, problem: str) -> str:
        return self.prompt.replace("{problem}", problem)

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the chat template is missing, or if steps are not found in what it writes."""
        if not self.chat:
            return
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the rendering needs a chat template, and {named(tokenizer)} has none; give another tokenizer."
            )
        if self._places(tokenizer, self._write(tokenizer, _TRIED_PROBLEM, _TRIED_STEPS), _TRIED_STEPS) is None:
            raise ValueError(f"the chat template of {named(tokenizer)} leaves out or rewrites steps.")

    def _start_ids(self, tokenizer: Any) -> list[int]:
        """Ids before the question or the chat."""
        if self.as_text:
            return tokenizer.encode("")
        return [tokenizer.bos_token_id] if self.bos and tokenizer.bos_token_id is not None else []

    def _end_ids(self, tokenizer: Any) -> list[int]:
        """Ids after the last step, which is scored at the last of them."""
        return []

    def prompt_ids(self, tokenizer: Any, problem: str) -> list[int]:
        """Ids of the question without a chat, after the beginning-of-sequence id."""
        return self._start_ids(tokenizer) + encode_text(tokenizer, self._question(problem))

    def render(
        self, tokenizer: Any, problem: Problem, steps: Sequence[str], max_length: int | None = None
    ) -> Rendered:
        """[`Rendering.render`]; a chat is what the template writes, cut off behind the last step that fits."""
        if not self.chat:
            return super().render(tokenizer, problem, steps, max_length)
        chat = self._write(tokenizer, problem, steps)
        places = self._places(tokenizer, chat, steps) if chat.is_safe else None
        if places is None:
            return Rendered([], 0, [])
        start = self._start_ids(tokenizer)
        closing = self._end_ids(tokenizer)
        ids = [*start, *chat.ids]
        places = [_Place(len(start) + score, len(start) + end) for score, end in places]
        if places and closing:
            ids = [*ids[: places[-1].end], *closing]
            places[-1] = _Place(len(ids) - 1, len(ids))
        kept = list(takewhile(lambda place: max_length is None or place.end <= max_length, places))
        prompt_length = len(start) + chat.tokens_up_to(self._first_start(chat))
        return Rendered(ids[: kept[-1].end if kept else prompt_length], prompt_length, [place.score for place in kept])

    def _write(self, tokenizer: Any, problem: Problem, steps: Sequence[str]) -> WrittenChat:
        return write_chat(tokenizer, self._messages(problem, steps), self._cuts_marked(tokenizer))

    def _conversation(self, problem: Problem) -> list[Message]:
        """The messages that pose the problem, the last one of the user written as `prompt` says."""
        given = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
        fields = [{name: value for name, value in one.items() if name != "content"} for one in given]
        texts = [one["content"] or "" for one in given]
        asked = max((index for index, one in enumerate(given) if one["role"] == "user"), default=None)
        if asked is None:
            raise ValueError(f"the problem is a conversation without a message of the user: {problem!r}.")
        texts[asked] = self._question(texts[asked])
        messages = [Message(own, [Piece(text)]) for own, text in zip(fields, texts, strict=True)]
        if self.system is not None and given[0]["role"] != "system":
            messages.insert(0, Message({"role": "system"}, [Piece(self.system, is_meant=True)]))
        return messages

    def _messages(self, problem: Problem, steps: Sequence[str]) -> list[Message]:
        """The conversation and the solution, with marks at what [`_Prompted._places`] looks for."""
        return [*self._conversation(problem), Message({"role": "assistant"}, self._pieces(steps))]

    def _cuts_marked(self, tokenizer: Any) -> bool:
        """Whether marked pieces that are meant are tokenized apart."""
        return False

    def _first_start(self, chat: WrittenChat) -> int:
        """Where the first step begins in what the template writes."""
        return chat.last_start

    def _pieces(self, steps: Sequence[str]) -> list[Piece]:
        """The steps as pieces of one message."""
        raise NotImplementedError

    def _places(self, tokenizer: Any, chat: WrittenChat, steps: Sequence[str]) -> list[_Place] | None:
        """The place of each step; `None` where one of them is not found."""
        raise NotImplementedError

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
        each_line (`bool`, *optional*, defaults to `False`):
            Whether the tag follows each line of a step, blank ones too. The score is at the step's last line that is
            not blank. Indentation and blank lines reach the rendering where the segmentation has `strip=False`.
    """

    tag: str = "\n"
    single: bool = True
    each_line: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.each_line and self.chat:
            raise ValueError("each_line=True and chat=True: lines are written without a chat template.")

    def _tag_ids(self, tokenizer: Any) -> list[int]:
        if self.single:
            return [one_id(tokenizer, self.tag, "tag")]
        return continue_with(tokenizer, self.tag, encode_template)

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the tag is not exactly one id, and as [`_Prompted.check`]."""
        self._tag_ids(tokenizer)
        super().check(tokenizer)

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step and its tag."""
        tag = self._tag_ids(tokenizer)
        texts = self._step_texts(steps)
        for number, text in enumerate(texts):
            lines = _lines(text, is_last=number == len(texts) - 1) if self.each_line else [text]
            ids = []
            score_offset = 0
            for line in lines:
                ids += continue_text(tokenizer, line) + tag
                if line.strip():
                    score_offset = len(ids) - 1
            yield RenderedStep(ids, score_offset)

    def _cuts_marked(self, tokenizer: Any) -> bool:
        # A tag that is no token of its own would be merged with the text before it
        return self.tag not in tokenizer.added_tokens_encoder

    def _pieces(self, steps: Sequence[str]) -> list[Piece]:
        tag = Piece(self.tag, is_marked=True, is_meant=True)
        return [piece for text in self._step_texts(steps) for piece in (Piece(text), tag)]

    def _places(self, tokenizer: Any, chat: WrittenChat, steps: Sequence[str]) -> list[_Place] | None:
        places = []
        for mark, text in zip(chat.marks, self._step_texts(steps), strict=True):
            if mark is None or not _ends_at(chat, mark, text) or not chat.text.startswith(self.tag, mark):
                return None
            score = chat.token_before(mark + len(self.tag))
            places.append(_Place(score, score + 1))
        return places


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chat:
            raise ValueError("chat=False: turns are written by a chat template.")

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the answer is not exactly one id, and as [`_Prompted.check`]."""
        one_id(tokenizer, self.answer, "answer")
        super().check(tokenizer)

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Turns are written as a whole, see [`Rendering.render`]."""
        raise NotImplementedError("turns are written by a chat template, as a whole; use render.")

    def _messages(self, problem: Problem, steps: Sequence[str]) -> list[Message]:
        *before, question = self._conversation(problem)
        if question.fields["role"] != "user":
            raise ValueError(
                f"steps follow the question in its message, so a conversation must end with the user: {problem!r}."
            )
        texts = [text + _numbered(self.after, number) for number, text in enumerate(self._step_texts(steps), start=1)]
        said = [Message(question.fields, [*question.pieces, *_marked_text(text)]) for text in texts[:1]]
        said += [Message({"role": "user"}, [Piece(text)]) for text in texts[1:]]
        answer = Message({"role": "assistant"}, [Piece(self.answer, is_marked=True, is_meant=True)])
        turns = [message for own in said for message in (own, answer)]
        return [*before, *(turns or [question])]

    def _first_start(self, chat: WrittenChat) -> int:
        return next((mark for mark in chat.marks[:1] if mark is not None), chat.last_start)

    def _places(self, tokenizer: Any, chat: WrittenChat, steps: Sequence[str]) -> list[_Place] | None:
        answer = one_id(tokenizer, self.answer, "answer")
        places = []
        for mark in chat.marks[1:]:
            if mark is None:
                return None
            index = chat.tokens_up_to(mark)
            if chat.ids[index] != answer:
                raise ValueError(
                    f"the answer {self.answer!r} is the id {answer}, but with the chat template of "
                    f"{named(tokenizer)} it is {chat.ids[index]}."
                )
            # The answer is predicted at the token before it
            places.append(_Place(index - 1, index + 1))
        return None if None in chat.marks else places


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
        if self.closing != "none" and not self.chat:
            raise ValueError(f"closing={self.closing!r} needs chat=True.")
        if self.apart and self.chat:
            raise ValueError("apart=True and chat=True: what a chat template writes is tokenized as a whole.")
        if self.apart and self.prefixes:
            raise ValueError("apart=True and prefixes=True: the steps of a prefix are tokenized as one text.")

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if `end` names a token that the tokenizer does not have, and as [`_Prompted.check`]."""
        self._end_ids(tokenizer)
        super().check(tokenizer)

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

    def _scored_texts(self, steps: Sequence[str]) -> list[str]:
        """The texts with a score at their end: the steps, each but the last with `after`, or one prefix."""
        texts = self._step_texts(steps)
        for index in range(len(texts) - 1):
            texts[index] += _numbered(self.after, index + 1)
        return ["".join(texts)] if self.prefixes else texts

    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step and of what is written after it."""
        encode = encode_text if self.apart else continue_text
        texts = self._scored_texts(steps)
        for number, text in enumerate(texts, start=1):
            ids = encode(tokenizer, text) + (self._end_ids(tokenizer) if number == len(texts) else [])
            yield RenderedStep(ids, len(ids) - 1)

    def _pieces(self, steps: Sequence[str]) -> list[Piece]:
        *before, last = self._scored_texts(steps) or [""]
        pieces = [Piece(text, is_marked=number > 0) for number, text in enumerate(before)]
        # A template may cut off white space at the end of a message
        said = last.rstrip()
        return [*pieces, Piece(said, is_marked=bool(before)), Piece(last[len(said) :], is_marked=True)]

    def _places(self, tokenizer: Any, chat: WrittenChat, steps: Sequence[str]) -> list[_Place] | None:
        places = []
        texts = self._scored_texts(steps)
        for number, (mark, text) in enumerate(zip(chat.marks, texts, strict=False), start=1):
            is_last = number == len(texts)
            if is_last and self.closing == "all":
                # All that the template writes, however it has rewritten the step
                score = len(chat.ids) - 1
            elif mark is None or not _ends_at(chat, mark, text):
                return None
            else:
                score = chat.token_before(mark)
            if is_last and self.closing == "first":
                score = self._token_that_ends(tokenizer, chat, score)
            places.append(_Place(score, score + 1))
        return places

    def _token_that_ends(self, tokenizer: Any, chat: WrittenChat, last: int) -> int:
        """The token that ends the message whose last one is given: the next special one, else the next one."""
        if last + 1 == len(chat.ids):
            raise ValueError(
                f"closing='first': the chat template of {named(tokenizer)} writes nothing after the last step."
            )
        special = special_ids(tokenizer)
        return next((index for index in range(last + 1, len(chat.ids)) if chat.ids[index] in special), last + 1)


def _lines(text: str, is_last: bool) -> list[str]:
    """The lines of a step. Before another step, a newline at its end begins none."""
    return (text if is_last else text.removesuffix("\n")).split("\n")


def _marked_text(text: str) -> list[Piece]:
    """A text that is marked at its first word: a template may cut off white space before it."""
    words = text.lstrip()
    return [Piece(text[: len(text) - len(words)]), Piece(words, is_marked=True)]


def _ends_at(chat: WrittenChat, place: int, text: str) -> bool:
    """Whether the last line of a text ends at a place of what a template has written, but for white space."""
    # Most templates write a step as it is
    if chat.text.endswith(text, 0, place):
        return True
    last_line = text.rstrip().rpartition("\n")[2]
    reached = place
    for word in reversed(last_line.split()):
        while reached and chat.text[reached - 1].isspace():
            reached -= 1
        if not chat.text.endswith(word, 0, reached):
            return False
        reached -= len(word)
    return True
