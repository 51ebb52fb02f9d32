"""Reward models behind HTTP, served by processes on loopback: no reward lost, none given to another completion."""

import asyncio
import contextlib
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
import yaml
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForTokenClassification, PreTrainedTokenizerFast

from tests.support.reward_servers import SPOILED, UNSCORED, Scorer, real_app
from tests.support.tiny_models import save_tiny_model
from trl_grpo_ext import StepRewards
from trl_grpo_ext.reward_models.models import ProcessRewardModel
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.presets import PRESETS
from trl_grpo_ext.reward_models.remote import addresses, server, transport
from trl_grpo_ext.reward_models.remote.client import RemoteOutcomeRewardModel, RemoteProcessRewardModel
from trl_grpo_ext.reward_models.remote.protocols import RewardServerError, openrlhf_steps, plain_query, vllm_steps
from trl_grpo_ext.reward_models.remote.server import _api_key, _receive_body, _Worker, create_app, main
from trl_grpo_ext.reward_models.renderings import Bare, Tagged
from trl_grpo_ext.rewards.sources import AsyncRewardSource, wrap_source
from trl_grpo_ext.steps.segmentation import Segmentation


ROOT = Path(__file__).parents[2]

PROBLEMS = ["1 + 1?", "1 + 1?", "пять?", "😀 or \x00?", "", "long"]
STEPS = [["2", f"so {UNSCORED}", "2"], ["3"], ["да\n\nи нет", "\\boxed{5}"], [], ["<extra_0>"], ["step"] * 40]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A server process, killed at the end; its command line ends with the port."""

    def __init__(self, *command, python=sys.executable):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments = [python, "-m", *command, str(self.port)]
        self.start()

    @classmethod
    @contextlib.contextmanager
    def command(cls, *command, **options):
        server = cls(*command, **options)
        try:
            yield server.wait_until_ready()
        finally:
            server.process.kill()
            server.process.wait()

    def start(self):
        self.process = subprocess.Popen(self.arguments, cwd=ROOT, stderr=subprocess.DEVNULL)

    def wait_until_ready(self):
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/health")
                return self
            assert self.process.poll() is None, f"{self.arguments} ended with {self.process.returncode}"
            time.sleep(0.05)
        raise TimeoutError(f"{self.arguments} did not start")

    def hits(self, path):
        return httpx.get(f"{self.url}/hits").json().get(path, 0)


def running():
    return Server.command("tests.support.reward_servers")


@contextlib.contextmanager
def served(app):
    """An application in a thread of this process, at the url that is given."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def real():
    """The package's server, in a thread of this process, which has imported it already."""
    with served(real_app()) as url:
        yield SimpleNamespace(url=url)


@pytest.fixture(scope="module")
def strange():
    with running() as server:
        yield server


def process(url, **options):
    return RemoteProcessRewardModel(url, **{"backoff": 0.01, "timeout": 30.0, "patience": 20.0, **options})


def scored(source, problems=PROBLEMS, steps=STEPS):
    return asyncio.run(source.score_steps(problems, steps))


# ---------------------------------------------------------------------------------------------------------------------
# The package's own server
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_remote_steps_have_the_scores_of_the_model_in_process(real, batch_size):
    expected = Scorer().score_steps(PROBLEMS, STEPS)
    assert scored(process(f"{real.url}/process", batch_size=batch_size)) == expected
    assert sum(score is None for own in expected for score in own) == 1


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_remote_outcomes_have_the_scores_of_the_model_in_process(real, batch_size):
    solutions = ["2", f"{UNSCORED} 2", "\n\nпять", "", "<extra_0>", "step" * 40]
    source = RemoteOutcomeRewardModel(f"{real.url}/outcome/", batch_size=batch_size)
    rewards = asyncio.run(source(prompts=PROBLEMS, completions=solutions, completion_ids=[[]] * 6))
    assert rewards == Scorer().score_batch(PROBLEMS, solutions)
    chats = [[{"role": "system", "content": "Think."}, {"role": "user", "content": problem}] for problem in PROBLEMS]
    answers = [[{"role": "assistant", "content": solution}] for solution in solutions]
    assert asyncio.run(source(prompts=chats, completions=answers, completion_ids=[[]] * 6)) == rewards


def test_no_completions_are_no_rewards(real):
    assert scored(process(f"{real.url}/process"), [], []) == []


