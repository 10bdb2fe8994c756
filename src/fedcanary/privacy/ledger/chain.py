"""A hash-chained SQLite file and its anchor: entries on disk for good, and every tampering short of all files found.

`entry` holds JSON texts, each hashed together with the hash before it. Two further files stand beside the database:
SQLite's write-ahead log, and the anchor, which holds the head of the chain (how many entries, hash of the last).

Order of writes. An entry is committed (synchronous=FULL), then the anchor is replaced, then the writer is told. So
    entries that a writer was told of  <=  anchor  <=  entries in the file        at any time.
A crash between the two writes leaves a file ahead of its anchor, which is normal and mended at the next entry; a file
behind its anchor is a rollback and is refused. The other order could not tell these two apart.

Found: any changed, dropped, added or reordered entry; a torn or missing log; an old file put back, also under a running
process; a missing or changed anchor. Not found here: all files rolled back or removed together, or written anew by
someone who can write them (the chain has no key). Against that, the head belongs in a place of another owner (the run's
record, or the other side's ledger), and `verify(head)` compares.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fedcanary.errors import BadInput, FedcanaryError, Refused
from fedcanary.privacy.ledger import anchor as anchors
from fedcanary.privacy.ledger.anchor import Head, canonical, damaged, link

SCHEMA: Final = 1
_APPLICATION: Final = 0x66636C67  # "fclg" in the file's header says whose file it is
_WAIT_S: Final = 30.0  # for another process's entry
_TABLES: Final = {
    b"entry": b"CREATE TABLE entry (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    b"tally": b"CREATE TABLE tally (name TEXT NOT NULL UNIQUE, count INTEGER NOT NULL)",
}


class Chain:
    """An open chain. Safe for threads; open it anew after a fork.

    `fold` is called with each entry, once and in order, and the head that it makes; what it raises says that the entry
    is not one of ours.
    """

    def __init__(self, path: Path, fold: Callable[[dict[str, Any], Head], None], first: Mapping[str, Any]):
        """Open the chain at `path` and check all of it; where there is none, make one with the entry `first`.

        Raises:
            BadInput: not a ledger, another schema's, or it cannot be read or written.
            Damaged: it was changed or rolled back since it was written.
        """
        self.path = path.resolve()  # one anchor, whatever link led here
        self._fold = fold
        self._hashes: list[str] = []
        self._lock = threading.RLock()
        self._process = os.getpid()
        with _explained(self.path):
            # the anchor first: it is made last, so that where it is, the file was
            if anchors.read(self.path) is not None and not self.path.exists():
                raise damaged(self.path, "it is gone, but its anchor is there")
            self._db = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                self._begin(first)
            except BaseException:
                self._db.close()
                raise

    def _begin(self, first: Mapping[str, Any]) -> None:
        self._db.text_factory = bytes  # a damaged text need not be UTF-8
        self._db.execute("BEGIN")
        self._is_empty()  # raises before anything is written to a file that may be someone else's
        self._db.execute("COMMIT")
        self._file = _identity(self.path)
        _keep_a_log(self.path, self._db)
        self._db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        with self.writing():
            if not self._hashes:
                for statement in _TABLES.values():
                    self._db.execute(statement.decode())
                self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
                self.append(first)

    @property
    def head(self) -> Head:
        """Of the entries seen so far."""
        return Head(count=len(self._hashes), hash=self._hashes[-1] if self._hashes else "")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the chain still, with every entry of the file folded in."""
        with self._transaction("BEGIN"):
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock, with every entry of the file folded in; on leaving, what was appended is on disk."""
        with self._transaction("BEGIN IMMEDIATE"):
            yield
        with self._transaction("BEGIN IMMEDIATE"):  # reads it back, and brings the anchor up to it
            pass

    def append(self, entry: Mapping[str, Any]) -> None:
        """Insert the next entry, inside `writing`; it is folded in from the file, once it is committed."""
        body = canonical(entry)
        made = link(self.head.hash, body.encode())
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?)", (self.head.count, body, made))

    def tally(self, name: str) -> None:
        """Count one more of `name`, inside `writing`: on disk, but outside the chain, which guards no counts."""
        new = "INSERT INTO tally VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET count = count + 1"
        self._db.execute(new, (name,))

    def tallies(self) -> dict[str, int]:
        """The counts by name, inside `reading` or `writing`."""
        found = self._db.execute("SELECT name, count FROM tally ORDER BY name")
        return {name.decode(): count for name, count in found}

    def verify(self, expected: Head | None = None) -> Head:
        """Check every entry on disk again, and that `expected`, a head seen before, lies on the chain.

        Raises:
            Damaged: it does not; the chain was changed or rolled back.
        """
        with self.reading():
            self._walk(self._db.execute("SELECT seq, body, hash FROM entry ORDER BY seq"), 0)
            if expected is not None:
                self._check_on_chain(expected, "the record")
            return self.head

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        if os.getpid() != self._process:
            raise FedcanaryError(f"{self.path} was opened by another process: open it again after a fork")
        with self._lock, _explained(self.path):
            self._db.execute(begin)
            try:
                anchor = anchors.read(self.path)  # before the first read, or another's new entry looks like a rollback
                self._catch_up()
                if anchor is not None:
                    self._check_on_chain(anchor, "its anchor")
                elif self.head.count > 1:  # the first alone: a crash before the first anchor
                    raise damaged(self.path, f"its anchor {anchors.beside(self.path).name} is missing")
                if begin != "BEGIN" and self._hashes and anchor != self.head:
                    anchors.write(self.path, self.head)
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _catch_up(self) -> None:
        """Read the entries since the last look, after our last one, which must still be there; all, at the first."""
        if _identity(self.path) != self._file:
            raise damaged(self.path, "it was removed, or another file put in its place, while it was open")
        query = "SELECT seq, body, hash FROM entry {} ORDER BY seq"
        if self._hashes:
            last = len(self._hashes) - 1
            self._walk(self._db.execute(query.format("WHERE seq >= ?"), (last,)), last)
        elif self._is_empty():
            return
        else:
            if (said := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != b"ok":
                raise damaged(self.path, f"SQLite finds {said.decode(errors='replace')}")
            self._walk(self._db.execute(query.format("")), 0)
        if not self._hashes:
            raise damaged(self.path, "its entries are gone")

    def _walk(self, entries: Iterable[tuple[object, Any, object]], at: int) -> None:
        """Hold entries from number `at` on to the hashes seen before, and fold in those not seen yet."""
        for seq, body, hash in entries:
            known = at < len(self._hashes)
            made = link(self._hashes[at - 1] if at else "", body) if isinstance(body, bytes) else ""
            as_before = made == self._hashes[at] if known else made != ""
            if seq != at or hash != made.encode() or not as_before:
                raise damaged(self.path, f"entry {at} is missing or was changed")
            if not known:
                try:
                    self._fold(json.loads(body), Head(count=at + 1, hash=made))
                except (ValueError, LookupError, TypeError, BadInput) as error:
                    raise damaged(self.path, f"entry {at} is not one that this program writes ({error})") from error
                self._hashes.append(made)
            at += 1
        if at < len(self._hashes):
            raise damaged(self.path, f"entry {at}, which this process saw, is missing")

    def _check_on_chain(self, head: Head, witness: str) -> None:
        if head.count > len(self._hashes):
            found = f"{witness} knows {head.count} entries, the file holds {len(self._hashes)}"
            raise damaged(self.path, f"it was rolled back: {found}")
        if head.count < 1 or self._hashes[head.count - 1] != head.hash:
            raise damaged(self.path, f"entry {head.count - 1} is another one than {witness} knows")

    def _is_empty(self) -> bool:
        """Whether the file is still to be filled. Raises BadInput unless it is empty or a ledger of this schema."""
        tables = dict(self._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        application, version = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if not tables and application == version == 0:
            return True
        if application != _APPLICATION:
            what = "is a database, but not a privacy ledger"
            raise BadInput.of(str(self.path), what, "point to a ledger, or to no file yet")
        if version != SCHEMA:
            remedy = "open it with the version of fedcanary that wrote it; start the next window in a new file"
            raise BadInput.of(str(self.path), f"has schema {version}, and this program knows schema {SCHEMA}", remedy)
        if tables != _TABLES:
            raise damaged(self.path, "its tables are not those that this program makes")
        return False


def _keep_a_log(path: Path, db: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite does not wait here for another process that does the same, so we do."""
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
    if mode != b"wal":
        raise BadInput.of(str(path), "lies where SQLite cannot keep a write-ahead log", "put it on a local disk")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the error is Python's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system say into one error with its remedy."""
    full = ("the disk is full", "make room")
    try:
        yield
        return
    except sqlite3.Error as error:
        cause: Exception = error
        match _code(error):
            case 0:
                raise
            case sqlite3.SQLITE_NOTADB if anchors.read(path) is None:
                raise BadInput.of(str(path), "is not a database", "point to a ledger, or to no file yet") from error
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                raise damaged(path, f"SQLite says {error}") from error
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                remedy = "let this user write the file and its folder, which must exist"
                raise BadInput.of(str(path), f"cannot be opened ({error})", remedy) from error
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                what, remedy = "another process holds it", "wait for that process or end it"
            case code:
                what, remedy = full if code == sqlite3.SQLITE_FULL else ("it cannot be used", "check the disk")
    except UnicodeDecodeError as error:  # Python could not read SQLite's own complaint, which cites a damaged text
        raise damaged(path, "SQLite cannot make sense of it") from error
    except OSError as error:
        cause = error
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, remedy = full if no_room else ("its anchor cannot be read or written", "mend that")
    again = "then repeat the round: the same id is paid once"
    raise Refused(f"{path}: {what} ({cause}), so nothing may be released\n    remedy: {remedy}, {again}") from cause
