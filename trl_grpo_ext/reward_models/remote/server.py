"""
A server for reward models, by OpenRLHF's protocol extended by steps: `python -m trl_grpo_ext.serve MODEL`.

`POST /get_reward` takes

    {"query": [...], "prompts": [...], "labels": [...], "steps": [[...], ...]}

where `query` is each prompt followed by its completion, and answers

    {"rewards": [...], "scores": [...], "step_scores": [[...], ...]}

A process reward model needs `steps`. It adds `step_scores`, null for a step that it left unscored. `labels` are not
used. Any other status comes with `{"error": ...}`: 4xx says what is wrong with the request, which need not be sent
again, and 5xx says what broke in the server.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ...rewards.step_reductions import STEP_REDUCTIONS
from ...rewards.types import check_finite
from ..opening import load_reward_model
from .protocols import OPENRLHF_PATH


KINDS = ("process", "outcome")
MAX_BYTES = 16 * 2**20


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


async def _receive_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, of which never more than `max_bytes` are held in memory."""
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
    if size > max_bytes:
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


def create_app(model: Any, kind: str, *, reduce: str = "min", max_bytes: int = MAX_BYTES) -> Starlette:
    """
    The server's application, for any server that runs ASGI.

    Args:
        model (`Any`):
            Has `score_steps(problems, steps)` (`kind="process"`) or `score_batch(problems, solutions)` (`"outcome"`).
            It is called in a thread, one request at a time. Its `ValueError`, and a score that is not finite, is
            answered with status 422, any other exception with 500.
        kind (`str`):
            `"process"` or `"outcome"`.
        reduce (`str`, *optional*, defaults to `"min"`):
            How a process model's steps become the `rewards` and `scores` of a completion.
        max_bytes (`int`, *optional*, defaults to 16 MiB):
            Largest body; a larger one is answered with status 413.

    Raises:
        ValueError: an unknown `kind` or `reduce`.
    """
    if kind not in KINDS or reduce not in STEP_REDUCTIONS:
        raise ValueError(f"kind {kind!r} is not in {KINDS}, or reduce {reduce!r} not in {tuple(STEP_REDUCTIONS)}.")
    busy = asyncio.Lock()
    score = model.score_steps if kind == "process" else model.score_batch

    async def get_reward(request: Request) -> JSONResponse:
        problems, answers = parse_request(await _receive_body(request, max_bytes), kind)
        try:
            async with busy:
                scores = await run_in_threadpool(score, problems, answers)
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
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16 (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to; only this machine by default")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="largest request (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model of the command line and serve it until interrupted."""
    options = _parser().parse_args(arguments)
    model = load_reward_model(options.model, options.preset, dtype=options.dtype)
    model.scorer.to(options.device)
    app = create_app(model, model.preset.kind, reduce=model.preset.reduce, max_bytes=options.max_bytes)
    uvicorn.run(app, host=options.host, port=options.port)
