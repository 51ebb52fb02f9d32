"""
Reward servers for the tests of the remote client.

`real_app` is the package's server over a [`Scorer`]. `strange_app` misbehaves in the way that the path says; it is
served by a process, `python -m tests.support.reward_servers PORT`, that imports nothing of the package.
"""

import asyncio
import collections
import email.utils
import gzip
import json
import math
import os
import signal
import sys
import time
import zlib


UNSCORED = "unscored"
PACKED = gzip.compress(b" " * 1_000_000)


class Scorer:
    """Scores that tell which problem, which step and which place in the solution they belong to."""

    def score_steps(self, problems, steps):
        return [
            [self._score(problem, k, step) for k, step in enumerate(own)]
            for problem, own in zip(problems, steps, strict=True)
        ]

    def score_batch(self, problems, solutions):
        return [self._score(problem, 0, solution) for problem, solution in zip(problems, solutions, strict=True)]

    def _score(self, problem, k, text):
        if text == "sleep":
            time.sleep(60)
        if text == "break":
            raise RuntimeError("the model broke")
        if text == "unreadable":
            raise ValueError(f"step {k} of {problem!r} cannot be rendered")
        if text == "nan":
            return math.nan
        return None if UNSCORED in text else zlib.crc32(f"{problem}|{k}|{text}".encode()) / 2**32


def correct(asked):
    """The right answer to a request of OpenRLHF's protocol."""
    scores = Scorer().score_steps(asked["prompts"], asked["steps"])
    return {"rewards": [0.0] * len(scores), "scores": [0.0] * len(scores), "step_scores": scores}


def _fewer(answer):
    answer["step_scores"].pop()


def _more(answer):
    answer["step_scores"].append([0.5])


def _fewer_steps(answer):
    answer["step_scores"][-1].pop()


def _more_steps(answer):
    answer["step_scores"][0].append(0.5)


def _moved_step(answer):
    answer["step_scores"][0].append(answer["step_scores"][-1].pop())


def _text(answer):
    answer["step_scores"][0][0] = "0.5"


def _nan(answer):
    answer["step_scores"][0][0] = float("nan")


def _truth(answer):
    answer["step_scores"][0][0] = True


def _no_steps(answer):
    del answer["step_scores"]


def _numbers(answer):
    answer["step_scores"] = [0.5] * len(answer["step_scores"])


SPOILED = {
    spoil.__name__[1:]: spoil
    for spoil in (_fewer, _more, _fewer_steps, _more_steps, _moved_step, _text, _nan, _truth, _no_steps, _numbers)
}


