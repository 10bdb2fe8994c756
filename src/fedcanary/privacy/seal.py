"""The client's side of the door: what one client wants to say becomes one vector that may leave it.

A sealed vector is the readings (encode.py) and behind them the weighted adapter update in fixed point, both of bounded
norm, with the noise that the terms ask of a client already in it:
    trust               noise at the client                what leaves the client
    secure_aggregation  its share of the sum's noise       the vector under masks (secagg)
    local               all of it                          the vector
    central             none: the server adds it           the vector
    none                none: epsilon is infinite          exact numbers, which the study must have said

Under the unit `example` the noise of each client's own training protects its examples. The update, and readings made
from public items and the trained models alone, are then post-processing: they follow the bounded readings in fixed
point, without noise, and cost nothing more. Only readings of the client's held-out examples are bounded and noised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.privacy import accounting, noise, secagg
from fedcanary.privacy.accounting import Mechanism, Neighbours
from fedcanary.privacy.encode import UNIT, Encoding, Integers
from fedcanary.rng import stream
from fedcanary.types import Array, Coord

Trust = Literal["secure_aggregation", "central", "local", "none"]
Sealed = npt.NDArray[Any]  # int64, or float64 under trust `none`
Bits = npt.NDArray[np.bool_]
Clients = Sequence[int] | npt.NDArray[np.int64]
Layout = Mapping[str, Sequence[Coord]]
UPDATE = "update"  # the adapter update's name among the releases
READINGS = "readings"
TRAINING = "training"  # the charge that update and exact readings are post-processing of
BITS: Final = 64  # entries are below 2^44, their noise far below 2^60: sums over 2^17 clients do not wrap
FIXED: Final = 2.0**32  # what 1 is in a sealed update
RANGE: Final = 2.0**12  # a weighted change beyond it is refused; a sum over 2^17 clients stays inside 63 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a round's vectors are protected, the same for all its clients.

    `noise_multiplier` is the noise's standard deviation over the norm cap, in a sum over `floor` clients; a sum over
    fewer is not opened. `dropouts` is the share of clients that may vanish while the sum is made. `update_clip` bounds
    the L2 norm of a client's unweighted change, and `update_noise` is the update's own noise multiplier; at 0 its sum
    leaves exactly. `simulated` is the seed of all noise: repeatable, so for simulation alone.

    Under the unit `example`, `training` is what a client's training in the round does to its examples, and `exact` are
    the probes whose readings are post-processing of it. `reach` is how far what epsilon hides moves a message of the
    others, in units of the norm cap: 1 for a client's whole message, less for one example (`Encoding.reach`).
    """

    trust: Trust
    noise_multiplier: float = 0.0
    delta: float = 0.0
    neighbours: Neighbours = "zeroed"
    floor: int = 1
    dropouts: float = 0.3
    update_clip: float = math.inf
    update_noise: float = 0.0
    simulated: int | None = None
    training: Mechanism | None = None
    exact: tuple[str, ...] = ()
    reach: float = 1.0

    def __post_init__(self) -> None:
        if self.trust != "none" and not self.noise_multiplier > 0:
            raise FedcanaryError(f"trust {self.trust!r} without noise protects nothing")
        if self.update_noise > 0 and not math.isfinite(self.update_clip):
            raise FedcanaryError("a noised update needs a bound on its norm")
        if self.exact and (self.training is None or self.training.kind == "none"):
            raise FedcanaryError("nothing leaves exactly unless training itself protected it")

    def bounded(self, layout: Layout) -> dict[str, tuple[Coord, ...]]:
        """The part of a layout that leaves as one bounded and noised message."""
        return {name: tuple(coords) for name, coords in layout.items() if name not in self.exact}

    def exactly(self, layout: Layout) -> dict[str, tuple[Coord, ...]]:
        """The part that leaves without noise, as post-processing."""
        return {name: tuple(coords) for name, coords in layout.items() if name in self.exact}

    def length(self, layout: Layout, shared: int) -> int:
        """Entries of a sealed vector, with an update of so many numbers and its weight."""
        exact = layout if self.trust == "none" else self.exactly(layout)
        said = 0 if self.trust == "none" else Encoding(self.bounded(layout)).size
        return said + sum(map(len, exact.values())) + shared + 1

    @property
    def readings_std(self) -> float:
        """Std asked of the noise in the integer sum of `floor` clients' readings."""
        return self.noise_multiplier * UNIT

    @property
    def update_std(self) -> float:
        """Std asked of the noise in the fixed-point sum of `floor` clients' updates; 0 for none."""
        return self.update_noise * self.update_clip * FIXED if self.update_noise else 0.0

    def mechanism(self, survivors: int) -> Mechanism:
        """What opening the readings of so many clients does to one of them."""
        norm = self.reach * UNIT
        return self._mechanism(0.0 if self.trust == "none" else self.readings_std, norm, survivors)

    def update_mechanism(self, survivors: int) -> Mechanism:
        """The same for the update."""
        return self._mechanism(0.0 if self.trust == "none" else self.update_std, self.update_clip * FIXED, survivors)

    def _mechanism(self, std: float, norm: float, survivors: int) -> Mechanism:
        if std == 0:
            return Mechanism(kind="none")
        shares = survivors if self.trust == "secure_aggregation" else 1
        return Mechanism(kind="discrete_gaussian", share_std=self._share(std), shares=shares, sensitivity=norm)

    def epsilon(self, mechanism: Mechanism) -> float:
        """Cost of one mechanism under these terms."""
        return accounting.compose([mechanism], self.delta or accounting.MIN_DELTA, neighbours=self.neighbours)

    def _share(self, std: float) -> float:
        return noise.share_std(std, self.floor if self.trust == "secure_aggregation" else 1)

    def noise_std(self, std: float, survivors: int) -> float:
        """Std of the noise that is in the sum over so many clients where `std` was asked for; 0 for 0."""
        return self._share(std) * math.sqrt(1 if self.trust == "central" else survivors) if std else 0.0

    def draw(self, std: float, size: int, *key: int | str) -> Integers:
        """(size,) one share of the noise: a client's, or the server's where that adds it."""
        if self.simulated is None:
            return noise.gaussian_noise(self._share(std), size)
        return noise.simulated_gaussian(stream(self.simulated, "noise", *key), self._share(std), size)


