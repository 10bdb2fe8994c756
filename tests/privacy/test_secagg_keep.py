"""A client that is read from its bytes before each step answers as one that was never away; and only its own bytes do.

What a client that is put back to an earlier state gives away is shown by attacks that succeed with it, and fail with
the state that was kept.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import traceback

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary import rng
from fedcanary.errors import BadInput
from fedcanary.privacy import secagg, shamir
from fedcanary.privacy.secagg import Aborted, Client, Refusal, Server, Step, Terms, aggregate, crypto
from fedcanary.privacy.secagg import messages as wire
from oracles.masked_round import LENGTH, Round, same


class OnDisk:
    """A client that exists only while it answers: before and after, there are its bytes."""

    def __init__(self, client, identity, registry, terms, **options):
        self.keys = (identity, registry, terms)
        self.data = Client(client, *self.keys, **options).to_bytes()
        self.past = [self.data]  # what no real client has: every state it was in

    @property
    def refused(self):
        return self.now().refused

    def now(self, kind=Client):
        return kind.from_bytes(self.data, *self.keys)

    def __getattr__(self, name):
        def answer(*message):
            client = self.now()
            try:
                return getattr(client, name)(*message)
            finally:
                self.data = client.to_bytes()
                self.past.append(self.data)

        return answer

    def put_back(self, step):
        """To the state before it answered this step."""
        self.data = self.past[list(Step).index(step)]


# -------------------------------------------------------------------------------------------------- the same answers


def outcome(work):
    try:
        result = work()
    except Aborted as aborted:
        return str(aborted)
    return result.total.tolist(), result.signed.tolist(), result.survivors, result.refused


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_outcome_is_that_of_clients_that_were_never_away(data):
    n = data.draw(st.integers(2, 9))
    bits = data.draw(st.sampled_from([3, 16, 32, 33, 64]))
    ids = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n, unique=True))
    length = data.draw(st.integers(1, 4))
    draw = rng.stream(data.draw(st.integers(0, 9)), "kept")
    vectors = {i: draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), length, dtype=np.int64) for i in ids}
    gone = data.draw(st.dictionaries(st.sampled_from(ids), st.sampled_from(list(Step)), max_size=int(0.3 * n) + 1))
    dropouts = {step: {i for i in gone if gone[i] is step} for step in Step}
    registry, identities = secagg.register(ids)
    terms = Terms(round_id="simulation", contract=b"", registry=registry.digest, length=length, bits=bits)
    kept = {i: OnDisk(i, identities[i], registry, terms) for i in ids}

    def alive():
        return aggregate(vectors, bits, dropouts=dropouts, registry=registry, identities=identities)

    assert outcome(lambda: secagg.run(Server(terms, registry, ids), kept, vectors, dropouts)) == outcome(alive)


def test_a_sparse_round_of_clients_on_disk_is_summed():
    round = Round(70, client=OnDisk)
    assert same(round.finish(late=[3, 33]), round.plain(i for i in range(70) if i not in (3, 33)))
    assert all(not round.clients[i].refused for i in range(70))


def secrets_of(client):
    """Everything that only this client may know, its two seeds and its sealing key first."""
    own = [client._self_seed, client._key_seed, client._seal_key.private_bytes_raw()]
    private = [client._mask_key.private_bytes_raw(), client._identity.private_bytes_raw()]
    held = [pair[at : at + shamir.SEED] for pair in client._held.values() for at in (0, shamir.SEED)]
    channels = [key for c in client._channels.values() for key in (c.open, c.say, c.hear)]
    return [*own, *private, *held, *channels]


def both(clients, step, *message):
    """The one answer of two clients that should be the same, as bytes; or their one refusal."""
    said = []
    for client in clients:
        try:
            said.append(getattr(client, step)(*message).to_bytes())
        except Refusal as refusal:
            said.append(str(refusal))
    assert said[0] == said[1]
    assert clients[0].refused == clients[1].refused
    assert clients[0].to_bytes() == clients[1].to_bytes()
    return said[0]


@pytest.mark.parametrize(
    ("step", "spoil"),
    [
        (None, None),
        (Step.SHARE, lambda m: dataclasses.replace(m, adverts=m.adverts[1:])),
        (Step.MASK, lambda m: dataclasses.replace(m, sealed=(*m.sealed[1:], m.sealed[1], (99, b"")))),  # goes on
        (Step.MASK, lambda m: dataclasses.replace(m, sealed=m.sealed[:3])),
        (Step.AGREE, lambda m: dataclasses.replace(m, acks=m.acks[1:])),  # goes on
        (Step.AGREE, lambda m: dataclasses.replace(m, ids=m.ids[4:])),
        (Step.AGREE, lambda m: dataclasses.replace(m, session=bytes(32))),
        (Step.UNMASK, lambda m: dataclasses.replace(m, signatures=m.signatures[:2] * 5)),
    ],
)
def test_each_answer_and_each_refusal_is_the_same_to_the_byte(monkeypatch, step, spoil):
    monkeypatch.setattr(shamir.os, "urandom", lambda size: b"\5" * size)  # the only draw that is made after the start
    round = Round(8)
    round.to_unmask(late=[6])
    messages = {
        Step.ADVERTISE: (),
        Step.SHARE: (round.rosters[0],),
        Step.MASK: (round.deliveries[0], round.vectors[0]),
        Step.AGREE: (round.survivors[0],),
        Step.UNMASK: (round.agreements[0],),
    }
    if step is not None:
        messages[step] = (spoil(messages[step][0]), *messages[step][1:])
    keys = (round.identities[0], round.registry, round.terms)
    drawn = io.BytesIO(b"".join(secrets_of(round.clients[0])[:3]))  # the same client again, from the start
    client = Client(0, *keys, randomness=drawn.read)
    said = []
    for name, message in messages.items():
        said.append(both((client, Client.from_bytes(client.to_bytes(), *keys)), name, *message))
        both((client, Client.from_bytes(client.to_bytes(), *keys)), name, *message)  # a second time: both refuse
    if step is None:
        assert all(isinstance(answer, bytes) for answer in said)


# ------------------------------------------------------------------------------------------------------ put back


@pytest.mark.parametrize("put_back", [False, True])
def test_two_lists_of_survivors_give_both_seeds_of_a_client_if_others_are_put_back(put_back):
    """The sum is released with the victim in it. Then seven are told that it dropped out; the victim is not touched."""
    victim, others = 9, range(7)
    round = Round(10, client=OnDisk)
    assert same(round.finish(), round.plain(range(10)))
    ids = wire.pack_ids(range(9))
    signed, answers, refusals = {}, {}, set()
    for i in others:
        if put_back:
            round.clients[i].put_back(Step.AGREE)
        try:
            signed[i] = round.clients[i].agree(dataclasses.replace(round.survivors[i], ids=ids)).signature
        except Refusal as refusal:
            refusals.add(refusal.reason)
    agreements = wire.Agreements(session=round.session.digest, signatures=tuple(signed.items()))
    for i in others:
        try:
            answers[i] = round.clients[i].unmask(agreements)
        except Refusal as refusal:
            refusals.add(refusal.reason)
    key_seed = round.key_seed(victim, answers)
    vector = round.stripped(victim, key_seed=key_seed, own_seed=round.answers[victim].seed)
    assert refusals == (set() if put_back else {"wrong_step"})
    assert (key_seed is not None) is same(vector, round.vectors[victim]) is put_back


def test_who_has_signed_one_list_unmasks_no_other():
    """As above, but the state is the one after `agree`: the other list's signatures are not a quorum for its own."""
    round = Round(10, client=OnDisk)
    round.to_unmask()
    other = wire.statement(round.session.digest, wire.pack_ids(range(9)))
    signed = tuple((i, round.identities[i].sign(other)) for i in range(9))
    with pytest.raises(Refusal, match="no_agreement"):
        round.clients[0].unmask(wire.Agreements(session=round.session.digest, signatures=signed))
    with pytest.raises(Refusal, match="nothing is next"):
        round.clients[0].unmask(round.agreements[0])


