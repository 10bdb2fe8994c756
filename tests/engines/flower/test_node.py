"""A client behind a node, against whatever it may be asked: by a server that crashed, that errs, or that is hostile."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from federation import Federation
from rough import study
from sums import Greedy, Sum, charges, disk, refusals, train_fields, vectors, wrong

from fedcanary.engines.flower import node as nodes
from fedcanary.engines.flower.certificates import IDENTITY
from fedcanary.engines.flower.journal import Journal
from fedcanary.engines.flower.node import AGREE, GIVEN, HELLO, JOURNAL, KEYS, SEALED, SHARE, TRAIN, UNMASK, Node
from fedcanary.engines.flower.wire import Ask
from fedcanary.privacy import seal, secagg
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.secagg.messages import Advert, Roster, decode, pack_ids
from fedcanary.privacy.secagg.session import open_session

STEPS = (KEYS, SHARE, TRAIN, AGREE, UNMASK)


# --- the same ask, another ask


@pytest.mark.parametrize("kind", [HELLO, *STEPS])
def test_the_same_ask_gets_the_same_bytes_from_another_process_too(far, kind):
    if kind == HELLO:
        one = Ask(HELLO, {})
        assert far.node(0).answer([one]) == far.node(0).answer([one])
        return
    asked = Sum(far).to(kind)
    for client, ask in asked.asked.items():
        again = Federation(far.setup, far.out).node(client).answer([ask, ask])  # nothing in memory
        assert again == [asked.answers[client]] * 2
        assert not again[0].refused
        assert charges(far, client) == ([] if kind in (KEYS, SHARE) else [1])


def other(ask: Ask, far: Federation) -> Ask:
    """The same step asked for in another way."""
    fields = dict(ask.fields)
    if ask.kind == KEYS:
        return Ask(KEYS, fields | {"cohort": 3})
    message = decode(ask.fields["message"])
    if ask.kind == SHARE:
        message = replace(message, ids=message.ids[:12])
    elif ask.kind == TRAIN:
        message = replace(message, sealed=message.sealed[:-1])
    elif ask.kind == AGREE:
        message = replace(message, ids=message.ids[:12])
    else:
        message = replace(message, signatures=message.signatures[::-1])
    return Ask(ask.kind, fields | {"message": message.to_bytes()})


@pytest.mark.parametrize("kind", STEPS)
def test_another_ask_for_an_answered_step_is_refused(far, kind):
    asked = Sum(far).to(kind)
    (answer,) = far.node(0).answer([other(asked.asked[0], far)])
    if kind == TRAIN:
        assert answer.fields == {"reasons": Reason.ANSWERED.value}
    else:
        assert answer.refused == "wrong_step"
    if kind != UNMASK:  # and the sum goes on
        Sum.unmask(asked) if kind == AGREE else None
        assert far.node(0).answer([asked.asked[0]]) == [asked.answers[0]]


def test_after_a_refusal_by_the_protocol_no_step_of_that_sum_follows(far):
    """A client that refuses has no secrets left: a second try would be a question about what it holds."""
    asked = Sum(far).to(TRAIN)
    survivors = asked.server.survivor_list()[0]
    few = replace(survivors, ids=pack_ids([0, 1]))
    refused = asked.ask(0, AGREE, message=few.to_bytes())
    assert refused.refused == "too_few_survivors"
    assert far.node(0).answer([asked.asked[0]]) == [refused]
    assert asked.ask(0, AGREE, message=survivors.to_bytes()).refused == "wrong_step"


# --- one round, two sums


def test_what_was_sealed_and_has_not_left_is_the_same_in_the_next_sum(room):
    """The sum of the first training does not exist: the vector is measured once, paid once, and not lost."""
    far = Federation(study(4, privacy={"noise": "system"}), room / "run")
    lost = Ask(TRAIN, {**train_fields(far, 1, 4), "sum": "nobody knows", "message": b""})
    assert refusals(far.node(0).answer([lost])) == {"unknown_sum"}
    with Journal(disk(far) / JOURNAL) as journal:
        first = journal.get(SEALED, "1")
    assert not first.endswith(GIVEN)
    asked = Sum(far).to(SHARE)
    measured = []
    far.host.clients.work = measured.append
    asked.deliveries = asked.server.deliveries()
    asked.ask(0, TRAIN, **train_fields(far, 1, 4), message=asked.deliveries[0].to_bytes())
    assert not asked.answers[0].refused
    assert not measured
    assert charges(far) == [1]
    # take the masks off, as all the others' shares would: what was masked is what was sealed
    with Journal(disk(far) / JOURNAL) as journal:
        assert journal.get(SEALED, "1")[32:] == GIVEN
    assert len(first) == 32 + 8 * far.host.facts.length


def name_for(far: Federation, helpers: set[int], prefix: str) -> str:
    """A sum's name, which draws its graph, such that these clients hold enough shares of everybody else's secrets."""
    n = len(far.setup.population)
    for k in range(10_000):
        session = open_session(far.node(0)._terms(f"{prefix} {k}", n), pack_ids(range(n)))
        held = (len(helpers.intersection(session.neighbours(c))) for c in range(n) if c not in helpers)
        if min(held) >= session.threshold:
            return f"{prefix} {k}"
    raise AssertionError("no such graph was found")


def two_sums(far: Federation, victim: int) -> tuple[np.ndarray | None, list[set[int]]]:
    """A hostile server asks for two sums of a round, one without the victim, each opened by another half.

    Returns what it makes of their difference, if it got both, and who is in each sum.
    """
    everyone = set(range(len(far.setup.population)))
    helpers = [set(range(0, len(everyone), 2)), set(range(1, len(everyone), 2)) - {victim}]
    names = [name_for(far, half, prefix) for half, prefix in zip(helpers, "ab", strict=True)]
    sums = [Sum(far, name, server=Greedy).to(SHARE) for name in names]
    for one, heard in zip(sums, (everyone, everyone - {victim}), strict=True):
        one.train(heard=heard)
    members = [{c for c, a in one.answers.items() if "message" in a.fields} for one in sums]
    totals = []
    for one, half in zip(sums, helpers, strict=True):
        try:
            one.agree()
            one.unmask(clients=half)
            totals.append(one.server.unmask())
        except secagg.Aborted:
            return None, members
    return totals[0] - totals[1], members


class Forgetful(Journal):
    """The planted bug: it is not kept that a vector has left."""

    def put(self, *entries):
        super().put(*(e for e in entries if e.kind != SEALED or not e.body.endswith(GIVEN)))


@pytest.mark.parametrize("planted", [False, True])
def test_no_client_is_in_two_sums_of_a_round(far, monkeypatch, planted):
    if planted:
        monkeypatch.setattr(nodes, "Journal", Forgetful)
    sums = [Sum(far, name, server=Greedy).to(SHARE) for name in "ab"]
    members = []
    for one, asked in zip(sums, ({0, 1, 2}, {0, 1, 2, 3}), strict=True):
        one.train(clients=asked)
        members.append({c for c, a in one.answers.items() if "message" in a.fields})
    assert members == ([{0, 1, 2}, {0, 1, 2, 3}] if planted else [{0, 1, 2}, {3}])


@pytest.mark.slow
def test_attack_two_sums_of_a_round_leave_no_difference_to_take(room, monkeypatch):
    """72 clients, so that neighbours are few: half of them can open a sum, and the other half another."""
    far = Federation(study(72), room / "sound")
    difference, (a, b) = two_sums(far, victim=7)
    assert difference is None
    assert len(a) == 72
    assert not a & b
    # the planted bug, with every client helping once only to unmask: the victim's vector, to the bit
    monkeypatch.setattr(nodes, "Journal", Forgetful)
    far = Federation(study(72), room / "planted")
    difference, (a, b) = two_sums(far, victim=7)
    assert a == b
    assert np.array_equal(difference.view(np.int64), vectors(far, 1, 72)[7])


@pytest.mark.parametrize("dropouts", [0.0, 0.1, 0.3])
def test_sums_of_a_round_with_no_client_in_common_are_each_over_the_floor(dropouts):
    """What any linear combination of such sums can tell: every sum in it adds its own clients, never fewer than the
    floor, whereas two sums with clients in common could cancel to fewer."""
    for n in range(4, 9):
        least = seal.floor(3, dropouts, n)
        possible = [set(s) for k in range(least, n + 1) for s in combinations(range(n), k)]
        assert min(len(s) for s in possible) >= 3
        worst = min((len(s ^ t) for s in possible for t in possible if s != t), default=n)
        if least < n:
            assert worst == 1  # the attack, were it not for the rule
        assert all(len(s | t) >= 2 * least for s in possible for t in possible if not s & t)


@pytest.mark.parametrize("planted", [False, True])
def test_attack_no_second_look_at_a_round_with_fresh_noise(room, monkeypatch, planted):
    """Two whole sums of one round: were the second measured anew, its mean would have half the noise."""
    if planted:
        put = Journal.put

        def forgets(self, *entries):
            put(self, *(e for e in entries if e.kind != SEALED))

        monkeypatch.setattr(Journal, "put", forgets)
    far = Federation(study(4, privacy={"noise": "system"}), room / "run")
    totals = []
    for name in "ab":
        try:
            totals.append(Sum(far, name).to(UNMASK).server.unmask())
        except secagg.Aborted:
            assert not planted
    assert len(totals) == (2 if planted else 1)
    assert len({total.tobytes() for total in totals}) == len(totals)
    assert charges(far) == [1]


@pytest.mark.parametrize("kind", [SHARE, TRAIN, AGREE, UNMASK])
def test_attack_a_step_asked_for_under_another_round_is_refused(far, kind):
    """A sum is of one round. Were its steps taken under any number, what is kept by round would be kept amiss."""
    asked = Sum(far).to(STEPS[STEPS.index(kind) - 1])
    asked.round = 2
    getattr(asked, kind)()
    assert refusals(asked.answers) == {"wrong_round"}


def test_attack_a_round_far_ahead_makes_nobody_forget(far):
    asked = Sum(far).to(TRAIN)
    far_ahead = Ask(KEYS, {"round": 10**9, "sum": "far ahead", "cohort": 4})
    assert refusals(far.node(0).answer([far_ahead])) == {"wrong_round"}
    assert asked.ask(0, KEYS, cohort=4).refused == ""  # the same answer as before: it is still there
    assert Sum(far, "b").keys()[0].refused == ""
    assert charges(far) == [1]


def test_attack_a_round_that_is_over_is_not_begun_again(far):
    """Neither by its name, nor by another: two generations of one sum would have one name for two lists."""
    for round in (1, 2, 3):
        asked = Sum(far, f"sum {round}", round).to(UNMASK)
        assert len(asked.server.unmask())
    replayed = Sum(far, "sum 1", 1)
    replayed.keys()
    assert refusals(replayed.answers) == {"wrong_round"}
    assert refusals(far.node(0).answer([Ask(TRAIN, train_fields(far, 1, 4))])) == {"wrong_round"}
    again = far.node(0).answer([Ask(TRAIN, train_fields(far, 3, 4))])
    assert again[0].fields == {"reasons": Reason.ANSWERED.value}
    assert charges(far) == [1, 2, 3]


# --- what makes no sense


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"sum": "another"}, "unknown_sum"),
        ({"sum": 7}, "malformed"),
        ({"sum": None}, "malformed"),
        ({"message": b""}, "malformed"),
        ({"message": None}, "malformed"),
        ({"message": b"\x01\x00" + bytes(9)}, "malformed"),
        ({"message": Roster(session=b"", ids=b"", adverts=()).to_bytes()}, "wrong_step"),
        ({"request": "{}"}, "malformed"),
        ({"request": "no JSON"}, "malformed"),
        ({"shared": b"no tensors"}, "malformed"),
        ({"line": "a,b"}, "malformed"),
        ({"round": 0}, "wrong_round"),
        ({"round": -1}, "wrong_round"),
        ({"round": 4}, "wrong_round"),
        ({"round": 2}, "wrong_round"),  # not the request's
        ({"round": 1.0}, "malformed"),
        ({"round": None}, "malformed"),
    ],
)
def test_a_training_that_makes_no_sense_is_one_word_and_harms_nothing(far, changed, word):
    asked = Sum(far).to(SHARE)
    asked.deliveries = asked.server.deliveries()
    (answer,) = far.node(0).answer([wrong(far, asked, **changed)])
    assert (answer.refused, dict(answer.fields)) == (word, {})
    (answer,) = far.node(0).answer([wrong(far, asked)])
    assert "message" in answer.fields
    assert charges(far) == [1]


@pytest.mark.parametrize("said", [3, 5])
def test_a_cohort_of_another_size_than_the_sum_was_begun_for_gets_no_vector(far, said):
    """The sum's floor follows from its cohort, and what the noise was made for too."""
    asked = Sum(far, cohort=said).to(SHARE)
    asked.deliveries = asked.server.deliveries()
    (answer,) = far.node(0).answer([wrong(far, asked)])
    assert answer.refused == "wrong_cohort"


