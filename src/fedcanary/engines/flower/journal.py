"""What one side must still know when its process is gone: one file, and nothing leaves before it is in it.

A client's journal makes it answer the same ask with the same bytes, however often it comes, and no other ask for a step
that it has answered. The server's makes a round that was cut off go on from the answers that had come.

Secrets of a round lie here until it is over: what is deleted from the file is overwritten, and there is no write-ahead
log; pages of SQLite's rollback journal, which is unlinked, may stay on the disk as free blocks. An older copy of the
file must not be put back: `privacy/secagg/keep.py` says what that would give away.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedcanary.errors import BadInput

SCHEMA = "CREATE TABLE IF NOT EXISTS entry (kind TEXT, key TEXT, round INTEGER, body BLOB, PRIMARY KEY (kind, key))"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value by its kind and key; it is forgotten with its round."""

    kind: str
    key: str
    round: int
    body: bytes


class Journal:
    """Entries on disk. One process at a time holds it (`alone`); others wait.

    Raises:
        BadInput: the file is no journal, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as undo:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
                undo.callback(self._db.close)
                path.chmod(0o600)
                for pragma in ("journal_mode = DELETE", "synchronous = FULL", "secure_delete = ON"):
                    self._db.execute(f"PRAGMA {pragma}")
                self._db.execute(SCHEMA)
                undo.pop_all()
            except (sqlite3.Error, OSError) as error:
                raise BadInput.of(str(path), f"is no journal that can be written ({error})", "move it away") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While open, no other process is here: one that outlived its node may still be at work on an older message."""
        with self._path.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the lock goes with the process, however that ends
            yield

    def get(self, kind: str, key: str) -> bytes | None:
        """The entry's body, if there is one."""
        row = self._db.execute("SELECT body FROM entry WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return None if row is None else bytes(row[0])

    def of(self, kind: str, round: int) -> Iterator[Entry]:
        """All entries of a kind and round, in the order in which they were written."""
        query = "SELECT kind, key, round, body FROM entry WHERE kind = ? AND round = ? ORDER BY rowid"
        for row in self._db.execute(query, (kind, round)).fetchall():
            yield Entry(*row)

    def put(self, *entries: Entry) -> None:
        """Write entries, all or none; when this returns, they are on the disk. One with a known key replaces it."""
        with self._transaction():
            rows = [(e.kind, e.key, e.round, e.body) for e in entries]
            self._db.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", rows)

    def delete(self, kind: str, key: str) -> None:
        """Forget one entry, if it is there."""
        with self._transaction():
            self._db.execute("DELETE FROM entry WHERE kind = ? AND key = ?", (kind, key))

    def forget(self, before: int) -> None:
        """Delete the entries of earlier rounds."""
        with self._transaction():
            self._db.execute("DELETE FROM entry WHERE round < ?", (before,))

    def latest(self) -> int:
        """The latest round of any entry; 0 if there is none."""
        (round,) = self._db.execute("SELECT max(round) FROM entry").fetchone()
        return round or 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite may have rolled it back by itself: a full disk
                self._db.execute("ROLLBACK")
            raise
