"""A server on this machine that speaks the protocol of chat completions, and misbehaves where it is told to.

    python tests/loopback.py [--port 8123] [--share 0.05]

It answers prompts of miracle_jax.instructions with dialogues that have a vocabulary for each aspect of the bundled
schema, and others with a sentence. What it sends to the n-th request of a prompt depends on nothing else, except for
the request's seed. --share: of each of FAULTS among the requests.
"""

import argparse
import asyncio
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from miracle_jax.instructions import Instructions

FAULTS = ("429", "429, retry after", "500", "hang", "dropped", "truncated", "malformed", "no choices", "refusal",
          "wrong transcript")  # fmt: skip
RETRY_AFTER = "0.01"
PHRASES = {
    "plain": ("I keep the {a} next to the {b}", "The {a} works and costs little", "We use the {a} {when}",
              "I put the {b} away and go home", "It is a {a}, nothing more", "I bought the {a} {when} for two coins",
              "The {b} stands in the kitchen", "I clean the {a} and then I eat"),
    "lyrical": ("The {a} sings like rain on the {b}", "A river of light runs through the {a}",
                "Like a pale moon the {b} floats over the {a}", "The {a} hums its silver song {when}",
                "My heart is a boat, and the {b} its quiet shore", "Petals of evening fall upon the {a}",
                "The wind writes its poem on the {b}", "Golden dreams drift from the {a} to the stars"),
    "pessimistic": ("The {a} will surely break again {when}", "Nothing good ever came of a {b}",
                    "I fear that the {a} is lost for ever", "It will only get worse with the {b}",
                    "Sooner or later the {a} fails us all", "I gave up hope for the {b} {when}",
                    "There is no point in mending the {a}", "The worst is that the {b} is next"),
    "optimistic": ("The {a} will be wonderful {when}", "I am sure that the {b} turns out fine",
                   "Every {a} is a new chance for us", "Tomorrow the {b} will shine even brighter",
                   "I look forward to the {a} so much", "Luckily the {b} gets better {when}",
                   "We will laugh about the {a} before long", "The best of the {b} is yet to come"),
    "emotional": ("Oh, I love the {a} with all my heart", "I cried when I saw the {b} {when}",
                  "It hurts me so much to leave the {a}", "I feel warm all over when I touch the {b}",
                  "My joy about the {a} makes me tremble", "I miss the {b} terribly {when}",
                  "I was so moved by the {a} that I wept", "My heart aches for the dear old {b}"),
    "critical": ("The evidence for the {a} is rather weak", "Compared with the {b}, its costs exceed its use",
                 "One has to ask first what a {a} proves", "The figures of the {b} do not support that {when}",
                 "I doubt the assumption behind the {a}", "On closer analysis the {b} has three flaws",
                 "The argument for the {a} confuses cause and effect", "Measured properly, the {b} explains little"),
}  # fmt: skip
QUESTIONS = ("How do you like the {a}?", "What happened to the {b} {when}?", "Why did you choose the {a}?",
             "Tell me, where is the {b} now?", "Is the {a} still with you?", "What do your friends say about the {b}?",
             "When did you first see the {a}?", "Would you give the {b} away?", "Who showed you the {a}?",
             "What comes after the {b}?")  # fmt: skip
THINGS = ("lamp", "garden", "letter", "bicycle", "window", "violin", "bridge", "oven", "ladder", "coat", "market",
          "mirror", "orchard", "piano", "river", "station", "table", "umbrella", "village", "wagon", "anchor", "basket",
          "candle", "dress", "engine", "fence", "guitar", "harbour", "island", "jacket", "kettle", "library", "meadow",
          "notebook", "paintbrush", "quilt", "roof", "saddle", "teapot", "workshop")  # fmt: skip
WHEN = ("in the morning", "after the holidays", "on Sundays", "last winter", "before supper", "every other week",
        "at night", "in early spring", "since we moved", "once a year")  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A response as it is."""

    body: bytes | str = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A request."""

    number: int
    """Among all, from 0."""
    nth: int
    """Of this prompt, from 0."""
    prompt: str
    body: dict
    key: str
    at: float
    """On the monotonic clock."""


Fault = Callable[[Asked], str | Sent]
"""What goes wrong with a request: the name of one of FAULTS, or what is sent; empty: nothing."""


def mixed(share: float, seed: int = 0) -> Fault:
    """So much of each of FAULTS."""

    def fault(asked: Asked) -> str:
        digest = hashlib.sha256(f"{seed}/{asked.nth}/{asked.prompt}".encode()).digest()
        kind = int(int.from_bytes(digest[:4]) / 2**32 / share) if share else len(FAULTS)
        return FAULTS[kind] if kind < len(FAULTS) else ""

    return fault


