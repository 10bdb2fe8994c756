"""What a node says when it fails, and what is on its disk, through kills and two processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from federation import Federation
from flwr.app import ConfigRecord, Message, RecordDict
from rough import study
from sums import Sum, charges, disk, refusals, vectors, wrong

from fedcanary.engines.flower import node as nodes
from fedcanary.engines.flower.clients import QUERY
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import InProcessGrid
from fedcanary.engines.flower.journal import Entry, Journal
from fedcanary.engines.flower.node import ERRORS, HELLO, JOURNAL, KEYS, SEALED, SHARE, TRAIN, UNMASK
from fedcanary.engines.flower.wire import Answer, Ask, data_of, decode_answers, encode, record
from fedcanary.errors import BadInput
from fedcanary.flower import apps
from fedcanary.privacy import secagg
from fedcanary.privacy.secagg.messages import MaskedInput, decode

SAID = "the patient's diagnosis is 17.2345"


# --- nothing of an exception's text


class Failing:
    """Clients that fail, and say why."""

    def __init__(self, consent, error: Callable[[str], Exception]) -> None:
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


def _kind(error: type[Exception]) -> Callable[[str], Exception]:
    return error if error is not BadInput else lambda text: BadInput.of("a client", text, "look")


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
    monkeypatch.setattr(apps, "LARGEST", 1000)
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
