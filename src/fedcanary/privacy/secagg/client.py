"""The client: it answers each step once, and refuses whatever could cost it its vector."""

from __future__ import annotations

import io
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Self, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedcanary.errors import BadInput
from fedcanary.privacy import shamir
from fedcanary.privacy.secagg.crypto import (
    NONCE,
    add_pads,
    commitment,
    derive,
    exchange,
    mask_secret,
    pair_key,
    self_key,
    verified,
)
from fedcanary.privacy.secagg.integers import Field, check_capacity, decode_signed
from fedcanary.privacy.secagg.keep import pack_rows, seal, unpack_rows, unseal
from fedcanary.privacy.secagg.messages import (
    Advert,
    Agreement,
    Agreements,
    Delivery,
    MaskedInput,
    Message,
    Roster,
    Rows,
    Shares,
    Survivors,
    Unmasking,
    decode,
    pack_ids,
    statement,
    unpack_ids,
)
from fedcanary.privacy.secagg.session import Session, open_session
from fedcanary.privacy.secagg.terms import Refusal, Registry, Step, Terms

Randomness = Callable[[int], bytes]
T = TypeVar("T")
NEXT = dict(zip(Step, [*list(Step)[1:], None], strict=True))
# bytes of a client's secrets that are still needed: its own mask's seed, the masking key's seed, the sealing key
SECRETS = {Step.ADVERTISE: 64, Step.SHARE: 64, Step.MASK: 32, Step.AGREE: 16, Step.UNMASK: 16, None: 0}
CHANNEL = struct.Struct("32s32s16s16s")


@dataclass(frozen=True, slots=True, repr=False)
class Channel:
    """What a client keeps of a neighbour: its public masking key; the key that opens its share; an ack each way."""

    mask_key: bytes
    open: bytes
    say: bytes
    hear: bytes


def check_advert(advert: Message, client: int, registry: Registry, terms: Terms) -> Advert:
    """The advert, if it is of this client and round and signed by the client's registered key; else Refusal."""
    if not isinstance(advert, Advert) or advert.client != client or advert.session != terms.digest:
        raise Refusal("bad_advert", f"of client {client}")
    if not verified(registry.keys[client], advert.signature, advert.signed()):
        raise Refusal("bad_signature", f"the keys of client {client} are not signed by its registered key")
    return advert