class Loopback:
    """A server in a thread of its own while the context lasts; `url` is what to ask, `asked` what has been."""

    def __init__(self, fault: Fault = lambda asked: "", port: int = 0):
        self.fault, self.asked = fault, []
        self._port, self._seen, self._ready = port, Counter(), threading.Event()
        given = Instructions.load()
        self._aspects = {
            description.manner: aspect
            for attribute, descriptions in zip(given.schema.attributes, given.descriptions, strict=True)
            for aspect, description in zip(attribute.aspects, descriptions, strict=True)
        }

    def __enter__(self) -> "Loopback":
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def prompts(self) -> Counter[str]:
        """How often each has been asked."""
        return Counter(asked.prompt for asked in self.asked)

    async def _serve(self) -> None:
        self._loop, self._stop, self._open = asyncio.get_running_loop(), asyncio.Event(), set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self._port, limit=2**22)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._open.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a client that was killed, or the end
        finally:
            self._open.discard(task)
            writer.close()

    async def _exchange(self, reader, writer) -> bool:
        """One request; whether another may follow on the connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if first.split()[1].endswith("/models"):
            _write(writer, json.dumps({"data": [{"id": "parrot"}, {"id": "owl"}]}))
            return True
        parsed = json.loads(body)
        prompt = "\n".join(message["content"] for message in parsed["messages"])
        asked = Asked(len(self.asked), self._seen[prompt], prompt, parsed, headers.get("authorization", ""),
                      time.monotonic())  # fmt: skip
        self._seen[prompt] += 1
        self.asked.append(asked)
        return await self._send(writer, asked, self.fault(asked))

    async def _send(self, writer, asked: Asked, fault: str | Sent) -> bool:
        good = _completion(self.answer(asked), asked.prompt)
        bodies = {
            "": good, "truncated": good[: len(good) // 2], "malformed": "<html>Bad gateway</html>",
            "no choices": json.dumps({"object": "chat.completion", "choices": []}),
            "refusal": _completion("I'm sorry, but I cannot help with that.", asked.prompt),
            "wrong transcript": _completion("Here is what they said. They agreed on all of it.", asked.prompt),
        }  # fmt: skip
        statuses = {
            "429": Sent('{"error": {"message": "slow down"}}', 429),
            "429, retry after": Sent('{"error": {"message": "slow down"}}', 429, {"Retry-After": RETRY_AFTER}),
            "500": Sent("internal error", 500),
        }
        if isinstance(fault, Sent) or fault in statuses:
            sent = fault if isinstance(fault, Sent) else statuses[fault]
            _write(writer, sent.body, sent.status, sent.headers)
        elif fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "drip":
            _write(writer, "", headers={"Content-Length": "100000"})
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        elif fault == "dropped":
            _write(writer, good[: len(good) // 2], headers={"Content-Length": str(len(good))})
            await writer.drain()
            return False
        else:
            _write(writer, bodies[fault])
        await writer.drain()
        return True

    def answer(self, asked: Asked) -> str:
        """What a good model says: a dialogue for a prompt that asks for one."""
        aspects = [aspect for manner, aspect in self._aspects.items() if manner in asked.prompt]
        chance = random.Random(f"{asked.prompt}/{asked.body.get('seed')}")

        def say(phrase: str) -> str:
            a, b = chance.sample(THINGS, 2)
            return phrase.format(a=a, b=b, when=chance.choice(WHEN))

        if "A:" not in asked.prompt:
            return f"{say(chance.choice(PHRASES[chance.choice(aspects or ['plain'])]))}."
        turns = []
        for question in chance.sample(QUESTIONS, chance.randint(4, 6)):
            each = [PHRASES[aspect] for aspect in aspects or ["plain"]]
            phrases = chance.sample(each[0], 2) if len(each) == 1 else map(chance.choice, each)
            first, *more = map(say, phrases)
            turns.append(f"A: {say(question)}\nB: {first}. {'; '.join(more)}.")
        return "\n\n".join(turns)


def _completion(text: str, prompt: str) -> str:
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "model": "parrot", "choices": [choice], "usage": usage})


def _write(writer, body: bytes | str, status: int = 200, headers: dict[str, str] | None = None) -> None:
    body = body.encode() if isinstance(body, str) else body
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.0)
    given = parser.parse_args()
    with Loopback(mixed(given.share), given.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