@pytest.mark.parametrize("put_back", [False, True])
def test_masking_again_without_a_neighbour_gives_their_pad_if_the_victim_is_put_back(put_back):
    """Only the victim is put back, once for each neighbour; nobody has to be declared dropped."""
    round, victim = Round(10, client=OnDisk), 9
    round.finish()
    own = (crypto.self_key(round.answers[victim].seed, round.session.digest, victim), -1)
    first = np.frombuffer(round.inputs[victim].values, dtype=round.terms.dtype)
    vector, refusals = first.copy(), set()
    crypto.add_pads(vector, [own])
    delivery = round.deliveries[victim]
    for peer in range(9):
        fewer = tuple(row for row in delivery.sealed if row[0] != peer)
        if put_back:
            round.clients[victim].put_back(Step.MASK)
        try:
            again = round.clients[victim].mask(dataclasses.replace(delivery, sealed=fewer), round.vectors[victim])
        except Refusal as refusal:
            refusals.add(refusal.reason)
        else:
            vector -= first - np.frombuffer(again.values, dtype=round.terms.dtype)
    assert refusals == (set() if put_back else {"wrong_step"})
    assert same(vector, round.vectors[victim]) is put_back


def test_another_vector_under_the_same_masks_gives_the_difference_if_the_client_is_put_back():
    round = Round(5, client=OnDisk)
    round.to_agree()
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].mask(round.deliveries[0], round.vectors[1])
    round.clients[0].put_back(Step.MASK)
    again = round.clients[0].mask(round.deliveries[0], round.vectors[1])
    seen = [np.frombuffer(message.values, dtype=round.terms.dtype) for message in (again, round.inputs[0])]
    assert same(seen[0] - seen[1], round.vectors[1] - round.vectors[0])


