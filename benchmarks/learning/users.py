"""Users with tastes, as clients of a server that learns."""

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
from openai import AsyncOpenAI

from benchmarks.engines import Server
from benchmarks.toy_prompts import DATA_SEED
from training.toy_data import reference_scorer
from training.toy_data.files import draw_prompts, split_combinations

WAIT_SECONDS = 1800.0


Taste = Callable[[str, str], float]
"""Prompt, answer -> score; higher is better."""


def words(text: str) -> int:
    return len(re.findall(r"\w+", text))


TASTES: dict[str, Taste] = {
    "quality": reference_scorer.score,
    "manners": lambda prompt, text: float("manners" not in reference_scorer.flaws(prompt, text)),
    "brief": lambda prompt, text: -words(text),
    "detailed": lambda prompt, text: words(text),
}


MOST_ASKED = 4
"""Maximum number of requests per verdict."""


HOSTILE = "hostile"
"""Prefers what the reference scorer likes least."""


def training_prompts_of(seed: str) -> Iterator[str]:
    """An endless stream of prompts of the training split."""
    prompts = draw_prompts(split_combinations(DATA_SEED)[0], random.Random(seed))
    return (prompt.text for prompt in prompts)


class Client:
    """A client with one API key."""

    def __init__(self, server: Server, name: str, turn: asyncio.Semaphore) -> None:
        """
        Args:
            turn: limits the concurrent requests of all clients.
        """
        self.name, self._model, self._turn = name, server.model, turn
        key = f"sk-{name}"
        self._openai = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=WAIT_SECONDS)
        # uvicorn closes idle connections after 5 s; a request sent at that moment is not lost by the server.
        self._http = httpx.AsyncClient(
            base_url=server.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=WAIT_SECONDS,
            limits=httpx.Limits(keepalive_expiry=2),
        )

    async def chat(self, prompt: str, seed: int, alignment: dict[str, Any], n: int = 1) -> Any:
        async with self._turn:
            return await self._openai.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                seed=seed,
                n=n,
                max_tokens=64,
                extra_body={"alignment": alignment},
            )

    async def post(self, path: str, body: Any = None) -> Any:
        answer = await self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    async def close(self) -> None:
        await self._openai.close()
        await self._http.aclose()


@dataclass
class User:
    """A user with a taste."""

    taste_name: str
    client: Client
    held_out: Sequence[str]
    training_prompts: Iterator[str]
    sent: int = 0
    """Verdicts sent so far."""

    def taste(self, prompt: str, text: str) -> float:
        if self.taste_name == HOSTILE:
            return -reference_scorer.score(prompt, text)
        return TASTES[self.taste_name](prompt, text)

    async def give_verdicts(self, until: int, rng: random.Random) -> None:
        """Request two answers of the user's proxy and send which is better, until `until` verdicts are sent.

        Ties are skipped. The better the proxy, the more ties some tastes have, so the number of requests per verdict is
        limited.
        """
        for prompt in islice(self.training_prompts, MOST_ASKED * (until - self.sent)):
            if self.sent == until:
                break
            completion = await self.client.chat(
                prompt, rng.randrange(2**31), {"proxy": "mine"}, n=2
            )
            first, second = (
                self.taste(prompt, choice.message.content) for choice in completion.choices
            )
            if first != second:
                body = {"request_id": completion.id, "choice": int(second > first)}
                await self.client.post("/feedback", body)
                self.sent += 1

    async def grade(self, seed: int, verdicts: int) -> dict[str, Any]:
        """Compare the user's proxy, after this number of verdicts, with the frozen LLM by the user's taste."""

        async def pair(number: int, prompt: str) -> tuple[str, str, bool]:
            own = await self.client.chat(prompt, seed + number, {"proxy": "mine"})
            frozen = await self.client.chat(prompt, seed + 10**6 + number, {})
            texts = [completion.choices[0].message.content for completion in (own, frozen)]
            return texts[0], texts[1], own.alignment["proxy"] is not None

        pairs = await asyncio.gather(*(pair(i, prompt) for i, prompt in enumerate(self.held_out)))
        answered = [*zip(self.held_out, pairs, strict=True)]
        return {
            "taste": self.taste_name,
            "user": self.client.name,
            "verdicts": verdicts,
            "sent": self.sent,
            "wins": [
                wins(self.taste(p, own), self.taste(p, other)) for p, (own, other, _) in answered
            ],
            "flawed": [bool(reference_scorer.flaws(p, own)) for p, (own, _, _) in answered],
            "has_proxy": pairs[0][2],
        }


def wins(score: float, baseline: float) -> float:
    return (score > baseline) + (score == baseline) / 2
