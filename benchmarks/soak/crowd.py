"""The clients, and an operator that loads and unloads proxies meanwhile."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from benchmarks.soak.requests import (
    BAD,
    MOVING,
    PASSING,
    PATHS,
    Question,
    proxies,
    read,
    read_stream,
)
from proxy.checkpoint import load

PROXY_HEADER = "Assent-Proxy"
WRONG_KEPT = 20

Key = tuple[Question, str | None]
"""(question, version of the proxy that answered; None for the frozen LLM)."""


@dataclass
class Record:
    """The outcomes of all requests so far."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """kind -> right, wrong, lost, cancelled, refused -> requests."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """kind -> seconds of each right answer."""
    details: list[str] = field(default_factory=list)
    """Details of the first wrong and lost ones."""
    versions: Counter[str] = field(default_factory=Counter)
    """version -> right answers under the name MOVING."""
    feedback: int = 0
    """Acknowledged feedback."""
    changes: Counter[str] = field(default_factory=Counter)
    """Loads and unloads."""

    def note(self, kind: str, outcome: str, detail: str = "") -> None:
        self.outcomes[kind][outcome] += 1
        if outcome in ("wrong", "lost") and len(self.details) < WRONG_KEPT:
            self.details.append(f"{kind}: {outcome}: {detail}")


@dataclass
class Crowd:
    """Clients of one server, and the expected answers."""

    http: aiohttp.ClientSession
    questions: Sequence[Question]
    right: dict[Key, str]
    """The idle server's answers."""
    record: Record = field(default_factory=Record)

    async def ask(
        self, question: Question, proxy: str | None, *, stream: bool = False
    ) -> tuple[str, str | None]:
        """(text, version of the proxy that answered)."""
        body = question.body(proxy) | ({"stream": True} if stream else {})
        async with self.http.post(PATHS[question.shape], json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {(await reply.text())[:200]}")
            name, _, version = reply.headers.get(PROXY_HEADER, "").partition("@")
            if (name or None) != proxy:
                raise RuntimeError(f"asked {proxy}, answered by {name or 'the frozen LLM'}")
            text = await read_stream(reply) if stream else read(question.shape, await reply.json())
            return text, version or None

    async def client(self, rng: random.Random, until: float) -> None:
        """Send one request after another."""
        kinds: Sequence[Callable[[random.Random], Awaitable[None]]]
        kinds = [self._question] * 12 + [self._stream] * 4 + [self._cancelled] * 2
        kinds = [*kinds, self._bad, self._feedback, self._passing]
        while monotonic() < until:
            kind = rng.choice(kinds)
            try:
                await kind(rng)
            except Exception as error:
                self.record.note(kind.__name__[1:], "lost", repr(error))

    async def _question(self, rng: random.Random) -> None:
        question = rng.choice(self.questions)
        proxy = rng.choice(proxies(question.shape))
        begin = monotonic()
        text, version = await self.ask(question, proxy)
        kind = f"{question.shape}, {'proxy' if proxy else 'plain'}"
        self._compare(kind, question, version, text, monotonic() - begin)
        if proxy == MOVING:
            self.record.versions[str(version)] += 1

    async def _stream(self, rng: random.Random) -> None:
        question = rng.choice(
            [candidate for candidate in self.questions if candidate.shape == "chat"]
        )
        begin = monotonic()
        text, version = await self.ask(question, rng.choice(proxies("chat")), stream=True)
        self._compare("chat, streamed", question, version, text, monotonic() - begin)

    async def _passing(self, rng: random.Random) -> None:
        """A request to a proxy that may be unloaded: it is refused, or answered completely."""
        question = rng.choice(
            [candidate for candidate in self.questions if candidate.shape == "chat"]
        )
        begin = monotonic()
        try:
            text, version = await self.ask(question, PASSING)
        except RuntimeError as error:
            if not str(error).startswith("404"):
                raise
            return self.record.note("a passing proxy", "refused")
        self._compare("a passing proxy", question, version, text, monotonic() - begin)

    async def _cancelled(self, rng: random.Random) -> None:
        """Disconnect after some chunks of a long answer."""
        question = rng.choice(
            [candidate for candidate in self.questions if candidate.shape == "chat"]
        )
        body = question.body(rng.choice(proxies("chat"))) | {
            "stream": True,
            "max_tokens": 400,
            "ignore_eos": True,
        }
        async with self.http.post(PATHS["chat"], json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {(await reply.text())[:200]}")
            await read_stream(reply, chunks=rng.randrange(1, 20))
            reply.close()
        self.record.note("cancelled", "cancelled")

    async def _bad(self, rng: random.Random) -> None:
        status, path, body = rng.choice(BAD)
        if path == PATHS["chat"]:
            body = self.questions[0].body(None) | body
        async with self.http.post(path, json=body) as reply:
            text = await reply.text()
        outcome = "refused" if reply.status == status else "wrong"
        self.record.note("bad", outcome, f"{body}: {reply.status}, not {status}: {text[:200]}")

    async def _feedback(self, rng: random.Random) -> None:
        body = {
            "prompt": rng.choice(self.questions).prompt,
            "response_a": "Yes.",
            "response_b": "No.",
            "better": "a",
        }
        async with self.http.post("/feedback", json=body) as reply:
            if reply.status != 201:
                raise RuntimeError(f"{reply.status}: {(await reply.text())[:200]}")
        self.record.feedback += 1
        self.record.note("feedback", "right")

    def _compare(
        self, kind: str, question: Question, version: str | None, text: str, seconds: float
    ) -> None:
        right = self.right[question, version]
        self.record.note(
            kind,
            "right" if text == right else "wrong",
            f"{question} {version}: {text!r}, not {right!r}",
        )
        if text == right:
            self.record.seconds[kind].append(seconds)

    async def operator(
        self, rng: random.Random, root: Path, versions: Sequence[str], until: float
    ) -> None:
        """Replace the proxy of one name, and load and unload others, until the time is over."""
        there = {PASSING: False, "shadow": False}
        try:
            while monotonic() < until:
                name = rng.choice([MOVING, *there])
                if name != MOVING and there[name]:
                    await self.change("delete", f"/proxies/{name}", name)
                    there[name] = False
                else:
                    body = {"name": name, "path": rng.choice(versions), "shadow": name == "shadow"}
                    version = await self.change("post", "/proxies", name, body)
                    if version != load(root / str(body["path"]), base=None).version:
                        self.record.note("loading", "wrong", f"{body}: {version}")
                    if name in there:
                        there[name] = True
                await asyncio.sleep(rng.uniform(0.1, 0.9))
            for name in [name for name, is_there in there.items() if is_there]:
                await self.change("delete", f"/proxies/{name}", name)
        except Exception as error:
            self.record.note("loading", "lost", repr(error))

    async def change(self, method: str, path: str, name: str, body: Any = None) -> str:
        async with self.http.request(method, path, json=body) as reply:
            if reply.status not in (200, 201, 202):
                raise RuntimeError(f"{method} {path} {body}: {reply.status}: {await reply.text()}")
            self.record.changes[f"{'loaded' if method == 'post' else 'unloaded'} {name}"] += 1
            return str((await reply.json())["version"])


async def ask_quietly(crowd: Crowd, versions: dict[str, str]) -> None:
    """Record the expected answers: every question, one at a time, for every proxy that may receive it.

    Args:
        crowd: with an empty `right`.
        versions: name -> version of the proxies that MOVING and PASSING will stand for, loaded under these names.
    """
    for question in crowd.questions:
        names = {name for name in proxies(question.shape) if name != MOVING}
        if MOVING in proxies(question.shape):
            names |= set(versions)
        for name in names:
            text, version = await crowd.ask(question, name)
            if name in versions and version != versions[name]:
                raise RuntimeError(f"{name} is {version}, not {versions[name]}")
            crowd.right[question, version] = text
