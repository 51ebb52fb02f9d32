"""Reward models behind HTTP: clients of OpenRLHF's protocol and of vLLM's pooling and classification endpoints."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tqdm.auto import tqdm

from ...concurrency import run_together
from ...rewards.types import StepRewards
from ...steps.policy_text import assistant_text, place_on_tokens, policy_steps, warn_of_template
from ...steps.segmentation import Segmentation, SegmentationLike, as_segmentation
from ..preset import Preset
from ..presets import resolve_preset
from ..problem import LAST_USER, ProblemLike, ProblemReader
from ..progress import scoring_bar
from ..readings import LabelSoftmax
from ..rendering import Problem, Rendering
from ..texts import check_texts
from .protocols import (
    OPENRLHF_PATH,
    VLLM_OUTCOMES_PATH,
    VLLM_STEPS_PATH,
    Query,
    Request,
    RewardServerError,
    Score,
    StepScores,
    counted,
    openrlhf_outcomes,
    openrlhf_steps,
    plain_query,
    vllm_outcome,
    vllm_steps,
)
from .transport import RemoteSource, Session


@dataclass(kw_only=True, eq=False, repr=False)
class RemoteRewardModel(RemoteSource):
    """
    What [`RemoteProcessRewardModel`] and [`RemoteOutcomeRewardModel`] share beside [`RemoteSource`].

    An answer counts only if it has exactly one score for every completion, and for every step, that was asked for. Of
    a request that fails, no score is used.

    Args:
        protocol (`str`, *optional*, defaults to `"openrlhf"`):
            `"openrlhf"`, which [`~trl_grpo_ext.reward_models.remote.server`] speaks, or `"vllm"`.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per request of OpenRLHF's protocol. vLLM, which batches by itself, gets one per request.
        model (`str`, *optional*):
            vLLM: name of the served model.
        preset ([`Preset`], `str` or `os.PathLike`, *optional*):
            The served model's preset. It gives `rendering`, `max_length` and, for steps, `segmentation`, `reduce` and
            `labels`, where these are not given. The package's own server needs none of them: it has the preset.
        rendering ([`~trl_grpo_ext.reward_models.rendering.Rendering`], *optional*):
            How the served model is fed. vLLM is sent ids that are made here, piece by piece, so that a tag or a turn
            that the policy writes stays text. Without it an outcome model on vLLM gets `messages`. OpenRLHF's own
            server is sent their text, which it tokenizes again: there a tag that the policy writes is a tag.
        tokenizer (*optional*):
            The reward model's tokenizer, for `rendering`.
        max_length (`int`, *optional*):
            The most tokens that `rendering` may give.
        problem (`str`, `Mapping[str, str]` or `Callable`, *optional*, defaults to `"last_user"`):
            What of a prompt is the problem: `"last_user"`, `"conversation"`, a column of the data set as
            `{"column": name}`, or a function; see [`~trl_grpo_ext.reward_models.problem.ProblemReader`]. A
            conversation needs a `rendering` with a chat template, or vLLM's `messages`.

    Raises:
        ValueError: as [`RemoteSource`]; an unknown protocol, a preset of the other kind, or a conversation as problem
            where the server is sent a text.
    """

    kind: ClassVar[str]
    path: ClassVar[dict[str, str]]

    protocol: str = "openrlhf"
    batch_size: int = 16
    model: str | None = None
    preset: Preset | str | os.PathLike[str] | None = None
    rendering: Any = None
    tokenizer: Any = None
    max_length: int | None = None
    problem: ProblemLike = LAST_USER

    def __post_init__(self):
        super().__post_init__()
        if self.protocol not in self.path:
            raise ValueError(f"protocol is {self.protocol!r}; known: {', '.join(self.path)}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.preset is not None:
            self._take_preset(resolve_preset(self.__name__, self.preset))
        if (self.rendering is None) != (self.tokenizer is None):
            raise ValueError("rendering (or preset) and tokenizer go together: the reward model's own, or neither.")
        self._problem = ProblemReader(self.problem, self._takes_conversations)
        if isinstance(self.rendering, Rendering) and len(self.rendering.inputs(["one", "two"])) > 1:
            raise ValueError(
                f"{self.rendering} makes an input of each step, and one request holds one input of a solution. Load "
                "the model here, or serve it by `python -m trl_grpo_ext.serve` and leave rendering and preset out."
            )

    def _name_parts(self) -> list[str]:
        return [] if self.model is None else [self.model.split("/")[-1]]

    @property
    def _takes_conversations(self) -> bool:
        return self.protocol == "vllm" if self.rendering is None else self.rendering.takes_conversations

    @property
    def required_columns(self) -> list[str]:
        """The columns that the dataset must have."""
        return self._problem.required_columns

    def _take_preset(self, preset: Preset) -> None:
        if preset.kind != self.kind:
            raise ValueError(
                f"preset '{preset.name}' is of kind '{preset.kind}'; {type(self).__name__} needs another."
            )
        if self.protocol == "vllm" and preset.mask_tags:
            raise ValueError(f"preset '{preset.name}' hides tags from attention, which vLLM cannot do.")
        self.rendering = preset.rendering if self.rendering is None else self.rendering
        self.max_length = preset.max_length if self.max_length is None else self.max_length

    def _render(self, problem: Problem, steps: Sequence[str]) -> Any:
        rendered = self.rendering.render(self.tokenizer, problem, list(steps), self.max_length)
        if steps and not rendered.ids:
            warn_of_template(repr(self))
        return rendered

    def _query(self, problem: Problem, steps: Sequence[str]) -> Query | None:
        """A completion for OpenRLHF's protocol; `None` where nothing of it fits into `max_length`."""
        if isinstance(problem, str) and self.rendering is None:
            return plain_query(problem, steps)
        rendered = self._render(problem, steps)
        if not rendered.score_positions:
            return None
        prompt = self.tokenizer.decode(rendered.ids[: rendered.prompt_length])
        return Query(prompt, self.tokenizer.decode(rendered.ids), list(steps)[: len(rendered.score_positions)])

    async def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """Send requests, at most `concurrency` at once, and return the scores of their completions in order."""

        async def answer(session: Session, request: Request, bar: tqdm) -> list[Any]:
            try:
                received = await session.post(request.payload)
                bar.update(request.completions)
                return counted(request.parse(received), request.completions, "the answer")
            except RewardServerError as error:
                self._leave_unjudged(error, session, request.completions)
                return [None] * request.completions

        with scoring_bar(sum(request.completions for request in requests), self.__name__, "completions") as bar:
            async with self._session(self.path[self.protocol]) as session:
                answers = await run_together([answer(session, request, bar) for request in requests])
        return list(itertools.chain.from_iterable(answers))

    def _batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]


