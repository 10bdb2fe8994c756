"""A client behind a node, against whatever it may be asked: by a server that crashed, that errs, or that is hostile."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from federation import Federation
from flwr.app import ConfigRecord, Message, RecordDict
from rough import study
from sums import Greedy, Sum, memory, refusals, train_fields

from fedcanary.engines.flower import node as nodes
from fedcanary.engines.flower.certificates import IDENTITY
from fedcanary.engines.flower.clients import QUERY
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import InProcessGrid
from fedcanary.engines.flower.journal import Entry, Journal
from fedcanary.engines.flower.node import AGREE, ERRORS, GIVEN, HELLO, JOURNAL, KEYS, SEALED, SHARE, TRAIN, UNMASK, Node
from fedcanary.engines.flower.wire import Answer, Ask, data_of, decode_answers, encode, record
from fedcanary.engines.places import place
from fedcanary.engines.protection import LEDGER
from fedcanary.errors import BadInput
from fedcanary.flower import apps
from fedcanary.privacy import ledger as ledgers
from fedcanary.privacy import seal, secagg
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.secagg.messages import Advert, MaskedInput, Roster, decode, pack_ids
from fedcanary.privacy.secagg.session import open_session

STEPS = (KEYS, SHARE, TRAIN, AGREE, UNMASK)
SAID = "the patient's diagnosis is 17.2345"


@pytest.fixture
def room():
    with memory() as folder:
        yield folder


@pytest.fixture
def far(room):
    """Four clients; three are enough."""
    return Federation(study(4), room / "run")


def charges(far: Federation, client: int = 0) -> list:
    path = place(far.out / "clients", client) / LEDGER
    if not path.exists():
        return []
    with ledgers.Ledger.open(
        path, owner=f"client {client}", budget=ledgers.Budget(epsilon=math.inf, delta=1.0)
    ) as ledger:
        ledger.verify()
        return [row.charge.round for row in ledger.rows()]


def disk(far: Federation, client: int = 0) -> Path:
    return place(far.out / "clients", client)


def vectors(far: Federation, round: int, cohort: int) -> dict[int, np.ndarray]:
    """What each client seals, as only its own disk knows."""
    found = {}
    for client in range(len(far.setup.population)):
        one = far.node(client)
        ask = Ask(TRAIN, train_fields(far, round, cohort))
        found[client] = one._measured(far.host.clients.consent.request(round, cohort), ask)[0]
    return found


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


def wrong(far: Federation, asked: Sum, **changed) -> Ask:
    """A training that is right but for some fields."""
    fields = {**train_fields(far, 1, 4), "sum": "a", "message": asked.deliveries[0].to_bytes(), **changed}
    return Ask(TRAIN, {name: value for name, value in fields.items() if value is not None})


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


# --- nothing of an exception's text


class Failing:
    """Clients that fail, and say why."""

    def __init__(self, consent, error: type[Exception]) -> None:
        self.consent, self.error = consent, error

    def work(self, asked):
        raise self.error(SAID)
        yield


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, AssertionError, sqlite3.OperationalError, BadInput, MemoryError]
)
def test_nothing_of_an_exceptions_text_leaves(far, error):
    far.host.clients = Failing(far.host.clients.consent, _kind(error))
    asked = Sum(far).to(SHARE)
    asked.train()
    said = encode(list(asked.answers.values()))
    assert b"diagnosis" not in said
    assert b"17.2345" not in said
    assert refusals(asked.answers) <= {"failed", "no_journal"}
    log = disk(far) / ERRORS
    assert SAID in log.read_text("utf-8")
    assert log.stat().st_mode & 0o077 == 0


def _kind(error: type[Exception]) -> type[Exception]:
    return error if error is not BadInput else lambda text: BadInput.of("a client", text, "look")  # type: ignore[return-value]


def test_every_word_that_a_node_says_is_one_that_the_server_knows(far):
    """Else the server counts it as `other`, and its operator learns nothing."""
    source = (Path(nodes.__file__).read_text("utf-8"), Path(secagg.client.__file__).read_text("utf-8"))
    said = {piece.split('"')[1] for text in source for piece in text.split("Wrong(")[1:] if piece.startswith('"')}
    said |= {piece.split('"')[1] for text in source for piece in text.split("Refusal(")[1:] if piece.startswith('"')}
    assert said <= nodes.WORDS
    assert {"wrong_round", "bad_roster"} <= said


def test_what_flowers_handler_gets_is_answered_whatever_it_is(room):
    """The app's own handler: bytes that are no parcel, and a node that is set up amiss. Nothing is raised there."""
    configs = {100: {"client": 0, "study": str(room / "none.toml"), "folder": str(room / "a")}, 101: {"folder": SAID}}
    grid = InProcessGrid(configs, apps.client_app)
    link = Link(grid, poll=0.0)
    asks = [Ask(HELLO, {}), Ask(KEYS, {"round": 1, "sum": "a", "cohort": 4})]
    found = dict(link.exchange({100: asks, 101: asks}, QUERY, 5.0, "1"))
    assert {node: refusals(answers) for node, answers in found.items()} == {100: {"failed"}, 101: {"failed"}}
    good = encode(asks)
    for data in (b"", b"junk", good[:-1], good + b"\0", bytes([9]) + good[1:], encode(found[100])):
        message = Message(record(data), 100, QUERY, ttl=9.0)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        assert decode_answers(data_of(reply.content), 100) == ()
    for content in (RecordDict(), RecordDict({"fedcanary": ConfigRecord({"parcel": "text"})})):
        (reply,) = grid.send_and_receive([Message(content, 100, "train", ttl=9.0)])
        assert decode_answers(data_of(reply.content), 100) == ()
    assert not link.faults


