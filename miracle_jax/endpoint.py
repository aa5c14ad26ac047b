"""An OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama), asked one job at a time.

Whatever the endpoint or the network does ends as one of four things: the request is sent again, later; another answer
is asked for; the job fails, with its reason; or the run stops with one sentence. asking.py asks many jobs at once.

The key comes from the environment and goes into the header of requests to the endpoint, never to where that redirects,
and nowhere else: what is recorded or said of answers that repeat it has [key] in its place.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from miracle_jax import reading, responses
from miracle_jax.errors import UserError, first_line, refuse
from miracle_jax.journal import DONE, FAILED

KEY_VARIABLE = "OPENAI_API_KEY"
SHORTEST_KEY = 8
"""Characters of what is taken out of texts; local servers take any word for a key, also one that dialogues use."""
LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 600.0
"""Seconds between two requests for an answer by our own choice, and at the endpoint's wish (Retry-After)."""
MOST_PUT_OFF = 100
"""Requests for an answer that the endpoint puts off, until they count as tries."""
FIRST_CONTACT = 3
"""Connections that fail before the first answer at all, until the endpoint counts as absent."""
IN_A_ROW = 20
"""Jobs in a row that the endpoint does not answer, until it counts as lost."""


@dataclass(frozen=True)
class Settings:
    """What asks an endpoint."""

    endpoint: str = ""
    """Base URL of an OpenAI-compatible API: https://api.openai.com/v1, http://127.0.0.1:8000/v1"""
    model: str = ""
    """What the endpoint calls it."""
    key_variable: str = ""
    """Environment variable with the key. Empty: OPENAI_API_KEY, and no key where that is not set, or the endpoint is a
    plain http:// one of another machine."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1000
    """Most tokens of an answer."""
    extra: str = "{}"
    """JSON object of more parameters; null takes one out: '{"max_tokens": null, "max_completion_tokens": 2000}'"""
    seed: int = 0
    """Every request has a seed of its own, made of this one; it shuffles too."""
    in_flight: int = 32
    """Requests at the same time; 1 for a server that answers one after the other, or they wait beyond their timeout."""
    requests_per_minute: float = 0.0
    """At most; 0: as many as the endpoint answers."""
    timeout: float = 120.0
    """Seconds that an answer may take, from the connection to its last byte."""
    tries: int = 8
    """Requests for an answer, where none comes or none that can be read. Those that the endpoint puts off (429 with
    Retry-After) do not count while they cost less than ten minutes."""
    attempts: int = 3
    """Answers of which one has to be usable."""
    backoff: float = 1.0
    """Seconds waited at most before the second try, doubled with each further one up to a minute."""
    price_in: float = 0.0
    """USD per million tokens of prompts."""
    price_out: float = 0.0
    """USD per million tokens of answers."""
    budget: float = 0.0
    """USD, earlier runs included, after which no job is begun; those in flight are still paid. 0: no limit"""
    limit: int = 0
    """Jobs asked in this run; 0: all."""
    again: Literal["", "failed"] = ""
    """failed: jobs that failed are asked again."""

    def check(self) -> None:
        """Raises UserError with all that is wrong."""
        problems = []
        if problem := _url_problem(self.endpoint):
            problems.append(f"--endpoint {problem}")
        if not self.model.strip() or not self.model.isprintable():
            problems.append("--model is missing; what does the endpoint call the model?")
        least = {"in_flight": 1, "max_tokens": 1, "tries": 1, "attempts": 1}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and name != "seed" and not least.get(name, 0) <= value < 2**53:
                problems.append(f"--{name.replace('_', '-')} {value}: expected a number from {least.get(name, 0)} on")
        if not self.timeout:
            problems.append("--timeout 0 lets nothing be answered")
        if self.budget and not (self.price_in or self.price_out):
            problems.append("--budget needs the prices: --price-in and --price-out, in USD per million tokens")
        try:
            parameters = self.parameters()
            json.dumps(parameters, allow_nan=False, ensure_ascii=False).encode()
            fixed = {"messages", "model", "stream", "n"} & set(parameters)
            problems += [f"--extra cannot set {name!r}" for name in sorted(fixed)]
        except UserError as error:
            problems.append(str(error))
        except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair
            problems.append(f"--extra {self.extra} cannot be sent: {error}")
        refuse(problems, "nothing can be asked with these flags")
        self.key()

    def key(self) -> str:
        """The key in the environment; empty: none. Raises UserError where there is none but should be."""
        name = self.key_variable or KEY_VARIABLE
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,99}", name) or name.startswith("sk_"):
            raise UserError("--key-variable takes the name of an environment variable, and not the key itself")
        if not self.key_variable and not self._safe():
            return ""
        key = os.environ.get(name, "").strip()
        if self.key_variable and not key:
            raise UserError(f"--key-variable {name}: there is no such environment variable, or it is empty; export it")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"what the environment variable {name} holds is no key: it has blanks or other characters")
        return key

    def _safe(self) -> bool:
        """Whether nobody on the way can read what is sent."""
        parts = urllib.parse.urlsplit(self.endpoint)
        return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")

    def parameters(self) -> dict[str, Any]:
        """Of every request, but for its seed; None stands for what is not sent."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return given | reading.parse_object(self.extra, f"--extra {self.extra} is no JSON object")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


