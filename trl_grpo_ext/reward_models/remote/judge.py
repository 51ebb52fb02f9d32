"""A language model behind an OpenAI-compatible endpoint as judge of steps and of outcomes."""

import asyncio
import copy
import inspect
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import httpx
from tqdm.auto import tqdm

from ...concurrency import run_together
from ...rewards.step_reductions import STEP_REDUCTIONS
from ...rewards.types import StepRewards, check_number
from ...steps.named_arguments import value_of_row
from ...steps.policy_text import assistant_text
from ...steps.segmentation import SegmentationLike, as_segmentation
from ...steps.step_reward import AsyncStepRewardFunction
from ..problem import LAST_USER, ProblemLike, ProblemReader
from ..progress import scoring_bar
from ..rendering import Problem
from .answer_cache import AnswerCache, content_key
from .images import images_of, without_images
from .judge_formats import JUDGE_FORMATS, JudgeFormat
from .protocols import RewardServerError, shown
from .transport import RemoteSource, Session


logger = logging.getLogger(__name__)

_PATH = "/chat/completions"
_TOKENS_OF_A_PRICE = 1e6
# Under which a question is handed on; a column of the data set may be called `problem`
_QUESTION = "_question_of_the_judge"
# Of the name of a format that has none
_DIGITS_OF_A_FORMAT = 6


class JudgeBudgetError(RuntimeError):
    """A judge has cost as much as it may."""


class _UnparsedAnswer(ValueError):
    """An answer of a judge that gives no rewards."""


class _Question(NamedTuple):
    problem: Problem
    images: list[str]


class _Reply(NamedTuple):
    text: str
    prompt_tokens: int
    answer_tokens: int


@dataclass
class JudgeUsage:
    """
    What a judge was asked, and what it took, since it was made, in this process.

    Args:
        answers (`int`):
            Answers that were paid for.
        cached (`int`):
            Answers from the cache.
        prompt_tokens, answer_tokens (`int`):
            Tokens that were paid for, as the server counts them.
        unparsed (`int`):
            Completions that stayed unjudged because an answer did not parse.
    """

    answers: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    unparsed: int = 0


