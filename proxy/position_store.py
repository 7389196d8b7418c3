"""Positions of the responses that a server learns from, on disk: serialised `proxy.positions.Positions` by key.

Each entry has the caller who judged the response, so that a caller's entries can be deleted.
"""

import sqlite3
import time
from pathlib import Path

FILE_NAME = ".positions.db"


class PositionStore:
    """Bytes by key."""

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: the directory of the database, which is created if it is missing.
        """
        self._database = sqlite3.connect(root / FILE_NAME, isolation_level=None)
        # Entries lost in a power failure are computed again.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("PRAGMA secure_delete=ON")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS positions "
            "(key TEXT PRIMARY KEY, caller TEXT, used REAL NOT NULL, content BLOB NOT NULL)"
        )

    def get(self, key: str) -> bytes | None:
        """The entry of a key, which counts as used now."""
        row = self._database.execute(
            "UPDATE positions SET used = ? WHERE key = ? RETURNING content", (time.time(), key)
        ).fetchone()
        return row[0] if row else None

    def put(self, key: str, caller: str | None, content: bytes) -> None:
        """Add an entry, or replace it."""
        row = key, caller, time.time(), content
        self._database.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", row)

    def forget(self, caller: str) -> None:
        """Delete a caller's entries, from the write-ahead log too."""
        self._database.execute("DELETE FROM positions WHERE caller = ?", (caller,))
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def trim(self, max_bytes: int) -> None:
        """Delete the least recently used entries beyond so many bytes."""
        sizes = self._database.execute(
            "SELECT key, length(content) FROM positions ORDER BY used DESC"
        ).fetchall()
        total = 0
        for key, size in sizes:
            total += size
            if total > max_bytes:
                self._database.execute("DELETE FROM positions WHERE key = ?", (key,))

    def close(self) -> None:
        self._database.close()
