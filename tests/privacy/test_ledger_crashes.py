"""The ledger under several processes and under kill -9: never a release without its charge, never a charge lost."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedcanary.privacy.ledger import Budget, Charge, Damaged, Head, Ledger, OverBudget


def charge(id: str) -> Charge:
    mechanism = {"kind": "gaussian"}
    return Charge(id=id, window=1, panel="a", round=1, mechanism=mechanism, purpose="probes", epsilon=0.125, delta=0.0)


def opened(folder: Path, epsilon: float) -> Ledger:
    return Ledger.open(folder / "ledger", owner="town", budget=Budget(epsilon=epsilon, delta=1.0))


# --- several at once

WORKER = """
import sys, time
from pathlib import Path
from fedcanary.privacy.ledger import Budget, Charge, Ledger, OverBudget
from fedcanary.privacy.ledger.charges import to_entry
folder, me, others, budget, bug = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
def meet(name):
    (folder / f"{name}-{me}").touch()
    end = time.monotonic() + 60
    while len(list(folder.glob(f"{name}-*"))) < others and time.monotonic() < end: time.sleep(0.002)
def in_two_steps(self, charge):
    with self._chain.writing():
        self._afford(charge)
    meet("checked")
    with self._chain.writing():
        self._chain.append({"kind": "charge", **to_entry(charge)})
if bug == "check and append in two transactions":
    Ledger.charge = in_two_steps
meet("ready")
paid = 0
with Ledger.open(folder / "ledger", owner="town", budget=Budget(epsilon=budget, delta=1.0)) as ledger:
    try:
        for number in range(10_000):
            id = "the only one" if bug == "same id" else f"{me} {number}"
            receipt = ledger.charge(Charge(id=id, window=1, panel="a", round=1, mechanism={}, purpose="probes",
                epsilon=0.125, delta=0.0))
            if bug == "same id":
                print(receipt.repeated, receipt.head.hash)
                break
            paid += 1
    except OverBudget:
        print(paid)
"""


def hammer(folder: Path, processes: int, budget: float, bug: str = "none") -> list[str]:
    """What each of several processes says that charge one ledger, which none of them finds made, all at once."""
    command = [sys.executable, "-c", WORKER, str(folder)]
    running = [
        subprocess.Popen([*command, str(me), str(processes), str(budget), bug], stdout=subprocess.PIPE, text=True)
        for me in range(processes)
    ]
    try:
        said = [process.communicate(timeout=120)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes
    return said


@pytest.mark.parametrize(
    ("processes", "charges"), [(2, 40), (8, 40), pytest.param(8, 1000, marks=[pytest.mark.slow, pytest.mark.services])]
)
def test_processes_together_spend_the_budget_exactly(tmp_path, processes, charges):
    said = hammer(tmp_path, processes, charges / 8)
    assert sum(int(paid) for paid in said) == charges
    with opened(tmp_path, charges / 8) as ledger:
        assert len(ledger.rows()) == charges
        assert ledger.spent(1).epsilon == charges / 8
        assert ledger.verify().count == charges + 1


def test_making_a_ledger_waits_for_another_process_that_makes_it(tmp_path):
    """SQLite itself does not: it says at once that the file is locked."""
    maker = sqlite3.connect(tmp_path / "ledger", isolation_level=None, check_same_thread=False)
    maker.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.2, lambda: maker.execute("COMMIT"))
    done.start()
    opened(tmp_path, 1.0).close()
    done.join()
    maker.close()


def test_the_planted_double_spend_is_seen(tmp_path):
    said = hammer(tmp_path, 2, 0.125, "check and append in two transactions")
    assert sum(int(paid) for paid in said) == 2  # twice what the budget allows


def test_processes_with_the_same_id_pay_once(tmp_path):
    said = hammer(tmp_path, 4, 0.125, "same id")
    assert sorted(line.split()[0] for line in said) == ["False", "True", "True", "True"]
    assert len({line.split()[1] for line in said}) == 1


def test_threads_share_one_ledger(tmp_path):
    paid = []
    with opened(tmp_path, 20 / 8) as ledger:

        def spend(me: int) -> None:
            for number in range(20):
                try:
                    paid.append(ledger.charge(charge(f"{me} {number}")).head.count)
                except OverBudget:
                    return

        threads = [threading.Thread(target=spend, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(paid) == list(range(2, 22))


# --- kill -9

ROUNDS = """
import os, signal, sys
from pathlib import Path
from fedcanary.privacy.ledger import Budget, Charge, Head, Ledger, anchor
from fedcanary.privacy.ledger.chain import Chain
folder, failpoint, rounds, bug = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
armed = False
def step(name):
    if armed and name == failpoint:
        os.kill(os.getpid(), signal.SIGKILL)
