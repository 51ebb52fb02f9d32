"""HTTP to reward servers: requests that outlive a server's absence, within bounds of time, bytes and patience."""

import asyncio
import email.utils
import functools
import itertools
import json
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from .addresses import address_of, parse_url, proxy_hint, slug, without_query
from .credentials import check_headers, read_api_key
from .protocols import RewardServerError, shown


logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
# A wait is logged once it is this long, and again each time that it has grown by the second number
_FIRST_NOTICE = 2.0
_NOTICE_EVERY = 60.0
# Server and proxies say so of themselves: too slow, too early, too many requests, or (502 and above) nobody there
_BUSY_STATUSES = (408, 425, 429)
# What another attempt does not change
_FINAL_ERRORS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.TooManyRedirects)
# What httpx sends by itself
_OWN_HEADERS = ("accept", "accept-encoding", "connection", "user-agent")
_BEARER = "Bearer "
# What is shorter, such as a version, is a part of too many words
_SHORTEST_SECRET = 6
# Not Python's own generator, whose state belongs to the training run
_jitter = random.Random()


class _Answer(NamedTuple):
    """Status, headers and body of an answer."""

    status: int
    headers: httpx.Headers
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise RewardServerError(f"the answer is not JSON: {self.text()}") from None

    def text(self) -> str:
        return shown(self.body.decode("utf-8", "replace"))