def byte_tokenizer(special):
    """One token per byte, so that a token's index is the number of bytes before it."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=special
    )


def test_a_completion_is_rewarded_at_the_last_tokens_of_its_scored_steps(real):
    tokenizer = byte_tokenizer([])
    texts = [
        "да.\n\nso 2<eos><pad><pad>",
        f"a\n\n{UNSCORED}\n\n b \n\n",
        "<eos>",
        "",
        UNSCORED,
        "one step, cut off in 😀"[:-1],
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    source = process(f"{real.url}/process", batch_size=2, policy_tokenizer=tokenizer, reduce="sum")
    wrapped = wrap_source(source, "judge", "none")
    assert isinstance(wrapped, AsyncRewardSource)
    chats = [[{"role": "user", "content": f"problem {number}"}] for number in range(len(texts))]
    sums = asyncio.run(wrapped(prompts=chats, completions=texts, completion_ids=ids, answer=["2"] * len(texts)))

    def score(number, *steps):
        return Scorer().score_steps([f"problem {number}"], [steps])[0]

    first, second, last = score(0, "да.", "so 2"), score(1, "a", UNSCORED, "b"), score(5, "one step, cut off in")
    end_of_second = len(texts[1]) - 1
    assert wrapped.rewards == [
        StepRewards([len("да.\n\n".encode()) - 1, len("да.\n\nso 2".encode()) - 1], first),
        StepRewards([2, len(f"a\n\n{UNSCORED}\n\n") - 1, end_of_second], second),
        None,
        None,
        StepRewards([len(UNSCORED) - 1], [None]),
        StepRewards([len(texts[5]) - 1], last),
    ]
    assert sums == [first[0] + first[1], second[0] + second[2], None, None, None, last[0]]


def test_the_segmentation_decides_about_the_steps(real):
    tokenizer = byte_tokenizer([])
    source = process(
        f"{real.url}/process", policy_tokenizer=tokenizer, segmentation=Segmentation(by="newline", max_steps=2)
    )
    ids = tokenizer("a\nb\nc")["input_ids"]
    (reward,) = asyncio.run(source(prompts=["p"], completions=["-"], completion_ids=[ids]))
    assert reward == StepRewards([1, 4], Scorer().score_steps(["p"], [["a", "b\nc"]])[0])


def test_without_the_policys_tokenizer_the_error_says_who_sets_it():
    with pytest.raises(ValueError, match=r"8000', .*\) has no `policy_tokenizer`.*GRPOExtTrainer sets it"):
        asyncio.run(process("http://127.0.0.1:8000")(prompts=["p"], completions=["c"], completion_ids=[[1]]))


GOOD = {"query": ["pc"], "prompts": ["p"], "labels": [None], "steps": [["c"]]}


@pytest.mark.parametrize(
    ("kind", "body", "status", "reason"),
    [
        ("process", b"{", 400, "the body is not JSON"),
        ("process", b"\xff", 400, "the body is not JSON"),
        ("process", b"[" * 50_000, 400, "the body is not JSON"),
        ("process", [GOOD], 400, "the body must be a JSON object"),
        ("process", {**GOOD, "query": "pc"}, 400, "`query` must be a list of strings"),
        ("process", {"query": ["pc"], "steps": [["c"]]}, 400, "`prompts` must be a list of strings"),
        ("process", {**GOOD, "prompts": [1]}, 400, "`prompts[0]` is not a string"),
        ("process", {**GOOD, "prompts": ["p", "p"]}, 400, "`query` and `prompts` differ in length: 1 and 2"),
        ("process", {"query": ["pc"], "prompts": ["p"]}, 400, "needs `steps`"),
        ("process", {**GOOD, "steps": [["c"], ["c"]]}, 400, "`prompts` and `steps` differ in length: 1 and 2"),
        ("process", {**GOOD, "steps": ["c"]}, 400, "`steps[0]` must be a list of strings"),
        ("process", {**GOOD, "steps": [["c", None]]}, 400, "`steps[0][1]` is not a string"),
        ("process", {**GOOD, "steps": [["c", " \n"]]}, 400, "`steps[0]` has a blank step"),
        ("process", {**GOOD, "steps": [["\ud800"]]}, 400, "half a surrogate pair"),
        ("process", {**GOOD, "steps": [["c" * 65536]]}, 413, "this server takes 65536"),
        ("process", b" " * 20_000_000, 413, "20000000 bytes; this server takes 65536"),
        ("outcome", {**GOOD, "query": ["qc"]}, 400, "`query[0]` does not start with `prompts[0]`"),
    ],
)
def test_a_bad_request_is_answered_with_its_reason(real, kind, body, status, reason):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(f"{real.url}/{kind}/get_reward", content=content)
    assert response.status_code == status and reason in response.json()["error"]


def test_other_methods_and_paths_are_refused_and_good_requests_served(real):
    assert httpx.get(f"{real.url}/process/get_reward").status_code == 405
    assert httpx.post(f"{real.url}/process/other").status_code == 404
    assert httpx.get(f"{real.url}/outcome/health").json() == {"kind": "outcome"}
    asked = {**GOOD, "query": ["pc", "p", "p"], "prompts": ["p"] * 3, "steps": [["c", "d", UNSCORED], [UNSCORED], []]}
    scores = Scorer().score_steps(asked["prompts"], asked["steps"])
    least = min(scores[0][:2])
    answer = httpx.post(f"{real.url}/process/get_reward", json=asked).json()
    assert answer == {"rewards": [least, None, None], "scores": [least, None, None], "step_scores": scores}


def test_a_model_that_breaks_is_a_5xx_and_the_server_goes_on(real):
    reason = r"/process/get_reward, 1 completion\(s\): status 500: .*RuntimeError: the model broke.*\(2 attempt\(s\)\)"
    with pytest.raises(RewardServerError, match=reason):
        scored(process(f"{real.url}/process", retries=1), ["p"], [["break"]])
    assert scored(process(f"{real.url}/process")) == Scorer().score_steps(PROBLEMS, STEPS)


@pytest.mark.parametrize(
    ("step", "reason"),
    [("unreadable", r"step 1 of 'q' cannot be rendered"), ("nan", r"`step_scores\[1\]\[1\]` is nan")],
)
def test_what_the_model_cannot_score_is_not_sent_again_and_the_client_sees_why(real, step, reason):
    source = process(f"{real.url}/process", backoff=30.0)
    with pytest.raises(RewardServerError, match=rf"status 422: {{\"error\":\"{reason}"):
        scored(source, ["p", "q"], [["a", "b"], ["c", step]])


def answered(app, body, raises=False, headers=None):
    """The application's answer to a body, without a server; `raises`: what it raises is not caught here."""

    async def post():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=raises)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post("/get_reward", content=content, headers=headers)

    return asyncio.run(post())


