"""Messages that are wrong, impossible or malformed: each is refused and counted, and the round goes on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcanary.privacy import secagg
from fedcanary.privacy.secagg import Aborted, Client, Refusal, decode
from fedcanary.privacy.secagg import messages as wire
from oracles.masked_round import LENGTH, Round, same

# ------------------------------------------------------------------------------------------------------ to a client


def roster_with(round, ids=None, adverts=None):
    real = round.rosters[0]
    return dataclasses.replace(
        real,
        ids=real.ids if ids is None else np.array(ids, dtype="<u4").tobytes(),
        adverts=real.adverts if adverts is None else tuple(adverts),
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r, a: roster_with(r, ids=[*range(10), 77]), "bad_roster"),  # not registered
        (lambda r, a: roster_with(r, ids=[0, 0, *range(1, 10)]), "bad_roster"),  # twice
        (lambda r, a: roster_with(r, ids=range(1, 10)), "bad_roster"),  # without the receiver
        (lambda r, a: roster_with(r, ids=[0], adverts=[]), "bad_roster"),  # alone
        (lambda r, a: roster_with(r, adverts=a[:3]), "bad_roster"),  # fewer neighbours than the roster gives it
        (lambda r, a: roster_with(r, ids=range(3), adverts=a[:2]), "bad_roster"),  # fewer than the contract's floor
        (lambda r, a: roster_with(r, adverts=[a[0], *a[:-1]]), "bad_roster"),  # one twice
        (lambda r, a: roster_with(r, adverts=[(1, a[1][1]), *a[1:]]), "bad_advert"),  # another's advert
        (lambda r, a: roster_with(r, adverts=[(1, other_round(r)), *a[1:]]), "bad_advert"),
        (lambda r, a: roster_with(r, adverts=[(1, swapped_key(r)), *a[1:]]), "bad_signature"),
        (lambda r, a: roster_with(r, adverts=[(1, a[0][1][:-1]), *a[1:]]), "malformed"),
        (lambda r, a: dataclasses.replace(r.rosters[0], session=bytes(32)), "wrong_round"),
    ],
)
def test_a_client_refuses_a_wrong_roster_and_then_everything(spoil, reason):
    round = Round(minimum=5)
    round.to_share()
    with pytest.raises(Refusal) as caught:
        round.clients[0].share(spoil(round, round.rosters[0].adverts))
    assert caught.value.reason == reason
    with pytest.raises(Refusal, match="wrong_step"):
        round.clients[0].share(round.rosters[0])


def other_round(round):
    terms = dataclasses.replace(round.terms, round_id="2")
    return Client(1, round.identities[1], round.registry, terms).advertise().to_bytes()


def swapped_key(round):
    return dataclasses.replace(round.adverts[1], mask_key=round.adverts[2].mask_key).to_bytes()


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (range(1, 10), "bad_survivors"),  # without the receiver
        ([*range(10), 11], "bad_survivors"),  # not on the roster
        ([*range(9), 8], "bad_survivors"),  # twice
        (range(6), "too_few_survivors"),
    ],
)
def test_a_client_signs_no_impossible_survivors(ids, reason):
    round = Round(10)
    round.to_agree()
    with pytest.raises(Refusal) as caught:
        round.clients[0].agree(dataclasses.replace(round.survivors[0], ids=np.array(list(ids), dtype="<u4").tobytes()))
    assert caught.value.reason == reason


def test_a_client_signs_no_survivor_that_it_has_no_mask_with():
    round = Round(10)
    round.to_mask()
    fewer = dataclasses.replace(round.deliveries[0], sealed=round.deliveries[0].sealed[1:])
    round.clients[0].mask(fewer, round.vectors[0])
    everybody = wire.Survivors(session=round.session.digest, ids=wire.pack_ids(range(10)), acks=())
    with pytest.raises(Refusal, match="bad_survivors"):
        round.clients[0].agree(everybody)


def test_a_step_that_is_asked_before_its_turn_is_refused_and_the_client_goes_on():
    round = Round(5)
    early = wire.Survivors(session=bytes(32), ids=b"", acks=())
    for step in ("share", "agree", "unmask"):
        with pytest.raises(Refusal, match="advertise is next"):
            getattr(round.clients[0], step)(early)
    assert same(round.finish(), round.plain(range(5)))


def test_a_client_masks_nothing_with_fewer_neighbours_than_the_threshold():
    round = Round(10)
    round.to_mask()
    fewer = dataclasses.replace(round.deliveries[0], sealed=round.deliveries[0].sealed[:5])
    with pytest.raises(Refusal, match="too_few_neighbours"):
        round.clients[0].mask(fewer, round.vectors[0])


# --------------------------------------------------------------------------------------- as bytes, and to the server


def every_message():
    round = Round(5)
    round.finish()
    down = [table[0] for table in (round.rosters, round.deliveries, round.survivors, round.agreements)]
    signed = wire.Agreement(session=round.session.digest, client=0, signature=bytes(64))
    return [round.adverts[0], round.shares[0], round.inputs[0], signed, round.answers[0], *down]


MESSAGES = every_message()


def test_every_message_survives_bytes():
    assert {type(m) for m in MESSAGES} == set(wire.MESSAGES)
    for message in MESSAGES:
        assert decode(message.to_bytes()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_cut_or_longer_bytes_are_malformed(message):
    data = message.to_bytes()
    for bad in (*(data[:k] for k in range(0, len(data), 7)), data + b"\0", b"\x02" + data[1:], data[:1] + b"\x09"):
        with pytest.raises(Refusal, match="malformed"):
            decode(bad)


@given(st.binary(max_size=60), st.integers(0, 8))
def test_no_bytes_make_decoding_fail_otherwise(data, tag):
    for content in (data, bytes([secagg.terms.VERSION, tag]) + data):
        try:
            assert decode(content).to_bytes() == content
        except Refusal as refusal:
            assert refusal.reason == "malformed"


def masked(round, **changes):
    return dataclasses.replace(round.inputs[0], **changes)


@pytest.mark.parametrize(
    ("sender", "spoil", "reason"),
    [
        (0, lambda r: masked(r, values=bytes(4 * LENGTH - 4)), "wrong_length"),
        (0, lambda r: masked(r, values=bytes(8 * LENGTH)), "wrong_length"),  # uint64 where uint32 was agreed
        (0, lambda r: masked(r, values=b"\xff" * 4 * LENGTH), "outside_field"),
        (0, lambda r: masked(r, session=bytes(32)), "wrong_round"),
        (0, lambda r: masked(r, acks=((0, bytes(16)),)), "bad_peers"),
        (0, lambda r: masked(r, acks=((1, bytes(16)), (99, bytes(16)))), "bad_peers"),
        (0, lambda r: masked(r, acks=r.inputs[0].acks + r.inputs[0].acks[:1]), "bad_peers"),
        (0, lambda r: masked(r, acks=((1, bytes(17)),)), "wrong_length"),
        (0, lambda r: r.inputs[1], "wrong_sender"),
        (0, lambda r: r.shares[0], "wrong_step"),
        (0, lambda r: r.deliveries[0], "wrong_step"),
        (0, lambda r: r.inputs[0].to_bytes()[:-3], "malformed"),
        (77, lambda r: masked(r, client=77), "unknown_client"),
        (1, lambda r: r.inputs[1], "duplicate"),
    ],
)
def test_hostile_inputs_are_dropped_and_counted_and_the_round_goes_on(sender, spoil, reason):
    round = Round(10, bits=20)
    round.to_mask()
    round.inputs = {i: round.clients[i].mask(d, round.vectors[i]) for i, d in round.deliveries.items()}
    for i in range(1, 10):
        assert round.server.collect(i, round.inputs[i].to_bytes())
    assert not round.server.collect(sender, spoil(round))
    assert round.server.refused == {reason: 1}
    survivors = round.server.survivor_list()
    assert round.server.survivors == tuple(range(1, 10))
    for i in survivors:
        round.server.collect(i, round.clients[i].agree(survivors[i]))
    for i, message in round.server.agreements().items():
        round.server.collect(i, round.clients[i].unmask(message))
    assert same(round.server.unmask(), round.plain(range(1, 10)))


def test_hostile_adverts_and_shares_are_dropped_and_counted():
    round = Round(10)
    adverts = {i: client.advertise() for i, client in round.clients.items()}
    replayed = decode(other_round(round))
    low_order = dataclasses.replace(adverts[2], mask_key=bytes(32))
    low_order = dataclasses.replace(low_order, signature=round.identities[2].sign(low_order.signed()))
    for i, advert in ((1, replayed), (2, low_order)):
        assert not round.server.collect(i, advert)
    for i in (0, *range(3, 10)):
        assert round.server.collect(i, adverts[i])
    rosters = round.server.roster()
    message = round.clients[0].share(rosters[0])
    overlong = tuple((peer, sealed + bytes(10_000)) for peer, sealed in message.sealed)
    assert not round.server.collect(0, dataclasses.replace(message, sealed=message.sealed[1:]))
    assert not round.server.collect(0, dataclasses.replace(message, sealed=overlong))
    assert round.server.refused == {"wrong_round": 1, "bad_key": 1, "wrong_recipients": 1, "wrong_length": 1}


def test_tampered_shares_cost_the_client_that_sent_them():
    round = Round(10)
    round.to_share()
    for i, roster in round.rosters.items():
        message = round.clients[i].share(roster)
        if i == 4:
            spoiled = tuple((p, s[:-1] + bytes([s[-1] ^ 1])) for p, s in message.sealed)
            message = dataclasses.replace(message, sealed=spoiled)
        round.server.collect(i, message)
    for i, delivery in round.server.deliveries().items():
        round.server.collect(i, round.clients[i].mask(delivery, round.vectors[i]))
    survivors = round.server.survivor_list()
    rest = [i for i in range(10) if i != 4]
    assert round.server.survivors == tuple(rest)
    assert all(round.clients[i].refused == {"tampered": 1} for i in rest)
    for i in rest:
        round.server.collect(i, round.clients[i].agree(survivors[i]))
    for i, message in round.server.agreements().items():
        round.server.collect(i, round.clients[i].unmask(message))
    assert same(round.server.unmask(), round.plain(rest))
    assert round.server.refused == {"one_sided_mask": 1}


def with_false_acks(stays):
    """Client 4 shows nobody that it masked with them."""
    round = Round(10)
    round.to_mask()
    for i, delivery in round.deliveries.items():
        message = round.clients[i].mask(delivery, round.vectors[i])
        lie = dataclasses.replace(message, acks=tuple((peer, bytes(16)) for peer, _ in message.acks))
        assert round.server.collect(i, lie if i == 4 else message)
    for i, message in round.server.survivor_list().items():
        round.server.collect(i, round.clients[i].agree(message))
    for i, message in round.server.agreements().items():
        if stays or i != 4:
            assert round.server.collect(i, round.clients[i].unmask(message))
    assert all(client.refused == ({} if i == 4 else {"no_mutual_mask": 1}) for i, client in round.clients.items())
    return round


def test_false_acks_are_counted_and_the_round_goes_on():
    round = with_false_acks(stays=True)
    assert same(round.server.unmask(), round.plain(range(10)))
    with pytest.raises(Aborted, match="0 shares of a client's secret"):
        with_false_acks(stays=False).server.unmask()


def test_a_share_of_another_sender_or_round_does_not_open():
    round, other = Round(10), Round(10, round_id="2")
    round.to_mask()
    other.to_mask()
    rows = dict(round.deliveries[0].sealed)
    rows[1], rows[2], rows[3] = rows[2], dict(other.deliveries[0].sealed)[2], b""
    extra = ((4, rows[4]), (77, rows[4]))
    delivery = dataclasses.replace(round.deliveries[0], sealed=(*rows.items(), *extra))
    answer = round.clients[0].mask(delivery, round.vectors[0])
    assert round.clients[0].refused == {"tampered": 3, "duplicate": 1, "unknown_client": 1}
    assert answer.peers == {4, 5, 6, 7, 8, 9}


def with_false_shares(late, liars):
    round = Round(10)
    round.to_unmask(late)
    for i, message in round.agreements.items():
        answer = round.clients[i].unmask(message)
        if i in liars:
            answer = dataclasses.replace(answer, shares=tuple((peer, bytes(16)) for peer, _ in answer.shares))
        assert round.server.collect(i, answer)
    return round


def test_a_false_share_is_found_and_done_without():
    round = with_false_shares(late=[9], liars=[4])
    assert same(round.server.unmask(), round.plain(range(9)))
    assert round.server.refused == {"false_share": 1}


def test_more_false_shares_than_can_be_done_without_stop_the_round():
    with pytest.raises(Aborted, match="shares of a client's secret"):
        with_false_shares(late=[9], liars=[1, 4, 7]).server.unmask()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": bytes(16)}, "bad_seed"),
        ({"shares": ((0, bytes(16)),)}, "bad_shares"),
        ({"shares": ((1, bytes(16)), (1, bytes(16)))}, "bad_shares"),
        ({"shares": tuple((i, b"short") for i in range(1, 10))}, "bad_shares"),
    ],
)
def test_wrong_answers_at_the_last_step_are_dropped(changes, reason):
    round = Round(10)
    round.to_unmask()
    for i, message in round.agreements.items():
        answer = round.clients[i].unmask(message)
        round.server.collect(i, dataclasses.replace(answer, **changes) if i == 0 else answer)
    assert round.server.refused == {reason: 1}
    assert same(round.server.unmask(), round.plain(range(10)))  # its shares are with the others


def test_false_signatures_do_not_make_a_quorum():
    round = Round(10)
    round.to_agree()
    for i in range(7):
        assert round.server.collect(i, round.clients[i].agree(round.survivors[i]))
    forged = wire.Agreement(session=round.session.digest, client=7, signature=bytes(64))
    assert not round.server.collect(7, forged)
    rows = round.server.agreements()[0].signatures
    spoiled = (*rows[:-1], (9, rows[0][1]), (77, rows[0][1]), rows[0])
    with pytest.raises(Refusal, match="no_agreement"):
        round.clients[0].unmask(wire.Agreements(session=round.session.digest, signatures=spoiled))
    assert round.clients[0].refused == {"bad_signature": 2}
