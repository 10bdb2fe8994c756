"""A whole round in one process: every client's and the server's code as it is, only the transport left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcanary.errors import BadInput
from fedcanary.privacy.secagg.client import Client, Randomness
from fedcanary.privacy.secagg.integers import Field, decode_signed, encode
from fedcanary.privacy.secagg.messages import Message
from fedcanary.privacy.secagg.server import Server
from fedcanary.privacy.secagg.terms import Refusal, Registry, Step, Terms

Integers = npt.NDArray[Any]  # (length,) of a signed or an unsigned integer type
Identities = Mapping[int, Ed25519PrivateKey]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a round gave: the sum modulo 2^bits and as signed integers, whose inputs are in it, what was dropped why."""

    total: Field
    signed: npt.NDArray[np.int64]
    survivors: tuple[int, ...]
    refused: Mapping[str, int]


def register(
    clients: Iterable[int], randomness: Randomness = os.urandom
) -> tuple[Registry, dict[int, Ed25519PrivateKey]]:
    """A registration list with new signing keys, and the keys."""
    identities = {client: Ed25519PrivateKey.from_private_bytes(randomness(32)) for client in clients}
    return Registry(keys={c: key.public_key().public_bytes_raw() for c, key in identities.items()}), identities


def run(
    server: Server,
    clients: Mapping[int, Client],
    vectors: Mapping[int, Integers],
    dropouts: Mapping[Step, Collection[int]] | None = None,
    before_unmasking: Callable[[tuple[int, ...]], None] | None = None,
) -> Outcome:
    """All five steps between a server and clients in one process; a client that drops out at a step stays away.

    `before_unmasking` gets the survivors while nothing can be read yet: the place to charge a ledger.

    Raises:
        Aborted: too few answered at a step.
    """
    bits = server.terms.bits
    gone: set[int] = set()
    refused: Counter[str] = Counter()

    def exchange(step: Step, answer: Callable[[int], Message], asked: Iterable[int]) -> None:
        gone.update((dropouts or {}).get(step, ()))
        for client in asked:
            if client in gone:
                continue
            try:
                server.collect(client, answer(client))
            except Refusal as refusal:
                refused[refusal.reason] += 1

    exchange(Step.ADVERTISE, lambda c: clients[c].advertise(), clients)
    rosters = server.roster()
    exchange(Step.SHARE, lambda c: clients[c].share(rosters[c]), rosters)
    deliveries = server.deliveries()
    exchange(Step.MASK, lambda c: clients[c].mask(deliveries[c], encode(np.asarray(vectors[c]), bits)), deliveries)
    survivors = server.survivor_list()
    if before_unmasking is not None:
        before_unmasking(server.survivors)
    exchange(Step.AGREE, lambda c: clients[c].agree(survivors[c]), survivors)
    agreements = server.agreements()
    exchange(Step.UNMASK, lambda c: clients[c].unmask(agreements[c]), agreements)
    total = server.unmask()
    refused.update(server.refused)
    for client in clients.values():
        refused.update(client.refused)
    return Outcome(
        total=total,
        signed=decode_signed(total, bits),
        survivors=server.survivors,
        refused=dict(refused),
    )


def aggregate(
    vectors: Mapping[int, Integers],
    bits: int = 32,
    *,
    dropouts: Mapping[Step, Collection[int]] | None = None,
    round_id: str = "simulation",
    contract: bytes = b"",
    degree: int = 30,
    minimum: int = 2,
    tolerated: float = 0.3,
    bound: int | None = None,
    registry: Registry | None = None,
    identities: Identities | None = None,
    randomness: Randomness = os.urandom,
    before_unmasking: Callable[[tuple[int, ...]], None] | None = None,
) -> Outcome:
    """Sum integer vectors of one length, by client id, with the whole protocol in this process.

    `dropouts` says who stays away from which step on, `tolerated` the share that may (`Terms` has the other terms).
    `registry` and `identities` are what one `register` gave for a whole run; without them everybody registers anew.

    >>> aggregate({1: np.array([1, -2]), 2: np.array([10, -20]), 3: np.array([100, -200])}).signed.tolist()
    [111, -222]

    Raises:
        BadInput: no vectors, or one that is not of integers, of another length, outside the field or the bound; a
            client without identity or not on the registration list; clients and bound that could overflow.
        Aborted: too few answered at a step.
    """
    lengths = {len(encode(np.asarray(vector), bits)) for vector in vectors.values()}
    if len(lengths) != 1:
        raise BadInput.of("vectors", f"lengths {sorted(lengths)}", "give at least one, all of one length")
    if (registry is None) != (identities is None):
        raise BadInput.of("registry", "comes with identities, or neither", "pass both of what `register` gave")
    if registry is None or identities is None:
        registry, identities = register(vectors, randomness)
    if unknown := sorted(vectors.keys() - identities.keys()):
        raise BadInput.of("identities", f"clients {unknown[:5]} have none", "register every client of the cohort")
    terms = Terms(
        round_id=round_id,
        contract=contract,
        registry=registry.digest,
        length=lengths.pop(),
        bits=bits,
        degree=degree,
        minimum=minimum,
        tolerated=tolerated,
        bound=bound,
    )
    clients = {c: Client(c, identities[c], registry, terms, randomness=randomness) for c in vectors}
    return run(Server(terms, registry, vectors.keys()), clients, vectors, dropouts, before_unmasking)
