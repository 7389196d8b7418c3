"""its_hub's best of N, a library: `its_hub_worker.py` runs in its environment and is asked through a pipe.

It passes no seed on. Its own judge asks the LLM for a score from 0 to 10 as JSON.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from benchmarks.peers.engine import Ask, Engine, Open, Reply
from benchmarks.peers.environments import python_of
from benchmarks.peers.setting import N
from judge.messages import Message

WORKER = Path(__file__).with_name("its_hub_worker.py")


def its_hub(judge: Literal["own", "rank"]) -> Open:
    """Best of N by its own judge, or with Assent's `/judge/rank` as its reward model."""

    @asynccontextmanager
    async def opened(engine: Engine) -> AsyncIterator[Ask]:
        settings = {
            "url": engine.server.url,
            "model": engine.world.served_name,
            "max_tokens": engine.world.decoding.max_new_tokens,
            "n": N,
            "judge": judge,
            "wish": engine.world.wish,
        }
        process = await asyncio.create_subprocess_exec(
            python_of(engine.setting.environments["its_hub"]),
            "-P",  # else this directory's its_hub.py would be imported
            WORKER,
            json.dumps(settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin and process.stdout
        waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        reading = asyncio.create_task(_read(process.stdout, waiting))

        async def ask(messages: list[Message], seed: int) -> Reply:
            number = len(waiting)
            waiting[number] = asyncio.get_running_loop().create_future()
            line = json.dumps({"number": number, "messages": messages}) + "\n"
            process.stdin.write(line.encode())  # type: ignore[union-attr]
            answer = await waiting[number]
            if "error" in answer:
                raise RuntimeError(f"its_hub: {answer['error']}")
            return Reply(answer["text"], answer["prompt_tokens"], answer["completion_tokens"])

        try:
            yield ask
        finally:
            reading.cancel()
            process.stdin.close()
            await process.wait()

    return opened


async def _read(
    lines: asyncio.StreamReader, waiting: dict[int, asyncio.Future[dict[str, Any]]]
) -> None:
    """Hand each answer to the request that waits for it."""
    while line := await lines.readline():
        answer = json.loads(line)
        waiting[answer["number"]].set_result(answer)
    for future in waiting.values():
        if not future.done():
            future.set_exception(RuntimeError("its_hub's worker has ended"))
