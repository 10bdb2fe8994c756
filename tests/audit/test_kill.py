"""kill -9 at every step of a round of the real loop, and what holds whatever happens.

`pipeline.run` runs as it is, with the real ledgers, gate, secure aggregation and record, over clients that are made up
(kill_driver.py, in a process of its own). Each kill is in a round of its own; the process is then started again, which
finishes that round and is killed in the next. After every kill:
    1  no release is in the record, and no sum was opened, without its charge in the ledger
    2  no charge that the ledger ever confirmed is gone from it
    3  with noise from the operating system, no charge ever paid for two different sums
    4  with simulated noise, the same sums are opened again, and the run ends as if nothing had happened
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from kill_driver import EPSILON, POINTS

from fedcanary.engines.protection import LEDGER, spent_by
from fedcanary.pipeline import replay
from fedcanary.privacy.ledger import Budget, Ledger
from fedcanary.record import NAME, RunRecord

HERE = Path(__file__).parent


class Server:
    """The process that forks the runs."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
        command = [sys.executable, str(HERE / "kill_driver.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    def run(self, **order) -> int:
        """Exit status of a run that is killed at a point of a round, or not at all."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    one = Server()
    yield one
    one.process.stdin.close()
    one.process.stdout.close()
    assert one.process.wait(60) == 0


class Crashing:
    """One run that is killed again and again."""

    def __init__(self, server, folder, rounds, *, noise="system", panel="rotating", bug="none"):
        self.server, self.folder, self.out = server, folder, folder / "run"
        self.order = {"out": str(self.out), "rounds": rounds, "noise": noise, "panel": panel, "bug": bug}
        self.confirmed: dict[str, str] = {}

    def go(self, point: str = "nowhere", round: int = 0) -> None:
        status = self.server.run(**self.order, point=point, round=round)
        assert status == (-signal.SIGKILL if point in POINTS else 0), status
        self.check()

    def events(self, kind: str) -> list[dict]:
        path = self.folder / "events.jsonl"
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [one for one in told if one["kind"] == kind]

    def rows(self):
        budget = Budget(epsilon=EPSILON, delta=1e-6)
        with Ledger.open(self.out / LEDGER, owner="few", budget=budget, spent=spent_by("zeroed")) as ledger:
            ledger.verify()
            return {row.charge.id: row for row in ledger.rows()}, ledger.spent(1)

    def record(self) -> RunRecord:
        return RunRecord.load(self.out) if (self.out / NAME).exists() else RunRecord(self.out / NAME, [])

    def check(self) -> None:
        rows, _ = self.rows() if (self.out / LEDGER).exists() else ({}, None)
        told = {event["id"]: event["hash"] for event in self.events("charged")}
        assert told.items() <= {id: row.head.hash for id, row in rows.items()}.items(), "a charge was lost"
        assert self.confirmed.items() <= told.items()
        self.confirmed = told
        record, paid = self.record(), set()
        for entry in record.entries:
            if entry.kind == "charge":
                paid.add(entry.body["id"])
            if entry.kind == "release":
                assert entry.body["charge_id"] in rows, "a release without its charge"
                assert entry.body["charge_id"] in paid, "the record has a release before its charge"
        looks = defaultdict(set)
        for event in self.events("opened"):
            assert event["id"] in rows, "sums were opened without a charge"
            looks[event["id"], event["probe"]].add(event["digest"])
        assert all(len(digests) == 1 for digests in looks.values()), "one charge paid for two different sums"
        for round in {event["round"] for event in self.events("unmasked")}:
            assert any(row.charge.round == round for row in rows.values()), "unmasked without a charge"
            seen = {event["digest"] for event in self.events("unmasked") if event["round"] == round}
            assert len(seen) == 1, "one charge paid for two different sums"

    def finish(self) -> RunRecord:
        """Run to the end: each round is in the record once, with its releases or with why it has none."""
        self.go()
        record, (rows, spent) = self.record(), self.rows()
        assert record.ended
        assert [body["round"] for body in record.of("round")] == list(range(1, self.order["rounds"] + 1))
        assert {body["id"] for body in record.of("charge")} <= rows.keys()
        assert {row.charge.round for row in rows.values()} >= {r for r, table in record.releases().items() if table}
        assert spent.epsilon <= EPSILON * (1 + 1e-9)
        released = {body["round"] for body in record.of("round") if record.releases()[body["round"]]}
        for row in rows.values():
            assert row.status == ("released" if row.charge.round in released else "aborted"), row
        evidence = [(body["round"], body["evidence"]) for body in record.of("round")]
        assert replay(record) == evidence, "what the record replays is not what the run saw"
        return record


def crash(server, folder, kills, **how) -> tuple[Crashing, RunRecord]:
    """One kill in each of rounds 2, 3, ..., at the points in turn; then to the end."""
    crashing = Crashing(server, folder, len(kills) + 2, **how)
    for round, point in enumerate(kills, start=2):
        crashing.go(point, round)
    return crashing, crashing.finish()


def outcomes(record: RunRecord) -> list[str]:
    """What became of each round, in the words of POINTS."""
    found = []
    for body in record.of("round"):
        released = bool(record.releases()[body["round"]])
        again = body["refused"].get("already_answered", 0)
        if "second look" in body["aborted"]:
            assert not released
            found.append("paid")
        elif again:
            assert not released
            found.append("not again")
        else:
            assert released and not body["aborted"] and not body["refused"]
            found.append("released")
    return found


def expected(kills, noise) -> list[str]:
    fine = "released"
    fresh = [POINTS[point] if POINTS[point] in ("paid", "not again") else fine for point in kills]
    return [fine, *(fresh if noise == "system" else [fine] * len(kills)), fine]


@pytest.fixture(scope="module")
def calm(server, tmp_path_factory):
    """Records of runs that nobody kills, by number of rounds."""
    made = {}

    def one(rounds: int) -> RunRecord:
        if rounds not in made:
            folder = tmp_path_factory.mktemp("calm")
            made[rounds] = Crashing(server, folder, rounds, noise="simulated").finish()
        return made[rounds]

    return one


def bodies(record: RunRecord, *kinds: str) -> list:
    return [(entry.kind, entry.body) for entry in record.entries if entry.kind in kinds]


def same_as_calm(record: RunRecord, calm: RunRecord) -> bool:
    return bodies(record, "round", "end") == bodies(calm, "round", "end") and replay(record) == replay(calm)


@pytest.mark.slow
def test_kill_9_at_every_step_in_turn(server, tmp_path):
    """Each step once, with fresh noise. What was paid for and may have been seen is never looked at again."""
    kills = list(POINTS)
    crashing, record = crash(server, tmp_path, kills)
    assert outcomes(record) == expected(kills, "system")
    unmasked = [event["round"] for event in crashing.events("unmasked")]
    assert len(unmasked) == len(set(unmasked)) >= 10


def test_kill_9_with_simulated_noise_changes_nothing(server, calm, tmp_path):
    kills = [
        "all answered",
        "just before unmasking",
        "unmasked",
        "the first release is written",
        "the round is written",
    ]
    crashing, record = crash(server, tmp_path, kills, noise="simulated")
    assert outcomes(record) == expected(kills, "simulated")
    assert same_as_calm(record, calm(len(kills) + 2))
    assert len(crashing.events("unmasked")) == len(kills) + 2 + 2  # two rounds were opened twice, to the same sums


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.parametrize("noise", ["system", "simulated"])
@pytest.mark.parametrize("point", POINTS)
def test_kill_9_twenty_times_at_each_step(server, calm, tmp_path, point, noise):
    kills = [point] * 20
    _, record = crash(server, tmp_path, kills, noise=noise)
    assert outcomes(record) == expected(kills, noise)
    if noise == "simulated":
        assert same_as_calm(record, calm(22))


@pytest.mark.parametrize(
    ("bug", "kills", "seen"),
    [
        ("release before charge", ["inside the ledger's transaction"], "opened without a charge"),
        ("a second look", ["unmasked"], "two different sums"),
        ("a second look", ["the sums are open"], "two different sums"),
        ("a charge on no disk", ["the round is over"], "a charge was lost"),
        ("a record without its charge", ["the round is over"], "before its charge"),
    ],
)
def test_the_laws_see_planted_bugs(server, tmp_path, bug, kills, seen):
    with pytest.raises(AssertionError, match=seen):
        crash(server, tmp_path, kills, bug=bug)


@pytest.mark.parametrize("point", ["unmasked", "the sums are open"])
def test_clients_do_not_answer_a_server_that_looks_again(server, tmp_path, point):
    """Each client's own ledger knows that it answered this round: one of the two refusals is enough."""
    _, record = crash(server, tmp_path, [point], bug="a server that looks again")
    assert outcomes(record) == ["released", "not again", "released"]
