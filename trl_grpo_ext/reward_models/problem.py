"""What a reward model or a judge is told of a prompt: the problem that the completion solves."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..distributed import is_main_process
from ..steps.named_arguments import NamedParameters, value_of_row
from ..steps.policy_text import check_text_only, last_user_text, message_text
from ..tables import import_by_path
from .chat import special_tokens
from .rendering import Problem
from .texts import check_texts


logger = logging.get_logger(__name__)

LAST_USER = "last_user"
CONVERSATION = "conversation"
_COLUMN = "column"
# The parameter of a function that is no column
_PROMPT = "prompt"

# What may be given as `problem`
ProblemLike = str | Mapping[str, str] | Callable[..., Problem]

# Markers of chat templates, some of which are special tokens in no tokenizer
_MARKERS = ("[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<｜User｜>")
# A shorter special token may well be a part of a text
_SHORTEST_MARKER = 3


def as_problem(value: Any, what: str, takes_conversations: bool) -> Problem:
    """
    A problem, checked.

    Args:
        value (`Any`):
            A text, or a conversation as a list of messages.
        what (`str`):
            Names it in the error.
        takes_conversations (`bool`):
            Whether it may be a conversation.

    Returns:
        `str` or `list[dict]`: the contents of the messages are texts.

    Raises:
        TypeError: neither of the two, or a message whose content is none.
        ValueError: a message that has other parts than text.
    """
    if isinstance(value, str):
        return value
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    if not is_list or not all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in value):
        raise TypeError(f"{what} is {value!r}; it must be a text" + " or a conversation." * takes_conversations)
    if not takes_conversations:
        raise TypeError(f"{what} is a conversation, and a text is needed: {value!r}.")
    for message in value:
        check_text_only(message.get("content"), what)
    return [{**message, "content": message_text(message.get("content"))} for message in value]


class ProblemReader:
    """
    Reads the problem of each completion of a batch, as a reward source has it.

    Args:
        problem (`str`, `Mapping[str, str]` or `Callable`):
            How the problem is chosen.

            - `"last_user"`: what the user said last. A prompt that is text is the problem as it is. A warning says
              once what else the prompts hold.
            - `"conversation"`: all messages of the prompt, the system message among them.
            - `{"column": name}`: a column of the data set, with texts or conversations.
            - a callable, or its import path `module:name`. It takes `prompt` and columns by name, and returns a text
              or a conversation.
        takes_conversations (`bool`):
            Whether the source can be given a conversation.

    Raises:
        TypeError: `problem` is none of these, or an async function.
        ValueError: an unknown name, the prompt as a column, or `"conversation"` for a source that takes texts alone.
    """

    def __init__(self, problem: ProblemLike, takes_conversations: bool):
        self.problem = problem
        self.takes_conversations = takes_conversations
        self._column = _column_of(problem)
        self._function = _function_of(problem)
        self._parameters = None if self._function is None else NamedParameters.of(self._function, "problem")
        self._said: set[str] = set()
        if problem == CONVERSATION and not takes_conversations:
            raise ValueError(
                "problem='conversation': this source writes the problem as a text, and not with a chat template that "
                "would write a conversation. Give a column, {'column': name}, or a function that returns a text."
            )

    @property
    def required_columns(self) -> list[str]:
        """The columns that the data set must have."""
        if self._parameters is not None:
            return [name for name in self._parameters.required if name != _PROMPT]
        return [] if self._column is None else [self._column]

    def check(self, problems: Any) -> list[Problem]:
        """Problems that a user gives: a list of texts, or of conversations where the source takes them."""
        if isinstance(problems, str) or not isinstance(problems, (list, tuple)):
            check_texts(problems, "problems")
        return [as_problem(one, f"problems[{row}]", self.takes_conversations) for row, one in enumerate(problems)]

    def read(
        self, prompts: Sequence[Any], columns: Mapping[str, Any], source: str, tokenizers: Iterable[Any] = ()
    ) -> list[Problem]:
        """
        The problem of each prompt.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                The prompts as TRL gives them to reward functions.
            columns (`Mapping[str, Any]`):
                The columns, with a value for each prompt.
            source (`str`):
                Names the reward source in errors and warnings.
            tokenizers (`Iterable[PreTrainedTokenizerBase | None]`, *optional*):
                Those whose special tokens in a prompt that is text are warned of.

        Raises:
            TypeError: what a column or the function gives is no problem.
            ValueError: no such column, a prompt without text of the user, or one with images.
        """
        rows = range(len(prompts))
        where = f"{source}, problem"
        if self._parameters is not None:
            self._parameters.check({*columns, _PROMPT}, f"{source}: the problem")
        columns = {name: own for name, own in columns.items() if self._takes(name)}
        named = [
            {name: value_of_row(own, row, len(prompts), where, name) for name, own in columns.items()} for row in rows
        ]
        problems = [self._of_row(prompt, own, source) for prompt, own in zip(prompts, named, strict=True)]
        self._warn_of_markers(prompts, source, tokenizers)
        return problems

    def _takes(self, name: str) -> bool:
        return name == self._column or (self._parameters is not None and self._parameters.takes(name))

    def _of_row(self, prompt: Any, columns: Mapping[str, Any], source: str) -> Problem:
        where = f"{source}: the problem"
        if self._column is not None:
            if self._column not in columns:
                raise ValueError(f"{where} is the column {self._column!r}, which the data set lacks.")
            return as_problem(columns[self._column], f"{where} (column {self._column!r})", self.takes_conversations)
        if self._function is not None and self._parameters is not None:
            arguments = self._parameters.select({**columns, _PROMPT: prompt})
            return as_problem(self._function(**arguments), f"{where} (of your function)", self.takes_conversations)
        if self.problem == CONVERSATION and not isinstance(prompt, str):
            return as_problem(prompt, where, takes_conversations=True)
        self._warn_of_what_is_left_out(prompt, source)
        return last_user_text(prompt)

    def _warn_of_what_is_left_out(self, prompt: Any, source: str) -> None:
        if isinstance(prompt, str) or "left out" in self._said:
            return
        asked = [index for index, message in enumerate(prompt) if message["role"] == "user"][-1:]
        others = [
            message["role"]
            for index, message in enumerate(prompt)
            if index not in asked and (message.get("content") or message.get("tool_calls"))
        ]
        if not others:
            return
        counted = ", ".join(f"{others.count(role)} of the {role}" for role in dict.fromkeys(others))
        way_out = "problem='conversation' keeps them" if self.takes_conversations else "problem=... can keep them"
        self._warn(
            "left out",
            f"{source}: the problem is what the user said last. The other messages of the prompt are left out, here "
            f"{counted}; {way_out}, and a column or a function of yours can be the problem. This is said once.",
        )

    def _warn_of_markers(self, prompts: Sequence[Any], source: str, tokenizers: Iterable[Any]) -> None:
        if "markers" in self._said or self._column is not None or self._function is not None:
            return
        known = set(_MARKERS).union(*(special_tokens(tokenizer) for tokenizer in tokenizers if tokenizer is not None))
        for prompt in dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)):
            found = sorted(marker for marker in known if len(marker) >= _SHORTEST_MARKER and marker in prompt)
            if found:
                self._warn(
                    "markers",
                    f"{source}: a prompt that is text holds {', '.join(found)}, as if a chat template had written it. "
                    "It is the problem as it is, with the template in it. Give prompts as messages, or the problem as "
                    "a column or a function of yours. This is said once.",
                )
                return

    def _warn(self, what: str, message: str) -> None:
        self._said.add(what)
        if is_main_process():
            logger.warning(message)


def _column_of(problem: Any) -> str | None:
    if not isinstance(problem, Mapping):
        return None
    if list(problem) != [_COLUMN] or not isinstance(problem[_COLUMN], str):
        raise ValueError(f"problem is {dict(problem)!r}; a column is given as {{'column': name}}.")
    if problem[_COLUMN] == _PROMPT:
        raise ValueError(
            f"problem is {dict(problem)!r}; the prompt is no column here: {CONVERSATION!r} gives all its messages, "
            f"and {LAST_USER!r} the last one of the user."
        )
    return problem[_COLUMN]


def _function_of(problem: Any) -> Callable[..., Any] | None:
    if isinstance(problem, Mapping) or problem in (LAST_USER, CONVERSATION):
        return None
    is_path = isinstance(problem, str) and ":" in problem
    function = import_by_path(f"problem={problem!r}", problem) if is_path else problem
    known = f"known: {LAST_USER}, {CONVERSATION}, {{'column': name}}, a function or its import path, module:name"
    if isinstance(function, str):
        raise ValueError(f"problem is {problem!r}; {known}.")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"problem is {problem!r}; {known}.")
    return function
