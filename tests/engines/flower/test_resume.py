"""The server dies at any point of a run, is started again over the same nodes, and nothing is lost or paid twice.

It dies by an exception that nothing catches, before and after every write and every exchange. What is on disk then is
what a killed process leaves, as each write is whole or not there (test_node.py kills a writer to see that).
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import pytest
from rough import Rough, intact, kept, on, study
from sums import memory

from fedcanary import act, pipeline
from fedcanary.engines.flower.clients import CLOSED
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import Fault
from fedcanary.engines.flower.journal import Journal
from fedcanary.engines.flower.node import TRAIN
from fedcanary.engines.places import place
from fedcanary.engines.protection import LEDGER, Protection, open_ledger
from fedcanary.errors import Refused
from fedcanary.privacy import ledger as ledgers
from fedcanary.privacy import secagg
from fedcanary.privacy.ledger.chain import Chain
from fedcanary.privacy.release import Gate
from fedcanary.record import RunRecord

ROUNDS = 2


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Counts the points that the server comes by, and kills it at one of them. Each has a label and a number."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.at = -1
        self.opened: dict[str, set[bytes]] = defaultdict(set)  # sums that were unmasked, by the sum's name

    def hit(self, label: str) -> None:
        self.labels.append(label)
        if len(self.labels) - 1 == self.at:
            raise Killed(label)

    def arm(self, at: int) -> None:
        self.labels, self.at = [], at

    @contextmanager
    def watching(self):
        """Every step of the server is a point, before and after."""
        with pytest.MonkeyPatch.context() as patch:
            for kind, name, label in (
                (Journal, "put", lambda journal, *entries: f"journal {entries[0].kind}"),
                (Journal, "delete", lambda journal, kind, key: f"journal without {kind}"),
                (Journal, "forget", lambda journal, before: "journal forgets"),
                (Gate, "close", lambda *rest: "close"),
                (RunRecord, "append", lambda record, kind, body: f"record {kind}"),
                (Protection, "settle", lambda *rest, **more: "settle"),
                (Protection, "gate", lambda *rest: "gate"),
                (Chain, "append", lambda chain, entry: f"ledger {entry['kind']}"),
                (secagg.Server, "unmask", lambda *rest: "unmask"),
                (secagg.Server, "survivor_list", lambda *rest: "survivors"),
            ):
                patch.setattr(kind, name, self._wrapped(getattr(kind, name), label))
            patch.setattr(pipeline.adapters, "save", self._wrapped(pipeline.adapters.save, lambda *rest: "adapter"))
            patch.setattr(act, "point", self._wrapped(act.point, lambda *rest: "pointer"))
            patch.setattr(pipeline, "_note_time", self._wrapped(pipeline._note_time, lambda *rest: "round over"))
            patch.setattr(Link, "exchange", self._exchange(Link.exchange))
            yield self

    def _wrapped(self, step, label):
        @wraps(step)
        def inner(*asked, **more):
            if not _server_side(asked[0]):
                return step(*asked, **more)
            name = label(*asked, **more)
            self.hit(f"before {name}")
            found = step(*asked, **more)
            if name == "unmask":
                self.opened[asked[0].terms.round_id].add(found.tobytes())
            self.hit(f"after {name}")
            return found

        return inner

    def _exchange(self, exchange):
        def inner(link, parcels, message_type, timeout, group):
            kinds = "+".join(ask.kind for ask in next(iter(parcels.values()), ()))
            self.hit(f"before exchange {kinds}")
            for k, answered in enumerate(exchange(link, parcels, message_type, timeout, group)):
                yield answered
                if k == 2:
                    self.hit(f"within exchange {kinds}")
            self.hit(f"after exchange {kinds}")

        return inner


def _server_side(one: object) -> bool:
    path = getattr(one, "_path", getattr(one, "path", None))
    return not isinstance(path, Path) or "clients" not in path.parts


class Case:
    """A federation whose server is killed; `go` is one life of it, which ends at a point or with the run."""

    def __init__(self, killer: Killer, out: Path, noise: str) -> None:
        self.killer, self.out = killer, out
        self.far = Rough(study(rounds=ROUNDS, privacy={"noise": noise}), out)
        killer.opened.clear()

    def go(self, at: int = -1) -> bool:
        self.killer.arm(at)
        try:
            self.far.run()
        except Killed:
            self.far.grid.pull_messages([])  # what was under way is lost with the process
            return False
        return True

    def check(self, calm: dict[str, bytes] | None) -> None:
        """What holds at the end of a run, however often its server died."""
        record = intact(self.out)
        released = record.releases()
        assert sorted(released) == list(range(1, ROUNDS + 1))
        assert all({release.count for release in table.values()} == {6.0} for table in released.values()), (
            "a lost round"
        )
        with open_ledger(self.far.setup, self.out / LEDGER) as ledger:
            rows = [(row.charge.id, row.charge.round, row.status) for row in ledger.rows()]
        assert len({id for id, _, _ in rows}) == len(rows)
        assert {status for _, _, status in rows} == {"released"}
        assert Counter(body["round"] for body in record.of("charge")) == dict.fromkeys(released, 2)
        assert {body["id"] for body in record.of("charge")} >= {id for id, _, _ in rows}
        for client in range(6):
            own = place(self.out / "clients", client) / LEDGER
            unbounded = ledgers.Budget(epsilon=math.inf, delta=1.0)
            with ledgers.Ledger.open(own, owner=f"client {client}", budget=unbounded) as ledger:
                assert [row.charge.round for row in ledger.rows()] == list(released)
        assert len(self.killer.opened) == ROUNDS, "a round was summed under two names"
        assert all(len(totals) == 1 for totals in self.killer.opened.values()), "two looks at one round"
        if calm is not None:
            assert once(kept(self.out)) == once(calm)


def once(files: dict[str, bytes]) -> dict[str, object]:
    """A record's entries, without releases that are there twice: of a round that was cut off among them."""
    entries: list[object] = []
    for line in files["record.jsonl"].splitlines():
        entry = json.loads(line)
        if entry["kind"] != "release" or [entry["kind"], entry["body"]] not in entries:
            entries.append([entry["kind"], entry["body"]])
    return {name: content for name, content in files.items() if name != "record.jsonl"} | {"entries": entries}


