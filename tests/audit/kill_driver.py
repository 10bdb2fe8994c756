"""A server that can be killed at any step: `pipeline.run` as it is, over clients that are made up.

Run as a program, it loads everything once and then, for each line of JSON on its input, forks a process that runs the
study in a folder, and answers with its exit status. The forked process tells what it did in `events.jsonl` (a write for
each event, so that a kill loses none), and kills itself with SIGKILL at the point and round it was told.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcanary import pipeline
from fedcanary.engines import protection
from fedcanary.engines.clients import Sent, Work
from fedcanary.engines.consent import Consent
from fedcanary.engines.setup import Setup
from fedcanary.privacy import secagg
from fedcanary.privacy.ledger import Ledger, anchor
from fedcanary.privacy.ledger.chain import Chain
from fedcanary.privacy.release import Gate
from fedcanary.record import RunRecord
from oracles.few import MadeUp, bare

PANEL, EPSILON = 3, 8.0
# In the order in which a round comes by them; and what becomes of the round where noise is fresh: it is "repeated"; its
# clients do "not again" say what they paid for; it is given up because it was "paid" for; or it was "over".
POINTS = {
    "panel drawn": "repeated",
    "a client has paid and not answered": "not again",
    "all answered": "not again",
    "inside the ledger's transaction": "not again",
    "before the anchor": "paid",
    "the ledger is charged": "paid",
    "the record's charge is half written": "paid",
    "the record has the charge": "paid",
    "just before unmasking": "paid",
    "unmasked": "paid",
    "the sums are open": "paid",
    "the adapter is written": "paid",
    "a release is half written": "paid",
    "the first release is written": "paid",
    "the round is half written": "paid",
    "the round is written": "over",
    "before the charge is settled": "over",
    "the first charge is settled": "over",
    "the round is over": "over",
}


class Mortal(MadeUp):
    """Made-up clients of a process that may die when all have answered."""

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        yield from super().work(asked)
        hit("all answered", asked.request.round)


def prepared(noise: str, rounds: int, panel: str) -> Setup:
    privacy = {"min_cohort": PANEL, "noise": noise, "panel": panel, "epsilon": EPSILON}
    privacy["updates"] = {"noise": 100.0, "clip": 1.0}
    return bare(PANEL * (rounds if panel == "rotating" else 1), {"rounds": rounds, "privacy": privacy})


def warm(noise: str, rounds: int, panel: str) -> Setup:
    """A setup, run once to its end, so that what it costs is calibrated once and not by every fork."""
    setup = prepared(noise, rounds, panel)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "LocalClients", Mortal)
        pipeline.run(setup, Path(folder))
    return setup


# --- where to die, and what to tell


def _nobody_kills(point: str, round: int) -> None:
    """What a process does at its killing points if none was chosen."""


hit: Callable[[str, int], None] = _nobody_kills
now = 0  # the round


def tell(file: int, **event: Any) -> None:
    os.write(file, json.dumps(event).encode() + b"\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def digest_of(total: np.ndarray) -> str:
    return hashlib.blake2b(total.tobytes(), digest_size=8).hexdigest()


def set_hooks(point: str, at: int, events: int) -> None:
    """Wrap each step: `hit` kills the process at its point; what is charged, opened and released is told."""
    global hit

    def maybe(name: str, round: int) -> None:
        if name == point and round == at:
            die()

    hit = maybe
    refuses = Consent.refuses
    cohort, charge, settle = protection.Protection.cohort, Ledger.charge, Ledger.settle
    insert, anchored = Chain.append, anchor.write
    unmask, close, append = secagg.Server.unmask, Gate.close, RunRecord.append
    save, timing, ready = pipeline.adapters.save, pipeline._note_time, protection.Protection.__init__

    def server_side(path: Path) -> bool:
        return "clients" not in path.parts

    def drawing(self, round):
        global now
        now = round
        drawn = cohort(self, round)
        hit("panel drawn", round if drawn.clients and getattr(self, "drawn_before", False) else -1)
        return drawn

    def opening(self, *rest):
        ready(self, *rest)
        self.drawn_before = True  # what is drawn while a run is resumed is of rounds that are over

    def asking(self, client, request):
        reasons = refuses(self, client, request)
        hit("a client has paid and not answered", request.round)
        return reasons

    def charging(self, one):
        receipt = charge(self, one)
        if server_side(self._chain.path):
            tell(events, kind="charged", id=one.id, round=one.round, hash=receipt.head.hash)
            hit("the ledger is charged", one.round)
        return receipt

    def inserting(self, entry):
        insert(self, entry)
        if server_side(self.path) and entry["kind"] == "charge":
            hit("inside the ledger's transaction", now)

    def anchoring(path, head):
        if server_side(path):
            hit("before the anchor", now)
        anchored(path, head)

    def settling(self, id, outcome):
        hit("before the charge is settled", now)
        settle(self, id, outcome)
        hit("the first charge is settled", now)

    def unmasking(self):
        hit("just before unmasking", now)
        total = unmask(self)
        tell(events, kind="unmasked", round=now, digest=digest_of(total))
        hit("unmasked", now)
        return total

    def closing(self, masked=None):
        found = close(self, masked)
        for release in found.values():
            content = digest_of(release.total)
            tell(events, kind="opened", id=release.charge_id, probe=release.probe, round=release.round, digest=content)
        hit("the sums are open", now)
        return found

    def appending(self, kind, body):
        words = {"charge": "the record's charge", "release": "a release", "round": "the round"}
        if f"{words.get(kind)} is half written" == point and now == at:
            append(self, kind, body)
            content = self.path.read_bytes()
            last = content[:-1].rfind(b"\n") + 1
            with self.path.open("r+b") as file:
                file.truncate((last + len(content)) // 2)
            die()
        entry = append(self, kind, body)
        after = {"charge": "the record has the charge", "release": "the first release is written"}
        hit(after.get(kind, f"the {kind} is written"), now)
        return entry

    def saving(*rest):
        save(*rest)
        hit("the adapter is written", now)

    def noting(*rest):
        timing(*rest)
        hit("the round is over", now)

    protection.Protection.cohort, protection.Protection.__init__ = drawing, opening
    Consent.refuses = asking
    Ledger.charge, Ledger.settle, Chain.append, anchor.write = charging, settling, inserting, anchoring
    secagg.Server.unmask, Gate.close, RunRecord.append = unmasking, closing, appending
    pipeline.adapters.save, pipeline._note_time = saving, noting


def plant(bug: str) -> None:
    """Bugs that the laws must see."""
    if bug == "release before charge":
        aggregate = secagg.aggregate

        def late(*rest, before_unmasking, **more):
            survivors: list[tuple[int, ...]] = []
            outcome = aggregate(*rest, before_unmasking=survivors.append, **more)
            tell(
                EVENTS[0], kind="opened", id="not charged yet", probe="all", round=now, digest=digest_of(outcome.total)
            )
            before_unmasking(*survivors)
            return outcome

        secagg.aggregate = late
    elif bug in ("a server that looks again", "a second look"):
        ready, agreed = protection.Protection.__init__, Consent.__init__

        def forgets(self, *rest):
            ready(self, *rest)
            self._given_up = set()

        def agrees(self, *rest):
            agreed(self, *rest)
            self._fresh_noise = False

        protection.Protection.__init__ = forgets
        if bug == "a second look":
            Consent.__init__ = agrees
    elif bug == "a charge on no disk":
        # the planted bug is exactly that a method of the ledger is another
        Ledger.charge = lambda self, one: SimpleNamespace(head=self.head)
    elif bug == "a record without its charge":
        append = RunRecord.append
        RunRecord.append = lambda self, kind, body: None if kind == "charge" else append(self, kind, body)
    elif bug != "none":
        raise ValueError(bug)


EVENTS: list[int] = []  # the open file


def child(setup: Setup, order: dict[str, Any]) -> None:
    out = Path(order["out"])
    out.mkdir(parents=True, exist_ok=True)
    EVENTS.append(os.open(out.parent / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    plant(order["bug"])
    set_hooks(order["point"], order["round"], EVENTS[0])
    pipeline.LocalClients = Mortal
    pipeline.run(setup, out)


def main() -> None:
    torch.set_num_threads(1)
    setups = functools.lru_cache(warm)
    for line in sys.stdin:
        order = json.loads(line)
        setup = setups(order["noise"], order["rounds"], order["panel"])
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                try:
                    child(setup, order)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
