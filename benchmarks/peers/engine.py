"""The engine that all serving rows share: Assent's server, requests to it, and vLLM's counters."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import AsyncOpenAI

from benchmarks.demo import gather
from benchmarks.engines import Server, serve
from benchmarks.peers.setting import AT_ONCE, Setting
from benchmarks.peers.worlds import World, world_of
from judge.messages import Message

SECONDS = 1800
"""For which a client waits for an answer."""
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


class Reply(NamedTuple):
    """An answer, and the tokens that it is said to have cost; None = nothing is said."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


Ask = Callable[[list[Message], int], Awaitable[Reply]]
"""A chat and a seed -> an answer."""
Open = Callable[["Engine"], AbstractAsyncContextManager[Ask]]
"""Starts what a row needs beside the engine."""


@dataclass(frozen=True)
class Engine:
    """The server of a world."""

    server: Server
    setting: Setting
    world: World

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens since the start, by vLLM's counters."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=SECONDS).text
        prompt, completion = (
            sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))
            for name in COUNTERS
        )
        return int(prompt), int(completion)


@contextmanager
def open_engine(setting: Setting, judge: Path | None = None) -> Iterator[Engine]:
    """The server, with a judge in this directory beside the LLM itself."""
    world = world_of(setting)
    flags: list[str | Path] = ["--enable-prefix-caching"]  # as served by default
    if world.wish is not None:
        setting.work.mkdir(parents=True, exist_ok=True)
        file = setting.work / "principles.json"
        principle = {"system": f"Choose the better response. {world.wish}"}
        file.write_text(json.dumps({"wish": principle}), encoding="utf-8")
        flags += ["--principles", file]
    if judge is not None:
        flags += ["--judge", judge]
    with serve(world.served, "assent", {world.proxy_name: world.proxy}, flags) as server:
        yield Engine(server, setting, world)


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key="none", timeout=SECONDS, max_retries=0)


def assent(
    *,
    with_proxy: bool = False,
    alignment: Callable[[World], dict[str, Any]] | None = None,
    with_wish: bool = False,
) -> Open:
    """A request to Assent itself.

    Args:
        with_proxy: whether the model's name says so.
        alignment: the field of that name.
        with_wish: whether a system prompt says what answers should be like.
    """

    @asynccontextmanager
    async def opened(engine: Engine) -> AsyncIterator[Ask]:
        world = engine.world
        model = world.served_name + (f":{world.proxy_name}" if with_proxy else "")
        extra = {"alignment": alignment(world)} if alignment else {}
        first = [Message(role="system", content=world.wish)] if with_wish and world.wish else []
        async with client_of(engine.url) as client:

            async def ask(messages: list[Message], seed: int) -> Reply:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[*first, *messages],  # type: ignore[list-item]
                    max_tokens=world.decoding.max_new_tokens,
                    seed=seed,
                    extra_body=extra,
                )
                return reply_of(answer)

            yield ask

    return opened


def reply_of(answer: Any) -> Reply:
    """Of a chat completion with one choice."""
    usage = answer.usage
    tokens = (
        (usage.prompt_tokens or None, usage.completion_tokens or None) if usage else (None,) * 2
    )
    return Reply(answer.choices[0].message.content or "", *tokens)


async def samples(
    engine: Engine, client: AsyncOpenAI, messages: list[Message], seed: int, n: int
) -> Any:
    """`n` answers in one request, with the log-probabilities of their tokens."""
    return await client.chat.completions.create(
        model=engine.world.served_name,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=engine.world.decoding.max_new_tokens,
        seed=seed,
        n=n,
        logprobs=True,
    )


async def sample_all(
    engine: Engine, title: str, chats: Sequence[list[Message]], n: int, seed: Callable[[int], int]
) -> list[list[str]]:
    """`n` answers to each chat, with a bar of this title; `seed` is called with a chat's index."""
    async with client_of(engine.url) as client:
        drawn = await gather(
            title, len(chats), AT_ONCE, lambda i: samples(engine, client, chats[i], seed(i), n)
        )
    return [[choice.message.content or "" for choice in answer.choices] for answer in drawn]


def mean_logprob(choice: Any) -> float:
    """Of an answer's tokens."""
    tokens = choice.logprobs.content
    return sum(token.logprob for token in tokens) / max(1, len(tokens))


def likeliest(n: int) -> Open:
    """The answer of `n` whose tokens are the most probable on average: what needs no judge."""

    @asynccontextmanager
    async def opened(engine: Engine) -> AsyncIterator[Ask]:
        async with client_of(engine.url) as client:

            async def ask(messages: list[Message], seed: int) -> Reply:
                answer = await samples(engine, client, messages, seed, n)
                best = max(answer.choices, key=mean_logprob)
                usage = answer.usage
                return Reply(
                    best.message.content or "", usage.prompt_tokens, usage.completion_tokens
                )

            yield ask

    return opened