@pytest.fixture(scope="module")
def killer():
    with Killer().watching() as one:
        yield one


@pytest.fixture(scope="module")
def calm(killer):
    """What is kept of a run that nobody kills; and the labels of its points, in order."""
    with memory() as folder:
        case = Case(killer, folder, "simulated")
        assert case.go()
        case.check(None)
        yield kept(folder), list(killer.labels)


@pytest.mark.parametrize("noise", ["simulated", "system"])
@pytest.mark.parametrize("seed", range(2))
def test_a_server_that_dies_again_and_again_loses_nothing(killer, calm, noise, seed):
    """Each life is as long as a draw says; every one gets some way further in the end."""
    files, _ = calm
    drawn, lives, died = random.Random(seed), 0, Counter()
    with memory() as folder:
        case = Case(killer, folder, noise)
        while not case.go(drawn.randrange(20, 60) if lives < 200 else -1):
            lives += 1
            died[killer.labels[-1]] += 1
        case.check(files if noise == "simulated" else None)
    assert 8 <= lives < 200
    assert len(died) >= 6


def points(labels: list[str]) -> list[int]:
    """One of each kind, of the second round where there is one."""
    last = {label: k for k, label in enumerate(labels)}
    return sorted(last.values())


@pytest.mark.parametrize("part", range(2))
def test_killed_once_at_each_kind_of_point(killer, calm, part):
    """The noise is from the operating system, so nothing is the same by luck; every point is in the slow sweep."""
    _, labels = calm
    for k in points(labels)[part::8]:
        with memory() as folder:
            case = Case(killer, folder, "system")
            assert not case.go(k)
            assert killer.labels[-1] == labels[k]
            assert case.go(), labels[k]
            case.check(None)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["simulated", "system"])
@pytest.mark.parametrize("part", range(10))
def test_killed_at_every_point(killer, calm, noise, part):
    files, labels = calm
    written = {"after record release", "before record release", "before record round"}
    for k in range(part, len(labels), 10):
        with memory() as folder:
            case = Case(killer, folder, noise)
            assert not case.go(k)
            assert case.go(), (k, labels[k])
            case.check(files if noise == "simulated" else None)
            if noise == "simulated" and labels[k] not in written:  # else some releases are there twice
                assert kept(folder) == files


def test_the_sweep_sees_all_there_is_to_see(calm):
    """So that a step that is renamed does not leave the sweep without a word."""
    _, labels = calm
    seen = {label.partition(" ")[2] for label in labels}
    steps = {f"journal {kind}" for kind in ("keys", "share", "train", "agree", "unmask", "closed", "sum")}
    steps |= {f"exchange {kind}" for kind in ("hello", "keys", "share", "train", "agree+keys", "unmask+share")}
    steps |= {f"record {kind}" for kind in ("header", "charge", "release", "round", "end")}
    steps |= {"close", "unmask", "survivors", "adapter", "settle", "pointer", "journal forgets", "ledger charge"}
    assert steps <= seen


@pytest.mark.parametrize("planted", [False, True])
def test_an_exchange_that_was_closed_is_not_opened_again(killer, calm, monkeypatch, planted):
    """A reply was lost, the sum is over the others, and the server dies. Were the reply taken now, it would be another
    sum, whose survivors nobody signs, and which costs something else than was paid: there would be no way on."""
    _, labels = calm
    with memory() as folder:
        case = Case(killer, folder, "system")
        case.far.grid._faults = on(TRAIN, Fault(kind="drop_reply"), rounds=(2,), times=2)
        cut = next(k for k, label in enumerate(labels) if label == "before exchange unmask")
        assert not case.go(cut - 1)  # one answer fewer than in a calm run
        if planted:
            get = Journal.get
            monkeypatch.setattr(
                Journal, "get", lambda self, kind, key: None if kind == CLOSED else get(self, kind, key)
            )
            with pytest.raises(Refused, match="for something else"):
                case.go()
            return
        assert case.go()
        counts = [{release.count for release in table.values()} for table in intact(folder).releases().values()]
        assert counts == [{6.0}, {5.0}]


def test_a_server_that_lost_its_journal_gets_nothing_a_second_time(killer, calm):
    """The round that it had paid for is given up, as clients give their vectors to no other sum; the next goes on."""
    _, labels = calm
    with memory() as folder:
        case = Case(killer, folder, "system")
        assert not case.go(labels.index("before unmask"))
        (folder / "flower.sqlite").unlink()
        assert case.go()
        record = intact(folder)
        assert [bool(table) for table in record.releases().values()] == [False, True]
        assert "interrupted after it was paid for" in next(record.of("round"))["aborted"]
        with pytest.raises(AssertionError, match="a lost round"):
            case.check(None)