class Fixed:
    """A model that answers every request with the same scores."""

    def __init__(self, scores):
        self.scores = scores

    def score_steps(self, problems, answers):
        return self.scores

    score_batch = score_steps


@pytest.mark.parametrize(
    ("kind", "scores", "name"),
    [
        ("outcome", [0.5, float("inf")], "rewards[1]"),
        ("process", [[None, float("-inf")]], "step_scores[0][1]"),
        ("process", [[0.5], [3e38, 3e38]], "rewards[1]"),
    ],
)
def test_a_score_that_json_or_float32_cannot_hold_is_named(kind, scores, name):
    response = answered(create_app(Fixed(scores), kind, reduce="sum"), GOOD)
    assert response.status_code == 422 and f"`{name}` is " in response.json()["error"]


def test_what_breaks_is_raised_to_the_server_for_its_log():
    body = {**GOOD, "steps": [["break"]]}
    with pytest.raises(RuntimeError, match="the model broke"):
        answered(create_app(Scorer(), "process"), body, raises=True)
    response = answered(create_app(Scorer(), "process"), body)
    assert (response.status_code, response.json()) == (500, {"error": "RuntimeError: the model broke"})
    # The server closes it, and a client that kept it would send its next request into nothing
    assert response.headers["connection"] == "close"


def receiving(messages):
    """What an application receives, in turn."""
    waiting = iter(messages)

    async def receive():
        return next(waiting)

    return receive


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server():
    scope = {"type": "http", "method": "POST", "path": "/get_reward", "headers": [], "query_string": b""}
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def send(message):
        pass

    asyncio.run(create_app(Scorer(), "process")(scope, receiving(messages), send))


def test_of_a_body_that_is_too_large_no_more_is_held_than_of_one_that_is_not():
    limit, chunk = 2**20, bytes(2**20)
    messages = ({"type": "http.request", "body": chunk, "more_body": number < 63} for number in range(64))
    tracemalloc.start()
    try:
        with pytest.raises(HTTPException, match=f"the body has {64 * limit} bytes; this server takes {limit}"):
            asyncio.run(_receive_body(Request({"type": "http"}, receiving(messages)), limit))
        assert tracemalloc.get_traced_memory()[1] < 8 * limit
    finally:
        tracemalloc.stop()


class Turns(Scorer):
    """A model that scores one request whenever it is told to, and remembers what it scored."""

    def __init__(self):
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.scored = []

    def score_steps(self, problems, steps):
        self.began.release()
        assert self.may_end.acquire(timeout=30)
        self.scored += problems
        return super().score_steps(problems, steps)