def test_a_parcel_above_the_limit_is_not_read(room, monkeypatch):
    monkeypatch.setattr(apps, "LIMIT", 1000)
    grid = InProcessGrid({100: {"client": 0, "study": "none.toml", "folder": str(room)}}, apps.client_app)
    big = Ask(KEYS, {"round": 1, "sum": "a", "cohort": 4, "more": bytes(1000)})
    (reply,) = grid.send_and_receive([Message(record(encode([big])), 100, QUERY, ttl=9.0)])
    assert decode_answers(data_of(reply.content), 100) == ()


# --- the disk


@pytest.mark.parametrize("how", ["garbage", "cut", "a folder", "another program's", "gone in the middle", "read-only"])
def test_a_damaged_journal_is_one_word_to_the_server_and_an_error_on_this_side(far, how, monkeypatch):
    asked = Sum(far).to(KEYS)
    file = disk(far) / JOURNAL
    if how == "garbage":
        file.write_bytes(os.urandom(1 << 14))
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "another program's":
        file.unlink()
        with sqlite3.connect(file) as db:
            db.execute("CREATE TABLE entry (something TEXT)")
        db.close()
    elif how == "gone in the middle":
        content = bytearray(file.read_bytes())
        content[4096:] = os.urandom(len(content) - 4096)
        file.write_bytes(content)
    else:  # by SQLite's own means, as no file is read-only to a test that runs as root
        connect = sqlite3.connect

        def reading(path, **how):
            return connect(f"file:{path}?mode=ro" if path == file else path, uri=path == file, **how)

        monkeypatch.setattr(sqlite3, "connect", reading)
    asked.share()
    assert asked.answers[0].refused == "no_journal"
    assert (disk(far) / ERRORS).stat().st_size
    assert refusals([asked.answers[c] for c in (1, 2, 3)]) == {""}


def test_a_full_disk_loses_nothing_that_was_said(far, monkeypatch):
    """Nothing leaves that is not kept; with room again, the same ask is answered."""
    asked = Sum(far).to(SHARE)
    put = Journal.put

    def full(self, *entries):
        self._db.execute("PRAGMA max_page_count = 1")
        put(self, *entries, Entry("more than there is room for", "", 1, bytes(1 << 20)))

    monkeypatch.setattr(Journal, "put", full)
    asked.train()
    assert refusals(asked.answers) == {"no_journal"}
    monkeypatch.setattr(Journal, "put", put)
    again = [far.node(c).answer([ask])[0] for c, ask in asked.asked.items()]
    assert refusals(again) == {""}
    assert charges(far) == [1]


def test_what_is_forgotten_is_not_in_the_file(room):
    with Journal(room / JOURNAL) as journal:
        secrets = [os.urandom(size) for size in (32, 900, 5000, 70_000)]
        journal.put(
            *(Entry(SEALED, str(k), 1, secret) for k, secret in enumerate(secrets)), Entry("other", "", 2, b"x")
        )
        content = (room / JOURNAL).read_bytes()
        assert all(secret[:30] in content for secret in secrets)
        journal.put(Entry(SEALED, "0", 1, b"replaced"))
        journal.delete(SEALED, "1")
        journal.forget(2)
        assert journal.latest() == 2
    left = b"".join(file.read_bytes() for file in room.iterdir())
    for secret in secrets:
        assert all(secret[at : at + 16] not in left for at in range(0, len(secret) - 16, 16))
    assert sorted(file.name for file in room.iterdir()) == [JOURNAL]