def test_sharing_again_seals_twice_under_one_nonce_if_the_client_is_put_back():
    """The difference of what is sealed is seen: here of the shares that the neighbour opens."""
    round = Round(5, client=OnDisk)
    round.to_mask()
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].share(round.rosters[0])
    round.clients[0].put_back(Step.SHARE)
    again = dict(round.clients[0].share(round.rosters[0]).sealed)[1]
    once = dict(round.shares[0].sealed)[1]
    cipher = ChaCha20Poly1305(round.clients[1].now()._channels[0].open)
    opened = [cipher.decrypt(crypto.NONCE, data, round.clients[1].now()._context(0, 1)) for data in (once, again)]
    size = 2 * shamir.SEED
    assert opened[0] != opened[1]
    assert differing(once[:size], again[:size]) == differing(*opened)


def differing(one, other):
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------------ what is kept


class KeepsAll(Client):
    """Planted bug: the masking key's seed stays until the end."""

    def to_bytes(self):
        return super().to_bytes() + self._key_seed


@pytest.mark.parametrize(
    ("client", "step", "read"),
    [
        (Client, Step.MASK, True),
        (Client, Step.AGREE, False),
        (Client, Step.UNMASK, False),
        (KeepsAll, Step.AGREE, True),
    ],
)
def test_a_disk_read_after_masking_does_not_help_to_take_the_pairwise_masks_off(client, step, read):
    """The thief has the file as it is before a step, and in the end all that the server has."""
    files = {}
    round = Round(6, client=client)

    def read_disk(now):
        files[now] = round.clients[3].to_bytes()

    round.to_mask()
    read_disk(Step.MASK)
    round.inputs = {i: round.clients[i].mask(d, round.vectors[i]) for i, d in round.deliveries.items()}
    for i, message in round.inputs.items():
        round.server.collect(i, message)
    read_disk(Step.AGREE)
    signed = {i: round.clients[i].agree(message) for i, message in round.server.survivor_list().items()}
    for i, message in signed.items():
        round.server.collect(i, message)
    read_disk(Step.UNMASK)
    answer = round.clients[3].unmask(round.server.agreements()[3])
    found = [
        files[step][at : at + shamir.SEED]
        for at in range(len(files[step]) - shamir.SEED + 1)
        if crypto.mask_secret(files[step][at : at + shamir.SEED], round.terms.digest).public_key().public_bytes_raw()
        == round.adverts[3].mask_key
    ]
    vectors = [round.stripped(3, key_seed=seed, own_seed=answer.seed) for seed in found]
    assert any(same(vector, round.vectors[3]) for vector in vectors) is read


def test_only_what_the_remaining_steps_need_is_kept():
    round = Round(5, client=OnDisk)
    round.finish()
    kept = round.clients[2]
    first, shared, masked = (Client.from_bytes(kept.past[k], *kept.keys) for k in (0, 2, 3))
    own, key, sealing = secrets_of(first)[:3]
    assert [[secret in data for secret in (own, key, sealing)] for data in kept.past] == [
        *([True, True, True], [True, True, True]),  # until the shares are sealed
        [True, True, False],  # until the vector is masked
        *([True, False, False], [True, False, False]),
        [False, False, False],
    ]
    after = [s for client in (first, shared, masked) for s in secrets_of(client) if s.strip(b"\0")]
    assert not any(secret in kept.data for secret in after)
    assert not any(first._identity.private_bytes_raw() in data for data in kept.past)


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.AGREE, Step.UNMASK])
def test_a_client_that_refused_keeps_no_secret_and_refuses_on(step):
    round = Round(5, client=OnDisk)
    round.finish()
    kept = round.clients[0]
    kept.put_back(step)
    secrets = secrets_of(kept.now())
    wrong = {
        Step.SHARE: round.rosters,
        Step.MASK: round.deliveries,
        Step.AGREE: round.survivors,
        Step.UNMASK: round.agreements,
    }[step][0]
    rest = (round.vectors[0],) if step is Step.MASK else ()
    with pytest.raises(Refusal, match="wrong_round"):
        getattr(kept, step)(dataclasses.replace(wrong, session=bytes(32)), *rest)
    assert not any(secret in kept.data for secret in secrets if secret.strip(b"\0"))
    with pytest.raises(Refusal, match="nothing is next"):
        getattr(kept, step)(wrong, *rest)