def test_the_queue_is_bounded_and_whoever_leaves_it_is_not_scored():
    model = Turns()
    body = {"query": ["p"], "prompts": ["p"], "labels": [None], "steps": [["a"]]}

    async def crowd(url):
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:

            async def ask(problem):
                return await client.post(f"{url}/get_reward", json={**body, "query": [problem], "prompts": [problem]})

            first = asyncio.ensure_future(ask("first"))
            await asyncio.to_thread(model.began.acquire, timeout=30)
            leaving = asyncio.ensure_future(ask("leaving"))
            await asyncio.sleep(0.3)
            staying = asyncio.ensure_future(ask("staying"))
            await asyncio.sleep(0.3)
            refused = await ask("one too many")
            leaving.cancel()
            await asyncio.sleep(0.3)
            late = asyncio.ensure_future(ask("late"))
            await asyncio.sleep(0.3)
            for _ in range(4):
                model.may_end.release()
            return refused, [await waiting for waiting in (first, staying, late)]

    with served(create_app(model, "process", queue=3)) as url:
        refused, answers = asyncio.run(crowd(url))
    assert refused.status_code == 429 and "3 requests are waiting" in refused.json()["error"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert [answer.status_code for answer in answers] == [200] * 3
    assert model.scored == ["first", "staying", "late"]


def test_a_wait_beyond_the_clients_time_out_is_refused_before_it_begins():
    worker = _Worker(lambda problems, answers: [], queue=64)
    worker._seconds = 50.0
    for inside, admitted in ((0, True), (1, True), (2, True), (3, False), (63, False)):
        worker._inside = inside
        if admitted:
            worker._refuse_if_full()
        else:
            with pytest.raises(HTTPException) as refused:
                worker._refuse_if_full()
            assert refused.value.status_code == 429 and int(refused.value.headers["Retry-After"]) == 60
    worker._seconds = 0.001
    worker._inside = 63
    worker._refuse_if_full()


def test_more_clients_than_the_queue_takes_lose_no_reward():
    """Eight processes with eight requests in flight each, and a server that takes four at once."""
    problems = [f"problem {number}" for number in range(24)]
    steps = [["a", "b"]] * 24
    expected = Scorer().score_steps(problems, steps)

    async def all_at_once(url):
        sources = [process(url, batch_size=1, backoff=0.01) for _ in range(8)]
        return await asyncio.gather(*(source.score_steps(problems, steps) for source in sources))

    with served(create_app(Scorer(), "process", queue=4)) as url:
        assert asyncio.run(all_at_once(url)) == [expected] * 8


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer wrong", "right", "Basic right", "Bearer right2", "Bearer ключ"]
)
def test_without_the_key_nothing_is_scored(authorization):
    app = create_app(Turns(), "process", api_key="right", max_bytes=1000)
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    response = answered(app, b" " * 100_000, headers=headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")


def test_the_key_comes_from_the_environment_on_both_sides(monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", "right")
    steps = [["a"], ["b", "c"]]
    with served(create_app(Scorer(), "process", api_key=_api_key("REWARD_API_KEY", "0.0.0.0"))) as url:
        source = process(url, api_key_env="REWARD_API_KEY")
        assert scored(source, ["p", "q"], steps) == Scorer().score_steps(["p", "q"], steps)
        with pytest.raises(RewardServerError, match="status 401"):
            scored(process(url), ["p", "q"], steps)


def test_beyond_loopback_a_key_is_needed(monkeypatch):
    monkeypatch.delenv("REWARD_API_KEY", raising=False)
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert _api_key("REWARD_API_KEY", host) is None
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match="REWARD_API_KEY, here and where clients run"):
            _api_key("REWARD_API_KEY", host)
    with pytest.raises(SystemExit, match="lets other machines ask"):
        main(["no-such-model", "--host", "0.0.0.0"])
    monkeypatch.setenv("REWARD_API_KEY", " ")
    with pytest.raises(ValueError, match="holds no key"):
        _api_key("REWARD_API_KEY", "127.0.0.1")


def test_a_request_that_is_too_large_is_not_sent_again_and_costs_only_its_completions(real, caplog):
    source = process(f"{real.url}/process", batch_size=1, on_failure="none", backoff=30.0)
    steps = [["a"], ["c" * 2_000_000], ["b"]]
    with caplog.at_level(logging.WARNING):
        scores = scored(source, ["p", "q", "r"], steps)
    expected = Scorer().score_steps(["p", "q", "r"], steps)
    assert scores == [expected[0], None, expected[2]]
    assert "status 413" in caplog.text and "stay unjudged" in caplog.text


def test_the_command_serves_a_real_model_on_loopback(forked_python, tmp_path):
    folder = save_tiny_model(tmp_path, LlamaForTokenClassification)
    problems, steps = ["1 + 1", "3", "4"], [["2", "so 2"], ["ab" * 30, "b", "c" * 80], []]
    expected = ProcessRewardModel.from_pretrained(folder).score_steps(problems, steps)
    assert [score is None for score in expected[1]] == [False, False, True]
    command = ["trl_grpo_ext.serve", folder, "--device", "cpu", "--port"]
    with Server.command(*command, python=forked_python) as server:
        assert scored(process(server.url), problems, steps) == expected
        assert scored(process(server.url, batch_size=1), problems, steps) == [
            [score if score is None else pytest.approx(score, abs=1e-6) for score in own] for own in expected
        ]
        # A server on all addresses would answer here too
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.2:{server.port}/health")


def test_the_command_reads_its_options(tmp_path, monkeypatch):
    # By its name, the folder would be of another preset, which cannot read it
    folder = save_tiny_model(tmp_path / "Math-psa", LlamaForTokenClassification)
    own = {
        "name": "own",
        "kind": "process",
        "rendering": {"type": "Tagged", "tag": ";"},
        "reading": {"type": "LabelSoftmax", "indices": [0]},
        "head": {"type": "LinearHead", "name": "score", "outputs": 2},
        "reduce": "sum",
    }
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(own))
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.update(app=app, **options))
    body = json.dumps({**GOOD, "steps": [["2", "so 2"]]}).encode()

    def expected(preset, dtype):
        model = ProcessRewardModel.from_pretrained(folder, preset=preset, dtype=dtype)
        return model.score_steps(["p"], [["2", "so 2"]])

    command = [folder, "--device", "cpu"]
    main([*command, "--preset", "trl-prm"])
    assert (started["host"], started["port"]) == ("127.0.0.1", 8000)
    by_name = answered(started["app"], body).json()
    assert by_name["step_scores"] == expected("trl-prm", "float32")
    assert by_name["rewards"] == [min(by_name["step_scores"][0])]

    options = ["--dtype", "bfloat16", "--max-bytes", str(len(body)), "--host", "127.0.0.2", "--port", "8001"]
    options += ["--queue", "5"]
    main([*command, "--preset", str(file), *options])
    assert (started["host"], started["port"]) == ("127.0.0.2", 8001)
    from_file = answered(started["app"], body).json()
    assert from_file["step_scores"] == expected(Preset.from_yaml(file), "bfloat16")
    assert from_file["step_scores"] != expected(Preset.from_yaml(file), "float32")
    assert from_file["rewards"] == [pytest.approx(sum(from_file["step_scores"][0]))]
    assert answered(started["app"], body + b" ").status_code == 413


def test_the_command_hands_over_what_the_model_is_loaded_with(monkeypatch):
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: None)
    loaded = {}

    def load(model, preset, **options):
        loaded.update(model=model, preset=preset, **options)
        scorer = SimpleNamespace(to=lambda device: None)
        return SimpleNamespace(preset=SimpleNamespace(kind="process", reduce="min"), scorer=scorer, score_steps=None)

    monkeypatch.setattr(server, "load_reward_model", load)
    main(["m", "--max-length", "77", "--batch-tokens", "99", "--reference", "ref"])
    assert loaded == {
        **{"model": "m", "preset": None, "dtype": "auto"},
        **{"max_length": 77, "batch_tokens": 99, "log_ratio_model": "ref"},
    }
    loaded.clear()
    main(["m"])
    assert loaded == {"model": "m", "preset": None, "dtype": "auto"}


