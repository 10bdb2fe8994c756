"""Many clients at once are what they are one by one: the same vectors, sums, releases and refusals, to the last bit.

The slow honest version beside the fast path is `seal` and `Gate.put`, called once for each client, and for the encoding
itself the formula of encode.py in plain Python.
"""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.privacy import release
from fedcanary.privacy.accounting import Mechanism
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.privacy.release import ROOM, Gate
from fedcanary.privacy.seal import FIXED, Message, Terms, seal, seal_all
from fedcanary.privacy.secagg import decode_signed
from fedcanary.rng import stream
from fedcanary.types import Coord


def probe(at: int) -> tuple[Coord, ...]:
    """Eight differences with zeros and squares of their own, what could not be said, and details that stay."""
    names = [f"c{k}" for k in range(8)]
    return (
        *(Coord(name=n, low=-1, high=1, purpose="x", scale=1.5, zero=0.1 * at, up=n == "c3") for n in names),
        *(Coord(name=n, low=0, high=1, purpose="x", scale=2.0) for n in ("c1_missing", "missing")),
        *(Coord(name=f"detail{k}", low=-1, high=1, purpose="x") for k in range(3)),
    )


LAYOUT = {f"p{at}": probe(at) for at in range(6)}
CLIENTS, CUTS = 600, (0, 1, 2, 250, 256, 599, 600)
TRAINED = Mechanism(kind="gaussian", noise_multiplier=2.0)
WAYS = {"exact updates": {}, "noised": {"update_clip": 0.5, "update_noise": 2.0}}
WAYS["examples"] = {"exact": ("p1", "p4"), "training": TRAINED}
TRUSTS = ("none", "central", "local", "secure_aggregation")
by_trust = pytest.mark.parametrize("trust", TRUSTS)
by_way = pytest.mark.parametrize("way", list(WAYS))


def terms_of(trust: str, way: str = "exact updates", floor: int = 8) -> Terms:
    if trust == "none":
        return Terms(trust="none")
    relation = "substituted" if trust == "local" else "zeroed"
    base = Terms(trust=trust, noise_multiplier=1.3, delta=1e-6, floor=floor, simulated=7, neighbours=relation)
    return replace(base, **WAYS[way])


def people(n: int, seed: int = 0, width: int = 5) -> Message:
    """Readings and updates of n clients: small and large, some that say nothing, some of part of their items."""
    rng = stream(seed, "people")
    readings = {}
    for name in LAYOUT:
        size = rng.choice([0.02, 0.5], (n, 1))
        said = np.clip(size * rng.normal(size=(n, 8)), -1, 1)
        gone = rng.choice([0.0, 0.3, 1.0], (n, 2), p=[0.8, 0.1, 0.1])
        readings[name] = np.concatenate([said, gone, rng.uniform(-1, 1, (n, 3))], axis=1)
    weight = rng.integers(1, 50, (n, 1)).astype(float)
    update = np.concatenate([weight * rng.normal(size=(n, width)) * rng.choice([0.01, 1.0], (n, 1)), weight], axis=1)
    return Message(readings=readings, update=update)


def row(messages: Message, at: int | slice) -> Message:
    return Message(readings={p: v[at] for p, v in messages.readings.items()}, update=messages.update[at])


@pytest.fixture
def unmasked(monkeypatch):
    """Secure aggregation without its 16 ms for each client: the sum modulo 2^64 that the protocol's masks leave."""

    class Sum:
        refused: dict[str, int] = {}  # noqa: RUF012 - stands for the outcome's own, and nothing writes to it

        def __init__(self, vectors, before_unmasking):
            before_unmasking(tuple(vectors))
            self.survivors = tuple(vectors)
            self.signed = decode_signed(np.array(list(vectors.values())).view(np.uint64).sum(axis=0), 64)

    monkeypatch.setattr(
        release.secagg, "aggregate", lambda vectors, bits, *, before_unmasking, **_: Sum(vectors, before_unmasking)
    )


def said_by(releases) -> list[tuple]:
    """All of some releases, arrays as bytes."""
    fields = [(getattr(r, name) for name in r.__dataclass_fields__) for r in releases.values()]
    return [tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in values) for values in fields]


