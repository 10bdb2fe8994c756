"""The head of a ledger's chain, and the anchor: the small file beside a ledger that keeps it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcanary.errors import Refused


class Damaged(Refused):
    """The ledger was changed, cut or rolled back since it was written: it can vouch for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Stands for a whole chain up to its last entry: how many entries, and the hash of the last."""

    count: int
    hash: str


def canonical(value: Any) -> str:
    """The one JSON text of a value, in ASCII; NaN and infinities have none (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def link(before: str, body: bytes) -> str:
    """Hash of an entry, given the hash before it."""
    return hashlib.blake2b(before.encode() + b"\n" + body, digest_size=32).hexdigest()


def beside(path: Path) -> Path:
    """Where a ledger's anchor lies."""
    return path.with_name(path.name + ".anchor")


def read(path: Path) -> Head | None:
    """The head that a ledger's anchor holds; None where there is no anchor. Raises Damaged if it was changed."""
    try:
        raw = beside(path).read_bytes()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
        head = Head(count=int(content["count"]), hash=str(content["hash"]))
        good = raw == content_of(head)
    except (ValueError, LookupError, TypeError):
        good = False
    if not good:
        raise damaged(path, f"its anchor {beside(path).name} was changed")
    return head


def content_of(head: Head) -> bytes:
    """An anchor's bytes, with a checksum."""
    content = {"count": head.count, "hash": head.hash}
    return canonical(content | {"check": link("anchor", canonical(content).encode())}).encode() + b"\n"


def write(path: Path, head: Head) -> None:
    """Replace the anchor as a whole, on disk when this returns. Called with the write lock held."""
    place = beside(path)
    temporary = place.with_name(place.name + ".new")
    with temporary.open("wb") as file:
        file.write(content_of(head))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, place)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def damaged(path: Path, what: str) -> Damaged:
    """The error for a ledger that can no longer be trusted, with its remedy."""
    return Damaged(
        f"{path}: {what}\n    remedy: release nothing on it; restore it with its anchor from a copy that agrees with "
        "the head in the run's record, or else count the window as spent and open a new ledger for the next"
    )