# ---------------------------------------------------------------------------------------------------------------------
# Servers that misbehave
# ---------------------------------------------------------------------------------------------------------------------


def test_answers_out_of_order_reach_their_completions_and_few_are_asked_at_once(strange):
    problems = [f"problem {number}" for number in range(24)]
    steps = [["step"] * (number % 4) for number in range(24)]
    source = process(f"{strange.url}/busy", batch_size=1, concurrency=5)
    assert scored(source, problems, steps) == Scorer().score_steps(problems, steps)
    assert strange.hits("/busy/get_reward") == 24
    assert 2 <= strange.hits("most at once") <= 5


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 501])
def test_what_says_that_the_request_is_wrong_is_final(strange, status):
    source = process(f"{strange.url}/status/{status}", retries=3)
    with pytest.raises(RewardServerError, match=f"status {status}: because of {status}"):
        scored(source)
    assert strange.hits(f"/status/{status}/get_reward") == 1
    source.on_failure = "none"
    assert scored(source) == [None] * len(PROBLEMS)
    assert strange.hits(f"/status/{status}/get_reward") == 2


def test_a_server_that_breaks_is_asked_again_as_often_as_wanted(strange):
    source = process(f"{strange.url}/status/500", retries=2)
    with pytest.raises(RewardServerError, match=r"status 500: because of 500 +\(3 attempt\(s\)\)"):
        scored(source)
    assert strange.hits("/status/500/get_reward") == 3
    source.on_failure, source.retries = "none", 0
    assert scored(source) == [None] * len(PROBLEMS)
    assert strange.hits("/status/500/get_reward") == 4


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, 520])
def test_a_server_that_is_busy_or_away_is_asked_again_while_patience_lasts(strange, status):
    source = process(f"{strange.url}/status/{status}", retries=0, patience=0.3)
    started = time.monotonic()
    with pytest.raises(RewardServerError, match=rf"status {status}: .*attempt\(s\); no answer for .*patience=0.3 s\)"):
        scored(source)
    assert 0.3 <= time.monotonic() - started < 10
    assert strange.hits(f"/status/{status}/get_reward") > 3


