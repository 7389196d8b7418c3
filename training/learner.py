"""The process of `python -m server --learn`, which learns proxies beside a server: on one core at most, with low
priority.

The server starts it and sends jobs to its standard input. The process asks the server to read responses with the LLM,
which the server has in memory already. Messages are bytes after their length. The first one, JSON, names LLM, database
and directory; each later one asks for a pass:

    server  ► {"name": ..., "directory": ..., "sources": [...], "caller": ..., "live": ..., "decoding": {...}}
    process ► {"read": [{"prompt": [...], "response": [...]}, ...], "decoding": {...}}      any number of times
    server  ► one message for each: safetensors of `proxy.positions.Positions`, empty if it cannot be read
    process ► {"outcome": {...}}, or {"error": "..."}
"""

import hashlib
import json
import os
import resource
import signal
import sqlite3
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from accelerate import Accelerator

from judge.feedback import Feedback, FeedbackError
from proxy.checkpoint import BaseModelId, ProxyError
from proxy.engine.parent_watch import watch_parent
from proxy.network import ProxyConfig
from proxy.position_store import PositionStore
from proxy.positions import Positions, joined
from training.console import TrainingError
from training.conversations import Conversations
from training.learning import Outcome, Trial, learn, too_few
from training.models import end_ids, load_tokenizer, model_without_weights, read_embeddings
from training.policy import default_config
from training.positions import Response
from training.verdicts import Verdict, read_verdicts

MOST_ROWS = 20_000
"""Rows of the database that are read, the newest first."""
MOST_BYTES = 2**30
"""Bytes of positions in a pass, and of those kept on disk."""
NICE = "ASSENT_LEARNER_NICE"
"""Environment variable: niceness, 1 to 19. 0: the engine's priority, and no pauses while other processes are busy."""
_MEMORY = 6 * 2**30  # bytes of memory without file mappings
_SLICE = 0.01  # seconds of processor time between two checks whether the machine is busy
_BUSY = 1.5  # wall seconds per second of processor time: above this it had to wait for a core
_SHARE = 0.1  # of a core at most, while the machine is busy
_AT_ONCE = 16  # verdicts whose responses the server reads in one message
NUCLEUS = ("temperature", "top_k", "top_p", "max_candidates")
ERRORS = (TrainingError, FeedbackError, ProxyError, OSError, sqlite3.Error)
_LENGTH = struct.Struct(">Q")


