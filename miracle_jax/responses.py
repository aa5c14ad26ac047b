"""What a chat-completions endpoint sends, read in bounded memory: whatever it is, it ends as an answer or as one of the
exceptions here."""

import contextlib
import datetime
import email.utils
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miracle_jax import dataset, reading
from miracle_jax.errors import UserError, first_line

LARGEST_BODY = 2**22
"""Bytes of an answer, with all that comes with its text."""
LONGEST_TEXT = 100_000
"""Characters of an answer's text."""
CONNECT = 10.0
"""Seconds to connect within."""
CUT_OFF = "length"
"""How an answer finishes that had no more tokens."""
COUNTS = ("attempts", "requests", "prompt_tokens", "completion_tokens")
"""Of a record."""


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str
    refusal: str
    prompt_tokens: int
    completion_tokens: int


class Again(Exception):
    """No answer; the request is to be sent again, after at least so many seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Hopeless(Exception):
    """No answer, and no other request would have one."""


class Unreadable(Exception):
    """An answer that is not read, and why."""


class Status(Exception):
    """A status other than success."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes):
        self.status, self.headers, self.body = status, headers, body


def http_client(timeout: float, connections: int):
    """Follows no redirect, which could take the key elsewhere; raises Status and Unreadable.

    timeout: seconds between two bytes; to connect CONNECT at most.
    """
    import httpx2
    import openai

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream):
            self._stream = stream

        async def __aiter__(self):
            size = 0
            async for part in self._stream:
                size += len(part)
                if size > LARGEST_BODY:
                    raise Unreadable(f"the answer has more than {LARGEST_BODY:,} bytes")
                yield part

        async def aclose(self):
            await self._stream.aclose()

    async def bound(response):
        if response.headers.get("content-encoding", "identity") != "identity":  # a bomb, maybe
            raise Unreadable("the answer is compressed, which was not asked for")
        response.stream = Bounded(response.stream)
        if not 200 <= response.status_code < 300:
            raise Status(response.status_code, response.headers, await response.aread())

    return openai.DefaultAsyncHttpxClient(
        follow_redirects=False, event_hooks={"response": [bound]},
        timeout=httpx2.Timeout(timeout, connect=min(CONNECT, timeout)),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )  # fmt: skip


def invalid_url() -> type[Exception]:
    """What httpx raises for a URL that it cannot take; a type of no other family."""
    import httpx2

    return httpx2.InvalidURL


def count(record: Mapping[str, Any], name: str) -> int:
    """A number from 0 that others wrote; 0 where it is none."""
    value = record.get(name)
    return value if type(value) is int and 0 <= value < 2**53 else 0


def read_answer(body: bytes) -> Answer:
    """Raises UserError for what is no JSON object, and Again for one without choices."""
    answer = reading.parse_object(body, "the answer is no JSON object")
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Again(f"the answer has no choices: {message_of(body)[0]}".rstrip(": "))
    content, usage = message.get("content"), answer.get("usage")
    if not isinstance(content, str | None):
        raise Again(f"the answer's content is {reading.kind(content)}")
    usage = usage if isinstance(usage, dict) else {}
    text, finish, refusal = (value if isinstance(value, str) else "" for value in
                             (content, choice.get("finish_reason"), message.get("refusal")))  # fmt: skip
    return Answer(_said(text), finish[:40], refusal, count(usage, "prompt_tokens"), count(usage, "completion_tokens"))


def _said(text: str) -> str:
    """A text without what a model thought before it spoke, where its server leaves that in."""
    thought, end, said = text.lstrip().partition("</think>")
    return (said.lstrip() if end else "") if thought.startswith("<think>") else text


def check(answer: Answer) -> None:
    """Raises ValueError for what no job can use."""
    if answer.refusal or answer.finish == "content_filter":
        raise ValueError(f"refused: {answer.refusal or answer.finish}")
    if not answer.text.strip():
        cut = ": it was cut off before it began (--max-tokens)" * (answer.finish == CUT_OFF)
        raise ValueError("the answer is empty" + cut)
    if len(answer.text) > LONGEST_TEXT:
        raise ValueError(f"the answer has more than {LONGEST_TEXT:,} characters")
    if not dataset.is_unicode(answer.text):
        raise ValueError(f"the answer has {dataset.NOT_UNICODE}")


def message_of(body: bytes) -> tuple[str, str]:
    """What an error says of itself in one short line, and its code; empty where it does not say."""
    error = {}
    with contextlib.suppress(UserError):
        error = reading.parse_object(body)
    if isinstance(error.get("error"), dict | str):
        error = error["error"]
    error = error if isinstance(error, dict) else {"message": error}
    texts = {name: value for name, value in error.items() if isinstance(value, str) and value.strip()}
    message = texts.get("message") or texts.get("detail")
    return first_line(ValueError(message)) if message else "", texts.get("code", "")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint wants to pass, by whichever header says so; 0 where none does."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            if math.isfinite(seconds := float(headers.get(name, "")) * unit):
                return max(seconds, 0.0)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    return 0.0
