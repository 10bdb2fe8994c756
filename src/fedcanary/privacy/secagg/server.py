"""The server: it collects, counts what it drops, and sums; it can release nothing once a step has failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.privacy import shamir
from fedcanary.privacy.secagg.client import check_advert
from fedcanary.privacy.secagg.crypto import (
    PROBE,
    add_pads,
    commitment,
    exchange,
    mask_secret,
    pair_key,
    self_key,
    verified,
)
from fedcanary.privacy.secagg.integers import Field, check_capacity
from fedcanary.privacy.secagg.messages import (
    ANSWERS,
    Advert,
    Agreement,
    Agreements,
    Delivery,
    MaskedInput,
    Message,
    Roster,
    Shares,
    Survivors,
    Unmasking,
    Upward,
    decode,
    pack_ids,
    statement,
)
from fedcanary.privacy.secagg.session import open_session
from fedcanary.privacy.secagg.terms import Aborted, Refusal, Registry, Step, Terms

SEALED = 2 * shamir.SEED + 16  # bytes of two sealed shares: ChaCha20-Poly1305 adds a tag of 16


class Server:
    """The server of one round: `collect` whatever arrives, then call the step's method, which closes it.

    Each closing method raises `Aborted` when too few answered; nothing is released then or later. `refused` counts
    dropped messages by reason.
    """

    def __init__(self, terms: Terms, registry: Registry, cohort: Collection[int]) -> None:
        if terms.registry != registry.digest or not set(cohort) <= registry.keys.keys():
            raise BadInput.of("registry", "not the one of the terms, or without one of the cohort", "register it first")
        if terms.bound is not None:
            check_capacity(len(cohort), terms.bound, terms.bits)
        self.terms, self.registry = terms, registry
        self.refused: Counter[str] = Counter()
        self._step: Step | None = Step.ADVERTISE
        self._asked: Collection[int] = frozenset(cohort)
        self._answers: dict[int, Any] = {}
        self._survivors: tuple[int, ...] | None = None

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ids of the clients whose inputs are in the sum; known after step 2, before anything is unmasked."""
        if self._survivors is None:
            raise FedcanaryError("the survivors are not known before the masked inputs are in")
        return self._survivors

    def collect(self, sender: int, message: Message | bytes) -> bool:
        """Take a message of the present step from the client that the transport names; False if it is dropped."""
        try:
            if sender not in self._asked:
                raise Refusal("unknown_client")
            if isinstance(message, bytes):
                message = decode(message)
            self._check(sender, message)
        except Refusal as refusal:
            self.refused[refusal.reason] += 1
            return False
        self._answers[sender] = message
        return True

    def _check(self, sender: int, message: Message) -> None:
        if self._step is None or type(message) is not ANSWERS[self._step]:
            raise Refusal("wrong_step")
        if message.session != (self.terms.digest if self._step is Step.ADVERTISE else self._session.digest):
            raise Refusal("wrong_round")
        if not isinstance(message, Upward) or message.client != sender:
            raise Refusal("wrong_sender")
        if sender in self._answers:
            raise Refusal("duplicate")
        if isinstance(message, Advert):
            check_advert(message, sender, self.registry, self.terms)
            for key in (message.mask_key, message.seal_key):
                exchange(PROBE, key)
        elif isinstance(message, Shares):
            if tuple(peer for peer, _ in message.sealed) != self._neighbours[sender]:
                raise Refusal("wrong_recipients")
            if any(len(sealed) != SEALED for _, sealed in message.sealed):
                raise Refusal("wrong_length")
        elif isinstance(message, MaskedInput):
            self._check_input(sender, message)
        elif isinstance(message, Agreement):
            known = sender not in self._session.committee or verified(
                self.registry.keys[sender], message.signature, self._statement
            )
            if not known:
                raise Refusal("bad_signature")
        elif isinstance(message, Unmasking):
            self._check_unmasking(sender, message)

    def _check_input(self, sender: int, message: MaskedInput) -> None:
        peers = [peer for peer, _ in message.acks]
        if not _distinct(peers) or not set(peers) <= self._sharers.intersection(self._neighbours[sender]):
            raise Refusal("bad_peers")
        overlong = any(len(ack) != shamir.SEED for _, ack in message.acks)
        if overlong or len(message.values) != self.terms.length * self.terms.dtype.itemsize:
            raise Refusal("wrong_length")
        if self.terms.outside(np.frombuffer(message.values, dtype=self.terms.dtype)):
            raise Refusal("outside_field")

    def _check_unmasking(self, sender: int, message: Unmasking) -> None:
        if commitment(message.seed, self.terms.digest, sender) != self._adverts[sender].commitment:
            raise Refusal("bad_seed")
        peers = [peer for peer, _ in message.shares]
        if not _distinct(peers) or not set(peers) <= self._peers[sender]:
            raise Refusal("bad_shares")
        if any(len(share) != shamir.SEED for _, share in message.shares):
            raise Refusal("bad_shares")

    def _close(self, step: Step, needed: int) -> dict[int, Any]:
        if self._step is not step:
            raise FedcanaryError(f"step {step!r} cannot be closed: {self._step or 'the end'} is the present one")
        answers, self._answers, self._step = self._answers, {}, None
        if len(answers) < needed:
            raise Aborted(step, len(answers), needed)
        self._asked = answers.keys()
        return answers

    def roster(self) -> dict[int, Roster]:
        """Close step 0: each participant's list of participants and its neighbours' adverts."""
        self._adverts: dict[int, Advert] = self._close(Step.ADVERTISE, self.terms.needed(len(self._asked)))
        ids = pack_ids(sorted(self._adverts))
        self._session = session = open_session(self.terms, ids)
        self._neighbours = {client: session.neighbours(client) for client in self._adverts}
        data = {client: advert.to_bytes() for client, advert in self._adverts.items()}
        self._step = Step.SHARE
        return {
            client: Roster(session=self.terms.digest, ids=ids, adverts=tuple((peer, data[peer]) for peer in near))
            for client, near in self._neighbours.items()
        }

    def deliveries(self) -> dict[int, Delivery]:
        """Close step 1: what was sealed for each client that shared."""
        answers: dict[int, Shares] = self._close(Step.SHARE, self._session.needed)
        self._sharers = frozenset(answers)
        self._step = Step.MASK
        inbox = _turned({client: message.sealed for client, message in answers.items()})
        return {c: Delivery(session=self._session.digest, sealed=tuple(rows)) for c, rows in inbox.items()}

    def survivor_list(self) -> dict[int, Survivors]:
        """Close step 2: the survivors, for their signatures. From here on `survivors` is known.

        Where one of two clients has masked with the other and not the other way round (a share that did not open),
        their masks do not cancel: of such pairs the client that is in most is left out, until there are none.
        """
        answers: dict[int, MaskedInput] = self._close(Step.MASK, self._session.needed)
        peers = {client: message.peers for client, message in answers.items()}
        open_pairs: dict[int, set[int]] = {client: set() for client in peers}
        for client, mine in peers.items():
            for peer in mine:
                if peer in peers and client not in peers[peer]:
                    open_pairs[client].add(peer)
                    open_pairs[peer].add(client)
        while worst := max(
            (c for c in open_pairs if open_pairs[c]), key=lambda c: (len(open_pairs[c]), c), default=None
        ):
            for peer in open_pairs.pop(worst):
                open_pairs[peer].discard(worst)
            self.refused["one_sided_mask"] += 1
        if len(open_pairs) < self._session.needed:
            raise Aborted(Step.MASK, len(open_pairs), self._session.needed, "masked inputs fit together")
        self._survivors = tuple(sorted(open_pairs))
        self._peers = {client: peers[client] for client in self._survivors}
        self._total = np.zeros(self.terms.length, dtype=self.terms.dtype)
        for client in self._survivors:
            self._total += np.frombuffer(answers[client].values, dtype=self.terms.dtype)
        ids = pack_ids(self._survivors)
        self._statement = statement(self._session.digest, ids)
        self._asked = frozenset(self._survivors)
        self._step = Step.AGREE
        inbox = _turned({client: answers[client].acks for client in self._survivors})
        return {c: Survivors(session=self._session.digest, ids=ids, acks=tuple(rows)) for c, rows in inbox.items()}

    def agreements(self) -> dict[int, Agreements]:
        """Close step 3: a quorum of signatures, for all who answered."""
        answers: dict[int, Agreement] = self._close(Step.AGREE, self._session.needed)
        signed = [(client, answers[client].signature) for client in answers if client in self._session.committee]
        if len(signed) < self._session.quorum:
            raise Aborted(Step.AGREE, len(signed), self._session.quorum, "signatures of the committee")
        message = Agreements(session=self._session.digest, signatures=tuple(signed[: self._session.quorum]))
        self._step = Step.UNMASK
        return dict.fromkeys(answers, message)

    def unmask(self) -> Field:
        """Close step 4: the sum of the survivors' vectors modulo 2^bits, (length,)."""
        answers: dict[int, Unmasking] = self._close(Step.UNMASK, self._session.needed)
        shares: dict[int, list[tuple[int, bytes]]] = {}
        for holder, message in answers.items():
            for peer, share in message.shares:
                if peer not in answers:  # whoever answered has said its seed itself
                    shares.setdefault(peer, []).append((self._neighbours[peer].index(holder), share))
        add_pads(self._total, self._removals(answers, shares))
        self._total &= self._total.dtype.type(2**self.terms.bits - 1)
        return self._total

    def _removals(
        self, answers: Mapping[int, Unmasking], shares: Mapping[int, list[tuple[int, bytes]]]
    ) -> Iterator[tuple[bytes, int]]:
        """Keys and signs of every pad that is left in the sum, signs turned."""
        inside, session = set(self.survivors), self._session.digest
        for client in self.survivors:
            own = answers[client].seed if client in answers else self._recover(client, shares, self._is_seed)
            yield self_key(own, session, client), -1
        for gone in sorted(set().union(*self._peers.values()) - inside):
            partners = [peer for peer in self._neighbours[gone] if peer in inside and gone in self._peers[peer]]
            secret = mask_secret(self._recover(gone, shares, self._is_key), self.terms.digest)
            for peer in partners:
                yield pair_key(secret, self._adverts[peer].mask_key, session, gone, peer), -1 if peer < gone else 1

    def _is_seed(self, client: int, secret: bytes) -> bool:
        return commitment(secret, self.terms.digest, client) == self._adverts[client].commitment

    def _is_key(self, client: int, secret: bytes) -> bool:
        public = mask_secret(secret, self.terms.digest).public_key().public_bytes_raw()
        return public == self._adverts[client].mask_key

    def _recover(
        self, client: int, shares: Mapping[int, list[tuple[int, bytes]]], right: Callable[[int, bytes], bool]
    ) -> bytes:
        mine, threshold = sorted(shares.get(client, [])), self._session.threshold
        secret, wrong = shamir.recover(mine, threshold, lambda candidate: right(client, candidate))
        if wrong:
            self.refused["false_share"] += 1
        if secret is None:
            raise Aborted(Step.UNMASK, len(mine), threshold, f"shares of a client's secret ({wrong} selections false)")
        return secret


def _distinct(ids: list[int]) -> bool:
    return len(set(ids)) == len(ids)


def _turned(outbox: Mapping[int, tuple[tuple[int, bytes], ...]]) -> dict[int, list[tuple[int, bytes]]]:
    """What each of these clients is sent, from what each of them sends."""
    inbox: dict[int, list[tuple[int, bytes]]] = {client: [] for client in outbox}
    for sender, rows in outbox.items():
        for receiver, content in rows:
            if receiver in inbox:
                inbox[receiver].append((sender, content))
    return inbox
