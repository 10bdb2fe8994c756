"""Who is whose neighbour, and how many must answer: what follows from the terms and the roster alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedcanary.privacy import shamir
from fedcanary.privacy.secagg.crypto import add_pads
from fedcanary.privacy.secagg.terms import Terms

COMPLETE = 64  # up to this many clients everybody is everybody's neighbour
COMMITTEE = 128  # up to this many sign the survivors; more signatures would cost each client more and add little


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """Each client works it out alone, so no server can draw another graph for the same roster.

    A ring in an order drawn by hashing; neighbours stand at `offsets` from each other on it. Offsets are drawn too:
    on a plain ring a server could cut out any short arc by declaring degree/2 clients on both sides dropped.
    """

    digest: bytes
    ids: npt.NDArray[np.uint32]  # (n,), increasing
    order: npt.NDArray[np.int64]  # (n,), index in `ids` of the client at each place of the ring
    place: npt.NDArray[np.int64]  # (n,), its inverse
    offsets: npt.NDArray[np.int64]  # (degree,)
    threshold: int  # shares that recover a secret
    near: int  # neighbours that must be left for a client to go on
    committee: frozenset[int]  # whose signatures over the survivors count
    quorum: int  # signatures needed: two sets of survivors cannot both get as many
    needed: int  # clients that must answer each step

    def neighbours(self, client: int) -> tuple[int, ...]:
        """Ids of a client's neighbours, increasing. The client must be on the roster."""
        at = self.place[np.searchsorted(self.ids, client)]
        return tuple(np.sort(self.ids[self.order[(at + self.offsets) % len(self.ids)]]).tolist())


@lru_cache(maxsize=4)  # a pure function; in a simulation all clients of a round ask the same
def open_session(terms: Terms, roster: bytes) -> Session:
    """The session of these participants: `roster` is their increasing ids as little-endian uint32."""
    ids = np.frombuffer(roster, dtype="<u4").astype(np.uint32)
    n = len(ids)
    digest = hashlib.sha256(b"session" + terms.digest + roster).digest()
    half = (n - 1) // 2
    order = _shuffled(digest, b"order", n)
    complete = n <= COMPLETE or terms.degree // 2 > half
    if complete:
        offsets = np.arange(1, n)
    else:  # the offset 1 is always there: it makes the graph connected
        steps = np.append(2 + _shuffled(digest, b"offsets", half - 1)[: terms.degree // 2 - 1], 1)
        offsets = np.concatenate([steps, -steps])
    committee = ids[order[:COMMITTEE]].tolist()
    dropped = terms.dropped(n)
    # Whose secret must be recovered has dropped out, so one fewer of the others has; but on a sparse graph it may be
    # one that stopped for want of neighbours.
    threshold = shamir.threshold(n - 1, len(offsets), max(dropped - complete, 0), n)
    return Session(
        digest=digest,
        ids=ids,
        order=order,
        place=np.argsort(order),
        offsets=offsets,
        threshold=threshold,
        # Half of them is rarely lost by chance. With only the threshold, 32 of 10,000 could be cut out (a cube of
        # five offsets has five neighbours inside for each) by declaring 800 dropped.
        near=max(threshold - 1, (len(offsets) + 1) // 2),
        committee=frozenset(committee),
        quorum=shamir.threshold(n, len(committee), dropped),
        needed=terms.needed(n),
    )


def _shuffled(digest: bytes, name: bytes, n: int) -> npt.NDArray[np.int64]:
    """A permutation of n that is the same with every version of numpy: the ranks of 8-byte pseudo-random words."""
    words = np.zeros(n, dtype="<u8")
    add_pads(words, [(hashlib.sha256(name + digest).digest(), 1)])
    return np.argsort(words, kind="stable").astype(np.int64)
