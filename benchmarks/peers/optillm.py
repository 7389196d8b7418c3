"""optillm's proxy in front of the engine: its `bon` and `moa`.

It passes no seed on, sends an empty system prompt and writes "User: " before the question; `bon` samples at
temperature 1 and rates each sample from 0 to 10, `moa` lets the LLM criticise three answers and write a fourth.
"""

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.engines import START_SECONDS, free_port, is_healthy, stop
from benchmarks.peers.engine import Ask, Engine, Open, Reply, client_of, reply_of
from benchmarks.peers.environments import python_of
from benchmarks.peers.setting import N
from judge.messages import Message


def optillm(approach: str) -> Open:
    """A request to optillm's proxy."""

    @asynccontextmanager
    async def opened(engine: Engine) -> AsyncIterator[Ask]:
        python = python_of(engine.setting.environments["optillm"])
        port = free_port()
        command = [str(python.with_name("optillm")), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--base-url", engine.url, "--best-of-n", str(N), "--log", "error"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command,
                env=os.environ | {"OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                await _healthy(process, f"http://127.0.0.1:{port}", log)
                async with client_of(f"http://127.0.0.1:{port}/v1") as client:

                    async def ask(messages: list[Message], seed: int) -> Reply:
                        answer = await client.chat.completions.create(
                            model=f"{approach}-{engine.world.served_name}",
                            messages=messages,  # type: ignore[arg-type]
                            max_tokens=engine.world.decoding.max_new_tokens,
                            seed=seed,
                        )
                        return reply_of(answer)

                    yield ask
            finally:
                stop(process)

    return opened


async def _healthy(process: subprocess.Popen[bytes], url: str, log: object) -> None:
    start = time.monotonic()
    while not is_healthy(url):
        if process.poll() is not None or time.monotonic() - start > START_SECONDS:
            raise RuntimeError(f"optillm did not start: {_tail(log)}")
        await asyncio.sleep(0.2)


def _tail(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return log.read().decode(errors="replace")[-2000:]  # type: ignore[attr-defined]