def without_waiting(monkeypatch):
    """The pauses of the client, which are over at once, and a function that tells its time."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    def monotonic():
        return 1000.0 + sum(pauses)

    # Not the modules themselves, whose functions others use
    monkeypatch.setattr(transport, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=monotonic, time=time.time))
    return pauses, monotonic


def test_the_pause_grows_and_differs_from_client_to_client(strange, monkeypatch):
    pauses, _ = without_waiting(monkeypatch)
    source = process(f"{strange.url}/flaky/40", backoff=1.0, patience=1200.0)
    assert scored(source) == Scorer().score_steps(PROBLEMS, STEPS)
    assert strange.hits("/flaky/40/get_reward") == 41
    longest = [min(30, 2**k) for k in range(40)]
    assert len(pauses) == 40
    assert all(top / 2 <= pause <= top for pause, top in zip(pauses, longest, strict=True))
    assert len({pause / top for pause, top in zip(pauses, longest, strict=True)}) == 40
    # By default an absence of 10 minutes is outlived, and the server is asked again within half a minute
    waited = sum(pauses)
    assert waited > 600 and RemoteProcessRewardModel("http://127.0.0.1:1").patience > 600


def test_the_jitter_leaves_the_generators_of_the_training_alone(strange):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    scored(process(f"{strange.url}/flaky/3"))
    assert random.random() == expected


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_the_server_says_how_long_to_wait(strange, kind):
    started = time.monotonic()
    assert scored(process(f"{strange.url}/later/{kind}")) == Scorer().score_steps(PROBLEMS, STEPS)
    # A date has whole seconds
    assert time.monotonic() - started >= 1
    assert strange.hits(f"/later/{kind}/get_reward") == 2


def test_a_wait_that_is_longer_than_patience_is_not_begun(strange):
    started = time.monotonic()
    with pytest.raises(RewardServerError, match=r"status 429: .*patience=20.0 s, Retry-After 86400 s"):
        scored(process(f"{strange.url}/later/tomorrow"))
    assert time.monotonic() - started < 10 and strange.hits("/later/tomorrow/get_reward") == 1


def test_a_wait_is_logged_once_then_at_intervals_and_so_is_its_end(strange, caplog, monkeypatch):
    _, now = without_waiting(monkeypatch)
    source = process(f"{strange.url}/flaky/30", backoff=1.0, patience=1200.0)
    with caplog.at_level(logging.WARNING):
        scored(source)
    waiting = [record.getMessage() for record in caplog.records if "Waiting for it" in record.getMessage()]
    total = now() - 1000
    assert total / 100 < len(waiting) <= total / 60 + 1
    assert all("status 503" in message and "/flaky/30/get_reward" in message for message in waiting)
    assert f"answers again after {total:.0f} s" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("how", ["slow", "trickle"])
def test_a_slow_answer_is_cut_off_by_time(strange, how):
    started = time.monotonic()
    source = process(f"{strange.url}/{how}", timeout=0.2, patience=0.5)
    with pytest.raises(RewardServerError, match=r"no answer within 0\.2 s"):
        scored(source)
    source.on_failure = "none"
    assert scored(source) == [None] * len(PROBLEMS)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("how", ["huge", "huge_status"])
def test_of_a_huge_answer_no_more_is_held_than_allowed(strange, how):
    source = process(f"{strange.url}/{how}", max_answer_bytes=2**20)
    tracemalloc.start()
    try:
        with pytest.raises(RewardServerError, match="more than max_answer_bytes=1048576 bytes"):
            scored(source)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    source.on_failure = "none"
    assert scored(source) == [None] * len(PROBLEMS)


def test_an_answer_that_grows_when_it_is_unpacked_is_not_unpacked(strange):
    with pytest.raises(RewardServerError, match=r"compressed \(gzip\)"):
        scored(process(f"{strange.url}/gzip"))


@pytest.mark.parametrize("how", [*SPOILED, "prose", "redirect"])
def test_an_answer_with_anything_but_one_score_per_step_is_not_used(strange, how):
    problems, steps = ["p", "q", "r"], [["a", "b"], ["c"], ["d", "e"]]
    source = process(f"{strange.url}/{how}")
    with pytest.raises(RewardServerError, match="step_scores|is not JSON|status 307"):
        scored(source, problems, steps)
    source.on_failure = "none"
    assert scored(source, problems, steps) == [None] * 3
    assert strange.hits(f"/{how}/get_reward") == 2


def test_the_first_failure_ends_the_wait_for_the_others(strange):
    started = time.monotonic()
    source = process(f"{strange.url}/break_once", retries=0, batch_size=1, concurrency=2)
    with pytest.raises(RewardServerError, match="status 500"):
        scored(source, ["p"] * 200, [["a"]] * 200)
    assert strange.hits("/break_once/get_reward") < 100
    assert time.monotonic() - started < 10


def test_of_a_server_that_is_killed_what_it_answered_is_kept_and_nothing_else():
    problems, steps = ["p", "q", "r", "s"], [["a"], ["b", "c"], ["d"], ["e"]]
    expected = Scorer().score_steps(problems, steps)
    with running() as server:
        source = process(f"{server.url}/die/2", batch_size=1, concurrency=1, patience=0.5, on_failure="none")
        assert scored(source, problems, steps) == [*expected[:2], None, None]
        server.process.wait(10)
        source.on_failure = "raise"
        with pytest.raises(RewardServerError, match="ConnectError.*patience=0.5 s"):
            scored(source, problems, steps)


def test_a_server_that_is_killed_and_comes_back_loses_no_reward():
    problems, steps = ["p", "q", "r", "s"], [["a"], ["b", "c"], ["d"], ["e"]]

    async def score_while_the_server_restarts(server):
        source = process(f"{server.url}/die/2", batch_size=1, concurrency=1, patience=120.0)
        waiting = asyncio.ensure_future(source.score_steps(problems, steps))
        await asyncio.to_thread(server.process.wait, 30)
        assert not waiting.done()
        server.start()
        return await waiting

    with running() as server:
        scores = asyncio.run(score_while_the_server_restarts(server))
    assert scores == Scorer().score_steps(problems, steps)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged():
    """Options of a reward model with a tag, and the tag's id."""
    tokenizer = byte_tokenizer(["<extra_0>"])
    tag = tokenizer.convert_tokens_to_ids("<extra_0>")
    return {"protocol": "vllm", "rendering": Tagged(tag="<extra_0>"), "tokenizer": tokenizer}, tag


@pytest.mark.parametrize("rows_of", ["tags", "tokens"])
def test_vllm_rows_are_read_at_the_steps_ends(strange, tagged, rows_of):
    options, tag = tagged
    source = process(f"{strange.url}/pooling/{tag if rows_of == 'tags' else 'tokens'}", max_length=30, **options)
    steps = [["ab", "c"], [], ["<extra_0>"], ["abc", "d" * 40, "e"], ["d" * 40]]
    scores = scored(source, ["q?"] * 5, steps)
    # One id per byte, the tag one more: the scores tell where they were read
    assert scores == [[4 / 1000, 6 / 1000], [], [11 / 1000], [5 / 1000, None, None], [None]]


def test_vllm_tags_that_the_policy_can_write_do_not_shift_the_rows(strange, tagged):
    options, _ = tagged
    newline = options["tokenizer"].encode("\n")[0]
    options = {**options, "rendering": Tagged(tag="\n")}
    source = process(f"{strange.url}/pooling/{newline}", **options)
    assert scored(source, ["q\n"], [["a\n\nb", "c"]]) == [[6 / 1000, 8 / 1000]]


def test_vllm_rows_of_another_number_are_not_used(strange, tagged):
    options, tag = tagged
    source = process(f"{strange.url}/pooling/{options['tokenizer'].encode('a')[0]}", **options)
    with pytest.raises(RewardServerError, match=r"`data\[0\]\.data` has 3 entries where 2 were asked for"):
        scored(source, ["q?"], [["aa", "a"]])
    source = process(f"{strange.url}/pooling/{tag}", labels=(2,), **options)
    with pytest.raises(RewardServerError, match=r"row of step 0 is \[0.996, 0.004\], without the label"):
        scored(source, ["q?"], [["ab"]])