@dataclass(kw_only=True, eq=False, repr=False)
class RemoteSource:
    """
    What all reward sources behind HTTP share: where the server is and how it is asked.

    A request is sent again while the server is away or busy: after connection errors, after a time-out, and after
    statuses 408, 425, 429 and 502 and above. Before attempt k + 1 the client waits

        min(30, backoff * 2^(k - 1)) * u seconds,    u uniform in [0.5, 1]

    and at least as long as the server's `Retry-After` says. The wait is logged once it is 2 s long, and then every
    minute. It ends with an error when no request of the batch has been answered for `patience` seconds. After status
    500, by which the server says that the request broke it, `retries` further attempts are made. Any other status, an
    answer that is too large and one that is not understood are final.

    Args:
        url (`str`):
            Where the server is, such as `"http://127.0.0.1:8000"`. The protocol's path is appended where the url does
            not end with it.
        name (`str`, *optional*):
            Name in logs, errors and `outcome_gate`; by default made from the class, the model and the url.
        on_failure (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops the training. `"none"` logs a warning and leaves the request's completions unjudged.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests in flight at once, per process.
        timeout (`float`, *optional*, defaults to `300.0`):
            Seconds from sending a request to its full answer, the server's queue included.
        patience (`float`, *optional*, defaults to `1200.0`):
            Seconds without any answer after which the server is given up. Keep it below `ddp_timeout`, after which
            other processes give this one up.
        retries (`int`, *optional*, defaults to `4`):
            Further attempts after status 500.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds of the first pause.
        headers (`Mapping[str, str]`, *optional*):
            Sent with every request. They are never shown.
        api_key_env (`str`, *optional*):
            Name of the environment variable with the key, which is sent as `Authorization: Bearer KEY`. The key is
            read for each batch and never stored.
        trust_env (`bool`, *optional*, defaults to `True`):
            Whether proxies are taken from the environment (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`).
        max_answer_bytes (`int`, *optional*, defaults to 16 MiB):
            Largest answer.

    Raises:
        ValueError: an address, choice or header that cannot work, a number out of range, or a variable without a key.
    """

    url: str = field(kw_only=False)
    name: str | None = None
    on_failure: str = "raise"
    concurrency: int = 8
    timeout: float = 300.0
    patience: float = 1200.0
    retries: int = 4
    backoff: float = 1.0
    headers: Mapping[str, str] | None = None
    api_key_env: str | None = None
    trust_env: bool = True
    max_answer_bytes: int = 16 * 2**20

    def __post_init__(self):
        url = parse_url(self.url)
        # TRL's logs show it
        self.__name__ = self.name or slug(type(self).__name__, *self._name_parts(), url.netloc.decode(), url.path)
        if self.on_failure not in ("raise", "none"):
            raise ValueError(f"on_failure is {self.on_failure!r}; known: raise, none.")
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("max_answer_bytes", self.max_answer_bytes, 1),
            ("retries", self.retries, 0),
            ("backoff", self.backoff, 0),
            ("patience", self.patience, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be positive.")
        self._client()

    def _name_parts(self) -> list[str]:
        """What distinguishes the source from others at the same url."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({without_query(httpx.URL(self.url))!r}, name={self.__name__!r})"

    def _client(self) -> httpx.AsyncClient:
        """A client for one event loop: outside the trainer, every call may have its own."""
        # An answer that comes compressed could be small here and huge when it is unpacked
        headers = {"Accept-Encoding": "identity", **check_headers(self.headers)}
        if self.api_key_env is not None:
            headers["Authorization"] = f"{_BEARER}{read_api_key(self.api_key_env, 'api_key_env')}"
        try:
            return httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None),
                trust_env=self.trust_env,
                verify=_tls(self.trust_env),
            )
        except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
            raise ValueError(f"{self.__name__}: {error}{proxy_hint(httpx.URL(self.url), self.trust_env)}") from None

    @asynccontextmanager
    async def _session(self, path: str) -> "AsyncIterator[Session]":
        """The requests of one batch to the path of the protocol."""
        async with self._client() as client:
            yield Session(self, client, address_of(self.url, path))

    def _leave_unjudged(self, error: RewardServerError, session: "Session", completions: int) -> None:
        """Raise the error again, or log it, as `on_failure` says."""
        # A server may repeat what it was sent
        message = session.without_secrets(f"reward server {session.address}, {completions} completion(s): {error}")
        if self.on_failure == "raise":
            raise RewardServerError(message) from None
        logger.warning("%s They stay unjudged.", message)


class Session:
    """
    The requests of one batch to one address.

    Args:
        source ([`RemoteSource`]):
            How the server is asked.
        client (`httpx.AsyncClient`):
            The open client.
        url (`httpx.URL`):
            Where requests go.
    """

    def __init__(self, source: RemoteSource, client: httpx.AsyncClient, url: httpx.URL):
        self.address = without_query(url)
        self._source = source
        self._client = client
        self._url = url
        self._gate = asyncio.Semaphore(source.concurrency)
        self._last_answer = time.monotonic()
        self._next_notice = _FIRST_NOTICE
        given = [value for name, value in client.headers.items() if name not in _OWN_HEADERS]
        # What the query of a url holds is no header, and may be a key all the same
        given += url.params.values()
        self._secrets = [
            part for value in given for part in value.removeprefix(_BEARER).split() if len(part) >= _SHORTEST_SECRET
        ]

    async def post(self, payload: Mapping[str, Any], before: Callable[[], None] = lambda: None) -> Any:
        """
        The JSON that the server answers.

        Args:
            payload (`Mapping[str, Any]`):
                What is sent, as JSON.
            before (`Callable[[], None]`, *optional*):
                Called when it is the request's turn; what it raises keeps the request from being sent.

        Raises:
            RewardServerError: the server refused, broke, stayed away for too long or answered something else.
        """
        body = json.dumps(payload, allow_nan=False).encode()
        async with self._gate:
            before()
            return await self._post(body)

    async def _post(self, body: bytes) -> Any:
        breaks = 0
        for attempt in itertools.count(1):
            retry_after = None
            try:
                answer = await self._send(body)
            except TimeoutError:
                trouble = f"no answer within {self._source.timeout} s"
            except (httpx.HTTPError, OSError) as error:
                trouble = f"{type(error).__name__} {error}" + proxy_hint(self._url, self._source.trust_env)
                if isinstance(error, _FINAL_ERRORS) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise RewardServerError(trouble) from None
            else:
                if 200 <= answer.status < 300:
                    self._note_answer()
                    return answer.json()
                trouble = f"status {answer.status}: {answer.text()}"
                if answer.status >= 502:
                    trouble += proxy_hint(self._url, self._source.trust_env)
                breaks += answer.status == 500
                may_return = answer.status in (500, *_BUSY_STATUSES) or answer.status >= 502
                if not may_return or breaks > self._source.retries:
                    raise RewardServerError(f"{trouble} ({attempt} attempt(s))")
                retry_after = _retry_after(answer.headers)
            await self._pause(attempt, trouble, retry_after)

    async def _send(self, body: bytes) -> _Answer:
        received = bytearray()
        # The time-outs of httpx are those of one packet; an answer that trickles in would never end
        async with asyncio.timeout(self._source.timeout):
            request = self._client.stream(
                "POST", self._url, content=body, headers={"Content-Type": "application/json"}
            )
            async with request as response:
                encoding = response.headers.get("content-encoding", "identity").lower()
                if encoding != "identity":
                    raise RewardServerError(f"the answer is compressed ({encoding}), which was not asked for.")
                async for chunk in response.aiter_raw():
                    received += chunk
                    if len(received) > self._source.max_answer_bytes:
                        limit = self._source.max_answer_bytes
                        raise RewardServerError(f"the answer has more than max_answer_bytes={limit} bytes.")
        # Before any of it is cut to be shown: a part of a secret would not be found
        body = bytes(received)
        for secret in self._secrets:
            body = body.replace(secret.encode(), b"***")
        return _Answer(response.status_code, response.headers, body)

    def _note_answer(self) -> None:
        now = time.monotonic()
        if self._next_notice > _FIRST_NOTICE:
            logger.warning("%s answers again after %.0f s.", self.address, now - self._last_answer)
        self._last_answer = now
        self._next_notice = _FIRST_NOTICE

    async def _pause(self, attempt: int, trouble: str, retry_after: float | None) -> None:
        """Wait before the next attempt; raise once patience is at its end."""
        waited = time.monotonic() - self._last_answer
        left = self._source.patience - waited
        # The bound keeps the power of two a float
        pause = min(_LONGEST_PAUSE, self._source.backoff * 2.0 ** min(attempt - 1, 30)) * _jitter.uniform(0.5, 1.0)
        if retry_after is not None:
            pause = max(pause, retry_after * _jitter.uniform(1.0, 1.25))
        if left <= 0 or (retry_after is not None and retry_after > left):
            asked = "" if retry_after is None else f", Retry-After {retry_after:.0f} s"
            raise RewardServerError(
                f"{trouble} ({attempt} attempt(s); no answer for {waited:.0f} s, patience={self._source.patience} s"
                f"{asked})"
            )
        pause = min(pause, left)
        if waited + pause >= self._next_notice:
            logger.warning(
                "%s: %s. Waiting for it since %.0f s, for at most %.0f s.",
                *(self.address, self.without_secrets(trouble), waited, self._source.patience),
            )
            self._next_notice = waited + pause + _NOTICE_EVERY
        await asyncio.sleep(pause)

    def without_secrets(self, text: str) -> str:
        """A text as it may be shown: without the values of the headers and the query that were given."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


@functools.cache
def _tls(trust_env: bool) -> ssl.SSLContext:
    """Made once: it reads all certificates, which takes longer than a request."""
    return httpx.create_ssl_context(trust_env=trust_env)
