"""What an LLM has read of responses that a server learns from, on disk: `proxy.positions.Positions`, by a hash.

By who judged them, too: what a caller wants forgotten goes with the rest of theirs.
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
            root: the directory that has it, or gets it.
        """
        self._database = sqlite3.connect(root / FILE_NAME, isolation_level=None)
        # What is lost in a power cut is read again.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("PRAGMA secure_delete=ON")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS positions "
            "(key TEXT PRIMARY KEY, caller TEXT, used REAL NOT NULL, content BLOB NOT NULL)"
        )

    def get(self, key: str) -> bytes | None:
        row = self._database.execute(
            "UPDATE positions SET used = ? WHERE key = ? RETURNING content", (time.time(), key)
        ).fetchone()
        return row[0] if row else None

    def put(self, key: str, caller: str | None, content: bytes) -> None:
        row = key, caller, time.time(), content
        self._database.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", row)

    def forget(self, caller: str) -> None:
        self._database.execute("DELETE FROM positions WHERE caller = ?", (caller,))
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def trim(self, most: int) -> None:
        """Delete what was not used for longest, beyond so many bytes."""
        sizes = self._database.execute(
            "SELECT key, length(content) FROM positions ORDER BY used DESC"
        ).fetchall()
        total = 0
        for key, size in sizes:
            total += size
            if total > most:
                self._database.execute("DELETE FROM positions WHERE key = ?", (key,))

    def close(self) -> None:
        self._database.close()