append, write_anchor, replace = Chain.append, anchor.write, os.replace
def stepping_append(self, entry):
    append(self, entry)
    if bug == "anchor before commit":
        new = anchor.link(self.head.hash, anchor.canonical(entry).encode())
        write_anchor(self.path, Head(count=self.head.count + 1, hash=new))
    step("inside the transaction")
def stepping_anchor(path, head):
    step("after the commit, before the anchor")
    write_anchor(path, head)
    step("after the anchor, before charge returns")
def stepping_replace(old, new):
    step("anchor written, not in place")
    replace(old, new)
Chain.append, anchor.write, os.replace = stepping_append, stepping_anchor, stepping_replace
def release(round, text):
    with (folder / "draft").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder / "draft", folder / f"release-{round}")
with Ledger.open(folder / "ledger", owner="town", budget=Budget(epsilon=rounds / 8, delta=1.0)) as ledger:
    done = 0
    for round in range(rounds):
        id = f"round {round}" + (f" of {os.getpid()}" if bug == "another id each time" else "")
        if not (folder / f"release-{round}").exists():
            armed = done == 1  # the first round of each process passes
            step("before the charge")
            if bug == "release before charge":
                release(round, "unpaid")
            receipt = ledger.charge(Charge(id=id, window=1, panel="a", round=round, mechanism={"kind": "gaussian"},
                purpose="probes", epsilon=0.125, delta=0.0))
            print(round, receipt.head.hash, receipt.repeated, flush=True)
            step("after the charge, before the release")
            release(round, receipt.head.hash)
            step("after the release")
            done += 1
        if bug == "none":
            ledger.settle(id, "released")
        step("after the outcome")