def test_unknown_kinds_and_empty_asks(far):
    asks = [Ask("drop_tables", {"round": 1}), Ask(KEYS, {}), Ask(AGREE, {"round": 1, "sum": "a", "message": b""})]
    assert [a.refused for a in far.node(0).answer(asks)] == ["unknown_kind", "malformed", "unknown_sum"]


def rosters(asked: Sum) -> dict[str, tuple[Roster, str]]:
    """Rosters for client 0 that it must not take, and its word."""
    right = asked.server.roster()[0]
    advert = decode(right.adverts[0][1])
    _, keys = secagg.register(range(4))
    identity = keys[1]
    forged = replace(advert, mask_key=bytes(range(32)))
    signed = replace(forged, signature=identity.sign(forged.signed()))
    return {
        "a key that its client did not sign": (_with(right, forged), "bad_signature"),
        "a key signed by somebody else": (_with(right, signed), "bad_signature"),
        "somebody who is not registered": (replace(right, ids=pack_ids([0, 1, 2, 9])), "bad_roster"),
        "without this client": (replace(right, ids=pack_ids([1, 2, 3])), "bad_roster"),
        "too few": (replace(right, ids=pack_ids([0, 1])), "bad_roster"),
        "nobody twice": (replace(right, ids=pack_ids([0, 1, 1, 2])), "bad_roster"),
        "without a neighbour's advert": (replace(right, adverts=right.adverts[1:]), "bad_roster"),
        "an advert under another's name": (replace(right, adverts=(right.adverts[0],) * 3), "bad_roster"),
        "of another sum": (replace(right, session=bytes(32)), "wrong_round"),
    }


