"""Whole rounds through the real door, with a coin for every client: what an auditor sees, and the bugs to be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pytest

from fedcanary.privacy import encode, secagg
from fedcanary.privacy.accounting import Mechanism, compose, gaussian_std
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.privacy.release import Charge, Gate
from fedcanary.privacy.seal import FIXED, READINGS, UPDATE, Message, Sealed, Terms, seal_all
from fedcanary.rng import stream
from fedcanary.types import Coord, Release
from oracles.plain_sum import plain_sum

EPSILON, DELTA = 2.0, 1e-6
CLIP = 0.5  # of an update
Plant = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Coins (m,) in {-1, +1} and scores (m,) of all canaries of some rounds, and what the first round was charged."""

    coins: np.ndarray
    scores: np.ndarray
    charges: tuple[Charge, ...]
    terms: Terms
    refused: int

    def stated(self, delta: float, *purposes: str) -> float:
        """Epsilon of one round (or of these parts of it) at `delta`, from what the gate wrote down when it charged."""
        parts = [Mechanism.from_json(c.event) for c in self.charges if not purposes or c.purpose in purposes]
        return compose(parts, delta, neighbours=self.terms.neighbours)

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of those who were in, and of those who were not."""
        return self.scores[self.coins == 1], self.scores[self.coins == -1]


def layout(size: int) -> dict[str, tuple[Coord, ...]]:
    """One probe of so many coordinates; a value of 1 is a whole message, and values go to 4."""
    return {"probe": tuple(Coord(name=f"c{i}", low=-4, high=4, purpose="audit", scale=1.0) for i in range(size))}


def terms_for(trust: str, floor: int, seed: int | None, update: bool = False) -> Terms:
    """EPSILON in all; with noised updates they pay half of it. Local noise hides any message behind any other."""
    far = 2.0 if trust == "local" else 1.0
    multiplier = gaussian_std(EPSILON, DELTA, far) * (np.sqrt(2) if update else 1)
    return Terms(
        trust=trust,
        noise_multiplier=multiplier,
        delta=DELTA,
        neighbours="substituted" if trust == "local" else "zeroed",
        floor=floor,
        update_clip=CLIP,
        update_noise=multiplier if update else 0.0,
        simulated=seed,
    )


def unshrunken(w):
    """The planted `encode.shrink` of a client that forgets its bound."""
    return np.pad(w, ((0, 0), (0, 1)))


def play(
    terms: Terms,
    *,
    rounds: int,
    clients: int,
    seed: int,
    loud: float = 1.0,
    look: Sequence[str] = (READINGS, UPDATE),
    masks: bool = False,
    dropouts: Mapping[secagg.Step, Sequence[int]] | None = None,
    plant: Plant | None = None,
) -> Seen:
    """Rounds in which every client is a canary: a whole message of `loud` times the norm cap, or none, by a coin.

    Client i speaks along coordinate i (of the readings, and of the update where that is noised), so the numbers that
    depend on it depend on nobody else's coin, and all pairs of coin and score are independent. "None" is a message of
    zeros, sealed like any other; under trust `local` it is the opposite message. Without `masks` the real transport is
    replaced by `plain_sum`. Scores come from the releases alone; under `local`, where the server receives every vector,
    from those. Who drops out is no canary. `look` says at which parts of a release the auditor looks.

    `plant`: {"noise": f} all noise times f; {"update noise": f} that of updates; {"silent": n} clients without a share;
    {"believed": f} shares drawn for f times as many survivors; {"unclipped": True} readings, {"unclipped update": f}
    updates clipped f times too wide; {"metrics": True} each client's loss beside its sealed vector.
    """
    plant = dict(plant or {})
    size = layout(clients)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    charges: list[Charge] = []
    refused, per_round = 0, 0
    stay = sorted(set(range(clients)) - {c for gone in (dropouts or {}).values() for c in gone})
    with pytest.MonkeyPatch.context() as patch:
        _plant(patch, plant)
        if not masks:
            patch.setattr(secagg, "aggregate", plain_sum)
        elif dropouts:
            real = secagg.aggregate
            patch.setattr(secagg, "aggregate", lambda *a, **k: real(*a, **k, dropouts=dropouts))
        for round in range(1, rounds + 1):
            coins = np.where(stream(seed, "coins", round).random(clients) < 0.5, 1, -1)
            gate = Gate(round, size, terms, charges.append, run=f"audit {seed}")
            messages = _together([_canary(c, clients, int(coins[c]), loud, terms) for c in range(clients)])
            received = _sealed(messages, size, terms, plant, round)
            gate.put_all(range(clients), received)
            metrics = messages.readings["probe"].sum(axis=1) if "metrics" in plant else np.zeros(clients)
            found = gate.close()
            refused += sum(gate.refused.values())
            per_round = per_round or len(charges)
            if found:
                local = terms.trust == "local"
                score = _from_vectors(received, clients, look) if local else _from_releases(found, clients, look)
                seen.append((coins[stay], (score + 1e9 * metrics)[stay]))
    coins, scores = (np.concatenate([pair[i] for pair in seen] or [np.zeros(0)]) for i in (0, 1))
    return Seen(coins=coins, scores=scores, charges=tuple(charges[:per_round]), terms=terms, refused=refused)


def _plant(patch: pytest.MonkeyPatch, plant: Plant) -> None:
    factors = {READINGS: plant.get("noise", 1.0), UPDATE: plant.get("update noise", plant.get("noise", 1.0))}
    if set(factors.values()) != {1.0}:
        draw = Terms.draw
        patch.setattr(Terms, "draw", lambda self, std, size, *key: draw(self, std * factors[key[0]], size, *key))
    if "unclipped" in plant:
        patch.setattr(encode, "shrink", unshrunken)


def _together(messages: Sequence[Message]) -> Message:
    readings = {name: np.stack([m.readings[name] for m in messages]) for name in messages[0].readings}
    return Message(readings=readings, update=np.stack([m.update for m in messages]))


def _sealed(messages: Message, size: Mapping[str, Sequence[Coord]], terms: Terms, plant: Plant, round: int) -> Sealed:
    """(clients, n): each client's vector, by its own terms; those in a row with the same terms are sealed together."""
    everyone = range(len(messages.update))
    own = [_as_planted(terms, client, plant) for client in everyone]
    parts = []
    for same, group in groupby(everyone, key=own.__getitem__):
        rows = list(group)
        said = Message(readings={name: v[rows] for name, v in messages.readings.items()}, update=messages.update[rows])
        parts.append(seal_all(said, size, same, round, rows))
    return np.concatenate(parts)


