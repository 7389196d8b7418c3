"""The file of all proxies loaded over HTTP: a restart loads them again, and other servers with this root do too.

    <proxy root>/proxies.json
    {"proxies": {"mine": {"path": "polite", "version": "1f0c...", "shadow": false}}}

A server writes it before it answers POST or DELETE /proxies, and checks every second whether another
one has. So all servers that share a root serve the same proxies, whichever of them got the request.
Proxies of --proxy are not in it: the command line loads them.
"""

import asyncio
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from server.proxies import Proxies, ProxyStateError, find_below

logger = logging.getLogger(__name__)

FILE_NAME, LOCK_NAME = "proxies.json", ".proxies.lock"
POLL_SECONDS = 1.0
LOCK_SECONDS = 5.0
"""To wait for another server, which holds the lock for milliseconds."""


class Entry(BaseModel):
    """One proxy in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    version: str
    shadow: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    proxies: dict[str, Entry] = {}


class ProxyManifest:
    """The file, and this server's loads and unloads that follow it."""

    def __init__(self, root: Path, proxies: Proxies) -> None:
        self.root, self.file, self.proxies = root, root / FILE_NAME, proxies
        self.entries: dict[str, Entry] = {}
        """The file's content as this server last saw it and tried to load it."""
        self.changing = asyncio.Lock()
        """Held from a load or unload to its `change`, so that `reconcile` does not restore the earlier content."""
        self._seen: tuple[int, int] | None = None
        self._failed: set[tuple[str, Entry]] = set()
        self._task: asyncio.Task[None] | None = None

    def change(self, name: str, entry: Entry | None) -> bool:
        """Write what a name stands for, None = nothing; returns False where the file cannot be written."""
        try:
            with self._locked():
                before = self._read()
                entries = {key: value for key, value in before.items() if key != name}
                if entry is not None:
                    entries[name] = entry
                if entries != before:
                    self._write(entries)
        except (OSError, ValidationError) as error:
            logger.warning("%s is not in %s: %s", name, self.file, error)
            return False
        # Not the file's other entries: another server may have written them, and `reconcile` must load them.
        self.entries = {key: value for key, value in self.entries.items() if key != name}
        if entry is not None:
            self.entries[name] = entry
        return True

    def watch(self) -> None:
        """Reconcile every second, until the event loop ends."""
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.reconcile()
            except Exception:  # the next poll tries again
                logger.exception("%s could not be read.", self.file)

    async def reconcile(self) -> None:
        """Load and unload what has changed in the file since the last time; a failed load is tried again."""
        async with self.changing:
            await self._reconcile()

    async def _reconcile(self) -> None:
        if (stamp := self._stamp()) == self._seen and not self._failed:
            return
        try:
            entries = self._read()
        except (OSError, ValidationError) as error:
            if stamp != self._seen:
                logger.error("%s cannot be read: %s", self.file, error)
            self._seen = stamp
            return
        before, self.entries, self._seen = self.entries, entries, stamp
        self._failed &= set(entries.items())
        for name in before.keys() - entries.keys():
            with suppress(ProxyStateError):  # it is unloaded already
                await self.proxies.unload(name)
        for name, entry in entries.items():
            if before.get(name) != entry or (name, entry) in self._failed:
                await self._load(name, entry)

    async def _load(self, name: str, entry: Entry) -> None:
        current = self.proxies.bound(name)
        if current is not None and current.version == entry.version:
            return self._failed.discard((name, entry))
        try:
            directory = find_below(self.root, entry.path)
            await self.proxies.load(name, directory, shadow=entry.shadow, version=entry.version)
        except ProxyStateError as error:
            if (name, entry) not in self._failed:
                logger.error("%s of %s is not loaded: %s", name, self.file, error)
            self._failed.add((name, entry))
        else:
            logger.info("%s %s is loaded, as %s has it.", name, entry.version, self.file)
            self._failed.discard((name, entry))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One server at a time reads and writes the file.

        Raises TimeoutError, an OSError, where somebody keeps the lock: loads and the shutdown must not wait forever.
        """
        with (self.root / LOCK_NAME).open("w") as lock:
            end = monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if monotonic() > end:
                        raise TimeoutError(
                            f"{lock.name} was locked by another process for {LOCK_SECONDS:g} s"
                        ) from None
                    sleep(0.05)
            yield

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self.file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _read(self) -> dict[str, Entry]:
        try:
            return _File.model_validate_json(self.file.read_bytes()).proxies
        except FileNotFoundError:
            return {}

    def _write(self, entries: dict[str, Entry]) -> None:
        """Atomic, and on the disk when it returns."""
        content: dict[str, Any] = {"proxies": {k: v.model_dump() for k, v in entries.items()}}
        descriptor, name = tempfile.mkstemp(dir=self.root, prefix=".proxies.")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(descriptor)
            Path(name).chmod(0o644)
            Path(name).replace(self.file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