def _with(roster: Roster, advert: Advert) -> Roster:
    return replace(roster, adverts=((roster.adverts[0][0], advert.to_bytes()), *roster.adverts[1:]))


def test_a_roster_with_a_wrong_key_or_a_stranger_is_refused(room):
    first = Federation(study(4), room / "0")
    names = list(rosters(Sum(first).to(KEYS)))
    for k, name in enumerate(names, start=1):
        asked = Sum(Federation(first.setup, room / str(k))).to(KEYS)
        roster, word = rosters(asked)[name]
        assert asked.ask(0, SHARE, message=roster.to_bytes()).refused == word, name


def test_a_node_with_another_list_of_keys_takes_no_part(room):
    far = Federation(study(4), room / "run")
    shutil.copy(disk(far, 3) / IDENTITY, room / "own")
    odd = Federation(far.setup, room / "other")  # whose list has other keys
    asked = Sum(far)
    ask = Ask(KEYS, {"round": 1, "sum": "a", "cohort": 4})
    (answer,) = Node(odd.host, 3, room / "own").answer([ask])
    assert not asked.server.collect(3, answer.fields["message"])
    assert asked.server.refused == {"wrong_round": 1}


def test_a_node_with_a_wrong_identity_takes_no_part(far, room):
    shutil.copy(disk(far, 2) / IDENTITY, disk(far, 3) / IDENTITY)
    asked = Sum(far).to(KEYS)
    assert asked.server.refused == {"bad_signature": 1}
    asked.share()
    assert refusals(asked.answers) == {""}
    assert sorted(asked.answers) == [0, 1, 2]
