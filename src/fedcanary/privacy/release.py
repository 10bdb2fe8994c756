"""THE ONLY DOOR: nothing a client measured or trained reaches the server except through a `Gate`.

Clients seal what they say (seal.py); the gate collects it, writes the charge, and only then opens the sums. Everything
a server-side function receives is a `Release`, and this file is the only one that builds them
(tests/contracts/test_door.py reads the source tree to keep that true).

    trust               the server sees                        who adds the noise
    secure_aggregation  masked vectors, and their noised sum   every client a share
    local               every client's noised vector           every client all of it
    central             every client's exact vector            the server, to the sum
    none                every client's exact numbers           nobody: epsilon is infinite

The update leaves as an exact sum unless the terms clip and noise it too. An exact sum is not differentially private,
and its own charge says so. Under the unit `example` it is the training that is charged, and the update and the exact
readings (`Terms.exact`), which are post-processing of it, cite that charge.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcanary.errors import FedcanaryError
from fedcanary.privacy import secagg
from fedcanary.privacy.encode import UNIT, Encoding, Integers, Sums
from fedcanary.privacy.seal import (
    BITS,
    FIXED,
    RANGE,
    READINGS,
    TRAINING,
    UPDATE,
    Bits,
    Clients,
    Layout,
    Sealed,
    Terms,
    bounds,
    inside,
    norms,
)
from fedcanary.types import Array, Coord, Release

Paying = Callable[[Collection[int]], None]  # told of the survivors before anything can be read
Registration = tuple[secagg.Registry, Mapping[int, Ed25519PrivateKey]]  # the list, and each simulated client's own key
ROOM: Final = int(2.0**63 / (RANGE * FIXED))  # clients whose sum cannot wrap, whatever they say within their bounds


class Masked(Protocol):
    """What clients have masked by themselves, where the server has no vector of theirs: the end of secure aggregation.

    `length` is that of each vector.
    """

    length: int

    def open(self, pay: Paying) -> secagg.Outcome:
        """The survivors' sum; calls `pay` with them before it asks anybody to unmask. Raises secagg.Aborted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a round's readings, update or training cost; written to the ledger before anything is opened."""

    id: str
    round: int
    purpose: str
    event: str  # the mechanism, as `accounting.Mechanism.from_json` reads it back
    epsilon: float
    delta: float


class Gate:
    """One round's passage through the door: `put` every client's sealed vector, then `close` once.

    `cohort` are the only clients who may send anything, and `panel` those of them who have readings to say (all, if
    absent); the others only train, and send an update. `run` tells its charges from other runs'; `registration` is the
    list of keys that secure aggregation checks (without it, clients register for the round). `aborted` says why nothing
    was opened, if so; `refused` counts what was not taken, by reason.
    """

    def __init__(
        self,
        round: int,
        layout: Layout,
        terms: Terms,
        charge: Callable[[Charge], None],
        *,
        cohort: Collection[int] | None = None,
        panel: Collection[int] | None = None,
        run: str = "",
        registration: Registration | None = None,
    ) -> None:
        self.aborted = ""
        self.refused: Counter[str] = Counter()
        self._round = round
        self._layout = {name: tuple(coords) for name, coords in layout.items()}
        self._encoding = Encoding(terms.bounded(self._layout))
        self._exact = terms.exactly(self._layout)
        exact = self._layout if terms.trust == "none" else self._exact
        self._bounds = bounds(exact)  # of what is seen as it is
        self._readings = len(self._bounds[0]) + (0 if terms.trust == "none" else self._encoding.size)
        self.terms = terms
        self._charge = charge
        self._cohort, self._panel, self._run, self._registration = cohort, panel, run, registration
        self._charges: dict[str, Charge] = {}
        self._size: int | None = None  # of the first vector taken; all have the same
        self._seen: set[int] = set()
        self._total: Sealed | None = None  # of vectors that the server sees
        self._sealed: dict[int, Integers] = {}  # what stays with each client until it is masked
        self._wrapped = False  # the total is beyond 64 bits
        self._closed = False

    def put(self, client: int, vector: Sealed) -> bool:
        """Take in a client's sealed vector (see `seal.seal`); False if it is dropped, which `refused` counts."""
        return self.put_all([client], vector[None])[0]

    def put_all(self, clients: Clients, vectors: Sealed) -> list[bool]:
        """Take in n clients' sealed vectors, the rows of (n, L); False for each that is dropped, as `refused` counts.

        To the last bit what `put` does with one after the other. Of what is taken only the sum stays, except under
        `secure_aggregation`, where this stands in for the clients until each vector is masked.
        """
        if self._closed:
            raise FedcanaryError("a message came after its round was closed")
        vectors, names = np.ascontiguousarray(vectors), np.asarray(clients).tolist()
        shaped = self._shaped(vectors)
        sound = self._sound(names, vectors).tolist() if shaped else [False] * len(vectors)
        taken = []
        for client, good in zip(names, sound, strict=True):
            reason = ""
            if self._cohort is not None and client not in self._cohort:
                reason = "not in this round's panel"
            elif client in self._seen:
                reason = "a second message of one client"
            elif not good:
                reason = "out of bounds" if shaped else "wrong shape"
            else:
                self._seen.add(client)
            if reason:
                self.refused[reason] += 1
            taken.append(not reason)
        if any(taken):
            self._add(names, vectors, taken)
        return taken

    def _shaped(self, vectors: Sealed) -> bool:
        """Whether every row may be a sealed vector of this round; the first that was taken says how long they are."""
        if vectors.dtype != (np.float64 if self.terms.trust == "none" else np.int64) or vectors.ndim != 2:
            return False
        length = int(vectors.shape[1])
        return length > self._readings and length == (self._size or length)

    def _answered(self, clients: Iterable[int]) -> int:
        """How many of these clients have readings to say."""
        return sum(self._panel is None or client in self._panel for client in clients)

    def _sound(self, names: Sequence[int], vectors: Sealed) -> Bits:
        """(n,) whether each row is within its bounds. What a trust hides from the server cannot be checked here."""
        start, size, (low, high) = self._readings, self._encoding.size, self._bounds
        sound: Bits = np.ones(len(vectors), dtype=np.bool_)
        if self._panel is not None and self.terms.trust != "secure_aggregation":
            silent = np.array([client not in self._panel for client in names], dtype=np.bool_)
            sound &= ~silent | ~vectors[:, :start].any(axis=1)
        if self.terms.trust == "none":
            sound &= np.isfinite(vectors).all(axis=1)
            sound &= inside(vectors[:, :start], low, high)
        elif self.terms.trust == "central":
            update, most, slack = vectors[:, start:] / FIXED, self.terms.update_clip, 1 / FIXED
            sound &= norms(vectors[:, :size].astype(np.float64)) <= UNIT
            sound &= np.abs(update).max(axis=1) < RANGE
            if math.isfinite(most):
                sound &= norms(update[:, :-1]) <= most * np.abs(update[:, -1]) * (1 + 1e-9)
            if start > size:
                sound &= inside(vectors[:, size:start] / FIXED, low - slack, high + slack)
        return sound

    def _add(self, names: Sequence[int], vectors: Sealed, taken: Sequence[bool]) -> None:
        rows = vectors if all(taken) else vectors[np.array(taken)]
        self._size = rows.shape[1]
        if self.terms.trust == "secure_aggregation":
            self._sealed.update(zip(itertools.compress(names, taken), rows.copy(), strict=True))
            return
        if self._total is not None:  # row after row, as numbers that are rounded have to be added
            rows = np.concatenate([self._total[None], rows])
        self._total = rows.sum(axis=0, initial=-rows.dtype.type(0))  # to -0.0, everything adds as it is
        if self.terms.trust != "none" and len(self._seen) > ROOM:
            self._wrapped |= bool((np.abs(rows.sum(axis=0, dtype=np.float64) - self._total) > 2.0**62).any())

    def close(self, masked: Masked | None = None) -> dict[str, Release]:
        """Write the charges, then open the sums: a release for each probe and one for the update.

        Empty if nobody sent anything, or too few did; the latter is charged all the same. A gate closes once: a second
        look at the same sums would be a second release. `masked` is where the clients' vectors are if they never came
        here.
        """
        if self._closed:
            raise FedcanaryError(f"round {self._round} was released before")
        self._closed = True
        if masked is not None:
            self._size = masked.length
            return self._unmasked(masked.open)
        count, total = self._answered(self._seen), self._total
        if not self._seen:
            return {}
        if count < self.terms.floor:
            self._abort(f"{count} clients answered, and no sum over fewer than {self.terms.floor} is opened")
            return {}
        if self._wrapped:
            self._abort("the sum of the updates is too large for 64 bits: let clients weigh less")
            return {}
        if total is None:
            return self._unmasked(self._together)
        self._pay(count)
        if self.terms.trust == "none":
            return self._plain(total)
        return self._open(self._noised(total) if self.terms.trust == "central" else total, count)

    def _abort(self, why: str) -> None:
        self.aborted = why
        if not self._charges:
            self._pay(self.terms.floor)

    def _unmasked(self, aggregate: Callable[[Paying], secagg.Outcome]) -> dict[str, Release]:
        def pay(survivors: Collection[int]) -> None:
            count = self._answered(survivors)
            if count < self.terms.floor:
                raise secagg.Aborted(secagg.Step.AGREE, count, self.terms.floor, "clients with readings are left")
            self._pay(count)

        try:
            outcome = aggregate(pay)
        except secagg.Aborted as error:
            if error.step in (secagg.Step.ADVERTISE, secagg.Step.SHARE):  # before anybody was asked for its vector
                self.aborted = str(error)
            else:
                self._abort(str(error))
            return {}
        self.refused.update(outcome.refused)
        return self._open(outcome.signed, self._answered(outcome.survivors))

    def _together(self, pay: Paying) -> secagg.Outcome:
        """The whole protocol over what was put, all clients played here."""
        registry, identities = self._registration or (None, None)
        return secagg.aggregate(
            self._sealed,
            BITS,
            round_id=f"{self._run} {self._round} {secrets.token_hex(8)}",  # a round begun again is another
            minimum=max(self.terms.floor, 2),
            tolerated=self.terms.dropouts,
            registry=registry,
            identities=identities,
            before_unmasking=pay,
        )

    def _noised(self, total: Integers) -> Integers:
        """What the server adds under trust `central`."""
        terms, size, update = self.terms, self._encoding.size, self._readings
        noised = total.copy()
        noised[:size] += terms.draw(terms.readings_std, size, READINGS, self._round)
        if terms.update_std:
            noised[update:-1] += terms.draw(terms.update_std, len(total) - update - 1, UPDATE, self._round)
        return noised

    def _pay(self, survivors: int) -> None:
        mechanisms = {READINGS: self.terms.mechanism(survivors)}
        if self.terms.training is not None:
            mechanisms = {TRAINING: self.terms.training, **mechanisms}
        elif self._size is None or self._size > self._readings + 1:  # a lone weight is no update
            mechanisms[UPDATE] = self.terms.update_mechanism(survivors)
        said = "|".join(f"{name}:{','.join(c.name for c in coords)}" for name, coords in self._layout.items())
        for purpose, mechanism in mechanisms.items():
            epsilon = self.terms.epsilon(mechanism)
            charge = Charge(
                id=hashlib.blake2b(f"{self._run}|{self._round}|{purpose}|{said}".encode(), digest_size=8).hexdigest(),
                round=self._round,
                purpose=purpose,
                event=mechanism.to_json(),
                epsilon=epsilon,
                delta=self.terms.delta if math.isfinite(epsilon) else 0.0,
            )
            self._charge(charge)
            self._charges[purpose] = charge

    def _plain(self, total: Array) -> dict[str, Release]:
        """Trust `none`: exact sums of everything, details included."""
        found, at, count = {}, 0, self._answered(self._seen)
        for name, coords in self._layout.items():
            found[name] = self._release(name, _exact(coords, total[at : at + len(coords)]), count, math.inf)
            at += len(coords)
        update = Sums(coords=(), total=total[at:], noise_std=np.zeros(len(total) - at))
        return {**found, UPDATE: self._release(UPDATE, update, count, math.inf)}

    def _open(self, total: Integers, count: int) -> dict[str, Release]:
        terms, at = self.terms, self._encoding.size
        sums, lost, lost_std = self._encoding.read(total[:at], count, terms.noise_std(terms.readings_std, count))
        found = {
            name: self._release(name, each, count, terms.reach, float(lost), lost_std) for name, each in sums.items()
        }
        for name, coords in self._exact.items():
            found[name] = self._release(name, _exact(coords, total[at : at + len(coords)] / FIXED), count, math.inf)
            at += len(coords)
        noise_std = np.full(len(total) - at, terms.noise_std(terms.update_std, count) / FIXED)
        noise_std[-1] = 0.0  # the weights' sum
        found[UPDATE] = self._release(
            UPDATE, Sums(coords=(), total=total[at:] / FIXED, noise_std=noise_std), count, terms.update_clip
        )
        return {name: found[name] for name in (*self._layout, UPDATE)}

    def _release(
        self, name: str, sums: Sums, count: int, sensitivity: float, lost: float = 0.0, lost_std: float = 0.0
    ) -> Release:
        if self.terms.training is not None and name in (UPDATE, *self._exact):
            charge = self._charges[TRAINING]
        else:
            charge = self._charges.get(name, self._charges[READINGS])
        return Release(
            round=self._round,
            probe=name,
            coords=sums.coords,
            total=sums.total,
            count=float(count),
            noise_std=sums.noise_std,
            sensitivity=sensitivity,
            event=charge.event,
            charge_id=charge.id,
            lost=lost,
            lost_std=lost_std,
        )


def _exact(coords: Sequence[Coord], total: Array) -> Sums:
    return Sums(coords=tuple(c.name for c in coords), total=total, noise_std=np.zeros(len(coords)))


def restore(body: Mapping[str, Any]) -> Release:
    """A release read back from a record, exactly as it was made; nothing passes the door a second time."""
    return Release(
        round=int(body["round"]),
        probe=str(body["probe"]),
        coords=tuple(body["coords"]),
        total=np.array(body["total"], dtype=np.float64),
        count=float(body["count"]),
        noise_std=np.array(body["noise_std"], dtype=np.float64),
        sensitivity=float(body["sensitivity"]),
        event=str(body["event"]),
        charge_id=str(body["charge_id"]),
        lost=float(body.get("lost", 0.0)),
        lost_std=float(body.get("lost_std", 0.0)),
    )
