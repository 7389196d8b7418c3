"""Learns proxies while serving, from what people choose and what the judge decides.

    python -m server --feedback FILE --proxy-root DIR --learn ours=person --learn quick=judge --learn mine=own

As verdicts come in, a process of its own (`training.learner`) fits a proxy to them and tests it on held-out verdicts. A
version that is better than the current one replaces it (`learned_proxies`): requests under way keep theirs, other
servers with this --proxy-root load it too, and the older version can be loaded again.

`<proxy root>/.learn/.positions.db` keeps what the LLM read of the rows. Of several servers with one root, one learns.
"""

import asyncio
import fcntl
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, TextIO

from judge.feedback import Source
from proxy.learned import MIN_VERDICTS, prune, rows_of, versions
from proxy.position_store import FILE_NAME as POSITIONS_FILE
from proxy.position_store import PositionStore
from server import metrics
from server.engine import EngineClient, Workers, read_responses
from server.feedback_writer import FeedbackWriter
from server.learned_proxies import Learnable, LearnedProxies
from server.learned_proxy import LearnedProxy, Spec
from server.learner import Learner, LearnerError
from server.proxies import Proxies, ProxyStateError
from server.proxy_manifest import ProxyManifest

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
POLL_SECONDS = 1.0
IDLE_SECONDS = 60.0
"""After which the learner's process ends."""
PASS_SECONDS = 1800.0
"""Limit of a pass, including the time to read responses."""
MIN_NEW, GROWTH = 5, 1.5
"""A pass is due when the verdicts have grown by this number and this factor since the last one. With the factor, all
passes together cost a few times the last one."""
DECODING = {"temperature": 1.0, "top_k": 16, "top_p": 0.95}
"""For settings that the LLM's generation config leaves out."""
_RESPONSES_AT_ONCE = 4  # few: people's requests come first