"""
# each step of a round, and how many charges without a release a kill there leaves
STEPS = {
    "before the charge": 0,
    "inside the transaction": 0,
    "after the commit, before the anchor": 1,
    "anchor written, not in place": 1,
    "after the anchor, before charge returns": 1,
    "after the charge, before the release": 1,
    "after the release": 0,
    "after the outcome": 0,
}


class Crashing:
    """A server that is killed again and again on one ledger, and what must hold after every kill."""

    def __init__(self, folder: Path, rounds: int, bug: str = "none") -> None:
        self.folder, self.rounds, self.bug = folder, rounds, bug
        self.told: dict[int, str] = {}  # round -> hash of the receipt that charge returned
        self.repeats = 0

    def start(self, failpoint: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ROUNDS, str(self.folder), failpoint, str(self.rounds), self.bug]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def run(self, failpoint: str, kill_after_s: float | None = None) -> None:
        with self.start(failpoint) as process:
            first = ""
            if kill_after_s is not None:
                first = process.stdout.readline()  # it charges
                time.sleep(kill_after_s)
                process.kill()
            said = first + process.stdout.read()  # not `communicate`, which skips what came with the first line
        killed = failpoint != "none" or kill_after_s is not None
        assert process.returncode == (-signal.SIGKILL if killed else 0)
        for line in said.splitlines():
            round, hash, repeated = line.split()
            assert self.told.setdefault(int(round), hash) == hash, "the round was paid twice"
            self.repeats += repeated == "True"

    def ledger(self) -> Ledger:
        return opened(self.folder, self.rounds / 8)

    def check(self) -> int:
        """The laws; returns how many charges have no release."""
        with self.ledger() as ledger:
            rows = ledger.rows()
            paid = {row.charge.round: row.head.hash for row in rows}
            assert len(paid) == len(rows), "a round was paid twice"
            assert ledger.spent(1).epsilon == len(rows) / 8
        released = {int(p.name.split("-")[1]): p.read_text() for p in self.folder.glob("release-*")}
        assert all(released[r] == paid.get(r) for r in released), "a release without its charge"
        assert self.told.items() <= paid.items(), "a charge was lost"
        return len(paid) - len(released)

    def finish(self) -> Head:
        """Run to the end undisturbed: everything is paid for once, and not one charge more fits."""
        self.run("none")
        assert self.check() == 0
        with self.ledger() as ledger:
            assert len(ledger.rows()) == self.rounds
            assert {row.status for row in ledger.rows()} == {"released"}
            with pytest.raises(OverBudget):
                ledger.charge(charge("one more"))
            return ledger.head


def crash(folder: Path, failpoint: str, kills: int, bug: str = "none") -> Crashing:
    crashing = Crashing(folder, 2 * kills + 2, bug)
    for _ in range(kills):
        crashing.run(failpoint)
        assert crashing.check() == STEPS[failpoint]
    return crashing


def test_kill_9_at_every_step_of_a_round(tmp_path):
    """One kill at each step in turn, on one ledger."""
    crashing = Crashing(tmp_path, 2 * len(STEPS) + 2)
    for failpoint, unreleased in STEPS.items():
        crashing.run(failpoint)
        assert crashing.check() == unreleased
    crashing.finish()
    assert crashing.repeats == sum(STEPS.values())  # each interrupted round was repeated on its old receipt


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Head:
    """Head of the ledger that twenty kills should come to, when nothing happens."""
    return Crashing(tmp_path_factory.mktemp("calm"), 2 * 20 + 2).finish()


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.parametrize("failpoint", STEPS)
def test_kill_9_twenty_times_at_each_step(tmp_path, calm, failpoint):
    crashing = crash(tmp_path, failpoint, kills=20)
    assert crashing.finish() == calm  # as if nothing had happened
    assert crashing.repeats == 20 * STEPS[failpoint]


@pytest.mark.slow
@pytest.mark.services
def test_kill_9_at_any_moment(tmp_path):
    """40 kills from outside (seed 7), up to 50 ms after a process began to charge: the moment is the scheduler's."""
    crashing, chance = Crashing(tmp_path, 5_000), random.Random(7)
    for _ in range(40):
        crashing.run("none", kill_after_s=chance.uniform(0.0, 0.05))
        assert crashing.check() in (0, 1)
    assert len(crashing.told) + crashing.repeats >= 40  # every process came as far as a receipt


@pytest.mark.parametrize(
    ("bug", "failpoint", "seen"),
    [
        ("release before charge", "inside the transaction", "a release without its charge"),
        ("another id each time", "after the charge, before the release", "paid twice"),
    ],
)
def test_the_laws_see_planted_bugs(tmp_path, bug, failpoint, seen):
    with pytest.raises(AssertionError, match=seen):
        crash(tmp_path, failpoint, kills=2, bug=bug)


def test_the_anchor_must_follow_the_commit(tmp_path):
    """The other order turns every crash between the two into a rollback."""
    with pytest.raises(Damaged, match="rolled back"):
        crash(tmp_path, "inside the transaction", kills=1, bug="anchor before commit")


@pytest.mark.parametrize("failpoint", ["tables made", "first commit", "anchor written"])
def test_kill_9_while_the_ledger_is_made(tmp_path, failpoint):
    script = f"""
import os, signal, sys
from pathlib import Path
from fedcanary.privacy.ledger import Budget, Ledger, anchor
from fedcanary.privacy.ledger.chain import Chain
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {failpoint!r} == "tables made": Chain.append = die
elif {failpoint!r} == "first commit": anchor.write = die
else: os.replace = die
Ledger.open(Path(sys.argv[1], "ledger"), owner="town", budget=Budget(epsilon=1.0, delta=1.0))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    with opened(tmp_path, 1.0) as ledger:
        assert ledger.charge(charge("r1")).head.count == 2
