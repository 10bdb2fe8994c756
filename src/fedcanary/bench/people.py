"""Populations of clients as readings, and the sums that panels of them make: exact integers, many windows at once.

Nothing here is approximated: a client's message is `Encoding.message`'s, a panel's sum is the sum of its clients'
messages. Windows are drawn in bulk, for which a large population is cut at random into blocks of clients that always
go together; a block's sum is made once and drawn as often as needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from fedcanary.privacy import noise
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.types import Array

Scheme = Literal["rotating", "same"]

FEW: Final = 128  # kinds of clients up to which a panel is drawn as a count of each
BLOCKS: Final = 16_384  # blocks that panels are put together from
PARTS: Final = 20  # blocks of a panel, at most
SMALL: Final = 100  # clients of a block that is made of clients, not of blocks
AT_ONCE: Final = 4_000_000  # numbers that are summed in one go: memory stays flat


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """M kinds of clients, equally likely, in each of some phases.

    `messages` is (phases, M, K + 1): what they would send. `exact` holds (phases, M) of what they read, by
    (probe, coordinate); NaN where a client could not say. A client is the same row in every phase.
    """

    encoding: Encoding
    messages: Array
    exact: Mapping[tuple[str, str], Array]

    @classmethod
    def of(
        cls,
        encoding: Encoding,
        phases: Sequence[Mapping[str, Array]],
        exact: Mapping[tuple[str, str], Array],
    ) -> People:
        """`phases` are readings (M, K_p) by probe, as clients would send them."""
        messages = np.stack([encoding.messages(phase) for phase in phases]).astype(np.float64)
        return cls(encoding=encoding, messages=messages, exact=exact)

    def mean(self, probe: str, coord: str, phase: int = -1) -> float:
        """The population's own mean of a coordinate in a phase, over those who could say it."""
        return float(np.nanmean(self.exact[probe, coord][phase]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """Sums over the panels of many windows: `messages` (rounds, paths, K + 1) and `exact` (rounds, paths) each."""

    n: int
    messages: Array
    exact: Mapping[tuple[str, str], Array]


def draw(
    people: People, phase_of: Sequence[int], n: int, paths: int, scheme: Scheme, rng: np.random.Generator
) -> Panels:
    """Panels of n clients for every round and path; `phase_of` says which phase a round (from 0) is in.

    `rotating`: a fresh panel every round, from a population much larger than it. `same`: one panel for all rounds.
    """
    keys = list(people.exact)
    table = np.concatenate([people.messages, np.stack([np.nan_to_num(people.exact[k]) for k in keys], axis=-1)], axis=2)
    rounds, fresh = len(phase_of), (len(phase_of) if scheme == "rotating" else 1)
    totals = np.empty((rounds, paths, table.shape[2]))
    if table.shape[1] <= FEW:
        counts = rng.multinomial(n, np.full(table.shape[1], 1 / table.shape[1]), size=(fresh, paths)).astype(np.float64)
        for t, phase in enumerate(phase_of):
            totals[t] = counts[min(t, fresh - 1)] @ table[phase]
    else:
        size, parts = _cut(n)
        sums = _blocks(table, size, rng)  # (phases, BLOCKS, numbers)
        chosen = rng.integers(BLOCKS, size=(fresh, paths, parts))
        for t, phase in enumerate(phase_of):
            totals[t] = 0.0
            for part in range(parts):
                totals[t] += sums[phase][chosen[min(t, fresh - 1), :, part]]
    width = people.messages.shape[2]
    exact = {key: totals[..., width + i] for i, key in enumerate(keys)}
    return Panels(n=n, messages=totals[..., :width], exact=exact)


def noised(panels: Panels, std: float, rng: np.random.Generator) -> Array:
    """The sums (rounds, paths, K + 1) with discrete Gaussian noise; `std` is over a message's norm."""
    if not std:
        return panels.messages
    return panels.messages + noise.simulated_gaussian(rng, std * UNIT, panels.messages.shape)


def _cut(n: int) -> tuple[int, int]:
    """N = size * parts, with at most PARTS parts."""
    parts = next(p for p in range(min(PARTS, n), 0, -1) if n % p == 0)
    return n // parts, parts


def _blocks(table: Array, size: int, rng: np.random.Generator) -> Array:
    """(phases, BLOCKS, numbers): sums over random blocks of so many clients, the same ones in every phase.

    In small blocks every client is as often as any other, give or take one. Large ones are put together from smaller.
    """
    if size <= SMALL or _cut(size)[1] == 1:
        members = np.stack(list(_members(table.shape[1], size, rng)))  # (BLOCKS, size)
    else:
        size, parts = _cut(size)
        table = _blocks(table, size, rng)
        members = rng.integers(BLOCKS, size=(BLOCKS, parts))
    return np.stack([_row_sums(phase, members) for phase in table])


def _members(people: int, size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    pool = np.zeros(0, dtype=np.int64)
    for _ in range(BLOCKS):
        while len(pool) < size:
            pool = np.concatenate([pool, rng.permutation(people)])
        yield pool[:size]
        pool = pool[size:]


def _row_sums(table: Array, members: npt.NDArray[np.int64]) -> Array:
    found = np.empty((len(members), table.shape[1]))
    step = max(1, AT_ONCE // (members.shape[1] * table.shape[1]))
    for first in range(0, len(members), step):
        found[first : first + step] = table[members[first : first + step]].sum(axis=1)
    return found
