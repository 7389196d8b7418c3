"""The client of the learner's process, which is started when a pass is due and ended when it is idle.

`training.learner` defines the messages. An error there ends the process and not the server; the next pass starts
another.
"""

import asyncio
import json
import logging
import os
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Limit of its start, on a busy machine."""
_LENGTH = struct.Struct(">Q")

Read = Callable[[Sequence[dict[str, Any]], dict[str, Any]], Awaitable[list[bytes]]]
"""(responses, decoding) -> the positions of each; b"" = it cannot be read."""


class LearnerError(Exception):
    """A pass failed; the message says why."""


class Learner:
    """One process, one message at a time."""

    def __init__(self, settings: dict[str, Any], read: Read) -> None:
        """
        Args:
            settings: as `training.learner.Learner` takes them.
            read: has the engine read responses.
        """
        self._settings, self._read = settings, read
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            LearnerError: the learner reports an error, ends, or takes longer than `seconds`.
        """
        try:
            process = await self._started()
            async with asyncio.timeout(seconds):
                return await self._converse(process, message)
        except LearnerError:  # the process reported it, and waits for the next message
            raise
        except BaseException as error:
            self.end()
            if isinstance(error, TimeoutError):
                raise LearnerError(f"it was not done after {seconds:.0f} seconds") from None
            if isinstance(error, OSError | EOFError | ValueError):
                raise LearnerError(f"its process has ended: {error}") from None
            raise

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        self._process = None

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        # It must use neither a GPU nor the directory of the server's metrics.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "training.learner"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        async with asyncio.timeout(START_SECONDS):
            answer = await self._converse(process, self._settings)
        if "ready" not in answer:
            raise ValueError(answer)
        return process

    async def _converse(
        self, process: asyncio.subprocess.Process, message: dict[str, Any]
    ) -> dict[str, Any]:
        """Send a message, serve the requests to read responses, and return the final answer."""
        await _send(process, json.dumps(message).encode())
        while True:
            answer: dict[str, Any] = json.loads(await _receive(process))
            if "error" in answer:
                raise LearnerError(answer["error"])
            if "read" not in answer:
                return answer
            for content in await self._read(answer["read"], answer["decoding"]):
                await _send(process, content)


async def _send(process: asyncio.subprocess.Process, content: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(_LENGTH.pack(len(content)) + content)
    await process.stdin.drain()


async def _receive(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    head = await process.stdout.readexactly(_LENGTH.size)
    return await process.stdout.readexactly(*_LENGTH.unpack(head))