def floor(min_cohort: int, dropouts: float, cohort: int) -> int:
    """No sum over fewer of so many clients is opened; the noise suffices for as few."""
    return max(min_cohort, math.ceil((1 - dropouts) * cohort - 1e-9))


def masking(
    sum: str, *, contract: str, registry: secagg.Registry, length: int, floor: int, dropouts: float
) -> secagg.Terms:
    """What both ends agree to before a secure sum of sealed vectors; `sum` names it and must never come twice."""
    return secagg.Terms(
        round_id=sum,
        contract=contract.encode(),
        registry=registry.digest,
        length=length,
        bits=BITS,
        minimum=max(floor, 2),  # a sum over one vector is that vector
        tolerated=dropouts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one client wants to say: a vector for each probe, and the weighted update of its shared tensors.

    `update` is (weight * change..., weight), so that the sum carries its own divisor. Of n clients at once (`seal_all`)
    every array has n rows.
    """

    readings: Mapping[str, Array]
    update: Array


def seal(message: Message, layout: Layout, terms: Terms, round: int, client: int) -> Sealed:
    """(K + 1 + E + P,) of one client: `seal_all`'s only row."""
    said = {name: values[None] for name, values in message.readings.items()}
    (sealed,) = seal_all(Message(readings=said, update=message.update[None]), layout, terms, round, [client])
    return np.asarray(sealed)


def seal_all(messages: Message, layout: Layout, terms: Terms, round: int, clients: Clients) -> Sealed:
    """(n, K + 1 + E + P) int64: bounded and noised, then E exact readings and the update; under trust `none` all exact.

    `messages` are those of n clients, in the order of `clients`: readings (n, K_p) by probe, and updates (n, P). What a
    client sends does not depend on the company it comes in.

    Raises:
        FedcanaryError: a message is not what may leave: the client's own bug, which must not reach the wire.
        BadInput: an update is too large to be sent.
    """
    names = np.asarray(clients).tolist()  # plain integers: a stream of noise is named by the type too
    check(messages, layout, len(names))
    if terms.trust == "none":
        said = [messages.readings[name] for name in layout]
        return np.concatenate([*said, messages.update], axis=1).astype(np.float64)
    readings = Encoding(terms.bounded(layout)).messages(messages.readings)
    exact = [np.rint(messages.readings[name] * FIXED).astype(np.int64) for name in terms.exactly(layout)]
    update = _fixed(messages.update, terms)
    if terms.trust != "central":
        for client, own, change in zip(names, readings, update[:, :-1], strict=True):
            own += terms.draw(terms.readings_std, len(own), READINGS, round, client)
            if terms.update_std:
                change += terms.draw(terms.update_std, len(change), UPDATE, round, client)
    return np.concatenate([readings, *exact, update], axis=1)


def seal_update(update: Array, layout: Layout, terms: Terms) -> Sealed:
    """What a client sends that only trains: zeros where others have readings, without noise, and its update (P,).

    The zeros are the same whatever the client holds, so they need no noise and cost nothing.
    """
    if update.ndim != 1 or not np.isfinite(update).all():
        raise FedcanaryError("an update is not finite")
    said = bounds(layout if terms.trust == "none" else terms.exactly(layout))[0].size
    if terms.trust == "none":
        return np.concatenate([np.zeros(said), update])
    silent = np.zeros(Encoding(terms.bounded(layout)).size + said, dtype=np.int64)
    return np.concatenate([silent, _fixed(update[None], terms)[0]])


def check(messages: Message, layout: Layout, n: int) -> None:
    """Refuse, at the client, what its own bug would let leave: other probes, values outside their bounds, NaN."""
    if messages.readings.keys() != layout.keys():
        raise FedcanaryError(f"a message with {sorted(messages.readings)} where {sorted(layout)} may pass")
    for name, coords in layout.items():
        if messages.readings[name].shape != (n, len(coords)):
            raise FedcanaryError(f"a reading of {name} has another shape than its coordinates")
    low, high = bounds(layout)
    if not inside(np.concatenate([messages.readings[name] for name in layout], axis=1), low, high).all():
        raise FedcanaryError("a reading lies outside its bounds")
    if messages.update.ndim != 2 or len(messages.update) != n or not np.isfinite(messages.update).all():
        raise FedcanaryError("an update is not finite")


def bounds(layout: Layout) -> tuple[Array, Array]:
    """(K,) least and (K,) greatest value of every coordinate of a layout."""
    return _bounds(tuple(c for coords in layout.values() for c in coords))


@cache
def _bounds(coords: tuple[Coord, ...]) -> tuple[Array, Array]:
    return np.array([c.low for c in coords]), np.array([c.high for c in coords])


def inside(values: Array, low: Array, high: Array) -> Bits:
    """(n,) whether each row of (n, K) is within bounds (K,), all of it; NaN is not."""
    return np.asarray(((values >= low) & (values <= high)).all(axis=1))


def _fixed(update: Array, terms: Terms) -> Integers:
    """(n, P) updates in fixed point, clipped; every number rounded toward zero, so that no norm grows."""
    weight, change = update[:, -1:], update[:, :-1]
    if math.isfinite(terms.update_clip):
        with np.errstate(divide="ignore", invalid="ignore"):  # a client without weight has no change to send
            norm = norms(change / weight)[:, None]
            factor = np.where(norm > 0, np.minimum(1.0, terms.update_clip / norm), 1.0)
            change = np.where(weight > 0, change * factor, 0.0)
    clipped = np.concatenate([change, weight], axis=1)
    largest = float(np.abs(clipped).max(initial=0.0))
    if largest >= RANGE:
        raise BadInput.of("update", f"a weighted change of {largest:.3g}", f"train less; below {RANGE:g} can be sent")
    return (clipped * FIXED).astype(np.int64)


def norms(rows: Array) -> Array:
    """(n,) L2 norms of the rows of (n, D), each as it would be alone."""
    return np.asarray(np.sqrt(np.vecdot(rows, rows)))