@by_trust
@by_way
def test_many_at_once_are_the_same_as_one_by_one(unmasked, trust, way):
    terms, everyone = terms_of(trust, way), people(CLIENTS)
    charges: list[list] = [[], []]
    slow, fast = (Gate(3, LAYOUT, terms, each.append, cohort=set(range(CLIENTS))) for each in charges)
    alone = [seal(row(everyone, k), LAYOUT, terms, 3, k) for k in range(CLIENTS)]
    for k, vector in enumerate(alone):
        assert slow.put(k, vector)
    for a, b in pairwise(CUTS):
        vectors = seal_all(row(everyone, slice(a, b)), LAYOUT, terms, 3, np.arange(a, b))
        assert vectors.tobytes() == np.array(alone[a:b]).tobytes()
        assert fast.put_all(np.arange(a, b), vectors) == [True] * (b - a)
        vectors[:] = 1  # a buffer that is used again changes nothing
    releases = slow.close(), fast.close()
    assert len(releases[0]) == len(LAYOUT) + 1
    assert said_by(releases[0]) == said_by(releases[1])
    assert charges[0] == charges[1] and len(charges[0]) == 2


@by_trust
def test_the_whole_protocol_gives_the_same_releases_for_both(trust):
    """As above, with the masks of secure aggregation."""
    terms, everyone, found = terms_of(trust), people(12), []
    one, many = (Gate(1, LAYOUT, terms, lambda charge: None) for _ in range(2))
    for k in range(12):
        one.put(k, seal(row(everyone, k), LAYOUT, terms, 1, k))
    many.put_all(range(12), seal_all(everyone, LAYOUT, terms, 1, range(12)))
    found = [said_by(gate.close()) for gate in (one, many)]
    assert found[0] == found[1] and found[0]


def test_the_encoding_is_its_formula():
    encoding, everyone = Encoding(LAYOUT), people(60, seed=3)
    for k, message in enumerate(encoding.messages(everyone.readings).tolist()):
        w, up = [], []
        for name, coords in LAYOUT.items():
            said = dict(zip([c.name for c in coords], everyone.readings[name][k].tolist(), strict=True))
            for c in (c for c in coords if c.scale is not None):
                unsaid = said.get(f"{c.name}_missing", 0.0) or (said["missing"] if c.name != "missing" else 0.0)
                w.append((1 - unsaid) * (said[c.name] - c.zero) / c.scale)
                up.append(c.up)
        f = min(1.0, 2 / (1 + math.fsum(x * x for x in w)))
        exact = [(UNIT - math.sqrt(len(w) + 1)) * v for v in [*(f * x for x in w), 1 - f]]
        # Rounded as said, where double precision leaves no doubt on which side of an integer a number is.
        for got, number, rises in zip(message, exact, [*up, True], strict=True):
            near = abs(number - round(number)) < 1e-8
            assert got == (math.ceil(number) if rises else math.trunc(number)) or (near and got == round(number))


@by_trust
def test_how_arrays_lie_in_memory_changes_nothing(unmasked, trust):
    """Sums of doubles depend on their order, and numpy's on the layout: the data here would show it."""
    terms, everyone = terms_of(trust, "noised"), people(300)
    turned = Message(
        readings={p: np.asfortranarray(v) for p, v in everyone.readings.items()},
        update=np.asfortranarray(everyone.update),
    )
    vectors, same = (seal_all(m, LAYOUT, terms, 1, range(300)) for m in (everyone, turned))
    assert vectors.tobytes() == same.tobytes()
    gates = [Gate(1, LAYOUT, terms, lambda charge: None) for _ in range(2)]
    for gate, rows in zip(gates, (vectors, np.asfortranarray(vectors)), strict=True):
        gate.put_all(range(300), rows)
    assert said_by(gates[0].close()) == said_by(gates[1].close())
    if trust == "none":  # planted: the sum in numpy's own order for columns
        assert np.asfortranarray(vectors).sum(axis=0).tobytes() != vectors.sum(axis=0).tobytes()


def test_nothing_but_minus_zero_is_minus_zero():
    gates = [Gate(1, LAYOUT, Terms(trust="none"), lambda charge: None) for _ in range(2)]
    vectors = seal_all(people(3), LAYOUT, Terms(trust="none"), 1, range(3))
    vectors[:, 0] = -0.0
    gates[0].put_all(range(3), vectors)
    for k in range(3):
        gates[1].put(k, vectors[k])
    found = [gate.close()["p0"].total for gate in gates]
    assert found[0].tobytes() == found[1].tobytes()
    assert math.copysign(1.0, found[0][0]) == -1.0


