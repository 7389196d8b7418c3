"""Proxies that are learned while serving, from what people choose and what the judge decides.

    python -m server --feedback FILE --proxy-root DIR --learn ours=person --learn quick=judge --learn mine=own

As verdicts come in, a process of its own (`training.learner`) fits a proxy to them and tests it on verdicts that it has
not seen. A version that is better than the live one takes its place as if `POST /proxies` had loaded it: requests under
way keep theirs, other servers with this --proxy-root follow, and the older version can be loaded again.

    <proxy root>/.learn/ours/<version>/             checkpoint, and the rows that it comes from
    <proxy root>/.learn/ours/learned.json           what came of the last pass
    <proxy root>/.learn/mine/<hash of a key>/...    the same for each key's own
    <proxy root>/.learn/.positions.db               what the LLM read of these rows

`own` is a proxy for each key, of this key's choices alone. It is loaded when its key asks for it; no other key can ask
for it, or sees it. Of several servers with this root one learns.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import math
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from judge.feedback import Source
from proxy.checkpoint import CONFIG_FILE
from proxy.learned import MIN_VERDICTS, prune, rows_of, versions
from proxy.position_store import FILE_NAME as POSITIONS_FILE
from proxy.position_store import PositionStore
from server import metrics
from server.access import Caller
from server.engine import EngineClient, Workers, read_responses
from server.keeper import Keeper
from server.learned_proxy import STATE_FILE, LearnedProxy, Spec
from server.learner import Learner, LearnerError
from server.proxies import LoadedProxy, Proxies, Refusal
from server.remembered import Entry, Remembered

logger = logging.getLogger(__name__)

DIRECTORY, LOCK_NAME = ".learn", ".lock"
LOOK_SECONDS = 1.0
IDLE_SECONDS = 60.0
"""After which the learner's process ends."""
PASS_SECONDS = 1800.0
"""That a pass may take, reading included."""
MIN_NEW, GROWTH = 5, 1.5
"""Verdicts must have grown by so much since the last pass: then all passes together cost a few times the last."""
MOST_LOADED = 64
"""Proxies of single keys in the worker; beyond it, the one that was asked for longest ago has to be loaded again."""
DECODING = {"temperature": 1.0, "top_k": 16, "top_p": 0.95}
"""Where the LLM's generation config says nothing."""
_READ_AT_ONCE = 4  # responses: people's requests come first


