"""Every way in which the server could read one vector is tried.

Each attack is run twice: on the code as it is, where it must fail, and with one protection taken out, where it must
read the vector: an attack that cannot succeed shows nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats

from fedcanary import rng
from fedcanary.privacy import shamir
from fedcanary.privacy.secagg import Client, Refusal, crypto
from fedcanary.privacy.secagg import messages as wire
from oracles.masked_round import Round, same

# ------------------------------------------------------------------------------------------------ one masked vector


def test_a_masked_vector_says_nothing_of_its_input():
    """Chi-square of 200,000 bytes against uniform: a correct program fails with probability 1e-6 for a fresh seed."""
    inputs = []
    for seed in (1, 2):
        round = Round(3, length=50_000, seed=seed)
        round.vectors[0] = np.zeros(50_000, dtype=np.uint32)  # whatever is seen in the output is the mask's
        round.to_agree()
        inputs.append(np.frombuffer(round.inputs[0].values, dtype=np.uint8))
    for seen in (*inputs, inputs[0] - inputs[1]):
        assert stats.chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-6
    assert np.mean(inputs[0] == inputs[1]) < 0.006  # 1 in 256 by chance


class NoOwnMask(Client):
    """Planted bug: no mask of its own."""

    def _pads(self):
        return itertools.islice(super()._pads(), 1, None)


class OnlyOwnMask(Client):
    """Planted bug: no masks with its neighbours."""

    def _pads(self):
        return itertools.islice(super()._pads(), 1)


@pytest.mark.parametrize(("client", "read"), [(Client, False), (NoOwnMask, True)])
def test_a_late_message_is_protected_by_the_own_mask(client, read):
    """The server has the victim's input, says it came too late, and is given the key of the victim's pairwise masks."""
    round = Round(10, client=client)
    round.finish(late=[3])
    assert 3 not in round.server.survivors
    seed = round.key_seed(3, round.answers)
    assert seed is not None
    assert same(round.stripped(3, key_seed=seed), round.vectors[3]) is read


@pytest.mark.parametrize(("client", "read"), [(Client, False), (OnlyOwnMask, True)])
def test_the_pairwise_masks_protect_who_is_in_the_sum(client, read):
    """Every survivor's own seed is given to the server."""
    round = Round(10, client=client)
    round.finish()
    assert same(round.stripped(3, own_seed=round.answers[3].seed), round.vectors[3]) is read


def test_a_client_without_one_kind_of_mask_breaks_the_sum():
    for client in (NoOwnMask, OnlyOwnMask):
        round = Round(6)
        round.clients[2] = client(2, round.identities[2], round.registry, round.terms)
        assert not same(round.finish(), round.plain(range(6)))


class Trusting(Client):
    """Planted bug: believes that the others were told of the same survivors."""

    def _check_quorum(self, signatures):
        pass


@pytest.mark.parametrize(("client", "read"), [(Client, False), (Trusting, True)])
def test_no_server_gets_both_kinds_of_share_by_telling_of_two_sets_of_survivors(client, read):
    """Seven are told that the victim dropped out, it and two others that it did not; all who will, unmask."""
    victim = 9
    round = Round(10, client=client)
    round.to_agree()
    ids = [wire.pack_ids(range(9 if i < 7 else 10)) for i in range(10)]
    told = {i: dataclasses.replace(round.survivors[i], ids=ids[i]) for i in range(10)}
    signed = {i: round.clients[i].agree(message).signature for i, message in told.items()}
    answers, refusals = {}, {}
    for i in range(10):
        mine = tuple((j, s) for j, s in signed.items() if ids[j] == ids[i])
        try:
            answers[i] = round.clients[i].unmask(wire.Agreements(session=round.session.digest, signatures=mine))
        except Refusal as refusal:
            refusals[i] = refusal.reason
    key_seed = round.key_seed(victim, {i: answers[i] for i in range(7)})
    own_seed = answers[victim].seed if victim in answers else None
    assert refusals == ({} if read else dict.fromkeys((7, 8, 9), "no_agreement"))
    assert same(round.stripped(victim, key_seed=key_seed, own_seed=own_seed), round.vectors[victim]) is read


class Credulous(Client):
    """Planted bug: believes that whoever it masked with has masked with it."""

    def _masked_with_me(self, near, acks):
        return near


