"""The requests of a soak test, and how their answers are read: an answer is wrong if it differs from the idle server's.

A `Question` is a fully determined request, including its seed. The answer is the same at any time, except for the
version of a proxy that a name stands for at that moment.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import aiohttp

MODEL = "demo"
FIXED = ("aligned", "polite")
"""Proxies of the command line, which are not replaced."""
MOVING = "moving"
"""A name that stands for one version after another."""
PASSING = "passing"
"""A name that is loaded at times only."""

Shape = Literal["chat", "completion", "best of 4", "judge"]
PATHS: dict[Shape, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "best of 4": "/v1/chat/completions",
    "judge": "/judge",
}

BAD: tuple[tuple[int, str, Any], ...] = (
    (404, "/v1/chat/completions", {"model": f"{MODEL}:none"}),
    (400, "/v1/chat/completions", {"alignment": {"proxy": "aligned", "strength": -1}}),
    (400, "/v1/chat/completions", {"alignment": {"proxy": "aligned", "best_of": 4}, "temperature": 0}),
    (400, "/v1/chat/completions", {"messages": []}),
    (400, "/v1/chat/completions", {"max_tokens": 10**9}),
    (400, "/judge", {"prompt": "Why?", "response_a": "So."}),
    (404, "/feedback", {"request_id": "nobody's", "choice": 0}),
    (400, "/v1/responses", {"model": MODEL, "input": [[] for _ in range(3000)]}),
    (400, "/v1/responses", {"model": MODEL, "input": [{"type": "message"} for _ in range(1000)]}),
    (400, "/v1/chat/completions", {"messages": [{} for _ in range(5000)]}),
    (400, "/v1/completions", {"model": MODEL, "prompt": [1.5] * 20_000}),
    (400, "/v1/chat/completions", {"stop": ["\ud800"]}),
    (400, "/proxies", {"name": "..", "path": "one"}),
)  # fmt: skip
"""(status, path, body): requests that are refused."""


@dataclass(frozen=True)
class Question:
    shape: Shape
    prompt: str
    seed: int = 0
    responses: tuple[str, str] = ("", "")
    """Responses for the judge."""

    def body(self, proxy: str | None) -> dict[str, Any]:
        chat = {"messages": [{"role": "user", "content": self.prompt}]}
        common = {
            "model": f"{MODEL}:{proxy}" if proxy else MODEL,
            "seed": self.seed,
            "max_tokens": 48,
        }
        match self.shape:
            case "chat":
                return common | chat
            case "completion":
                return common | {"prompt": self.prompt}
            case "best of 4":
                return common | chat | {"alignment": {"best_of": 4}}
            case "judge":
                a, b = self.responses
                return {"prompt": self.prompt, "response_a": a, "response_b": b}


def questions(prompts: list[str], seeds: int, rng: random.Random) -> Iterator[Question]:
    """Questions of each shape; the judge compares an answer with an unrelated one."""
    for prompt, seed in product(prompts, range(seeds)):
        yield Question("chat", prompt, seed)
    for prompt in prompts:
        yield Question("completion", prompt)
        yield Question("best of 4", prompt)
        yield Question("judge", prompt, responses=(f"{prompt} Yes.", rng.choice(prompts)))


def proxies(shape: Shape) -> tuple[str | None, ...]:
    """The proxies that receive questions of this shape; None is the frozen LLM."""
    if shape == "chat":
        return (None, *FIXED, MOVING)
    return {
        "completion": (None, "aligned", MOVING),
        "best of 4": ("aligned", MOVING),
        "judge": (None,),
    }[shape]


def read(shape: Shape, answer: dict[str, Any]) -> str:
    """The part of the answer that must be the same every time."""
    match shape:
        case "completion":
            return str(answer["choices"][0]["text"])
        case "judge":
            return json.dumps([answer["winner"], answer["consistent"]])
        case _:
            return str(answer["choices"][0]["message"]["content"])


async def read_stream(reply: aiohttp.ClientResponse, chunks: int | None = None) -> str:
    """The text of a streamed chat answer, or of its first `chunks`."""
    text, ended, seen = "", False, 0
    async for line in reply.content:
        if line == b"data: [DONE]\n":
            ended = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            seen += 1
            if seen == chunks:
                return text
    if not ended:
        raise RuntimeError("the stream ended before its end")
    return text