def chat_completion(asked, how, authorization):
    """A judge that finds steps with "wrong" in them wrong; each message of 10 letters takes a token."""
    said = asked["messages"][-1]["content"]
    text = said if isinstance(said, str) else said[0]["text"]
    if how == "freely":
        answer = f"<think>Hm. \\boxed{{{'No' if 'wrong' in text else 'Yes'}}}"
    elif how in ("prose", "echo"):
        answer = authorization if how == "echo" else "I would rather not."
    elif how == "refusal":
        answer = None
    else:
        data = json.loads(text)
        verdicts = [{"step": s["step"], "critique": "", "correct": "wrong" not in s["text"]} for s in data["steps"]]
        if how == "fewer":
            verdicts.pop()
        answer = json.dumps({"steps": verdicts})
    letters = sum(len(message["content"]) for message in asked["messages"])
    usage = {"prompt_tokens": letters // 10, "completion_tokens": 7}
    return {"choices": [{"message": {"role": "assistant", "content": answer}}], "usage": usage}


def strange_app():
    """`/NAME/get_reward` misbehaves as NAME says; `/hits` has the requests of each path, and the most at once."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    hits = collections.Counter()
    questions = []
    inside = 0

    async def trickle():
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    async def cut_off():
        yield b"{"
        raise ConnectionError("cut off")

    async def flood():
        for _ in range(64):
            yield b" " * 2**20

    def pooling(asked, how):
        """The row of position p in ids is [1 - p/1000, p/1000]."""
        tagged = [p for p, token in enumerate(asked["input"]) if how == "tokens" or token == int(how)]
        return {"data": [{"index": 0, "object": "pooling", "data": [[1 - p / 1000, p / 1000] for p in tagged]}]}

    async def answer(request):
        nonlocal inside
        hits[request.url.path] += 1
        number = hits[request.url.path]
        how, argument = request.path_params["how"], request.path_params.get("argument", "")
        asked = await request.json()
        if how == "status":
            return Response(f"because of {argument} {request.headers.get('authorization', '')}", int(argument))
        if how == "long_status":
            # Errors show 500 characters of it, which end within the key
            return Response("x" * 480 + request.headers["authorization"], int(argument))
        if how == "flaky" and number <= int(argument):
            return Response("try again", 503)
        if how == "slow":
            await asyncio.sleep(60)
        if how == "trickle":
            return StreamingResponse(trickle(), media_type="application/json")
        if how == "die" and number > int(argument):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "break_once" and number == 1:
            return Response("broken", 500)
        if how == "later" and number == 1:
            in_two_seconds = email.utils.formatdate(time.time() + 2, usegmt=True)
            seconds = {"seconds": "1", "date": in_two_seconds, "tomorrow": "86400"}[argument]
            return Response("busy", 429, {"retry-after": seconds})
        if how == "disconnect" and number == 1:
            return StreamingResponse(cut_off(), media_type="application/json")
        if how in ("huge", "huge_status"):
            return StreamingResponse(flood(), 200 if how == "huge" else 503)
        if how == "gzip":
            return Response(PACKED, headers={"content-encoding": "gzip"})
        if how == "prose" and "messages" not in asked:
            return Response("no json")
        if how == "redirect":
            return Response(status_code=307, headers={"location": "/good/get_reward"})
        if how == "busy":
            inside += 1
            hits["most at once"] = max(hits["most at once"], inside)
            # The later a request came, the sooner it is answered
            await asyncio.sleep(max(0.01, 0.1 - 0.01 * number))
            inside -= 1
        if request.url.path.endswith("/chat/completions"):
            sent = {name: request.headers.get(name) for name in ("authorization", "accept-encoding")}
            questions.append({**asked, **sent, "path": how})
            return JSONResponse(chat_completion(asked, how, request.headers.get("authorization")))
        if how == "pooling":
            return JSONResponse(pooling(asked, argument))
        if how == "classify":
            length = len(asked["input"]) if "input" in asked else sum(len(m["content"]) for m in asked["messages"])
            return JSONResponse({"data": [{"index": 0, "label": None, "probs": [7.0, -length], "asked": asked}]})
        if how == "outcomes":
            pairs = zip(asked["query"], asked["labels"], strict=True)
            return JSONResponse({"rewards": [len(query) + int(label) for query, label in pairs]})
        body = correct(asked)
        if how in SPOILED:
            SPOILED[how](body)
        return Response(json.dumps(body), media_type="application/json")

    async def asked_for(request):
        return JSONResponse([question for question in questions if question["path"] == request.path_params["how"]])

    async def counts(request):
        return JSONResponse(dict(hits))

    ends = ("get_reward", "pooling", "classify", "v1/chat/completions")
    posts = [Route(f"/{{how}}/{end}", answer, methods=["POST"]) for end in ends]
    posts += [Route(f"/{{how}}/{{argument}}/{end}", answer, methods=["POST"]) for end in ends]
    gets = {"/hits": counts, "/asked/{how}": asked_for, "/health": counts}
    return Starlette(routes=[*(Route(path, endpoint) for path, endpoint in gets.items()), *posts])


def real_app():
    """The package's server for both kinds, with a limit of 64 KiB."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from trl_grpo_ext.reward_models.remote.server import create_app

    kinds = [Mount(f"/{kind}", create_app(Scorer(), kind, max_bytes=65536)) for kind in ("process", "outcome")]
    return Starlette(routes=kinds)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(strange_app(), port=int(sys.argv[1]), log_level="warning")
