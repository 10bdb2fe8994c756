"""One round of secure aggregation with every party at hand, and what a server can work out from what it was given."""

from __future__ import annotations

import numpy as np

from fedcanary import rng
from fedcanary.privacy import secagg, shamir
from fedcanary.privacy.secagg import Client, Server, Terms, crypto, encode
from fedcanary.privacy.secagg.session import open_session

LENGTH = 5


class Round:
    """One round with all parties at hand, so that a test can do to it what a hostile party would."""

    def __init__(self, n=10, client=Client, length=LENGTH, seed=0, **terms):
        random = rng.stream(seed, "secagg")
        self.registry, self.identities = secagg.register(range(n), random.bytes)
        self.terms = Terms(
            **{"round_id": "1", "contract": b"c", "registry": self.registry.digest, "length": length, **terms}
        )
        self.vectors = {i: encode(random.integers(-99, 99, length), self.terms.bits) for i in range(n)}
        self.clients = {
            i: client(i, key, self.registry, self.terms, randomness=random.bytes) for i, key in self.identities.items()
        }
        self.server = Server(self.terms, self.registry, range(n))

    def to_share(self):
        self.adverts = {i: client.advertise() for i, client in self.clients.items()}
        for i, advert in self.adverts.items():
            assert self.server.collect(i, advert)
        self.rosters = self.server.roster()
        return self.rosters

    def to_mask(self):
        self.to_share()
        self.shares = {i: self.clients[i].share(roster) for i, roster in self.rosters.items()}
        for i, message in self.shares.items():
            assert self.server.collect(i, message)
        self.deliveries = self.server.deliveries()
        return self.deliveries

    def to_agree(self, late=()):
        """Everybody masks; what the `late` send is kept from the honest part of the server."""
        self.to_mask()
        self.inputs = {i: self.clients[i].mask(d, self.vectors[i]) for i, d in self.deliveries.items()}
        for i in self.inputs.keys() - set(late):
            assert self.server.collect(i, self.inputs[i])
        self.survivors = self.server.survivor_list()
        return self.survivors

    def to_unmask(self, late=()):
        self.to_agree(late)
        for i, message in self.survivors.items():
            assert self.server.collect(i, self.clients[i].agree(message))
        self.agreements = self.server.agreements()
        return self.agreements

    def finish(self, late=()):
        self.to_unmask(late)
        self.answers = {i: self.clients[i].unmask(message) for i, message in self.agreements.items()}
        for i, message in self.answers.items():
            self.server.collect(i, message)
        return self.server.unmask()

    def plain(self, ids):
        return sum((self.vectors[i] for i in ids), np.zeros_like(self.vectors[0])) & (2**self.terms.bits - 1)

    # What a server can do with what it has been given.

    @property
    def session(self):
        return open_session(self.terms, next(iter(self.rosters.values())).ids)

    def key_seed(self, victim, answers):
        """The victim's masking key from the shares that those who think it dropped out gave."""
        near = self.session.neighbours(victim)
        shares = [(near.index(i), dict(answer.shares)[victim]) for i, answer in answers.items()]

        def right(secret):
            known = crypto.mask_secret(secret, self.terms.digest).public_key().public_bytes_raw()
            return known == self.adverts[victim].mask_key

        return shamir.recover(shares, self.session.threshold, right)[0]

    def stripped(self, victim, *, key_seed=None, own_seed=None):
        """The victim's masked vector less every mask that these seeds give."""
        vector = np.frombuffer(self.inputs[victim].values, dtype=self.terms.dtype).copy()
        pads = []
        if own_seed is not None:
            pads.append((crypto.self_key(own_seed, self.session.digest, victim), -1))
        if key_seed is not None:
            secret = crypto.mask_secret(key_seed, self.terms.digest)
            for peer in self.inputs[victim].peers:
                key = crypto.pair_key(secret, self.adverts[peer].mask_key, self.session.digest, victim, peer)
                pads.append((key, -1 if victim < peer else 1))
        crypto.add_pads(vector, pads)
        return vector


def same(a, b):
    """Whether two vectors are equal."""
    return bool(np.array_equal(a, b))