@pytest.mark.parametrize("rows", [[], [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 4, "base64", [0.5, 0.5, 0.5]])
def test_vllm_rows_without_a_common_tag_must_be_those_of_all_tokens(rows):
    request = vllm_steps(None, [7, 8, 9], [1, 2], (-1,))
    assert request.parse({"data": [{"data": [[0.5, 0.1], [0.5, 0.2], [0.5, 0.3]]}]}) == [[0.2, 0.3]]
    with pytest.raises(RewardServerError, match=r"`data\[0\]\.data`|row of step 0"):
        request.parse({"data": [{"data": rows}]})


def test_vllm_labels_are_added(strange, tagged):
    options, tag = tagged
    scores = scored(process(f"{strange.url}/pooling/{tag}", labels=(0, 1), **options), ["q?"], [["ab"]])
    assert scores == [[1.0]]


def test_vllm_outcomes_are_the_last_logit(strange, tagged):
    options, _ = tagged
    plain = RemoteOutcomeRewardModel(f"{strange.url}/classify/1", protocol="vllm", model="rm")
    assert asyncio.run(plain(prompts=["ab", "c"], completions=["cde", ""], completion_ids=[[], []])) == [-5.0, -1.0]
    rendered = RemoteOutcomeRewardModel(f"{strange.url}/classify/1", max_length=10, **options)
    rewards = asyncio.run(rendered.score_batch(["ab", "c", "d"], ["cde", "f" * 20, ""]))
    assert rewards == [-6.0, None, -2.0]


def test_vllm_is_asked_as_its_documentation_says(tagged):
    options, tag = tagged
    encode = options["tokenizer"].encode
    source = RemoteOutcomeRewardModel("http://localhost", protocol="vllm", model="rm")
    assert source._vllm_outcome("p", "s").payload == {
        "model": "rm",
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "s"}],
        "use_activation": False,
    }
    source = RemoteOutcomeRewardModel("http://localhost", **options)
    assert source._vllm_outcome("p", "s").payload == {"input": [*encode("ps"), tag], "use_activation": False}


# ---------------------------------------------------------------------------------------------------------------------
# What is sent and read
# ---------------------------------------------------------------------------------------------------------------------


TEMPLATED = Tagged(prompt="Q: {problem}\n", between=" ", tag="<extra_0>")


def test_openrlhfs_own_server_gets_text_in_the_template_of_the_model(strange, tagged):
    """OpenRLHF's server scores `query` as it is, and its own trainer sends prompts in their template."""
    options, _ = tagged
    options = {**options, "protocol": "openrlhf", "rendering": TEMPLATED, "batch_size": 2}
    source = RemoteOutcomeRewardModel(f"{strange.url}/outcomes", **options, max_length=30)
    problems = ["p", "q", "long", "r"]
    rewards = asyncio.run(source.score_batch(problems, ["one", "two", "x" * 40, "three"], ["1", "2", "3", "4"]))
    # One number for each letter of the query, and the labels stay with their completions
    queries = ["Q: p\none<extra_0>", "Q: q\ntwo<extra_0>", None, "Q: r\nthree<extra_0>"]
    assert rewards == [query and len(query) + label for label, query in enumerate(queries, 1)]
    sent = []
    steps_of = RemoteProcessRewardModel("http://localhost", **options, max_length=20)

    async def ask(requests):
        sent.extend(request.payload for request in requests)
        return [[0.5, 0.25], [0.75]]

    steps_of._ask = ask
    scores = scored(steps_of, ["p", "q", "r"], [["a", "b"], [], ["c", "d" * 20]])
    assert scores == [[0.5, 0.25], [], [0.75, None]]
    assert sent == [
        {
            "query": ["Q: p\na<extra_0> b<extra_0>", "Q: r\nc<extra_0>"],
            "prompts": ["Q: p\n", "Q: r\n"],
            "labels": [None, None],
            "steps": [["a", "b"], ["c"]],
        }
    ]


@pytest.mark.parametrize("end", ["", "/", "/get_reward", "/get_reward/"])
def test_the_url_may_end_with_the_path_as_openrlhf_writes_it(real, end):
    assert scored(process(f"{real.url}/process{end}")) == Scorer().score_steps(PROBLEMS, STEPS)


def test_a_preset_says_how_the_served_model_is_fed_cut_and_read(tagged):
    options, _ = tagged
    source = process("http://localhost", protocol="vllm", preset="qwen-math-prm", tokenizer=options["tokenizer"])
    preset = PRESETS["qwen-math-prm"]
    assert (source.max_length, source.rendering) == (4096, preset.rendering) == (preset.max_length, source.rendering)
    assert (source.segmentation, source.reduce, tuple(source.labels)) == (preset.segmentation, preset.reduce, (1,))
    given_values = {"max_length": 8, "reduce": "sum", "labels": (0,), "segmentation": "newline"}
    source = process("http://localhost", preset=preset, tokenizer=options["tokenizer"], **given_values)
    assert (source.max_length, source.reduce, source.labels) == (8, "sum", (0,))
    assert source.segmentation == Segmentation(by="newline")


def test_two_sources_have_two_names_and_no_repr_shows_a_secret():
    sources = [
        RemoteProcessRewardModel("http://a:8000"),
        RemoteProcessRewardModel("http://a:8001"),
        RemoteProcessRewardModel("http://a:8000/other"),
        RemoteOutcomeRewardModel("http://a:8000"),
        RemoteOutcomeRewardModel("http://a:8000", model="org/rm"),
        RemoteProcessRewardModel("http://a:8000", name="mine"),
    ]
    names = [source.__name__ for source in sources]
    assert len(set(names)) == len(names) and names[0] == "RemoteProcessRewardModel-a-8000" and names[-1] == "mine"
    assert not any("/" in name or ":" in name for name in names)
    hidden = RemoteProcessRewardModel("http://a:8000/x?key=hidden", headers={"Authorization": "Bearer hidden"})
    assert repr(hidden) == "RemoteProcessRewardModel('http://a:8000/x', name='RemoteProcessRewardModel-a-8000-x')"