class Learning:
    """Schedules passes. Its methods run on the event loop."""

    def __init__(
        self,
        specs: Sequence[Spec],
        feedback_writer: FeedbackWriter,
        proxies: Proxies,
        manifest: ProxyManifest,
        engine: EngineClient,
        workers: Workers,
        *,
        model: Mapping[str, Any],
    ) -> None:
        """
        Args:
            specs: what the server learns by itself.
            feedback_writer: the database of verdicts.
            proxies, manifest: what serves.
            engine, workers: read responses for the learner.
            model: the LLM's directory as `model`, its `base` and `chat_template`.
        """
        self.learned = LearnedProxies(specs, proxies, manifest)
        self._feedback_writer = feedback_writer
        self._engine, self._workers = engine, workers
        settings = dict(model) | {
            "root": str(self.learned.root),
            "feedback": feedback_writer.feedback.url,
            "longest": engine.model_config.max_model_len - 1,
        }
        self._learner = Learner(settings, self._read)
        self._decoding = default_decoding(engine)
        self._passes = asyncio.Lock()
        self._lock: TextIO | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_id = -1

    async def learn(self, name: str, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """Run a pass now: of one proxy, or of all keys' own. Returns the outcome of each."""
        spec = self.learned.specs.get(name, Spec(name, tuple(sources)))
        counts = await self._feedback_writer.counts()
        return [await self._pass(item) for item in self.learned.learnable(spec, counts)]

    async def forget(self, caller: str) -> dict[str, Any]:
        """Delete a caller's rows, what was read of them, and all versions learned from them.

        Raises:
            FeedbackError: nothing was deleted.
        """
        self._learner.end()  # its pass may use these rows
        async with self._passes:
            forgotten = await self._feedback_writer.forget(caller)
            deleted = 0
            for proxy in self.learned.on_disk():
                deleted += await self._forget_versions(proxy, caller)
            await asyncio.to_thread(self._forget_positions, caller)
            self._last_id = -1  # the remaining rows may be due for a pass
        return forgotten | {"versions": deleted}

    async def _forget_versions(self, proxy: LearnedProxy, caller: str) -> int:
        """Delete the versions learned from a caller's rows; the newest of the others serves."""
        known = versions(proxy.directory)
        stale = [path for path in known if caller in rows_of(path).values()]
        if not stale:
            return 0
        if self.learned.live(proxy) in stale:
            left = [path for path in known if path not in stale]
            await self.learned.serve(proxy, left[0] if left else None)
        for path in stale:
            shutil.rmtree(path)
        proxy.write(proxy.read().model_copy(update={"seen": 0, "outcome": None}))
        return len(stale)

    def _forget_positions(self, caller: str) -> None:
        if (self.learned.root / POSITIONS_FILE).exists():
            store = PositionStore(self.learned.root)
            store.forget(caller)
            store.close()

    # --- the schedule ---

    def watch(self) -> None:
        """Learn as verdicts come in, until the event loop ends."""
        if self.learned.specs:
            self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        idle = 0.0
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                busy = self._is_first() and await self._learn_due()
            except Exception:  # the next poll tries again
                logger.exception("Learning failed.")
                busy = False
            idle = 0.0 if busy else idle + POLL_SECONDS
            if idle >= IDLE_SECONDS and not self._passes.locked():
                self._learner.end()

    def _is_first(self) -> bool:
        """Whether this server learns, of all servers with this root: it holds the lock."""
        if self._lock is None:
            self.learned.root.mkdir(parents=True, exist_ok=True)
            lock = (self.learned.root / LOCK_NAME).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    async def _learn_due(self) -> bool:
        """Run all passes that are due; returns whether there were any."""
        last_id = await self._feedback_writer.last_id()
        if last_id == self._last_id:
            return False
        self._last_id = last_id
        counts = await self._feedback_writer.counts()
        due = [
            item
            for spec in self.learned.specs.values()
            for item in self.learned.learnable(spec, counts)
            if _is_due(item.verdicts, item.proxy.read().seen)
        ]
        for item in due:
            await self._pass(item)
        return bool(due)

    async def _pass(self, item: Learnable) -> dict[str, Any]:
        """Learn a version and serve it if it is better; returns the outcome."""
        proxy = item.proxy
        async with self._passes:
            live = self.learned.live(proxy)
            job = {
                "name": item.spec.name,
                "directory": str(proxy.directory),
                "sources": item.spec.sources,
                "caller": item.caller,
                "live": str(live) if live is not None else None,
                "decoding": self._decoding,
            }
            start = monotonic()
            try:
                outcome = (await self._learner.ask(job, PASS_SECONDS))["outcome"]
                if outcome["version"] is not None:
                    version = proxy.directory / outcome["version"]
                    await self.learned.serve(proxy, version)
                    await asyncio.to_thread(prune, proxy.directory, version)
            except (LearnerError, ProxyStateError) as error:
                outcome = {"error": str(error)}
            outcome["seconds"] = round(monotonic() - start, 1)
            state = proxy.read()
            if "error" not in outcome:
                state.seen = max(item.verdicts, outcome["rows"])  # more may have come meanwhile
            state.outcome = outcome
            proxy.write(state)
        _report(proxy, outcome)
        return outcome

    async def _read(
        self, responses: Sequence[dict[str, Any]], decoding: dict[str, Any]
    ) -> list[bytes]:
        """For the learner: positions of responses, a few at a time; b"" = it could not be read."""
        pairs = [(response["prompt"], response["response"]) for response in responses]
        contents = await read_responses(
            self._engine, self._workers, pairs, decoding, at_once=_RESPONSES_AT_ONCE
        )
        return [content or b"" for content in contents]


def default_decoding(engine: EngineClient) -> dict[str, Any]:
    """The decoding to learn proxies at: what the LLM is sampled with where a request sets nothing."""
    defaults = engine.model_config.get_diff_sampling_param()
    own = {name: defaults[name] for name in DECODING if (defaults.get(name) or 0) > 0}
    return DECODING | own


def _is_due(count: int, seen: int) -> bool:
    return count >= MIN_VERDICTS and count >= max(seen + MIN_NEW, GROWTH * seen)


def _report(proxy: LearnedProxy, outcome: Mapping[str, Any]) -> None:
    """Put an outcome into the log and the metrics."""
    name = proxy.name
    result = "error" if "error" in outcome else "kept" if outcome["version"] is None else "live"
    metrics.LEARNING_PASSES.labels(name, result).inc()
    metrics.LEARNING_SECONDS.labels(name).inc(outcome["seconds"])
    if result == "error":
        logger.error("%s was not learned: %s", proxy.served_name, outcome["error"])
        return
    for gauge, key in (
        (metrics.LEARNING_VERDICTS, "verdicts"),
        (metrics.LEARNING_ACCURACY, "accuracy"),
        (metrics.LEARNING_KL, "kl"),
    ):
        if (value := outcome[key]) is not None:
            gauge.labels(name).set(value[0] if isinstance(value, list) else value)
    accuracy = outcome["accuracy"] or (math.nan, math.nan)
    logger.info(
        "%s: %d verdicts, %.1f %% ± %.1f %% of held-out ones ordered correctly, %s after %.0f s: %s.",
        proxy.served_name,
        outcome["verdicts"],
        *(100 * value for value in accuracy),
        f"version {outcome['version']}" if outcome["version"] else "no new version",
        outcome["seconds"],
        outcome["reason"],
    )