class Learning:
    """All that is learned, and what of it serves. Its methods run on the event loop."""

    def __init__(
        self,
        specs: Sequence[Spec],
        keeper: Keeper,
        proxies: Proxies,
        remembered: Remembered,
        engine: EngineClient,
        workers: Workers,
        *,
        model: Mapping[str, Any],
    ) -> None:
        """
        Args:
            specs: what learns by itself.
            keeper: of the verdicts.
            proxies, remembered: what serves.
            engine, workers: that read for the learner.
            model: the LLM's directory as `model`, its `base` and `chat_template`.
        """
        self.specs = {spec.name: spec for spec in specs}
        self._keeper, self._proxies, self._remembered = keeper, proxies, remembered
        self._engine, self._workers = engine, workers
        self.root = remembered.root / DIRECTORY
        settings = dict(model) | {
            "root": str(self.root),
            "feedback": keeper.feedback.url,
            "longest": engine.model_config.max_model_len - 1,
        }
        self._learner = Learner(settings, self._read)
        self._decoding = nucleus_of(engine)
        self._passes = asyncio.Lock()
        self._loaded: OrderedDict[str, None] = OrderedDict()  # of keys, the last asked for last
        self._lock: TextIO | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_id = -1

    # --- requests ---

    async def wake(self, name: str, caller: Caller) -> None:
        """Have the worker load the version of a key's own proxy that is to serve, where it has not."""
        spec = self.specs.get(name)
        if spec is None or not spec.own:
            return
        learned = self._learned(spec, caller.identity)
        served, live = learned.served_name, learned.read().live
        if live is None:
            return await self._unload(served)
        bound = self._proxies.bound(served)
        if bound is None or bound.version != live:
            try:
                await self._proxies.load(served, learned.directory / live, version=live)
            except Refusal as refusal:  # the frozen LLM answers, or the version before
                logger.error("%s is not loaded: %s", served, refusal)
        self._loaded[served] = None
        self._loaded.move_to_end(served)
        while len(self._loaded) > MOST_LOADED:
            await self._unload(next(iter(self._loaded)))

    def find(self, name: str, caller: Caller) -> LoadedProxy | None:
        """What a name that is learned stands for; None = nothing yet: the frozen LLM answers."""
        return self._proxies.bound(self._learned(self.specs[name], caller.identity).served_name)

    def names(self) -> list[str]:
        """What requests may ask for, whether anything was learned yet or not."""
        return [spec.name for spec in self.specs.values() if not spec.shadow]

    def status(self, name: str, caller: Caller) -> dict[str, Any]:
        """What is learned under a name, and what serves; of keys' own, the caller's.

        Raises:
            Refusal: nothing is.
        """
        spec = self.specs.get(name, Spec(name, ()))
        learned = self._learned(spec, caller.identity)
        known = versions(learned.directory)
        if name not in self.specs and not known:
            raise Refusal(404, f"nothing is learned as {name!r}: the server's --learn says what is")
        live = self._live(learned)
        return {
            "object": "proxy.learning",
            "name": name,
            "from": ["own"] if spec.own else list(spec.sources),
            "live": live.name if live is not None else None,
            "last_pass": learned.read().outcome,
            "versions": [
                {"version": path.name, "path": str(path.relative_to(self._remembered.root))}
                | json.loads((path / CONFIG_FILE).read_bytes())["training"]
                for path in known
            ],
        }

    async def learn(self, name: str, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """A pass at once: of one proxy, or of all keys' own. What came of each."""
        spec = self.specs.get(name, Spec(name, tuple(sources)))
        several = self._learned_of(spec, await self._keeper.counts())
        return [await self._pass(spec, *learned) for learned in several]

    async def forget(self, caller: str) -> dict[str, Any]:
        """Delete a caller's rows, what was read of them, and all versions that come from them.

        Raises:
            FeedbackError: nothing was deleted.
        """
        self._learner.end()  # what it works on
        async with self._passes:
            forgotten = await self._keeper.forget(caller)
            gone = 0
            for learned in self._known():
                known = versions(learned.directory)
                stale = [path for path in known if caller in rows_of(path).values()]
                if not stale:
                    continue
                if self._live(learned) in stale:
                    left = [path for path in known if path not in stale]
                    await self._serve(learned, left[0] if left else None)
                for path in stale:
                    shutil.rmtree(path)
                gone += len(stale)
                learned.write(learned.read().model_copy(update={"seen": 0, "outcome": None}))
            await asyncio.to_thread(self._forget_positions, caller)
            self._last_id = -1  # what is left may be learned anew
        return forgotten | {"versions": gone}

    # --- what goes on beside them ---

    def follow(self) -> None:
        """Learn as verdicts come in, until the event loop ends."""
        if self.specs:
            self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        idle = 0.0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                busy = self._is_first() and await self._learn_what_is_due()
            except Exception:  # whatever it is, the next look may find it mended
                logger.exception("Nothing was learned.")
                busy = False
            idle = 0.0 if busy else idle + LOOK_SECONDS
            if idle >= IDLE_SECONDS and not self._passes.locked():
                self._learner.end()

    def _is_first(self) -> bool:
        """Whether this is the one that learns, of all servers with this root."""
        if self._lock is None:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / LOCK_NAME).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    async def _learn_what_is_due(self) -> bool:
        last_id = await self._keeper.last_id()
        if last_id == self._last_id:
            return False
        self._last_id = last_id
        counts = await self._keeper.counts()
        due = [
            (spec, *learned)
            for spec in self.specs.values()
            for learned in self._learned_of(spec, counts)
            if _is_due(learned[1], learned[0].read().seen)
        ]
        for each in due:
            await self._pass(*each)
        return bool(due)

    async def _pass(
        self, spec: Spec, learned: LearnedProxy, count: int, caller: str | None
    ) -> dict[str, Any]:
        """Have a proxy learned, and where it is better, serve it."""
        async with self._passes:
            live = self._live(learned)
            job = {
                "name": spec.name,
                "directory": str(learned.directory),
                "sources": spec.sources,
                "caller": caller,
                "live": str(live) if live is not None else None,
                "decoding": self._decoding,
            }
            start = monotonic()
            try:
                outcome = (await self._learner.ask(job, PASS_SECONDS))["outcome"]
                if outcome["version"] is not None:
                    version = learned.directory / outcome["version"]
                    await self._serve(learned, version)
                    await asyncio.to_thread(prune, learned.directory, version)
            except (LearnerError, Refusal) as error:
                outcome = {"error": str(error)}
            outcome["seconds"] = round(monotonic() - start, 1)
            state = learned.read()
            if "error" not in outcome:
                state.seen = max(count, outcome["rows"])  # more may have come before it looked
            state.outcome = outcome
            learned.write(state)
        _report(learned, outcome)
        return outcome

    async def _serve(self, learned: LearnedProxy, version: Path | None) -> None:
        """From now on this version; None = none any more.

        Raises:
            Refusal: it could not be loaded.
        """
        name = learned.served_name
        if learned.owner is not None:
            learned.write(
                learned.read().model_copy(update={"live": version.name if version else None})
            )
            if version is None:
                await self._unload(name)
            elif self._proxies.bound(name) is not None:
                await self._proxies.load(name, version, version=version.name)
            return
        async with self._remembered.changing:
            entry = None
            if version is None:
                await self._unload(name)
            else:
                shadow = name in self.specs and self.specs[name].shadow
                await self._proxies.load(name, version, shadow=shadow, version=version.name)
                path = str(version.relative_to(self._remembered.root))
                entry = Entry(path=path, version=version.name, shadow=shadow)
            await asyncio.to_thread(self._remembered.change, name, entry)

    async def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        if self._proxies.bound(name) is not None:
            with suppress(Refusal):  # somebody else has
                await self._proxies.unload(name)

    async def _read(
        self, responses: Sequence[dict[str, Any]], decoding: dict[str, Any]
    ) -> list[bytes]:
        """For the learner: what the LLM reads in responses, a few at a time."""
        given = [(each["prompt"], each["response"]) for each in responses]
        contents = await read_responses(
            self._engine, self._workers, given, decoding, at_once=_READ_AT_ONCE
        )
        return [content or b"" for content in contents]

    # --- which there are ---

    def _learned(self, spec: Spec, caller: str | None) -> LearnedProxy:
        return LearnedProxy(spec.name, self.root, _hash(caller) if spec.own and caller else None)

    def _learned_of(
        self, spec: Spec, counts: Mapping[tuple[Source, str | None], int]
    ) -> list[tuple[LearnedProxy, int, str | None]]:
        """Each proxy of a name, how many verdicts there are for it, and whose; None = everybody's."""
        if not spec.own:
            total = sum(n for (source, _), n in counts.items() if source in spec.sources)
            return [(self._learned(spec, None), total, None)]
        return [
            (self._learned(spec, caller), count, caller)
            for (source, caller), count in counts.items()
            if source in spec.sources and caller is not None
        ]

    def _known(self) -> list[LearnedProxy]:
        """All of which there is something on the disk."""
        found = [
            LearnedProxy(path.parent.name, self.root) for path in self.root.glob(f"*/{STATE_FILE}")
        ]
        return found + [
            LearnedProxy(path.parent.parent.name, self.root, path.parent.name)
            for path in self.root.glob(f"*/*/{STATE_FILE}")
        ]

    def _live(self, learned: LearnedProxy) -> Path | None:
        """The checkpoint that serves now."""
        if learned.owner is not None:
            live = learned.read().live
            return learned.directory / live if live is not None else None
        bound = self._proxies.bound(learned.served_name)
        if bound is None:
            return None
        found = Path(bound.description["directory"])  # without links
        ours = learned.directory / found.name
        return ours if ours.resolve() == found else found

    def _forget_positions(self, caller: str) -> None:
        if (self.root / POSITIONS_FILE).exists():
            store = PositionStore(self.root)
            store.forget(caller)
            store.close()