def test_a_vector_that_does_not_fit_ends_the_kept_client_as_it_ends_the_one_in_memory():
    for client in (Client, OnDisk):
        round = Round(5, client=client)
        round.to_mask()
        with pytest.raises(BadInput):
            round.clients[0].mask(round.deliveries[0], np.zeros(LENGTH + 1, dtype=np.uint32))
        with pytest.raises(Refusal, match="nothing is next"):
            round.clients[0].mask(round.deliveries[0], round.vectors[0])


def test_eight_clients_more_in_the_round_are_33_bytes_more():
    """4 bytes for its id, a bit for whether it survived; the rest depends on the neighbours alone."""
    sizes = {}
    for n in (66, 74):
        round = Round(n, client=OnDisk)
        round.to_unmask()
        sizes[n] = max(len(data) for data in round.clients[0].past)
    assert sizes[74] - sizes[66] == 33
    assert sizes[66] == size_of(clients=66, neighbours=30)


def size_of(clients, neighbours):
    """Tag; nine lengths; id, step, counts, own seed; roster, channels, held pairs, survivors, mutual masks."""
    return 32 + 9 * 4 + 4 + len("unmask{}") + 16 + 4 * clients + neighbours * (100 + 36 + 4) + -(-clients // 8)


# ------------------------------------------------------------------------------------------------------ only its own


@functools.cache
def states():
    """The bytes of one client at each step, and its keys."""
    round = Round(3, client=OnDisk)
    round.finish()
    return round, round.clients[1]


def refused(data, *keys):
    with pytest.raises(Refusal) as caught:
        Client.from_bytes(data, *keys)
    assert caught.value.reason == "bad_state"
    return caught.value


def test_bytes_that_are_cut_longer_or_altered_anywhere_are_refused():
    _, kept = states()
    for data in kept.past:
        assert Client.from_bytes(data, *kept.keys).to_bytes() == data
        for at in range(len(data)):
            refused(data[:at], *kept.keys)
            refused(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], *kept.keys)
        refused(data + b"\0", *kept.keys)
    for one, other in zip(kept.past, kept.past[1:], strict=False):
        refused(one[:32] + other[32:], *kept.keys)


@given(st.binary(max_size=80))
def test_no_bytes_make_reading_fail_otherwise(data):
    refused(data, *states()[1].keys)


def test_the_bytes_are_of_one_client_round_registration_list_and_version(monkeypatch):
    round, kept = states()
    identity, registry, terms = kept.keys
    wider, _ = secagg.register(range(4))
    wider = secagg.Registry(keys={**registry.keys, 3: wider.keys[3]})
    for data in kept.past:
        refused(data, round.identities[0], registry, terms)
        refused(data, identity, registry, dataclasses.replace(terms, round_id="2"))
        refused(data, identity, registry, dataclasses.replace(terms, contract=b"other"))
        refused(data, identity, wider, terms)
        refused(data, identity, wider, dataclasses.replace(terms, registry=wider.digest))
    monkeypatch.setattr("fedcanary.privacy.secagg.keep.FORMAT", 2)
    for data in kept.past:
        refused(data, *kept.keys)


def test_no_secret_is_in_an_error_or_a_repr():
    round, kept = states()
    said, secrets = [], set()
    for step, data in zip(Step, kept.past, strict=False):
        client = Client.from_bytes(data, *kept.keys)
        secrets |= {secret for secret in secrets_of(client) if secret.strip(b"\0")}
        said += [repr(client), str(client), repr(client._channels), *map(repr, client._channels.values())]
        with pytest.raises(Refusal) as caught:
            Client.from_bytes(data[:-1], *kept.keys)
        errors = [caught.value]
        wrong = wire.Survivors(session=bytes(32), ids=b"", acks=())
        for name in ("advertise", "agree", step):
            message = {"advertise": (), "mask": (wrong, round.vectors[1])}.get(name, (wrong,))
            try:
                getattr(client, name)(*message)
            except (Refusal, BadInput) as error:
                errors.append(error)
        said += [text for error in errors for text in (repr(error), "".join(traceback.format_exception(error)))]
    written = (bytes.hex, lambda s: repr(s)[2:-1], lambda s: base64.b64encode(s).decode(), lambda s: str([*s]))
    forms = [form(secret)[:16] for secret in secrets for form in written]
    assert len(secrets) > 15 and len(said) > 30
    assert not [form for form in forms if any(form in text for text in said)]
