"""What the base model says to the public items: the same for every client, round, run and study, so asked only once.

The answers are kept on disk under a name that says what they follow from. A file is written whole or not at all and
carries its own digest, so any number of processes may share the folder: whoever finds a file that is not whole asks
the model again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from fedcanary.engines.setup import Setup
from fedcanary.models import stacked
from fedcanary.types import Array, Role, Suite

VERSION: Final = 1  # of what is stored; another number reads none of the older files
_DIGEST: Final = 16


def base_probabilities(setup: Setup, tokens: int) -> Array:
    """(n, C) the base's choice probabilities on all public items, role by role in the order of `Setup.items`."""
    parts = [_of(setup, suite, tokens) for role in Role for suite in setup.suites if suite.role == role]
    width = max((part.shape[1] for part in parts), default=1)
    return np.concatenate([_widened(part, width) for part in parts]) if parts else np.zeros((0, 1))


def _of(setup: Setup, suite: Suite, tokens: int) -> Array:
    if setup.cache is None or not suite.digest:
        return _asked(setup, suite, tokens)
    base = setup.base
    follows = f"{VERSION}|{base.digest}|{base.task}|{base.max_length}|{base.dtype}|{suite.version}|{suite.digest}"
    file = setup.cache / "readings" / f"{hashlib.blake2b(follows.encode(), digest_size=16).hexdigest()}.bin"
    shape = (len(suite.items), max((len(item.choices) for item in suite.items), default=1))
    found = _read(file, shape)
    if found is None:
        found = _asked(setup, suite, tokens)
        _write(file, found)
    return found


def _asked(setup: Setup, suite: Suite, tokens: int) -> Array:
    rows = setup.base.rows(suite.items)
    return stacked.score(setup.base, setup.lora, [], [rows], tokens=tokens)[0].choice_probability()


def _widened(table: Array, width: int) -> Array:
    """With columns for choices that none of its items has: of probability 0, and NaN where an item has none at all."""
    more = np.zeros((len(table), width - table.shape[1]))
    more[np.isnan(table).all(axis=1)] = np.nan
    return np.concatenate([table, more], axis=1)


def _read(file: Path, shape: tuple[int, int]) -> Array | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    if hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest or len(body) != 8 * shape[0] * shape[1]:
        return None
    return np.frombuffer(body, dtype="<f8").reshape(shape).copy()


def _write(file: Path, table: Array) -> None:
    body = table.astype("<f8").tobytes()
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to fail
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.blake2b(body, digest_size=_DIGEST).digest() + body)
        Path(draft).replace(file)