@dataclass(kw_only=True, eq=False, repr=False)
class _Judge(RemoteSource):
    """
    What [`JudgeSteps`] and [`JudgeOutcome`] share beside [`RemoteSource`].

    The server is asked at `url` + `/chat/completions`, or at `/v1/chat/completions` if the url has no path. Equal
    questions of a batch are asked once. An answer that does not parse, or that has another number of verdicts, leaves
    its completion unjudged, and is counted in the metric `rewards/{source}/unparsed`.

    The other metrics are `rewards/{source}/answers`, `cached`, `prompt_tokens` and `answer_tokens`, for each
    completion, and with a price `rewards/{source}/cost`, what all processes have paid since the judge was made.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        format ([`JudgeFormat`] or `str`):
            How the judge is asked and its answer is read: one of `JUDGE_FORMATS` by name, or your own.
        request_options (`Mapping[str, Any]`, *optional*, defaults to `{"temperature": 0}`):
            Further fields of the request, such as `max_tokens`.
        cache (`str` or `os.PathLike`, *optional*):
            A folder for all answers, by the content of the request. A run that is resumed with it pays for nothing
            twice.
        price (`tuple[float, float]`, *optional*):
            Price of a million tokens of prompts, and of answers.
        max_cost (`float`, *optional*):
            Once all processes together have paid this much since the judge was made, the training stops with a
            [`JudgeBudgetError`]. Requests in flight are still paid.
        problem (`str`, `Mapping[str, str]` or `Callable`, *optional*, defaults to `"last_user"`):
            What of a prompt is the problem: `"last_user"`, `"conversation"`, a column of the data set as
            `{"column": name}`, or a function; see [`~trl_grpo_ext.reward_models.problem.ProblemReader`]. In `{{data}}`
            a conversation is a list of messages, and in `{{problem}}` each message follows its role and a colon.

    Raises:
        TypeError: a `format` that is none.
        ValueError: as [`RemoteSource`]; an unknown format, or one of the other kind; `max_cost` without a price.
    """

    model: str = field(kw_only=False)
    format: JudgeFormat | str = "verdicts"
    request_options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    cache: str | os.PathLike[str] | None = None
    price: tuple[float, float] | None = None
    max_cost: float | None = None
    problem: ProblemLike = LAST_USER

    kind: ClassVar[str]

    def __post_init__(self):
        self._format = _as_format(self.format)
        super().__post_init__()
        if self._format.kind != self.kind:
            raise ValueError(f"the format is of kind '{self._format.kind}'; {type(self).__name__} needs another.")
        self._problem = ProblemReader(self.problem, takes_conversations=True)
        self.usage = JudgeUsage()
        self._cache = AnswerCache(self.cache)
        self._processes = 1
        if self.price is not None and (len(self.price) != 2 or not min(self.price) >= 0):
            raise ValueError(
                f"price is {self.price!r}; give the prices of a million tokens of prompts and of answers."
            )
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost needs a price.")

    def _name_parts(self) -> list[str]:
        templates = {"system": self._format.system, "user": self._format.user, "next": self._format.next_user}
        format_name = self.format if isinstance(self.format, str) else content_key(templates)[:_DIGITS_OF_A_FORMAT]
        return [self.model.split("/")[-1], format_name]

    @property
    def required_columns(self) -> list[str]:
        """The columns of the dataset that the templates and the problem name."""
        return list(dict.fromkeys([*self._format.columns, *self._problem.required_columns]))

    @property
    def cost(self) -> float:
        """What this process has paid since the judge was made; 0 without a price."""
        prompt_price, answer_price = self.price or (0.0, 0.0)
        paid = self.usage.prompt_tokens * prompt_price + self.usage.answer_tokens * answer_price
        return paid / _TOKENS_OF_A_PRICE

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Take the number of processes, which share `max_cost`."""
        self._processes = accelerator.num_processes

    def _check_budget(self) -> None:
        # Each process judges as many completions as another one
        if self.max_cost is not None and self.cost * self._processes >= self.max_cost:
            raise JudgeBudgetError(
                f"judge '{self.__name__}' has cost {self.cost * self._processes:.4g}, and max_cost is "
                f"{self.max_cost:.4g}. Resume from the last checkpoint with a larger one"
                + ("." if self.cache is None else "; answers in the cache are not paid again.")
            )

    @asynccontextmanager
    async def _batch(self, completions: int, columns: Mapping[str, Any]) -> "AsyncIterator[_Batch]":
        """Ask about one batch, and log what it took."""
        path = _PATH if httpx.URL(self.url).path.strip("/") else f"/v1{_PATH}"
        before = copy.copy(self.usage)
        with scoring_bar(completions, self.__name__, "completions") as bar:
            async with self._session(path) as session:
                yield _Batch(self, session, bar)
        log_metric: Callable[[str, float], None] | None = columns.get("log_metric")
        if log_metric is None or not completions:
            return
        # In every batch: processes must log the same
        for name, count in asdict(self.usage).items():
            log_metric(f"rewards/{self.__name__}/{name}", (count - asdict(before)[name]) / completions)
        if self.price is not None:
            # The mean over processes is logged
            log_metric(f"rewards/{self.__name__}/cost", self.cost * self._processes)

    def _questions(self, prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[_Question]:
        """The question of each prompt. An error in one of them costs no judgement."""
        images = [images_of(prompt) for prompt in prompts]
        texts = [without_images(prompt) for prompt in prompts]
        problems = self._problem.read(texts, columns, f"judge '{self.__name__}'")
        return [_Question(*question) for question in zip(problems, images, strict=True)]

    async def _judge(
        self,
        batch: "_Batch",
        question: _Question,
        completion: Any,
        steps: Sequence[str] | None,
        columns: Mapping[str, Any],
    ) -> list[float | None] | None:
        """The reward of each step, or of the outcome; `None` for a completion that stays unjudged."""
        text = assistant_text(completion)
        problem = question.problem
        images = question.images

        def fill(template: str, **more: Any) -> str:
            return self._format.fill(template, problem, steps, text, {**columns, **more})

        system = self._format.system
        messages = [] if system is None else [{"role": "system", "content": fill(system)}]
        try:
            if steps is None or self._format.next_user is None:
                messages.append(_user_message(fill(self._format.user), images))
                return await self._ask(batch, messages, 1 if steps is None else len(steps))
            values: list[float | None] = []
            for number, step in enumerate(steps):
                template = self._format.next_user if number else self._format.user
                messages.append(_user_message(fill(template, step=step), [] if number else images))
                value = await self._ask(batch, messages, 1)
                if value is None:
                    return None
                values += value
            return values
        except _UnparsedAnswer as error:
            if not self.usage.unparsed:
                message = batch.session.without_secrets(str(error))
                logger.warning("%s; counted from now on in rewards/%s/unparsed.", message, self.__name__)
            self.usage.unparsed += 1
            return None
        finally:
            batch.bar.update()

    async def _ask(self, batch: "_Batch", messages: list[dict[str, Any]], count: int) -> list[float | None] | None:
        """Ask, put the answer at the end of the messages and read it; `None` where the server failed."""
        schema = None if self._format.schema is None else self._format.schema(count)
        answer = await batch.ask(messages, schema)
        if answer is None:
            return None
        messages.append({"role": "assistant", "content": answer})
        try:
            return _checked(self._format.parse(answer, count), count)
        # RecursionError: JSON that is nested too deep
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise _UnparsedAnswer(
                f"judge '{self.__name__}': an answer does not parse ({type(error).__name__}: {error}), and its "
                f"completion stays unjudged: {shown(answer)!r}"
            ) from error


class _Batch:
    """The questions of one batch, of which equal ones are asked once."""

    def __init__(self, judge: _Judge, session: Session, bar: tqdm):
        self._judge = judge
        self.session = session
        self.bar = bar
        self._asked: dict[str, asyncio.Future[str | None]] = {}

    async def ask(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None) -> str | None:
        """The judge's answer; `None` where the server failed and `on_failure` is `"none"`."""
        options = self._judge.request_options
        question: dict[str, Any] = {"model": self._judge.model, "messages": list(messages), **options}
        if schema is not None:
            named = {"name": "judgement", "strict": True, "schema": schema}
            question["response_format"] = {"type": "json_schema", "json_schema": named}
        # Two servers may give one name to two models
        key = content_key({"address": self.session.address, **question})
        if key not in self._asked:
            self._asked[key] = asyncio.ensure_future(self._answer(key, question))
        return await self._asked[key]

    async def _answer(self, key: str, question: Mapping[str, Any]) -> str | None:
        usage = self._judge.usage
        stored = self._judge._cache.get(key)
        if stored is not None:
            usage.cached += 1
            return stored
        try:
            answer = await self.session.post(question, self._judge._check_budget)
            reply = _read_reply(answer, needs_usage=self._judge.price is not None)
        except RewardServerError as error:
            self._judge._leave_unjudged(error, self.session, 1)
            return None
        usage.answers += 1
        usage.prompt_tokens += reply.prompt_tokens
        usage.answer_tokens += reply.answer_tokens
        # A refusal is no answer that a later run should meet again
        if reply.text:
            self._judge._cache.put(key, reply.text)
        return reply.text


