"""
A server for reward models, by OpenRLHF's protocol extended by steps: `python -m trl_grpo_ext.serve MODEL`.

`POST /get_reward` takes

    {"query": [...], "prompts": [...], "labels": [...], "steps": [[...], ...]}

where `query` is each prompt followed by its completion, and answers

    {"rewards": [...], "scores": [...], "step_scores": [[...], ...]}

A process reward model needs `steps`. It adds `step_scores`, null for a step that it left unscored. `labels` are not
used. Any other status comes with `{"error": ...}`:

- 429: the queue is full, and `Retry-After` says when to come back.
- any other 4xx: what is wrong with the request, which need not be sent again.
- 5xx: what broke in the server.

Requests are scored one after the other. One whose client has left while it waited is not scored. With a key in the
environment, `Authorization: Bearer KEY` is asked for everywhere but at `/health`.
"""

import argparse
import asyncio
import hmac
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ...rewards.step_reductions import STEP_REDUCTIONS
from ...rewards.types import check_finite
from ..opening import load_reward_model
from .credentials import read_api_key
from .protocols import OPENRLHF_PATH


KINDS = ("process", "outcome")
MAX_BYTES = 16 * 2**20
QUEUE = 64
API_KEY_ENV = "REWARD_API_KEY"
# Of the client's time-out of 300 s, what a request may spend in the queue
_LONGEST_QUEUE_SECONDS = 120.0
_LONGEST_RETRY_SECONDS = 60
# What is known of the time of a request before the first
_FIRST_GUESS_SECONDS = 1.0


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        raise HTTPException(400, f"`{name}` must be a list of strings.")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise HTTPException(400, f"`{name}[{index}]` is not a string.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise HTTPException(400, f"`{name}[{index}]` has half a surrogate pair, which is not text.")
    return values


def _same_length(first: Sequence[Any], second: Sequence[Any], names: str) -> None:
    if len(first) != len(second):
        raise HTTPException(400, f"{names} differ in length: {len(first)} and {len(second)}.")


def parse_request(body: bytes, kind: str) -> tuple[list[str], list[Any]]:
    """
    Check and take apart a request.

    Args:
        body (`bytes`):
            The request's body.
        kind (`str`):
            `"process"` or `"outcome"`.

    Returns:
        `tuple[list[str], list[Any]]`: the problems, and for each its steps (process) or its solution (outcome).

    Raises:
        `starlette.exceptions.HTTPException`: status 400 and the field that is wrong.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise HTTPException(400, "the body must be a JSON object.")
    queries = _texts(data.get("query"), "query")
    prompts = _texts(data.get("prompts"), "prompts")
    _same_length(queries, prompts, "`query` and `prompts`")
    if kind == "outcome":
        for index, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not query.startswith(prompt):
                raise HTTPException(400, f"`query[{index}]` does not start with `prompts[{index}]`.")
        return prompts, [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    if not isinstance(data.get("steps"), list):
        raise HTTPException(400, "a process reward model needs `steps`, a list of strings for each prompt.")
    _same_length(prompts, data["steps"], "`prompts` and `steps`")
    steps = [_texts(own, f"steps[{index}]") for index, own in enumerate(data["steps"])]
    for index, own in enumerate(steps):
        if not all(step.strip() for step in own):
            raise HTTPException(400, f"`steps[{index}]` has a blank step.")
    return prompts, steps


async def _receive_body(request: Request, max_bytes: int, *, refuses: bool = True) -> bytes:
    """The body of a request, of which never more than `max_bytes` are held in memory; a larger one is refused."""
    body = bytearray()
    size = 0
    try:
        # A body that is too large is received to its end: a client that is cut off while it sends does not see why
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_bytes:
                body += chunk
    except ClientDisconnect:
        # Nobody receives this answer, but any other exception would be logged as an error of the server
        raise HTTPException(400, f"the client left after {size} bytes.") from None
    if size > max_bytes and refuses:
        raise HTTPException(413, f"the body has {size} bytes; this server takes {max_bytes}.")
    return bytes(body)


def _finite(scores: Sequence[float | None], name: str) -> list[float | None]:
    return [None if s is None else check_finite(s, f"`{name}[{index}]`") for index, s in enumerate(scores)]


def _answer(scores: list[Any], kind: str, reduce: str) -> dict[str, Any]:
    """The answer's JSON; `ValueError` names a score that is NaN or infinite, which JSON does not have."""
    if kind == "outcome":
        rewards = _finite(scores, "rewards")
        return {"rewards": rewards, "scores": rewards}
    step_scores = [_finite(own, f"step_scores[{index}]") for index, own in enumerate(scores)]
    scored = [[score for score in own if score is not None] for own in step_scores]
    rewards = _finite([STEP_REDUCTIONS[reduce](own) if own else None for own in scored], "rewards")
    return {"rewards": rewards, "scores": rewards, "step_scores": step_scores}


def _is_authorized(request: Request, api_key: str | None) -> bool:
    if api_key is None:
        return True
    given = request.headers.get("authorization", "").encode()
    # Takes the same time however many characters are right
    return hmac.compare_digest(given, f"Bearer {api_key}".encode())


async def _until_client_leaves(request: Request) -> None:
    """To be called once the body is received, after which nothing else arrives."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Worker:
    """
    The model in a thread of its own, and the queue before it.

    Args:
        score (`Callable`):
            Scores the completions of one request.
        queue (`int`):
            The most requests that wait or are scored.
    """

    def __init__(self, score: Callable[[list[str], list[Any]], list[Any]], queue: int):
        self._score = score
        self._queue = queue
        # One thread is the queue too: it takes up what was submitted in that order
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-model")
        self._inside = 0
        self._seconds = _FIRST_GUESS_SECONDS

    def _timed(self, problems: list[str], answers: list[Any]) -> list[Any]:
        started = time.monotonic()
        scores = self._score(problems, answers)
        self._seconds = (self._seconds + time.monotonic() - started) / 2
        return scores

    def _refuse_if_full(self) -> None:
        wait = self._inside * self._seconds
        # However slow the model is, one request may wait while another one is scored
        if self._inside < min(self._queue, 2) or (self._inside < self._queue and wait <= _LONGEST_QUEUE_SECONDS):
            return
        # When half of the queue is done there is room, and the model has something to do until then
        seconds = min(max(math.ceil(wait / 2), 1), _LONGEST_RETRY_SECONDS)
        raise HTTPException(429, f"{self._inside} requests are waiting.", {"Retry-After": str(seconds)})

    def _leave(self, job: "asyncio.Future[list[Any]]") -> None:
        self._inside -= 1
        # Otherwise asyncio complains of the error of a job that nobody waits for any more
        if not job.cancelled():
            job.exception()

    async def score(self, request: Request, problems: list[str], answers: list[Any]) -> list[Any]:
        """The scores of a request, or status 429 if too many wait, or 499 if its client has left."""
        self._refuse_if_full()
        work = self._executor.submit(self._timed, problems, answers)
        job = asyncio.wrap_future(work)
        self._inside += 1
        job.add_done_callback(self._leave)
        leaving = asyncio.ensure_future(_until_client_leaves(request))
        try:
            await asyncio.wait({job, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            # Nothing happens to what is done, or is being scored
            work.cancel()
        if leaving.done() and not job.done():
            raise HTTPException(499, "the client left.")
        return job.result()


def create_app(
    model: Any,
    kind: str,
    *,
    reduce: str = "min",
    max_bytes: int = MAX_BYTES,
    queue: int = QUEUE,
    api_key: str | None = None,
) -> Starlette:
    """
    The server's application, for any server that runs ASGI.

    Args:
        model (`Any`):
            Has `score_steps(problems, steps)` (`kind="process"`) or `score_batch(problems, solutions)` (`"outcome"`).
            It is called in a thread of its own, one request at a time. Its `ValueError`, and a score that is not
            finite, is answered with status 422, any other exception with 500.
        kind (`str`):
            `"process"` or `"outcome"`.
        reduce (`str`, *optional*, defaults to `"min"`):
            How a process model's steps become the `rewards` and `scores` of a completion.
        max_bytes (`int`, *optional*, defaults to 16 MiB):
            Largest body; a larger one is answered with status 413.
        queue (`int`, *optional*, defaults to `64`):
            The most requests that wait or are scored. Another one is answered with status 429, as is one that would
            wait for more than two minutes.
        api_key (`str`, *optional*):
            The key that requests must have.

    Raises:
        ValueError: an unknown `kind` or `reduce`, or a queue without a place.
    """
    if kind not in KINDS or reduce not in STEP_REDUCTIONS:
        raise ValueError(f"kind {kind!r} is not in {KINDS}, or reduce {reduce!r} not in {tuple(STEP_REDUCTIONS)}.")
    if queue < 1:
        raise ValueError(f"queue is {queue}; it must be at least 1.")
    worker = _Worker(model.score_steps if kind == "process" else model.score_batch, queue)

    async def get_reward(request: Request) -> JSONResponse:
        authorized = _is_authorized(request, api_key)
        # Of a stranger's body nothing is held, and it is received to its end all the same
        body = await _receive_body(request, max_bytes if authorized else 0, refuses=authorized)
        if not authorized:
            raise HTTPException(401, "the key is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        problems, answers = parse_request(body, kind)
        try:
            scores = await worker.score(request, problems, answers)
            return JSONResponse(_answer(scores, kind, reduce))
        except ValueError as error:
            # Sending it again would not help, which clients do after 5xx
            raise HTTPException(422, str(error)) from error

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"kind": kind})

    async def refuse(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def fail(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again, so that the server logs its traceback. The server then closes the
        # connection; a client that does not know would send its next request there and see a connection error
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500, {"Connection": "close"})

    routes = [Route(OPENRLHF_PATH, get_reward, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: fail})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trl_grpo_ext.serve", description="Serve a reward model.")
    parser.add_argument("model", help="model id or folder, of a preset")
    parser.add_argument("--preset", help="name of a preset, or path of a YAML file (default: the one that fits)")
    parser.add_argument("--reference", help="second model of a reward that is a log-ratio (default: the preset's)")
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16 (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-length", type=int, help="most tokens of an input (default: the model's)")
    parser.add_argument("--batch-tokens", type=int, help="most padded tokens of a forward (default: 16384)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to; only this machine by default")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="largest request (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=QUEUE, help="most requests that wait (default: %(default)s)")
    parser.add_argument(
        "--api-key-env",
        default=API_KEY_ENV,
        help="environment variable with the key that clients must send, needed beyond loopback (default: %(default)s)",
    )
    return parser


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _api_key(variable: str, host: str) -> str | None:
    """
    The key that requests must have, if there is one.

    Raises:
        ValueError: none, and the server would bind to more than loopback.
    """
    if variable in os.environ:
        return read_api_key(variable, "--api-key-env")
    if _is_loopback(host):
        return None
    raise ValueError(
        f"--host {host} lets other machines ask. Put a key into the environment variable {variable}, here and where "
        "clients run, and give them its name as api_key_env."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model of the command line and serve it until interrupted."""
    options = _parser().parse_args(arguments)
    try:
        api_key = _api_key(options.api_key_env, options.host)
    except ValueError as error:
        sys.exit(str(error))
    optional = {"log_ratio_model": options.reference, "max_length": options.max_length}
    optional["batch_tokens"] = options.batch_tokens
    given = {name: value for name, value in optional.items() if value is not None}
    model = load_reward_model(options.model, options.preset, dtype=options.dtype, **given)
    model.scorer.to(options.device)
    app = create_app(
        model,
        model.preset.kind,
        reduce=model.preset.reduce,
        max_bytes=options.max_bytes,
        queue=options.queue,
        api_key=api_key,
    )
    uvicorn.run(app, host=options.host, port=options.port)