@pytest.mark.parametrize(("client", "read"), [(Client, False), (Credulous, True)])
def test_no_server_makes_a_victim_mask_only_with_those_who_will_be_declared_dropped(client, read):
    """No client colludes. The victim is told of 15 neighbours, the others of all, and then that those 15 dropped out.

    The others have a mask with the victim, so nothing they see is wrong, and its own mask's seed is theirs to give.
    """
    round, victim = Round(70, client=client), 7
    round.to_mask()
    dropped = set(round.session.neighbours(victim)[:15])
    told = tuple(row for row in round.deliveries[victim].sealed if row[0] in dropped)
    round.deliveries[victim] = dataclasses.replace(round.deliveries[victim], sealed=told)
    round.inputs = {i: round.clients[i].mask(d, round.vectors[i]) for i, d in round.deliveries.items()}
    left = sorted(round.inputs.keys() - dropped)
    ids, signed = wire.pack_ids(left), {}
    for i in left:
        acks = tuple((j, dict(round.inputs[j].acks)[i]) for j in left if i in round.inputs[j].peers)
        with contextlib.suppress(Refusal):  # some have lost too many neighbours; the victim sees that it was lied to
            signed[i] = round.clients[i].agree(wire.Survivors(session=round.session.digest, ids=ids, acks=acks))
    assert len(signed) >= round.session.quorum and victim not in signed
    rows = tuple((i, message.signature) for i, message in signed.items())
    agreements = wire.Agreements(session=round.session.digest, signatures=rows)
    answers = {i: dict(round.clients[i].unmask(agreements).shares) for i in signed}

    def secret_of(i, right):
        near = round.session.neighbours(i)
        shares = [(near.index(j), answers[j][i]) for j in near if i in answers.get(j, ())]
        return shamir.recover(shares, round.session.threshold, right)[0]

    own = secret_of(
        victim, lambda s: crypto.commitment(s, round.terms.digest, victim) == round.adverts[victim].commitment
    )
    vector = np.frombuffer(round.inputs[victim].values, dtype=round.terms.dtype).copy()
    pads = [] if own is None else [(crypto.self_key(own, round.session.digest, victim), -1)]
    for i in dropped:
        public = round.adverts[i].mask_key
        seed = secret_of(
            i, lambda s, i=i, p=public: crypto.mask_secret(s, round.terms.digest).public_key().public_bytes_raw() == p
        )
        secret = crypto.mask_secret(seed, round.terms.digest)
        key = crypto.pair_key(secret, round.adverts[victim].mask_key, round.session.digest, i, victim)
        pads.append((key, -1 if victim < i else 1))
    crypto.add_pads(vector, pads)
    assert (own is not None) is same(vector, round.vectors[victim]) is read


def test_a_client_gives_one_kind_of_share_once():
    round = Round(10)
    round.finish(late=[3])
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].unmask(round.agreements[0])
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].agree(dataclasses.replace(round.survivors[0], ids=wire.pack_ids(range(10))))
    both = {peer: len(share) for peer, share in round.answers[0].shares}
    assert both == {peer: shamir.SEED for peer in range(1, 10)}  # one share for each, never two


@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (2, 3), (7, 30), (43, 64), (3, 300)])
def test_shares_are_those_of_the_library(monkeypatch, threshold, holders):
    draw = rng.stream(8, "shamir", str(holders))
    stream, secret = draw.bytes(16 * (threshold - 1)), draw.bytes(16)
    parts = iter([stream[i : i + 16] for i in range(0, len(stream), 16)])
    monkeypatch.setattr(shamir.os, "urandom", lambda size: stream)
    monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", lambda size: next(parts))
    expected = [piece for _, piece in shamir.Shamir.split(threshold, holders, secret)]
    assert shamir.share(secret, threshold, holders) == expected


def test_shares_below_the_threshold_recover_nothing():
    secret = bytes(range(16))
    shares = list(enumerate(shamir.share(secret, 4, 6)))
    for chosen in itertools.combinations(shares, 4):
        assert shamir.recover(chosen, 4, lambda s: s == secret) == (secret, 0)
    for chosen in itertools.combinations(shares, 3):
        assert shamir.recover(chosen, 4, lambda s: True) == (None, 0)
        assert shamir.recover(chosen, 3, lambda s: s == secret)[0] is None


# ------------------------------------------------------------------------------------------------------ registration


def made_up(round, victim):
    """The server in the place of everybody but the victim: made-up signing keys, its own masking keys."""
    keys = {i: Ed25519PrivateKey.generate() for i in round.clients if i != victim}
    for i, key in keys.items():
        round.clients[i] = Client(i, key, round.registry, round.terms)
        round.vectors[i] = np.zeros_like(round.vectors[i])


def test_keys_made_by_the_server_are_refused():
    round = Round(6)
    made_up(round, victim=2)
    adverts = {i: client.advertise() for i, client in round.clients.items()}
    assert round.server.collect(2, adverts[2])
    assert not round.server.collect(0, adverts[0])  # the honest part of the server would not take them either
    assert round.server.refused == {"bad_signature": 1}
    near = tuple((i, adverts[i].to_bytes()) for i in range(6) if i != 2)
    roster = wire.Roster(session=round.terms.digest, ids=wire.pack_ids(range(6)), adverts=near)
    with pytest.raises(Refusal, match="not signed by its registered key"):
        round.clients[2].share(roster)


def test_without_that_check_the_server_reads_the_vector(monkeypatch):
    for side in ("client", "server"):
        monkeypatch.setattr(f"fedcanary.privacy.secagg.{side}.verified", lambda *_: True)
    round = Round(6)
    made_up(round, victim=2)
    assert same(round.finish(), round.vectors[2])