@dataclass(kw_only=True, eq=False, repr=False)
class JudgeSteps(_Judge):
    """
    A language model that judges the steps of a completion, as an async reward source.

    Steps are found and rewards are placed as by [`~trl_grpo_ext.step_reward`].

    Args:
        segmentation ([`Segmentation`] or its argument `by`, *optional*, defaults to `"blank_line"`):
            How completions are cut into steps.
        reduce (`str`, *optional*, defaults to `"min"`):
            How the steps become one number under outcome supervision.
        policy_tokenizer (*optional*):
            The policy's tokenizer, which decodes the completions; the trainer sets it.

    Example:

    ```python
    >>> judge = JudgeSteps("https://api.openai.com/v1", "gpt-4.1-mini", api_key_env="OPENAI_API_KEY", cache="answers")
    >>> trainer = GRPOExtTrainer(model, reward_funcs=[judge], train_dataset=dataset)
    ```
    """

    kind: ClassVar[str] = "process"

    segmentation: SegmentationLike = "blank_line"
    reduce: str = "min"
    policy_tokenizer: Any = None

    def __post_init__(self):
        super().__post_init__()
        self._segmentation = as_segmentation(self.segmentation)
        if self.reduce not in STEP_REDUCTIONS:
            raise ValueError(f"reduce is {self.reduce!r}; known: {', '.join(STEP_REDUCTIONS)}.")

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Take the number of processes, and the tokenizer of the policy whose `completion_ids` will come."""
        super().prepare(accelerator, policy_tokenizer, batch_tokens)
        self.policy_tokenizer = policy_tokenizer

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[StepRewards | None]:
        questions = self._questions(prompts, columns)
        async with self._batch(len(prompts), columns) as batch:

            async def judge(steps: Sequence[str], completion: Any, **of_row: Any) -> Any:
                return await self._judge(batch, of_row.pop(_QUESTION), completion, steps, of_row)

            # `**of_row` would take all columns, and the problem as a text, which an image is not
            names = ["steps", "completion", _QUESTION, *self._format.columns]
            parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
            judge.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            source = AsyncStepRewardFunction(judge, self._segmentation, self.__name__)
            source.policy_tokenizer = self.policy_tokenizer
            given = {"completion_ids": completion_ids, "tool_mask": tool_mask, "prompt_ids": prompt_ids}
            return await source(prompts, completions, **given, **{**columns, _QUESTION: questions})


@dataclass(kw_only=True, eq=False, repr=False)
class JudgeOutcome(_Judge):
    """
    A language model that judges whole completions, as an async reward source: one number each.

    Args:
        format ([`JudgeFormat`] or `str`, *optional*, defaults to `"correct"`):
            As for [`JudgeSteps`]; also what [`rubric_format`] returns.

    Example:

    ```python
    >>> rubric = rubric_format({"The answer is right.": 2.0, "It is explained.": 1.0})
    >>> judge = JudgeOutcome("http://127.0.0.1:8000/v1", "Qwen/Qwen3-32B", format=rubric)
    ```
    """

    kind: ClassVar[str] = "outcome"

    format: JudgeFormat | str = "correct"

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        def of_row(row: int) -> dict[str, Any]:
            where = f"reward source '{self.__name__}', completion {row}"
            missing = [name for name in self._format.columns if name not in columns]
            if missing:
                raise TypeError(f"{where}: the format names {missing[0]!r}, which is no column of the dataset.")
            return {name: value_of_row(columns[name], row, len(prompts), where, name) for name in self._format.columns}

        questions = self._questions(prompts, columns)
        rows = [of_row(row) for row in range(len(prompts))]
        async with self._batch(len(prompts), columns) as batch:
            judged = await run_together(
                [
                    self._judge(batch, question, completion, None, own)
                    for question, completion, own in zip(questions, completions, rows, strict=True)
                ]
            )
        return [None if values is None else values[0] for values in judged]


def _as_format(value: Any) -> JudgeFormat:
    if isinstance(value, str) and value in JUDGE_FORMATS:
        return JUDGE_FORMATS[value]
    if isinstance(value, str):
        raise ValueError(f"format is {value!r}; known: {', '.join(JUDGE_FORMATS)}, or a JudgeFormat of your own.")
    if not isinstance(value, JudgeFormat):
        raise TypeError(f"format is {value!r}; give a JudgeFormat or the name of one.")
    return value


def _user_message(text: str, images: Sequence[str]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def _read_reply(answer: Any, needs_usage: bool) -> _Reply:
    """The text of a chat completion, empty for a refusal, and the tokens that it took."""
    try:
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        names = ("prompt_tokens", "completion_tokens")
        tokens = [usage[name] if needs_usage else usage.get(name) or 0 for name in names]
        if not isinstance(text, (str, type(None))) or not all(type(count) in (int, float) for count in tokens):
            raise TypeError(f"content {text!r}, tokens {tokens!r}")
    except (LookupError, TypeError, AttributeError) as error:
        raise RewardServerError(f"not a chat completion ({type(error).__name__}: {error}): {shown(answer)}") from None
    return _Reply(text or "", *map(int, tokens))


def _checked(values: Any, count: int) -> list[float | None]:
    """The rewards that a parser returned, as many as there are steps."""
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{len(values)} verdicts for {count} step(s)")
    return [None if value is None else check_number(value, "a reward") for value in values]