def _url_problem(url: str) -> str:
    if not url:
        return "is missing; give the base URL, for instance http://127.0.0.1:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        whole = False
    if not whole or not url.isprintable() or " " in url:
        return f"{url} is no URL; it begins with http:// or https://, for instance http://127.0.0.1:8000/v1"
    if "@" in parts.netloc or "?" in url or "#" in url:  # not quoted: it may be a secret
        return f"has a user, a password or a query, which would be kept in files; export a key as {KEY_VARIABLE}"
    if parts.path.rstrip("/").endswith("/completions"):
        return f"{url} goes too far; give the base URL, which ends before /chat/completions"
    return ""


@dataclass(frozen=True)
class Job:
    """Something to be answered."""

    id: str
    messages: list[dict[str, str]]
    """As the API has them: role and content."""
    check: Callable[[str], object] = lambda text: None
    """Raises ValueError, which says why, where an answer is not usable."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else its record shall have."""


class Endpoint:
    """To be used as an asynchronous context. Raises UserError, from any method, where the run has to stop."""

    def __init__(self, settings: Settings):
        try:
            import aiolimiter
            import openai
        except ImportError as error:
            raise UserError(
                f"what asks an endpoint needs the package {error.name}: bash launch/setup.sh corpus (or pip install "
                "'miracle-jax[corpus]')"
            ) from None
        settings.check()
        self.settings, self._key, self._openai = settings, settings.key(), openai
        try:
            self._client = openai.AsyncOpenAI(
                base_url=settings.endpoint, api_key=self._key or "none", max_retries=0,
                default_headers={"Accept-Encoding": "identity"},
                http_client=responses.http_client(settings.timeout, settings.in_flight),
            )  # fmt: skip
            self._client.base_url.join("x").host  # noqa: B018 - raises InvalidURL
        except (ImportError, ValueError, OSError, responses.invalid_url()) as error:
            raise UserError(
                f"{settings.endpoint} cannot be asked: {first_line(error)}; look at the URL and at the environment's "
                "proxies and certificates (ALL_PROXY, SSL_CERT_FILE)"
            ) from None
        per_minute = settings.requests_per_minute
        self._limiter = aiolimiter.AsyncLimiter(1, 60 / per_minute) if per_minute else contextlib.nullcontext()
        self._not_before = 0.0
        self._reached, self._refused, self._unanswered = False, 0, 0

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.close()

    async def answer(self, job: Job, before: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The record of a job: its id and fields, status, reason, text (the last there was), finish, attempts, requests
        and tokens.

        before: the record of the same job from an earlier run, whose counts are added, and whose seeds are not used
          again.
        """
        counts = {name: responses.count(before or {}, name) for name in responses.COUNTS}
        record = {"id": job.id, **job.fields, "status": FAILED, "reason": "", "text": "", "finish": ""}
        for attempt in range(self.settings.attempts):
            counts["attempts"] += 1
            try:
                answer = await self._until_answered(job, counts)
            except (responses.Again, responses.Hopeless) as error:
                self._unanswered += 1
                return record | counts | {"reason": str(error)}
            self._unanswered = 0
            counts["prompt_tokens"] += answer.prompt_tokens
            counts["completion_tokens"] += answer.completion_tokens
            record["text"] = self._public(answer.text)[: responses.LONGEST_TEXT]
            record["finish"] = self._public(answer.finish)
            try:
                responses.check(answer)
                job.check(answer.text)
                return record | counts | {"status": DONE, "reason": ""}
            except ValueError as error:
                record["reason"] = self._public(first_line(error))
                if attempt + 1 < self.settings.attempts:
                    await self._back_off(attempt)
        return record | counts

    def check_alive(self, reason: str) -> None:
        """Raises UserError where IN_A_ROW jobs have not been answered. reason: of the last."""
        if self._unanswered >= IN_A_ROW:
            raise UserError(
                f"{self.settings.endpoint} did not answer the last {self._unanswered} jobs, the last of them for this "
                f"reason: {reason}; when that is mended, run the same command with --again failed"
            )

    async def _until_answered(self, job: Job, counts: dict[str, int]) -> responses.Answer:
        """Raises responses.Again when the tries are used up, and responses.Hopeless."""
        number = counts["attempts"]
        seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed}/{job.id}/{number}".encode()).digest()[:4]) >> 1
        attempt, put_off, until = 0, 0, time.monotonic() + LONGEST_WAIT
        while True:
            counts["requests"] += 1
            try:
                return await self._request(job, seed)
            except responses.Again as error:
                self._hold(error)
                if error.wait and put_off < MOST_PUT_OFF and time.monotonic() < until:
                    put_off += 1  # _turn waits
                    continue
                attempt += 1
                if attempt == self.settings.tries:
                    raise
            await self._back_off(attempt - 1)

    async def _back_off(self, attempt: int) -> None:
        """Exponential, with full jitter."""
        most = min(self.settings.backoff * 2.0 ** min(attempt, 60), LONGEST_BACKOFF)
        await asyncio.sleep(random.uniform(0, most))

    def _hold(self, error: responses.Again) -> None:
        """Nobody sends anything before the endpoint wants it."""
        if error.wait > LONGEST_WAIT:
            raise UserError(
                f"{self.settings.endpoint} wants to be asked again in {error.wait / 60:,.0f} minutes only ({error}); "
                "run the same command then"
            )
        self._not_before = max(self._not_before, time.monotonic() + error.wait)

    async def _turn(self) -> None:
        """Returns when the next request may be sent."""
        while True:
            async with self._limiter:
                wait = self._not_before - time.monotonic()
            if wait <= 0:
                return
            await asyncio.sleep(wait + random.uniform(0, self.settings.backoff))

    async def _request(self, job: Job, seed: int) -> responses.Answer:
        """One request. Raises responses.Again and responses.Hopeless."""
        settings, openai = self.settings, self._openai
        parameters = {k: v for k, v in ({"seed": seed} | settings.parameters()).items() if v is not None}
        late = f"no answer within {settings.timeout:g} s (--timeout, --in-flight)"
        await self._turn()
        try:
            async with asyncio.timeout(settings.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=settings.model, messages=job.messages, extra_body=parameters
                )
            self._reached = True
            return responses.read_answer(self._without_key(response.content))
        except UserError as error:  # of what is no JSON
            raise responses.Again(self._public(str(error))) from None
        except TimeoutError:
            raise responses.Again(late) from None
        except openai.APIConnectionError as error:
            reason = self._unconnected(error.__cause__)
            raise responses.Again(late if isinstance(error, openai.APITimeoutError) else reason) from None
        except responses.Unreadable as error:
            raise responses.Again(str(error)) from None
        except responses.Status as answer:
            self._reached = True
            raise await self._status_error(answer) from None

    def _unconnected(self, cause: Exception) -> str:
        """The reason. Raises UserError where there has never been a connection."""
        import httpx2

        reason = f"the connection failed: {self._public(f'{type(cause).__name__}: {first_line(cause)}')}"
        if not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            self._reached = True
        self._refused += not self._reached
        if self._refused >= FIRST_CONTACT:
            where = self.settings.endpoint
            raise UserError(f"{where} cannot be reached: {reason}; is it running, and is the URL right?")
        return reason

    async def _status_error(self, answer: responses.Status) -> Exception:
        endpoint, status = self.settings.endpoint, answer.status
        said, code = responses.message_of(self._without_key(answer.body))
        reason = f"status {status}" + f": {self._public(said)}" * bool(said)
        if status in (401, 403):  # what is said may hold a part of the key
            variable = self.settings.key_variable or KEY_VARIABLE
            have = "the key" if self._key else "requests without a key"
            return UserError(f"{endpoint} refuses {have} (status {status}); export a valid one as {variable}")
        if status == 404:
            wrong = f"{endpoint} knows no model {self.settings.model}, or no chat completions ({reason})"
            return UserError(wrong + await self._models())
        if status == 402 or code == "insufficient_quota":
            return UserError(f"{endpoint} wants to be paid first ({reason}); run the same command then")
        if status < 400:
            to = first_line(ValueError(self._public(answer.headers.get("location", ""))))
            return UserError(f"{endpoint} redirects to {to!r} (status {status}); give the URL to ask as --endpoint")
        if status in (408, 409, 429) or status >= 500:
            return responses.Again(reason, responses.retry_after(answer.headers))
        return responses.Hopeless(reason)

    async def _models(self) -> str:
        """What the endpoint has, for a sentence."""
        names = []
        wrong = (TimeoutError, UserError, TypeError, self._openai.OpenAIError, responses.Status, responses.Unreadable)
        with contextlib.suppress(*wrong):
            async with asyncio.timeout(responses.CONNECT):
                listed = await self._client.models.with_raw_response.list()
            models = reading.parse_object(listed.content).get("data")
            names = [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)][:10]
        return f"; it has {self._public(', '.join(names))[:500]}" if names else "; the URL often ends in /v1"

    def _public(self, text: str) -> str:
        return self._without_key(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")

    def _without_key(self, text: bytes) -> bytes:
        return text.replace(self._key.encode(), b"[key]") if len(self._key) >= SHORTEST_KEY else text