def test_a_vector_that_has_left_is_not_on_the_disk(far):
    """Nor any state of its secure sum two rounds later."""
    asked = Sum(far).to(TRAIN)
    sealed = {c: v.tobytes() for c, v in vectors(far, 1, 4).items()}
    for client, vector in sealed.items():
        content = b"".join(p.read_bytes() for p in disk(far, client).iterdir() if p.name.startswith("journal"))
        assert vector[:64] not in content
    asked.agree()
    asked.unmask()
    for round in (2, 3):
        Sum(far, f"sum {round}", round).to(UNMASK)
    with Journal(disk(far) / JOURNAL) as journal:
        rounds = {row[0] for row in journal._db.execute("SELECT DISTINCT round FROM entry")}
    assert rounds == {2, 3}


WRITER = """
import sys
from pathlib import Path
from fedcanary.engines.flower.journal import Entry, Journal
with Journal(Path(sys.argv[1])) as journal:
    for k in range(int(sys.argv[2]), 10**9):
        journal.put(*(Entry("kind", str(part), k, k.to_bytes(8, "little") * (1 + 2000 * part)) for part in range(4)))
        print(k, flush=True)
"""


def test_kill_9_leaves_all_or_nothing(room):
    """Ten kills at random moments; what `put` returned from is there, and of the next all four entries or none."""
    file, start = room / JOURNAL, 0
    for seed in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(start)], stdout=subprocess.PIPE, text=True
        )
        last = start - 1
        for _ in range(random.Random(seed).randrange(1, 12)):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        last = int(rest[-1]) if rest else last
        with Journal(file) as journal:
            there = {journal.get("kind", str(part))[:8] for part in range(4)}
            assert len(there) == 1
            found = int.from_bytes(there.pop(), "little")
            assert found in (last, last + 1)
            assert journal.latest() == found
            for part in range(4):
                assert journal.get("kind", str(part)) == found.to_bytes(8, "little") * (1 + 2000 * part)
        start = found + 1


# --- two processes of one node


def _answer_there(far: Federation, client: int, ask: Ask, ready, queue) -> None:
    ready.wait()
    queue.put(encode(far.node(client).answer([ask])))


@pytest.mark.parametrize("noise", ["simulated", "system"])
def test_two_processes_with_one_ask_give_the_same_bytes_and_pay_once(room, noise):
    far = Federation(study(4, privacy={"noise": noise}), room / "run")
    asked = Sum(far).to(SHARE)
    asked.deliveries = asked.server.deliveries()
    ask = wrong(far, asked)
    context = multiprocessing.get_context("fork")
    queue, ready = context.Queue(), context.Barrier(2)
    both = [context.Process(target=_answer_there, args=(far, 0, ask, ready, queue)) for _ in range(2)]
    for process in both:
        process.start()
    said = {queue.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
    assert len(said) == 1
    (answer,) = decode_answers(said.pop(), 1 << 24)
    assert isinstance(decode(answer.fields["message"]), MaskedInput)
    assert charges(far) == [1]


def test_two_processes_that_open_a_new_journal_at_once(far):
    ask = Ask(KEYS, {"round": 1, "sum": "a", "cohort": 4})
    assert far.host.facts.rounds == 3
    said: list[list[Answer]] = []
    threads = [threading.Thread(target=lambda: said.append(far.node(0).answer([ask]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({encode(answers) for answers in said}) == 1
    assert refusals(said[0]) == {""}


def test_what_a_study_comes_to_is_worked_out_once_and_again_after_a_change(room):
    far = Federation(study(4), room / "run")
    facts = far.host.facts
    (file,) = far.out.glob("facts-*.json")
    assert json.loads(file.read_text())["contract"] == facts.contract
    again = Federation(far.setup, far.out)
    again.host.__dict__.pop("setup")  # would have to be prepared, which takes a model
    assert again.host.facts == facts
    changed = Federation(study(4, rounds=2), far.out)
    assert changed.host.facts != facts
