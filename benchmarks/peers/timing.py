"""Timed rounds. In each all rows have their turn, in a new order, with the same prompts; ratios are within a round.

The machine may be shared: seconds of different rounds are not comparable, and small ratios mean nothing.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.jobs import Job
from benchmarks.peers.engine import Engine
from benchmarks.peers.lab import as_prompts, open_lab, scale_of
from benchmarks.peers.rows import Decoding, Serving
from benchmarks.peers.setting import Setting
from benchmarks.peers.worlds import prompts_of, world_of
from judge.messages import Message

SERVING_ROUNDS = "rounds/serving"
DECODING_ROUNDS = "rounds/decoding"
ALONE = 2
"""Requests one after the other, where there is one client."""
Chats = list[list[Message]]
Seconds = dict[str, list[list[float]]]
"""Of a request, by row: [rounds][numbers of clients]."""


@dataclass(frozen=True)
class JobOfRows(Job):
    """A job about several rows: where one is missing in its result it runs again."""

    rows: tuple[str, ...] = ()


def serving_job(engine: Callable[[], Engine], rows: Mapping[str, Serving]) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        return {"clients": setting.clients, "rows": asyncio.run(_time_serving(engine(), rows))}

    return JobOfRows(SERVING_ROUNDS, run, rows=tuple(rows))


async def _time_serving(engine: Engine, rows: Mapping[str, Serving]) -> Seconds:
    async with AsyncExitStack() as stack:
        asks = {
            name: await stack.enter_async_context(row.open(engine)) for name, row in rows.items()
        }

        async def work(name: str, chats: Chats, clients: int, seed: int) -> None:
            if clients == 1:
                for i, messages in enumerate(chats):
                    await asks[name](messages, seed + 100 * i)
            else:
                await asyncio.gather(
                    *(asks[name](messages, seed + 100 * i) for i, messages in enumerate(chats))
                )

        return await _rounds(engine.setting, list(rows), work)


def decoding_job(rows: Mapping[str, Decoding]) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        lab = open_lab(setting, scale_of(setting))
        decoders = {name: row.make(lab, world_of(setting)) for name, row in rows.items()}

        async def work(name: str, chats: Chats, clients: int, seed: int) -> None:
            prompts = as_prompts(lab.frozen, chats)
            batches = [[prompt] for prompt in prompts] if clients == 1 else [prompts]
            for i, batch in enumerate(batches):
                decoders[name](batch, (seed + i) % 2**31)

        seconds = asyncio.run(_rounds(setting, list(rows), work))
        return {"clients": setting.clients, "rows": seconds}

    return JobOfRows(DECODING_ROUNDS, run, rows=tuple(rows))


async def _rounds(
    setting: Setting,
    names: list[str],
    work: Callable[[str, Chats, int, int], Awaitable[None]],
) -> Seconds:
    """Time every row in every round."""
    for name in names:  # once, so that nothing is compiled or connected in a round
        await work(name, prompts_of(setting, 1), 1, 0)
    seconds: Seconds = {name: [] for name in names}
    for index in range(setting.rounds):
        for name in names:
            seconds[name].append([])
        for clients in setting.clients:
            chats = prompts_of(setting, max(ALONE, clients), skip=max(setting.clients) * index)
            for name in random.Random(f"{index} {clients}").sample(names, len(names)):
                start = time.perf_counter()
                await work(name, chats, clients, 10**6 * (index + 1))
                seconds[name][-1].append((time.perf_counter() - start) / len(chats))
    return seconds