def test_a_proxy_of_the_environment_is_named_and_can_be_left_out(real, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxy = f"http://user:password@127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    named = rf"ConnectError .*through the proxy {proxy.replace('user:password@', '')} of the environment; trust_env"
    with pytest.raises(RewardServerError, match=named):
        scored(process(f"{real.url}/process", patience=0.0))
    assert scored(process(f"{real.url}/process", patience=0.0, on_failure="none")) == [None] * 6
    expected = Scorer().score_steps(PROBLEMS, STEPS)
    assert scored(process(f"{real.url}/process", trust_env=False)) == expected
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert scored(process(f"{real.url}/process")) == expected
    monkeypatch.setenv("HTTP_PROXY", "strange://proxy")
    monkeypatch.setenv("http_proxy", "strange://proxy")
    with pytest.raises(ValueError, match="strange"):
        process(f"{real.url}/process")


@pytest.mark.parametrize(
    "error",
    [
        httpx.ProxyError,
        httpx.ReadError,
        httpx.WriteError,
        httpx.PoolTimeout,
        httpx.LocalProtocolError,
        httpx.RemoteProtocolError,
        httpx.DecodingError,
        httpx.TooManyRedirects,
        httpx.UnsupportedProtocol,
    ],
)
def test_every_error_of_the_transport_is_covered(error, monkeypatch):
    async def fail(self, request):
        raise error("torn")

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", fail)
    source = process("http://localhost", patience=0.0, trust_env=False)
    with pytest.raises(RewardServerError, match=f"{error.__name__} torn"):
        scored(source)
    source.on_failure = "none"
    assert scored(source) == [None] * len(PROBLEMS)


@given(counts=st.lists(st.integers(0, 3), max_size=5), found=st.lists(st.integers(0, 3), max_size=5), data=st.data())
def test_only_an_answer_of_the_same_shape_is_read(counts, found, data):
    request = openrlhf_steps([plain_query("p", ["s"] * count) for count in counts])
    number = st.none() | st.floats(0, 1)
    scores = [data.draw(st.lists(number, min_size=count, max_size=count)) for count in found]
    if counts == found:
        assert request.parse({"step_scores": scores}) == scores
    else:
        with pytest.raises(RewardServerError, match="entries where"):
            request.parse({"step_scores": scores})


def test_labels_come_from_the_column_that_is_named():
    source = RemoteOutcomeRewardModel("http://127.0.0.1:1", label_column="answer", retries=0)
    with pytest.raises(ValueError, match="no column 'answer'"):
        asyncio.run(source(prompts=["p"], completions=["c"], completion_ids=[[1]]))
    sent = []

    async def ask(requests):
        sent.extend(request.payload for request in requests)
        return [1.0, 2.0]

    source._ask = ask
    asyncio.run(source(prompts=["p", "q"], completions=["c", "d"], completion_ids=[[1], [1]], answer=["2", "3"]))
    assert sent == [{"query": ["pc", "qd"], "prompts": ["p", "q"], "labels": ["2", "3"]}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "does not start with http"),
        ({"protocol": "grpc"}, "protocol is 'grpc'"),
        ({"on_failure": "zero"}, "on_failure is 'zero'"),
        ({"concurrency": 0}, "concurrency"),
        ({"batch_size": 0}, "batch_size"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
        ({"patience": -1.0}, "patience"),
        ({"max_answer_bytes": 0}, "max_answer_bytes"),
        ({"url": "http://user:hidden@localhost"}, "user name or password"),
        ({"url": "http://"}, "names no host"),
        ({"headers": {"X-Key": "two\nlines"}}, "header 'X-Key' is not printable"),
        ({"api_key_env": "NO_KEY_HERE"}, "NO_KEY_HERE holds no key"),
        ({"preset": "acemath-rm", "tokenizer": 1}, "kind 'outcome'"),
        ({"preset": "math-shepherd", "tokenizer": 1, "protocol": "vllm"}, "say with `labels`"),
        ({"preset": replace(PRESETS["qwen-math-prm"], mask_tags=True), "protocol": "vllm"}, "hides tags"),
        ({"preset": "qwen-math-prm"}, "go together"),
        ({"rendering": Tagged()}, "go together"),
        ({"protocol": "vllm"}, "needs rendering and tokenizer"),
        ({"rendering": Bare(prefixes=True), "tokenizer": 1}, "makes an input of each step"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        RemoteProcessRewardModel(**{"url": "http://localhost", **options})


@pytest.mark.parametrize(
    "proxy", ["http://alice:secret@10.0.0.1:1", "alice:secret@10.0.0.1:1", "http://u:secret/w@rd@10.0.0.1:1"]
)
def test_the_password_of_a_proxy_is_not_shown(monkeypatch, proxy):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": proxy})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
    hint = addresses.proxy_hint(httpx.URL("http://reward.example"), True)
    assert "10.0.0.1:1" in hint and "secret" not in hint and "alice" not in hint and "rd" not in hint.split(" of ")[0]