def _as_planted(terms: Terms, client: int, plant: Plant) -> Terms:
    """The terms by which a client seals: the round's own, unless it has a bug."""
    if client < plant.get("silent", 0):
        return replace(terms, trust="central")  # whose clients add nothing
    if "believed" in plant:
        return replace(terms, floor=int(terms.floor * plant["believed"]))
    if "unclipped update" in plant:
        wide = plant["unclipped update"]
        return replace(terms, update_clip=terms.update_clip * wide, update_noise=terms.update_noise / wide)
    return terms


def _canary(client: int, clients: int, coin: int, loud: float, terms: Terms) -> Message:
    own = np.zeros(clients)
    own[client] = loud if coin == 1 else (-loud if terms.trust == "local" else 0.0)
    change = 20 * CLIP * own if terms.update_noise else np.zeros(0)  # every honest client clips it to CLIP
    return Message(readings={"probe": own}, update=np.append(change, 1.0))


def _from_releases(found: Mapping[str, Release], clients: int, look: Sequence[str]) -> np.ndarray:
    """(clients,) the log-likelihood ratio of in against out, up to a constant, under the noise that is stated."""
    score, update = np.zeros(clients), found[UPDATE]
    if READINGS in look:
        score += found["probe"].total / found["probe"].noise_std ** 2
    if UPDATE in look and len(update.total) > 1:
        score += CLIP * update.total[:clients] / update.noise_std[:clients] ** 2
    return score


def _from_vectors(received: Sequence[np.ndarray], clients: int, look: Sequence[str]) -> np.ndarray:
    """The same from each client's own vector; readings and updates, if any, have one noise multiplier here."""
    score = np.zeros(clients)
    for client, vector in enumerate(received):
        if READINGS in look:
            score[client] += vector[client] / UNIT
        if UPDATE in look and len(vector) > clients + 2:
            score[client] += vector[clients + 1 + client] / (CLIP * FIXED)
    return score


def projections(
    terms: Terms,
    size: Mapping[str, Sequence[Coord]],
    message: Callable[[int, bool], Message],
    clients: int,
    runs: int,
    plant: Plant,
) -> tuple[tuple[np.ndarray, np.ndarray], Seen]:
    """(runs,) scores of whole rounds with client 0's message, and of as many where it is zeroed; all others the same.

    A round's score is everything that left, projected on what client 0 changes in it without noise, over the noise.
    Under trust `local` client 0's vector left. `plant` as in `play`.
    """
    charges: list[Charge] = []
    messages = {present: _together([message(c, present) for c in range(clients)]) for present in (True, False)}

    def left(present: bool, run: int) -> np.ndarray:
        gate = Gate(2 * run + present, size, terms, charges.append)
        vectors = _sealed(messages[present], size, terms, plant, 2 * run + present)
        assert all(gate.put_all(range(clients), vectors))
        own = vectors[0]
        found = gate.close()
        if terms.trust == "local":
            return own / np.where(np.arange(len(own)) < Encoding(size).size, UNIT, CLIP * FIXED)
        lost = found[next(iter(size))]
        spread = [r.total / np.where(r.noise_std > 0, r.noise_std, np.inf) for r in found.values()]
        return np.concatenate([*spread, [lost.lost / lost.lost_std]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secagg, "aggregate", plain_sum)
        with pytest.MonkeyPatch.context() as silent:
            silent.setattr(Terms, "draw", lambda self, std, size, *key: np.zeros(size, dtype=np.int64))
            direction = left(True, 0) - left(False, 0)
        first = charges[: len(charges) // 2]
        _plant(patch, plant)
        inside, outside = (
            np.array([left(present, run) @ direction for run in range(runs)]) for present in (True, False)
        )
    nothing = np.zeros(0)
    return (inside, outside), Seen(coins=nothing, scores=nothing, charges=tuple(first), terms=terms, refused=0)