class Stream:
    """Length-prefixed messages."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink

    def send(self, message: Any) -> None:
        content = json.dumps(message).encode()
        self._sink.write(_LENGTH.pack(len(content)) + content)
        self._sink.flush()

    def receive(self) -> bytes | None:
        """The next message; None at the end of the stream."""
        head = self._source.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        return self._source.read(*_LENGTH.unpack(head))


class Learner:
    """Runs the jobs that the server sends."""

    def __init__(self, stream: Stream, settings: dict[str, Any]) -> None:
        """
        Args:
            stream: to the server.
            settings: `model` and `root`, directories; `feedback`, the database's URL; `base`; `chat_template`, the
                server's, or null; `longest`, the maximum number of tokens of prompt and response.
        """
        self.stream, self.base = stream, BaseModelId.model_validate(settings["base"])
        self.longest, self.root = settings["longest"], Path(settings["root"])
        model = settings["model"]
        self.model = model_without_weights(model)
        self.embeddings = read_embeddings(Path(model), self.model)
        tokenizer = load_tokenizer(model)
        tokenizer.chat_template = settings["chat_template"] or tokenizer.chat_template
        self.chats, self.end_ids = Conversations(tokenizer), end_ids(self.model, tokenizer)
        self.feedback = Feedback(settings["feedback"], create=False)
        self.root.mkdir(parents=True, exist_ok=True)
        self.store = PositionStore(self.root)
        self.accelerator = Accelerator(cpu=True)

    def run(self, job: dict[str, Any]) -> Outcome:
        """A pass over the verdicts for one proxy.

        Raises:
            TrainingError, FeedbackError, ProxyError: the pass failed; the message says why.
        """
        config = default_config(self.model, max_candidates=16, max_rejections=16, **job["decoding"])
        left_out = Counter[str]()
        rows = self.feedback.newest(MOST_ROWS, job["sources"], job["caller"])
        verdicts = read_verdicts(rows, self.chats, self.end_ids, self.longest, left_out)
        verdicts, positions = self._read(verdicts, config, left_out)
        if reason := too_few(verdicts):
            outcome = Outcome(verdicts=len(verdicts), reason=reason)
        else:
            trial = Trial(
                verdicts,
                config,
                self.embeddings,
                lambda responses: joined(
                    [positions[self._key(response, config)] for response in responses]
                ),
                self.accelerator,
            )
            outcome = learn(
                verdicts,
                trial,
                Path(job["live"]) if job["live"] else None,
                self.base,
                Path(job["directory"]),
                {"learned": job["name"], "sources": job["sources"]},
            )
        outcome.rows, outcome.left_out = len(rows), dict(+left_out)
        self.store.trim(MOST_BYTES)
        return outcome

    def _read(
        self, verdicts: Sequence[Verdict], config: ProxyConfig, left_out: Counter[str]
    ) -> tuple[list[Verdict], dict[str, Positions]]:
        """The verdicts whose responses can be read, as many as fit the memory, and the positions of these."""
        positions: dict[str, Positions] = {}
        kept: list[Verdict] = []
        total = 0
        for start in range(0, len(verdicts), _AT_ONCE):
            batch = verdicts[start : start + _AT_ONCE]
            missing: dict[str, tuple[Response, str | None]] = {}
            for verdict in batch:
                for response in (verdict.better, verdict.worse):
                    key = self._key(response, config)
                    if key in positions or key in missing:
                        continue
                    if content := self.store.get(key):
                        positions[key] = _parsed(content)
                        total += len(content)
                    else:
                        missing[key] = response, verdict.caller
            for key, content in self._ask(missing, config):
                positions[key] = _parsed(content)
                total += len(content)
            kept += [
                verdict
                for verdict in batch
                if self._key(verdict.better, config) in positions
                and self._key(verdict.worse, config) in positions
            ]
            if total > MOST_BYTES:
                break
        lost = len(verdicts) - len(kept)
        left_out["that the LLM cannot read, or that memory has no room for"] += lost
        return kept, positions

    def _ask(
        self, missing: dict[str, tuple[Response, str | None]], config: ProxyConfig
    ) -> Iterator[tuple[str, bytes]]:
        """Have the server read responses, and keep what it returns."""
        if not missing:
            return
        decoding = {name: getattr(config, name) for name in NUCLEUS}
        responses = [response._asdict() for response, _ in missing.values()]
        self.stream.send({"read": responses, "decoding": decoding})
        for key, (_, caller) in missing.items():
            if (content := self.stream.receive()) is None:
                raise SystemExit  # the server has ended
            if content:
                self.store.put(key, caller, content)
                yield key, content

    def _key(self, response: Response, config: ProxyConfig) -> str:
        nucleus = [getattr(config, name) for name in NUCLEUS]
        content = json.dumps([self.base.fingerprint, nucleus, response])
        return hashlib.sha256(content.encode()).hexdigest()


def _parsed(content: bytes) -> Positions:
    return Positions(**safetensors.torch.load(content))


def be_modest() -> None:
    """Limit processor time and memory, and ignore Ctrl-C: this process ends with the server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    if nice := int(os.environ.get(NICE, "10")):
        os.nice(nice)
        signal.signal(signal.SIGPROF, Rest())
        signal.setitimer(signal.ITIMER_PROF, _SLICE, _SLICE)


class Rest:
    """Called after each slice of processor time: sleeps while other processes want the core.

    Low priority alone does not keep their data in the caches, nor memory bandwidth free.
    """

    def __init__(self) -> None:
        self._wall, self._used = time.monotonic(), time.process_time()

    def __call__(self, *_: object) -> None:
        wall, used = time.monotonic() - self._wall, time.process_time() - self._used
        if wall > _BUSY * used:
            time.sleep(used * (1 / _SHARE - 1))
        self._wall, self._used = time.monotonic(), time.process_time()


def main() -> None:
    watch_parent()
    be_modest()
    stream = Stream(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # libraries print to stdout
    try:
        settings = json.loads(stream.receive() or b"null")
        learner = Learner(stream, settings)
    except ERRORS as error:
        stream.send({"error": str(error)})
        return
    stream.send({"ready": True})
    while message := stream.receive():
        job = json.loads(message)
        try:
            stream.send({"outcome": asdict(learner.run(job))})
        except ERRORS as error:
            stream.send({"error": str(error)})
        except Exception as error:  # a bug, or out of memory: the next pass may succeed
            traceback.print_exc()
            stream.send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
