"""The loop: base model -> clients -> personalization -> probes -> private release -> monitor -> policy -> record.

This file is the table of contents of the program; each numbered step is a stage with a folder of its own.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedcanary import act
from fedcanary import record as records
from fedcanary.act import round_folder
from fedcanary.drill import DrillDowns
from fedcanary.engines import slices
from fedcanary.engines.clients import Clients, Work
from fedcanary.engines.local import LocalClients, Tap, apply_update
from fedcanary.engines.plan import plan_of
from fedcanary.engines.protection import Protection
from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput
from fedcanary.models import adapters
from fedcanary.monitor import base as monitor
from fedcanary.monitor.verdict import Past, judge, lineage
from fedcanary.privacy.contract import tally
from fedcanary.privacy.seal import UPDATE
from fedcanary.record import RunRecord
from fedcanary.types import Release, Verdict


class Stopped(Exception):
    """The user asked to stop; the record ends with the last complete round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a run tells whoever watches it; `releases` and `verdict` when the round is complete."""

    round: int
    rounds: int
    done: int
    clients: int
    releases: Mapping[str, Release] | None = None
    verdict: Verdict | None = None


def run(
    setup: Setup,
    out: Path,
    *,
    watch: Callable[[Progress], None] = lambda progress: None,
    clients: Clients | None = None,
    oracle_tap: Tap | None = None,
    rebaseline: str | None = None,
) -> RunRecord:
    """Run a study into a folder, or go on with the run it holds. Returns the record.

    A run that an alarm ended (held) goes on only with `rebaseline`, which says what was fixed. `clients` are played by
    this process unless somebody else reaches them. `oracle_tap` sees every
    client's exact readings. It exists for tests and benchmarks that need an all-seeing oracle; no command of the
    program sets it.

    Raises:
        BadInput: the folder holds the run of another study, or one that cannot be re-baselined; or a client failed.
        Refused: the study declared no further re-baseline.
        Stopped: on an interrupt, after which the same call goes on to the same result.
    """
    study = setup.study
    record = RunRecord.open(out)
    clients = clients or LocalClients(setup, out / "clients", oracle_tap)
    plan, initial = plan_of(setup, clients.base_answers), setup.method.published(setup.shared, setup.initial)
    parts = {"contract": clients.consent.contract.digest}
    if initial:  # else an app keeps its own model
        parts[act.INITIAL] = adapters.digest(initial)
    _begin(record, setup, plan, parts)
    (out / "contract.toml").write_text(clients.consent.contract.text, encoding="utf-8")
    if rebaseline is not None:
        act.rebaseline(record, rebaseline)
    if not record.rounds:
        _keep(out, 0, initial, setup)
    act.point(out, record)
    (state, judged), past = act.judged(record, plan), act.past(record)
    drills = DrillDowns.of(record, judged)
    kept = adapters.load(round_folder(out, lineage(past)[0])) if initial else {}
    shared = {name: kept[name] for name in setup.shared}
    to_come = () if act.held(record) else range(record.rounds + 1, study.rounds + 1)
    with _interruptible() as interrupted, Protection(setup, record, clients.remembers, clients.there) as protected:
        clients.upcoming = protected.cohort
        for t in to_come:
            started = time.monotonic()
            # 1 base model and data were loaded by `engines.setup`   2 who trains and who answers
            cohort = protected.cohort(t)
            gate = protected.gate(t, cohort)
            size, all_asked, failed, done = len(cohort.clients), len(cohort.clients) + len(cohort.trainers), 0, 0
            # 3 each client: theta_t -> theta_k,t   4 its probes compare theta_0, theta_t and theta_k,t
            request = clients.consent.request(t, size, drills.ask())
            asked = Work(request, cohort.clients, shared, gate.terms, lineage(past), cohort.trainers)
            for sent in clients.work(asked):
                for one in sent:
                    if one.vector is not None:
                        gate.put(one.client, one.vector)
                    failed += one.failed
                    gate.refused.update(tally(one.refused))
                done += len(sent)
                watch(Progress(round=t, rounds=study.rounds, done=done, clients=all_asked))
                if interrupted():
                    raise Stopped
            # 5 sum -> charge the ledger -> noise -> Release
            releases = gate.close(clients.masked)
            if UPDATE in releases:
                shared = apply_update(shared, releases[UPDATE].total)
            published = setup.method.published(shared, setup.initial)
            _keep(out, t, published, setup)
            # 6 the tests step on the new releases   7 policy over the evidence
            state, evidence = monitor.step(plan, state, releases)
            verdict = judge(evidence, releases.get("utility"), study.policy.on_alarm, past)
            past.append(Past(states=verdict.states, adopted=verdict.adopted))
            # 8 append; the report reads only the record
            written = record.cut_off()  # by a run that ended here: it released the same
            for release in releases.values():
                body = records.plain(records.fields(release))
                if release.probe != UPDATE and body not in written:  # an update is in the adapter, whose digest follows
                    record.append("release", body)
            record.append(
                "round",
                {
                    "round": t,
                    "clients": size,
                    **({"also_trained": len(cohort.trainers)} if study.clients.also_train else {}),
                    "failed": failed,
                    "refused": dict(sorted(gate.refused.items())),
                    "aborted": cohort.why_none or gate.aborted,
                    "adapter": adapters.digest(published),
                    "evidence": [records.fields(e) for e in evidence],
                    "verdict": records.fields(verdict),
                    **drills.step(releases, evidence),
                },
            )
            act.point(out, record)
            protected.settle(t, released=bool(releases))
            _note_time(out, t, time.monotonic() - started)
            watch(Progress(round=t, rounds=study.rounds, done=done, clients=size, releases=releases, verdict=verdict))
            if verdict.action != "adopt":
                break
    act.end(record)
    return record


def replay(record: RunRecord) -> list[tuple[int, list[dict[str, Any]]]]:
    """Each round's evidence, computed again from the recorded releases and the recorded plan alone."""
    _, table = act.judged(record, monitor.plan_from(record.header["plan"]))
    return [(round, [dict(records.plain(records.fields(e))) for e in evidence]) for round, evidence in table]


def replay_slices(record: RunRecord) -> list[dict[str, Any]]:
    """The same for what each round's entry holds of slices; empty ones where the study has none."""
    _, table = act.judged(record, monitor.plan_from(record.header["plan"]))
    return DrillDowns.again(record, table)


def _begin(record: RunRecord, setup: Setup, plan: monitor.Plan, parts: Mapping[str, str]) -> None:
    header = setup.header() | {"plan": monitor.plan_body(plan), **slices.header(setup.study, setup.slices)}
    header["digests"] |= parts
    if not record.entries:
        record.append("header", header)
        return
    now, then = records.plain(header)["digests"], record.header["digests"]
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        raise BadInput.of(
            str(record.path.parent),
            f"was made with another {' and '.join(changed)}",
            "resume with the same study, model, data and suites, or start in another --out",
        )


def _note_time(out: Path, round: int, seconds: float) -> None:
    with (out / "timing.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"round": round, "seconds": float(f"{seconds:.3f}")}) + "\n")


def _keep(out: Path, round: int, adapter: adapters.Adapter, setup: Setup) -> None:
    if adapter:
        adapters.save(round_folder(out, round), adapter, setup.lora, setup.base)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C only asks; the second ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: the caller handles interrupts
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