class Client:
    """One client of one round. Each step's method may be called once, in order; after a `Refusal` none may.

    `refused` counts what it dropped by reason. `randomness` is the operating system's unless a simulation says
    otherwise. Between two steps the client may go through `to_bytes` and `from_bytes`: it then answers as it would
    have, and refuses as it would have.
    """

    def __init__(
        self,
        client: int,
        identity: Ed25519PrivateKey,
        registry: Registry,
        terms: Terms,
        *,
        randomness: Randomness = os.urandom,
    ) -> None:
        if terms.registry != registry.digest or client not in registry.keys:
            raise BadInput.of("registry", "not the one of the terms, or without this client", "register it first")
        self.client = int(client)
        self.refused: Counter[str] = Counter()
        self._identity, self._registry, self._terms = identity, registry, terms
        self._next: Step | None = Step.ADVERTISE
        self._self_seed, self._key_seed = randomness(shamir.SEED), randomness(shamir.SEED)
        self._mask_key = mask_secret(self._key_seed, terms.digest)
        self._seal_key = X25519PrivateKey.from_private_bytes(randomness(32))
        self._session: Session
        self._channels: dict[int, Channel] = {}
        self._held: dict[int, bytes] = {}  # both shares of each neighbour whose message opened
        self._survivors: set[int] = set()
        self._mutual: set[int] = set()  # surviving neighbours that have shown that they masked with this client

    def to_bytes(self) -> bytes:
        """The state after the latest step, to be on the disk before that step's answer leaves: see `keep`."""
        secrets = self._self_seed + self._key_seed + self._seal_key.private_bytes_raw()
        parts = [
            pack_ids([self.client]),
            (self._next or "").encode(),
            json.dumps(self.refused, sort_keys=True).encode(),
            secrets[: SECRETS[self._next]],
        ]
        if self._next is not None and self._channels:
            ids = self._session.ids
            parts += [
                ids.astype("<u4").tobytes(),
                pack_rows({peer: CHANNEL.pack(*astuple(channel)) for peer, channel in self._channels.items()}),
                pack_rows(self._held),
                np.packbits(np.isin(ids, list(self._survivors))).tobytes(),
                pack_ids(sorted(self._mutual)),
            ]
        return seal(parts, self._identity, self._registry, self._terms)

    @classmethod
    def from_bytes(cls, data: bytes, identity: Ed25519PrivateKey, registry: Registry, terms: Terms) -> Self:
        """The client that `to_bytes` wrote.

        Raises:
            Refusal: cut or altered bytes; another identity, registration list, terms or version (`bad_state`).
        """
        number, step, refused, secrets, *met = unseal(data, identity, registry, terms)
        drawn = io.BytesIO(secrets.ljust(64, b"\0"))  # zeros for those that no step needs any more
        self = cls(int.from_bytes(number, "little"), identity, registry, terms, randomness=drawn.read)
        self._next = Step(step.decode()) if step else None
        self.refused.update(json.loads(refused))
        if met:
            roster, channels, held, survivors, mutual = met
            self._session = session = open_session(terms, roster)
            self._channels = {
                p: Channel(*CHANNEL.unpack(row)) for p, row in unpack_rows(channels, CHANNEL.size).items()
            }
            self._held = unpack_rows(held, 2 * shamir.SEED)
            inside = np.unpackbits(np.frombuffer(survivors, np.uint8), count=len(session.ids)).astype(bool)
            self._survivors = set(session.ids[inside].tolist())
            self._mutual = set(np.frombuffer(mutual, "<u4").tolist())
        return self

    def advertise(self) -> Advert:
        """Step 0: fresh public keys, signed."""
        self._enter(Step.ADVERTISE)
        advert = Advert(
            session=self._terms.digest,
            client=self.client,
            mask_key=self._mask_key.public_key().public_bytes_raw(),
            seal_key=self._seal_key.public_key().public_bytes_raw(),
            commitment=commitment(self._self_seed, self._terms.digest, self.client),
            signature=b"",
        )
        return self._done(Step.ADVERTISE, replace(advert, signature=self._identity.sign(advert.signed())))

    def share(self, roster: Roster) -> Shares:
        """Step 1: shares of both seeds, sealed for each neighbour.

        Raises:
            Refusal: another round; a roster with somebody who is not registered, without this client, of fewer than
                the minimum or of more than can be summed without overflow; an advert missing, too many, or not signed
                by its client.
        """
        self._enter(Step.SHARE, roster)
        terms = self._terms
        ids = unpack_ids(roster.ids, self._registry.ids, "bad_roster")
        if len(ids) < terms.minimum or self.client not in ids:
            raise Refusal("bad_roster", "too few, or without this client")
        if terms.bound is not None:
            try:
                check_capacity(len(ids), terms.bound, terms.bits)
            except BadInput as bad:
                raise Refusal("overflow", str(bad)) from None
        self._session = session = open_session(terms, roster.ids)
        if tuple(peer for peer, _ in roster.adverts) != session.neighbours(self.client):
            raise Refusal("bad_roster", "not the adverts of this client's neighbours")
        adverts = {peer: check_advert(decode(data), peer, self._registry, terms) for peer, data in roster.adverts}
        self._channels, sealed = {}, []
        for (peer, advert), pair in zip(adverts.items(), self._make_shares(), strict=True):
            key, self._channels[peer] = self._channel(peer, advert)
            sealed.append((peer, ChaCha20Poly1305(key).encrypt(NONCE, pair, self._context(self.client, peer))))
        return self._done(Step.SHARE, Shares(session=session.digest, client=self.client, sealed=tuple(sealed)))

    def _make_shares(self) -> list[bytes]:
        """For each neighbour, its share of the key's seed and its share of the own mask's seed."""
        threshold, holders = self._session.threshold, len(self._session.offsets)
        both = (shamir.share(seed, threshold, holders) for seed in (self._key_seed, self._self_seed))
        return [key + own for key, own in zip(*both, strict=True)]

    def _channel(self, peer: int, advert: Advert) -> tuple[bytes, Channel]:
        """The key that seals for this neighbour, and what is kept; the round's contract and roster are in the salt."""
        low, high = sorted((self.client, peer))
        secret = exchange(self._seal_key, advert.seal_key)
        keys = derive(secret, self._session.digest, b"channel" + struct.pack("<II", low, high), 96)
        a, b, c, d = keys[:32], keys[32:64], keys[64:80], keys[80:]
        return (a, Channel(advert.mask_key, b, c, d)) if self.client == low else (b, Channel(advert.mask_key, a, d, c))

    def _context(self, sender: int, receiver: int) -> bytes:
        return self._session.digest + struct.pack("<II", sender, receiver)

    def mask(self, delivery: Delivery, vector: Field) -> MaskedInput:
        """Step 2: the masked vector. A sealed share that does not open is dropped, with the neighbour it is from.

        Args:
            delivery: sealed shares of the neighbours that have not dropped out.
            vector: (length,) entries below 2^bits, of the terms' type (`encode` makes it). It is not changed.

        Raises:
            BadInput: another shape or type, or an entry outside the field or the terms' bound.
            Refusal: another round, or shares from fewer than half of the neighbours.
        """
        self._enter(Step.MASK, delivery)
        self._check_vector(vector)
        self._held = {}
        for peer, sealed in delivery.sealed:
            if peer not in self._channels or peer in self._held:
                self.refused["duplicate" if peer in self._held else "unknown_client"] += 1
                continue
            try:
                opened = ChaCha20Poly1305(self._channels[peer].open).decrypt(
                    NONCE, sealed, self._context(peer, self.client)
                )
            except (InvalidTag, ValueError):
                opened = b""
            if len(opened) == 2 * shamir.SEED:
                self._held[peer] = opened
            else:
                self.refused["tampered"] += 1
        if len(self._held) < self._session.near:
            raise Refusal("too_few_neighbours", f"{len(self._held)} shares arrived")
        masked = vector.copy()
        add_pads(masked, self._pads())
        masked &= masked.dtype.type(2**self._terms.bits - 1)
        answer = MaskedInput(
            session=self._session.digest,
            client=self.client,
            values=masked.tobytes(),
            acks=tuple((peer, self._channels[peer].say) for peer in sorted(self._held)),
        )
        return self._done(Step.MASK, answer)

    def _check_vector(self, vector: Field) -> None:
        terms = self._terms
        good = vector.shape == (terms.length,) and vector.dtype == terms.dtype and not terms.outside(vector)
        if good and terms.bound is not None:
            signed = decode_signed(vector, terms.bits)
            good = -terms.bound <= int(signed.min()) and int(signed.max()) <= terms.bound
        if not good:
            raise BadInput.of("vector", "does not fit the terms of the round", "use secagg.encode on the right length")

    def _pads(self) -> Iterator[tuple[bytes, int]]:
        session = self._session.digest
        yield self_key(self._self_seed, session, self.client), 1
        for peer in self._held:
            key = pair_key(self._mask_key, self._channels[peer].mask_key, session, self.client, peer)
            yield key, 1 if self.client < peer else -1

    def agree(self, survivors: Survivors) -> Agreement:
        """Step 3: a signature over the survivors.

        A neighbour whose word that it masked with this client is missing or false does not count, and no share of its
        own mask's seed is given: were it honest, its mask with this client would not be in its vector.

        Raises:
            Refusal: this client is not among them, they are too few, fewer than half of its neighbours count, or one
                is a neighbour that it has no mask with (Bonawitz et al. 2017, figure 4: U3 within U2).
        """
        self._enter(Step.AGREE, survivors)
        self._survivors = ids = unpack_ids(survivors.ids, self._session.ids, "bad_survivors")
        near = ids.intersection(self._channels)
        if self.client not in ids or not near <= self._held.keys():
            raise Refusal("bad_survivors", "without this client, or with a neighbour that it has no mask with")
        self._mutual = self._masked_with_me(near, dict(survivors.acks))
        if alone := near - self._mutual:
            self.refused["no_mutual_mask"] += len(alone)
        if len(ids) < self._session.needed or len(self._mutual) < self._session.near:
            raise Refusal("too_few_survivors", f"{len(ids)}, {len(self._mutual)} of them neighbours")
        signature = self._identity.sign(statement(self._session.digest, survivors.ids))
        return self._done(Step.AGREE, Agreement(session=self._session.digest, client=self.client, signature=signature))

    def _masked_with_me(self, near: set[int], acks: Mapping[int, bytes]) -> set[int]:
        return {peer for peer in near if acks.get(peer) == self._channels[peer].hear}

    def unmask(self, agreements: Agreements) -> Unmasking:
        """Step 4: the own mask's seed, and one share for each neighbour.

        Raises:
            Refusal: fewer of the committee than the quorum signed the survivors that this client signed.
        """
        self._enter(Step.UNMASK, agreements)
        self._check_quorum(agreements.signatures)
        size = shamir.SEED
        shares = tuple(
            (peer, pair[size:] if peer in self._survivors else pair[:size])
            for peer, pair in sorted(self._held.items())
            if peer in self._mutual or peer not in self._survivors
        )
        answer = Unmasking(session=self._session.digest, client=self.client, seed=self._self_seed, shares=shares)
        return self._done(Step.UNMASK, answer)

    def _check_quorum(self, signatures: Rows) -> None:
        agreed: set[int] = set()
        signed = statement(self._session.digest, pack_ids(sorted(self._survivors)))
        for signer, signature in signatures:
            if len(agreed) == self._session.quorum:
                break
            member = signer in self._session.committee and signer in self._survivors
            if member and verified(self._registry.keys[signer], signature, signed):
                agreed.add(signer)
            else:
                self.refused["bad_signature"] += 1
        if len(agreed) < self._session.quorum:
            raise Refusal("no_agreement", f"{len(agreed)} of {self._session.quorum} signed these survivors")

    def _enter(self, step: Step, message: Message | None = None) -> None:
        """Nothing is answered twice or out of order, and nothing more once something was refused."""
        if self._next is not step:
            raise Refusal("wrong_step", f"{step} was asked, {self._next or 'nothing'} is next")
        self._next = None
        if message and message.session != (self._terms if step is Step.SHARE else self._session).digest:
            raise Refusal("wrong_round")

    def _done(self, step: Step, answer: T) -> T:
        self._next = NEXT[step]
        return answer