def nucleus_of(engine: EngineClient) -> dict[str, Any]:
    """The decoding that a proxy is to be learned at: what the LLM is sampled with where a request says nothing."""
    usual = engine.model_config.get_diff_sampling_param()
    found = {name: usual[name] for name in DECODING if (usual.get(name) or 0) > 0}
    return DECODING | found


def _is_due(count: int, seen: int) -> bool:
    return count >= MIN_VERDICTS and count >= max(seen + MIN_NEW, GROWTH * seen)


def _hash(caller: str) -> str:
    return hashlib.sha256(caller.encode()).hexdigest()[:16]


def _report(learned: LearnedProxy, outcome: Mapping[str, Any]) -> None:
    """In the log and the metrics."""
    name = learned.name
    result = "error" if "error" in outcome else "kept" if outcome["version"] is None else "live"
    metrics.LEARNING_PASSES.labels(name, result).inc()
    metrics.LEARNING_SECONDS.labels(name).inc(outcome["seconds"])
    if result == "error":
        logger.error("%s was not learned: %s", learned.served_name, outcome["error"])
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
        "%s: %d verdicts, %.1f %% ± %.1f %% of unseen ones ordered rightly, %s after %.0f s: %s.",
        learned.served_name,
        outcome["verdicts"],
        *(100 * each for each in accuracy),
        f"version {outcome['version']}" if outcome["version"] else "nothing new",
        outcome["seconds"],
        outcome["reason"],
    )
