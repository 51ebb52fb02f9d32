"""Reward models behind HTTP: clients of OpenRLHF's protocol and of vLLM's pooling and classification endpoints."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ...rewards.types import StepRewards
from ...steps.policy_text import assistant_text, last_user_text, place_on_tokens, policy_steps
from ...steps.segmentation import Segmentation, SegmentationLike, as_segmentation
from ..texts import check_texts
from .protocols import (
    OPENRLHF_PATH,
    VLLM_OUTCOMES_PATH,
    VLLM_STEPS_PATH,
    Request,
    RewardServerError,
    Score,
    StepScores,
    counted,
    openrlhf_outcomes,
    openrlhf_steps,
    shown,
    vllm_outcome,
    vllm_steps,
)


logger = logging.getLogger(__name__)

# Scoring twice changes nothing on the server, so what may have arrived can be sent again
_CONNECTION_ERRORS = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.ProxyError)
_CONNECT_SECONDS = 10.0


@dataclass(kw_only=True, eq=False)
class RemoteRewardModel:
    """
    What [`RemoteProcessRewardModel`] and [`RemoteOutcomeRewardModel`] share: the server and how it is asked.

    A request is sent again when the connection fails or the server answers 5xx. Before attempt k + 1 the client waits

        backoff * 2^(k - 1) seconds, k = 1, ..., retries

    It is never sent again after 4xx, which says that the request is wrong, nor after a time-out, since that would add
    to the load of a slow server. An answer counts only if it has exactly one score for every completion, and for every
    step, that was asked for. Of a request that fails, no score is used.

    Args:
        url (`str`):
            Where the server is, such as `"http://127.0.0.1:8000"`; the protocol's path is appended.
        protocol (`str`, *optional*, defaults to `"openrlhf"`):
            `"openrlhf"`, which [`~trl_grpo_ext.reward_models.remote.server`] speaks, or `"vllm"`.
        name (`str`, *optional*):
            Its name in logs, errors and `outcome_gate`; that of the class by default.
        on_failure (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops the training. `"none"` logs a warning and leaves the request's completions unjudged.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests in flight at once, per process.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds from sending a request to its full answer.
        retries (`int`, *optional*, defaults to `3`):
            Further attempts after the first.
        backoff (`float`, *optional*, defaults to `0.5`):
            Seconds before the second attempt.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per request of OpenRLHF's protocol. vLLM, which batches by itself, gets one per request.
        headers (`dict[str, str]`, *optional*):
            Sent with every request, such as `{"Authorization": "Bearer ..."}`.
        model (`str`, *optional*):
            vLLM: name of the served model.
        rendering (`Tagged`, `Turns` or `Bare`, *optional*):
            vLLM: the preset's rendering. Requests then carry ids that are made here, piece by piece, so that a tag or
            a turn that the policy writes stays text. Without it an outcome model gets `messages`.
        tokenizer (*optional*):
            vLLM: the reward model's tokenizer, for `rendering`.
        max_length (`int`, *optional*):
            vLLM: the most tokens that `rendering` may give.

    Raises:
        ValueError: an unknown protocol, address or choice, or a number out of range.
    """

    url: str = field(kw_only=False)
    protocol: str = "openrlhf"
    name: str | None = None
    on_failure: str = "raise"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 3
    backoff: float = 0.5
    batch_size: int = 16
    headers: dict[str, str] | None = None
    model: str | None = None
    rendering: Any = None
    tokenizer: Any = None
    max_length: int | None = None

    def __post_init__(self):
        # TRL's logs show it
        self.__name__ = self.name or type(self).__name__
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} does not start with http:// or https://.")
        if self.protocol not in ("openrlhf", "vllm"):
            raise ValueError(f"protocol is {self.protocol!r}; known: openrlhf, vllm.")
        if self.on_failure not in ("raise", "none"):
            raise ValueError(f"on_failure is {self.on_failure!r}; known: raise, none.")
        if min(self.concurrency, self.batch_size) < 1 or min(self.retries, self.backoff) < 0:
            raise ValueError(
                "concurrency and batch_size must be at least 1, retries and backoff at least 0; got "
                f"{self.concurrency}, {self.batch_size}, {self.retries}, {self.backoff}."
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be positive.")
        if (self.rendering is None) != (self.tokenizer is None):
            raise ValueError("rendering and tokenizer go together: the reward model's own, both or neither.")

    def _render(self, problem: str, steps: Sequence[str]) -> Any:
        return self.rendering.render(self.tokenizer, problem, list(steps), self.max_length)

    async def _post(self, client: httpx.AsyncClient, address: str, payload: dict[str, Any]) -> Any:
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                # The time-outs of httpx are those of one packet; an answer that trickles in would never end
                response = await asyncio.wait_for(client.post(address, json=payload), self.timeout)
            except TimeoutError:
                raise RewardServerError(f"no answer within {self.timeout} s.") from None
            except _CONNECTION_ERRORS as error:
                failure = f"{type(error).__name__} {error}"
                continue
            except httpx.HTTPError as error:
                raise RewardServerError(f"{type(error).__name__} {error}") from error
            if response.is_success:
                return _json(response)
            failure = f"status {response.status_code}: {shown(response.text)}"
            if not response.is_server_error:
                raise RewardServerError(failure)
        raise RewardServerError(f"{failure} ({self.retries + 1} attempts)")

    async def _ask(self, path: str, requests: Sequence[Request]) -> list[Any]:
        """Send requests, at most `concurrency` at once, and return the scores of their completions in order."""
        address = self.url.rstrip("/") + path
        gate = asyncio.Semaphore(self.concurrency)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)

        async def answer(client: httpx.AsyncClient, request: Request) -> list[Any]:
            try:
                async with gate:
                    received = await self._post(client, address, request.payload)
                return counted(request.parse(received), request.completions, "the answer")
            except RewardServerError as error:
                message = f"reward server {address}, {request.completions} completion(s): {error}"
                if self.on_failure == "raise":
                    raise RewardServerError(message) from error
                logger.warning("%s They stay unjudged.", message)
                return [None] * request.completions

        # A client belongs to one event loop, and outside the trainer every call may have its own
        async with httpx.AsyncClient(headers=self.headers, timeout=timeout) as client:
            tasks = [asyncio.ensure_future(answer(client, request)) for request in requests]
            try:
                return list(itertools.chain.from_iterable(await asyncio.gather(*tasks)))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_some(self, path: str, requests: Sequence[Request | None], unasked: Sequence[Any]) -> list[Any]:
        """[`_ask`] with one completion per request; where a request is `None`, the score is that of `unasked`."""
        answers = iter(await self._ask(path, [request for request in requests if request is not None]))
        return [score if request is None else next(answers) for request, score in zip(requests, unasked, strict=True)]


def _batches(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise RewardServerError(f"the answer is not JSON: {shown(response.text)}") from None


@dataclass(kw_only=True, eq=False)
class RemoteProcessRewardModel(RemoteRewardModel):
    """
    A process reward model on a server, as an async reward source: the policy's steps, scored at their last tokens.

    Args:
        segmentation (`Segmentation` or its argument `by`, *optional*, defaults to `Segmentation()`):
            How completions are cut into steps, and which part of them has steps.
        policy_tokenizer (*optional*):
            The policy's tokenizer, which decodes the completions; the trainer sets it.
        reduce (`str`, *optional*, defaults to `"min"`):
            How the steps become one number under outcome supervision.
        labels (`Sequence[int]`, *optional*, defaults to `(-1,)`):
            vLLM: the positive labels of the served classification head, whose probabilities are added.

    Example:

    ```python
    >>> judge = RemoteProcessRewardModel("http://127.0.0.1:8000")
    >>> trainer = GRPOExtTrainer(model, reward_funcs=[judge], train_dataset=dataset)
    ```
    """

    segmentation: SegmentationLike = field(default_factory=Segmentation)
    policy_tokenizer: Any = None
    reduce: str = "min"
    labels: Sequence[int] = (-1,)

    def __post_init__(self):
        super().__post_init__()
        self.segmentation = as_segmentation(self.segmentation)
        if self.protocol == "vllm" and self.rendering is None:
            raise ValueError("a process reward model on vLLM needs rendering and tokenizer, which place its steps.")

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
        source = f"RemoteProcessRewardModel({self.url!r})"
        segmentation = as_segmentation(self.segmentation)
        tokenizer = self.policy_tokenizer
        steps = policy_steps(tokenizer, completion_ids, tool_mask, segmentation, source, prompts, prompt_ids)
        texts = [[step.text for step in own] for own in steps]
        scores = await self.score_steps([last_user_text(prompt) for prompt in prompts], texts)
        return [place_on_tokens(own, values) for own, values in zip(steps, scores, strict=True)]

    async def score_steps(self, problems: Sequence[str], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        """
        Scores of every step of every solution, in order.

        Returns:
            `list[list[float | None] | None]`: per solution as many as it has steps, `None` for a step that the server
            left unscored; `None` instead of the list where the request failed and `on_failure` is `"none"`.
        """
        check_texts(problems, "problems")
        for index, own in enumerate(steps):
            check_texts(own, f"solution {index}")
        ask = self._ask_openrlhf if self.protocol == "openrlhf" else self._ask_vllm
        return await ask(problems, steps)

    async def _ask_openrlhf(self, problems: Sequence[str], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        batches = _batches(len(problems), self.batch_size)
        return await self._ask(OPENRLHF_PATH, [openrlhf_steps(problems[rows], steps[rows]) for rows in batches])

    async def _ask_vllm(self, problems: Sequence[str], steps: Sequence[Sequence[str]]) -> list[StepScores]:
        requests: list[Request | None] = []
        for problem, own in zip(problems, steps, strict=True):
            ids, _, score_positions = self._render(problem, own)
            request = vllm_steps(self.model, ids, score_positions, len(own), self.labels)
            # Without a step that fits there is nothing to ask for
            requests.append(request if score_positions else None)
        return await self._ask_some(VLLM_STEPS_PATH, requests, [[None] * len(own) for own in steps])


@dataclass(kw_only=True, eq=False)
class RemoteOutcomeRewardModel(RemoteRewardModel):
    """
    An outcome reward model on a server, as an async reward source: one number per completion, as the server gives it.

    Args:
        label_column (`str`, *optional*):
            OpenRLHF's protocol: the dataset's column that is sent as `labels`, for servers that compare with an
            answer.
    """

    label_column: str | None = None

    @property
    def required_columns(self) -> list[str]:
        """The column that the dataset must have."""
        return [] if self.label_column is None else [self.label_column]

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        if self.label_column is not None and self.label_column not in columns:
            raise ValueError(f"the dataset has no column {self.label_column!r} to send as `labels`.")
        return await self.score_batch(
            [last_user_text(prompt) for prompt in prompts],
            [assistant_text(completion) for completion in completions],
            None if self.label_column is None else columns[self.label_column],
        )

    async def score_batch(
        self, problems: Sequence[str], solutions: Sequence[str], labels: Sequence[Any] | None = None
    ) -> list[Score]:
        """One number per solution, in order; `None` where the server gave none or the request failed."""
        check_texts(problems, "problems")
        check_texts(solutions, "solutions")
        if self.protocol == "vllm":
            pairs = zip(problems, solutions, strict=True)
            requests = [self._vllm_outcome(problem, solution) for problem, solution in pairs]
            return await self._ask_some(VLLM_OUTCOMES_PATH, requests, [None] * len(requests))
        labels = [None] * len(problems) if labels is None else labels
        batches = _batches(len(problems), self.batch_size)
        requests = [openrlhf_outcomes(problems[rows], solutions[rows], labels[rows]) for rows in batches]
        return await self._ask(OPENRLHF_PATH, requests)

    def _vllm_outcome(self, problem: str, solution: str) -> Request | None:
        if self.rendering is None:
            chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
            return vllm_outcome(self.model, messages=chat)
        ids, _, score_positions = self._render(problem, [solution])
        # A solution that does not fit would be judged by its problem alone
        return vllm_outcome(self.model, input=ids) if score_positions else None
