"""The run record: what happened, in order, in one append-only file that can be checked.

`record.jsonl` has one entry per line: {"seq", "kind", "body", "prev", "digest"}, where `digest` is the Blake2b of the
other four and `prev` the digest of the line before, so a changed, dropped or reordered line is found. Kinds:
    header   schema, study, plan of the tests, digests, environment
    charge   what a round's releases cost; always before the release it pays for
    release  the sums that passed the door
    round    clients, evidence (and that of slices), verdict, digest of the shared adapter: the round is complete
    end      how the run ended; after an end that was held, a re-baseline may follow
    rebaseline  which modes' tests begin anew after this round, and what was fixed
An entry is on disk before anything acts on it. The record holds no times, so equal runs have equal records (wall
times are in `timing.jsonl`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from fedcanary.errors import BadInput
from fedcanary.privacy.release import restore
from fedcanary.types import Mode, Release

SCHEMA = 1
NAME = "record.jsonl"
PACKAGES = ("fedcanary", "torch", "transformers", "peft", "numpy", "safetensors")


def plain(value: Any) -> Any:
    """JSON-ready copy: NaN becomes null, infinities become "inf" and "-inf", arrays become lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    return value


def number(value: Any) -> float:
    """Inverse of `plain` for one number."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the record."""

    seq: int
    kind: str
    body: Mapping[str, Any]
    prev: str
    digest: str


def _digest(seq: int, kind: str, body: Mapping[str, Any], prev: str) -> str:
    text = json.dumps([seq, kind, body, prev], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class RunRecord:
    """The record in a folder. `append` returns only when the line is on disk."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self.path = path
        self.entries = entries

    @classmethod
    def open(cls, folder: Path) -> RunRecord:
        """The record of a folder: a new one, or the one to go on with."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls.load(folder) if (folder / NAME).exists() else cls(folder / NAME, [])

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a record and check its chain. A torn last line (a crash while writing) is left out.

        Raises:
            BadInput: no record, or one that was changed; the line is named.
        """
        path = folder / NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise BadInput.of(str(folder), "holds no run record", "point to the --out folder of a run") from error
        lines = raw.split(b"\n")
        entries: list[Entry] = []
        for number_, line in enumerate(lines[:-1], start=1):
            prev = entries[-1].digest if entries else ""
            try:
                entry = Entry(**json.loads(line))
                good = entry.seq == number_ - 1 and entry.prev == prev
                good = good and entry.digest == _digest(entry.seq, entry.kind, entry.body, prev)
                good = good and _line(entry) == line + b"\n"  # another spelling of the same values is a change too
            except (ValueError, TypeError):
                good = False
            if not good:
                raise BadInput.of(
                    f"{path}:{number_}", "was changed since it was written", "restore the file from a backup"
                )
            entries.append(entry)
        return cls(path, entries)

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Write one entry and flush it to disk."""
        seq, prev = len(self.entries), self.digest
        content = plain(body)
        entry = Entry(seq, kind, content, prev, _digest(seq, kind, content, prev))
        line = json.dumps(
            {"seq": seq, "kind": kind, "body": content, "prev": prev, "digest": entry.digest}, ensure_ascii=False
        )
        size = sum(len(_line(e)) for e in self.entries) if self._torn() else None
        with self.path.open("ab") as file:
            if size is not None:
                file.truncate(size)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)
        return entry

    def _torn(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    @property
    def digest(self) -> str:
        """Digest of the last entry, which stands for the whole record."""
        return self.entries[-1].digest if self.entries else ""

    def of(self, kind: str) -> Iterator[Mapping[str, Any]]:
        """Bodies of all entries of a kind."""
        return (entry.body for entry in self.entries if entry.kind == kind)

    @property
    def header(self) -> Mapping[str, Any]:
        """The first entry's body. Raises BadInput if the run never began."""
        for body in self.of("header"):
            return body
        raise BadInput.of(str(self.path), "has no header: the run never began", "start it again in an empty folder")

    @property
    def rounds(self) -> int:
        """How many rounds are complete."""
        return sum(1 for _ in self.of("round"))

    def cut_off(self) -> list[Mapping[str, Any]]:
        """The releases at the record's end, of a round that was cut off while they were written."""
        written = list(takewhile(lambda entry: entry.kind == "release", reversed(self.entries)))
        return [entry.body for entry in reversed(written)]

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end, and did not go on after it."""
        return bool(self.entries) and self.entries[-1].kind == "end"

    def rebaselines(self) -> dict[int, tuple[Mode, ...]]:
        """The modes whose tests began anew, by the round after which they did."""
        return {int(body["round"]): tuple(Mode(mode) for mode in body["modes"]) for body in self.of("rebaseline")}

    def releases(self) -> dict[int, dict[str, Release]]:
        """All releases of complete rounds that the monitor read, by round and probe.

        A round that was interrupted among its releases and then given up leaves some behind, which nobody read.
        """
        complete = {int(body["round"]): not body.get("aborted") for body in self.of("round")}
        table: dict[int, dict[str, Release]] = {round: {} for round in sorted(complete)}
        for body in self.of("release"):
            if complete.get(int(body["round"])):
                table[int(body["round"])][str(body["probe"])] = restore(body)
        return table


def _line(entry: Entry) -> bytes:
    content = {"seq": entry.seq, "kind": entry.kind, "body": entry.body, "prev": entry.prev, "digest": entry.digest}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields, not copied deeply."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def environment() -> dict[str, Any]:
    """What the run ran on: packages, interpreter, processor kind, source commit if there is one."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "packages": versions,
        **_commit(),
    }


def _commit() -> dict[str, Any]:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "log", "-1", "--format=%H", "--", "."],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": found or None, "dirty": bool(dirty)}