def test_noise_is_a_clients_own_whatever_its_number_is_made_of():
    terms, everyone = terms_of("local"), people(3)
    ways = ([4, 5, 6], range(4, 7), np.arange(4, 7), np.arange(4, 7, dtype=np.int32), [np.int64(k) for k in (4, 5, 6)])
    assert len({seal_all(everyone, LAYOUT, terms, 1, way).tobytes() for way in ways}) == 1
    other = seal_all(everyone, LAYOUT, terms, 1, [5, 4, 6])
    assert (other[2] == seal_all(everyone, LAYOUT, terms, 1, ways[0])[2]).all()
    assert (other[:2] != seal_all(everyone, LAYOUT, terms, 1, ways[0])[:2])[:, 0].all()


def planted(terms: Terms) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Chunks with one thing wrong in each, as (what is expected of its odd message, clients, vectors)."""
    counter = iter(range(10**6))
    good = seal_all(people(1), LAYOUT, terms, 1, [0])[0]
    center = Encoding(terms.bounded(LAYOUT)).size

    def chunk(*odd, who=None, n=5):
        clients = [next(counter) for _ in range(n)]
        rows = np.stack([good] * n)
        for place, value in odd:
            rows[2, place] = value
        if who is not None:
            clients[2] = who
        return clients, rows

    seen = "a second message of one client"
    yield ("", *chunk())
    yield ("not in this round's panel", *chunk(who=-1))
    yield (seen, *chunk(who=0))
    clients, rows = chunk()
    clients[2] = clients[1]
    yield seen, clients, rows
    hidden = terms.trust in ("local", "secure_aggregation")
    bad = "" if hidden else "out of bounds"
    if terms.trust == "none":
        for place, value in ((1, math.nan), (1, math.inf), (0, 1.0000001), (9, -1e-9), (-1, math.nan), (-2, -math.inf)):
            yield (bad, *chunk((place, value)))
    else:
        yield (bad, *chunk((0, UNIT + 1)))
        yield (bad, *chunk((0, UNIT), (1, 400)))  # each within, the norm just beyond
        yield (bad, *chunk((-1, int(5000 * FIXED))))
        yield (bad, *chunk((-2, np.iinfo(np.int64).min)))
        if terms.exact:
            yield (bad, *chunk((center, int(1.001 * FIXED))))
        if math.isfinite(terms.update_clip):
            yield (bad, *chunk((-2, int(0.6 * good[-1]))))
    for spoilt in (good[:-1], np.append(good, good[:1]), good[:3], good.astype(np.float32)):
        clients = [next(counter), next(counter)]
        yield "wrong shape", clients, np.stack([spoilt] * 2)
    yield "wrong shape", [next(counter), next(counter)], np.stack([good] * 2)[:, None]
    # A client whose first message was dropped may send another; a third is one too many.
    clients, rows = chunk()
    clients[3] = clients[4] = clients[2]
    rows[2, 0] = 2**40
    yield ("both" if not hidden else "twice"), clients, rows


@by_trust
@by_way
def test_the_same_messages_are_refused_for_the_same_reasons(unmasked, trust, way):
    terms = terms_of(trust, way)
    slow, fast = (Gate(1, LAYOUT, terms, lambda charge: None, cohort=set(range(1000))) for _ in range(2))
    expected: Counter[str] = Counter()
    for why, clients, vectors in planted(terms):
        one_by_one = [slow.put(client, vector) for client, vector in zip(clients, vectors, strict=True)]
        assert fast.put_all(clients, vectors) == one_by_one
        if why == "both":
            assert one_by_one == [True, True, False, True, False]
            odd = ["out of bounds", "a second message of one client"]
        elif why == "twice":
            assert one_by_one == [True, True, True, False, False]
            odd = ["a second message of one client"] * 2
        elif why == "wrong shape":
            odd = [why] * 2
            assert one_by_one == [False, False]
        else:
            assert one_by_one == [True, True, not why, True, True]
            odd = [why] if why else []
        expected.update(odd)
        assert slow.refused == fast.refused == expected, why
    assert said_by(slow.close()) == said_by(fast.close())
    with pytest.raises(FedcanaryError, match="closed"):
        fast.put_all(clients, vectors)


def test_without_the_check_of_norms_the_planted_messages_pass(monkeypatch):
    """The attack of the test above, on a gate that forgot it."""
    terms = terms_of("central")
    monkeypatch.setattr(release, "norms", lambda rows: np.zeros(len(rows)))
    gate = Gate(1, LAYOUT, terms, lambda charge: None, cohort=set(range(1000)))
    passed = [why for why, clients, vectors in planted(terms) if all(gate.put_all(clients, vectors))]
    assert passed == ["", "out of bounds", "out of bounds"]


@by_trust
def test_a_chunk_with_one_client_whose_message_may_not_leave_is_not_sealed(trust):
    terms = terms_of(trust)
    for probe_, place, value in (("p2", 0, 1.0001), ("p5", 9, -1e-9), ("p0", 3, math.nan)):
        everyone = people(5)
        everyone.readings[probe_][3, place] = value
        with pytest.raises(FedcanaryError, match="outside its bounds"):
            seal_all(everyone, LAYOUT, terms, 1, range(5))
    with pytest.raises(FedcanaryError, match="another shape"):
        seal_all(people(4), LAYOUT, terms, 1, range(5))
    everyone = people(5)
    everyone.update[4, 0] = math.nan
    with pytest.raises(FedcanaryError, match="not finite"):
        seal_all(everyone, LAYOUT, terms, 1, range(5))
    if trust != "none":
        everyone.update[4, 0] = 5000.0
        with pytest.raises(BadInput, match="train less"):
            seal_all(everyone, LAYOUT, terms, 1, range(5))


def test_a_client_without_weight_sends_no_change_however_large():
    terms, messages = terms_of("central", "noised"), people(3)
    messages.update[1] = [5.0] * (messages.update.shape[1] - 1) + [0.0]
    sealed = seal_all(messages, LAYOUT, terms, 1, range(3))
    width = messages.update.shape[1]
    assert not sealed[1, -width:].any() and sealed[0, -width:].any()


@pytest.mark.parametrize("weight", [1.0, 4095.0])
def test_a_sum_that_does_not_fit_is_not_opened(monkeypatch, weight):
    """From 2^19 clients on their weights can add up to more than 64 bits hold; unchecked, the sum turns negative."""
    layout = {"p": (Coord(name="c", low=-1, high=1, purpose="x", scale=1.0),)}
    terms, n = replace(terms_of("central"), floor=100), ROOM + 2000
    vector = seal(Message(readings={"p": np.array([0.5])}, update=np.array([weight])), layout, terms, 1, 0)
    found, charges = {}, []
    for room in (ROOM, 2 * ROOM):
        monkeypatch.setattr(release, "ROOM", room)
        gate = Gate(1, layout, terms, charges.append)
        for first in range(0, n, 2**17):
            ids = range(first, min(first + 2**17, n))
            gate.put_all(ids, np.broadcast_to(vector, (len(ids), len(vector))))
        found[room] = gate.close()
    if weight == 1:
        assert said_by(found[ROOM]) == said_by(found[2 * ROOM])
        assert found[ROOM]["update"].total[-1] == n
        return
    assert found[ROOM] == {} and [c.purpose for c in charges[:1]] == ["readings"]
    assert found[2 * ROOM]["update"].total[-1] < 0


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["none", "central", "secure_aggregation"])
def test_memory_grows_by_less_than_a_client_says(trust):
    """From 20,000 to 100,000 clients only the set of those who answered grows; with vectors kept (8 x 55 bytes, as
    secure aggregation must in a simulation, where it stands in for the clients) the same measure sees it.
    """
    terms, everyone = terms_of(trust, floor=100), people(1000, width=1)
    if trust == "secure_aggregation":
        terms = replace(terms, trust="secure_aggregation", simulated=7)
    vectors = seal_all(everyone, LAYOUT, terms, 1, range(1000))
    peaks = []
    for n in (20_000, 100_000):
        gate = Gate(1, LAYOUT, terms, lambda charge: None)
        tracemalloc.start()
        for first in range(0, n, 1000):
            if trust != "secure_aggregation":
                vectors = seal_all(everyone, LAYOUT, terms, 1, range(first, first + 1000))
            assert all(gate.put_all(range(first, first + 1000), vectors))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        if trust != "secure_aggregation":
            assert {r.count for r in gate.close().values()} == {float(n)}
    grown = (peaks[1] - peaks[0]) / 80_000
    assert grown > 8 * 55 if trust == "secure_aggregation" else grown < 150