def _filled(rows: Sequence[int], scores: Sequence[Any], unasked: Sequence[Any]) -> list[Any]:
    """The scores in their rows, and in all others what those get that nothing was asked for."""
    filled = list(unasked)
    for row, score in zip(rows, scores, strict=True):
        filled[row] = score
    return filled


@dataclass(kw_only=True, eq=False, repr=False)
class RemoteProcessRewardModel(RemoteRewardModel):
    """
    A process reward model on a server, as an async reward source: the policy's steps, scored at their last tokens.

    Args:
        segmentation (`Segmentation` or its argument `by`, *optional*):
            How completions are cut into steps, and which part of them has steps. By default as the preset says, else
            at blank lines.
        policy_tokenizer (*optional*):
            The policy's tokenizer, which decodes the completions; the trainer sets it.
        reduce (`str`, *optional*):
            How the steps become one number under outcome supervision; by default as the preset says, else `"min"`.
        labels (`Sequence[int]`, *optional*):
            vLLM: the positive labels of the served classification head, whose probabilities are added; by default as
            the preset says, else the last one.

    Example:

    ```python
    >>> judge = RemoteProcessRewardModel("http://127.0.0.1:8000")
    >>> trainer = GRPOExtTrainer(model, reward_funcs=[judge], train_dataset=dataset)
    ```
    """

    kind: ClassVar[str] = "process"
    path: ClassVar[dict[str, str]] = {"openrlhf": OPENRLHF_PATH, "vllm": VLLM_STEPS_PATH}

    segmentation: SegmentationLike | None = None
    policy_tokenizer: Any = None
    reduce: str | None = None
    labels: Sequence[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.segmentation = as_segmentation(Segmentation() if self.segmentation is None else self.segmentation)
        self.reduce = "min" if self.reduce is None else self.reduce
        self.labels = (-1,) if self.labels is None else self.labels
        if self.protocol == "vllm" and self.rendering is None:
            raise ValueError("a process reward model on vLLM needs rendering and tokenizer, which place its steps.")

    def _take_preset(self, preset: Preset) -> None:
        super()._take_preset(preset)
        self.segmentation = preset.segmentation if self.segmentation is None else self.segmentation
        self.reduce = preset.reduce if self.reduce is None else self.reduce
        if self.labels is None and isinstance(preset.reading, LabelSoftmax):
            self.labels = preset.reading.indices
        if self.labels is None and self.protocol == "vllm":
            raise ValueError(
                f"preset '{preset.name}' takes its scores by {type(preset.reading).__name__}, and vLLM gives "
                "probabilities of labels; say with `labels` which of them to add."
            )

    def prepare(self, accelerator: Any, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Take the tokenizer of the policy whose `completion_ids` will come."""
        self.policy_tokenizer = policy_tokenizer

    async def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[StepRewards | None]:
        segmentation = as_segmentation(self.segmentation)
        tokenizer = self.policy_tokenizer
        steps = policy_steps(tokenizer, completion_ids, tool_mask, segmentation, repr(self), prompts, prompt_ids)
        texts = [[step.text for step in own] for own in steps]
        problems = self._problem.read(prompts, columns, repr(self), (tokenizer, self.tokenizer))
        scores = await self.score_steps(problems, texts)
        return [place_on_tokens(own, values) for own, values in zip(steps, scores, strict=True)]

    async def score_steps(self, problems: Sequence[Problem], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        """
        Scores of every step of every solution, in order.

        Returns:
            `list[list[float | None] | None]`: per solution as many as it has steps, `None` for a step that the server
            left unscored; `None` instead of the list where the request failed and `on_failure` is `"none"`.
        """
        problems = self._problem.check(problems)
        for index, own in enumerate(steps):
            check_texts(own, f"solution {index}")
        ask = self._ask_openrlhf if self.protocol == "openrlhf" else self._ask_vllm
        # Steps that did not fit, the last ones, were not asked for
        return [
            None if values is None else [*values, *[None] * (len(own) - len(values))]
            for values, own in zip(await ask(problems, steps), steps, strict=True)
        ]

    async def _ask_openrlhf(self, problems: Sequence[Problem], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        queries = [self._query(problem, own) for problem, own in zip(problems, steps, strict=True)]
        asked = {row: query for row, query in enumerate(queries) if query is not None}
        requests = [openrlhf_steps([asked[row] for row in rows]) for rows in self._batches(list(asked))]
        return _filled(list(asked), await self._ask(requests), [[] for _ in steps])

    async def _ask_vllm(self, problems: Sequence[Problem], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        requests = {}
        assert self.labels is not None
        for row, (problem, own) in enumerate(zip(problems, steps, strict=True)):
            rendered = self._render(problem, own)
            # Without a step that fits there is nothing to ask for
            if rendered.score_positions:
                requests[row] = vllm_steps(self.model, rendered.ids, rendered.score_positions, self.labels)
        return _filled(list(requests), await self._ask(list(requests.values())), [[] for _ in steps])


@dataclass(kw_only=True, eq=False, repr=False)
class RemoteOutcomeRewardModel(RemoteRewardModel):
    """
    An outcome reward model on a server, as an async reward source: one number per completion, as the server gives it.

    Args:
        label_column (`str`, *optional*):
            OpenRLHF's protocol: the dataset's column that is sent as `labels`, for servers that compare with an
            answer.
    """

    kind: ClassVar[str] = "outcome"
    path: ClassVar[dict[str, str]] = {"openrlhf": OPENRLHF_PATH, "vllm": VLLM_OUTCOMES_PATH}

    label_column: str | None = None

    @property
    def required_columns(self) -> list[str]:
        """The columns that the dataset must have."""
        return super().required_columns + ([] if self.label_column is None else [self.label_column])

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        if self.label_column is not None and self.label_column not in columns:
            raise ValueError(f"the dataset has no column {self.label_column!r} to send as `labels`.")
        return await self.score_batch(
            self._problem.read(prompts, columns, repr(self), (self.tokenizer,)),
            [assistant_text(completion) for completion in completions],
            None if self.label_column is None else columns[self.label_column],
        )

    async def score_batch(
        self, problems: Sequence[Problem], solutions: Sequence[str], labels: Sequence[Any] | None = None
    ) -> list[Score]:
        """One number per solution, in order; `None` where the server gave none or the request failed."""
        problems = self._problem.check(problems)
        check_texts(solutions, "solutions")
        pairs = zip(problems, solutions, strict=True)
        if self.protocol == "vllm":
            found = [self._vllm_outcome(problem, solution) for problem, solution in pairs]
            asked = {row: request for row, request in enumerate(found) if request is not None}
            requests = list(asked.values())
        else:
            labels = [None] * len(problems) if labels is None else labels
            queries = [self._query(problem, [solution]) for problem, solution in pairs]
            asked = {row: query for row, query in enumerate(queries) if query is not None}
            requests = [
                openrlhf_outcomes([asked[row] for row in rows], [labels[row] for row in rows])
                for rows in self._batches(list(asked))
            ]
        return _filled(list(asked), await self._ask(requests), [None] * len(problems))

    def _vllm_outcome(self, problem: Problem, solution: str) -> Request | None:
        if self.rendering is None:
            asked = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
            return vllm_outcome(self.model, messages=[*asked, {"role": "assistant", "content": solution}])
        rendered = self._render(problem, [solution])
        # A solution that does not fit would be judged by its problem alone
        return vllm_outcome(self.model, input=rendered.ids) if rendered.score_positions else None
