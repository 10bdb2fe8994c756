"""Records for the report's tests: made-up readings through the real gate, monitor, policy and record."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcanary import act
from fedcanary import record as records
from fedcanary import study as studies
from fedcanary.engines import privacy_terms
from fedcanary.engines.setup import Setup, load_suites
from fedcanary.monitor import base as monitor
from fedcanary.monitor.verdict import judge
from fedcanary.personalize import method
from fedcanary.privacy.ledger import Budget
from fedcanary.privacy.release import Charge, Gate
from fedcanary.privacy.seal import UPDATE, Message, seal
from fedcanary.probes import probes
from fedcanary.probes.base import CLIP, merge
from fedcanary.record import RunRecord
from fedcanary.report.summary import summarise
from fedcanary.rng import stream
from fedcanary.types import Mode, Role

SPENT = Budget(epsilon=3.5, delta=1e-6)  # what a protected record says is spent
Says = Callable[[int, int], Mapping[str, Any] | None]  # round, client -> what it says; None if it failed
CASES = (
    "all_alarm",
    "all_clear",
    "all_unknown",
    "mixed",
    "held",
    "zero_rounds",
    "crashed",
    "unscored",
    "nobody",
    "protected",
)


def reading(layout: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One client's vectors. `said` has `change` (by mode, negative is worse), `score`, `utility`, and `missing`."""
    vectors = {}
    for name, coords in layout.items():
        if name == "utility":
            base, now = said["utility"]
            values = {f"{w}_base": base for w in ("score", "accuracy")}
            values |= {f"{w}_gain": now - base for w in ("score", "accuracy")}
        else:
            change = float(said["change"].get(name, 0.0))
            delta = float(np.clip(change, -CLIP, CLIP))
            values = {"delta": delta, "square": delta**2, "tail": float(change < -0.1)}
            values |= {c.name: -delta for c in coords if c.name.startswith("contrast:")}
            values |= {c.name: delta**2 for c in coords if "square" in c.name}
            values |= {c.name.removesuffix("_square"): delta for c in coords if c.name.endswith("_square")}
            values |= {"score": said["score"], "score_square": said["score"] ** 2, **said.get("more", {})}
            if said.get("missing"):
                values = {c.name: 1.0 for c in coords if c.name.endswith("missing")}
        vectors[name] = np.array([values.get(c.name, 0.0) for c in coords])
    return vectors


def build(
    folder: Path,
    says: Says,
    *,
    rounds: int,
    clients: int,
    planned: int | None = None,
    ends: bool = True,
    crash: bool = False,
    study: Mapping[str, Any] | None = None,
    strangers: int = 0,
) -> RunRecord:
    """Run the loop's stages 5 to 8 over what made-up clients say."""
    tree = {"rounds": planned or rounds or 5, "privacy": {"trust": "none"}, "clients": {"count": clients}}
    parsed = studies.parse({**tree, **(study or {})})
    suites = load_suites(parsed)
    setup = Setup(
        study=parsed,
        base=SimpleNamespace(digest="b" * 32),
        lora=SimpleNamespace(targets=("q", "v")),
        initial={"lora_A": torch.zeros(2, 3)},
        method=method("fedavg", 0.1),
        population=Population(clients),
        suites=suites,
        probes=probes({role: merge(suites, role) for role in Role}, parsed.probes.tail),
    )
    plan = monitor.plan(
        margins=parsed.probes.margins.model_dump(),
        parts={p.mode: p.parts for p in setup.probes if p.mode is not None},
        groups={g: 0.01 for g in setup.probes[1].read_groups},
        units={p.mode: p.unit for p in setup.probes if p.mode is not None},
        alpha=parsed.monitor.alpha,
        horizon=parsed.rounds,
    )
    record = RunRecord.open(folder)
    header = setup.header() | {"plan": monitor.plan_body(plan)}
    header["digests"][act.INITIAL] = "0" * 32
    record.append("header", header)
    state = monitor.start(plan)

    def pay(charge: Charge) -> None:
        spent = Budget(epsilon=math.inf, delta=0.0) if parsed.privacy.trust == "none" else SPENT
        record.append("charge", {**records.fields(charge), "ledger": None, "spent": records.fields(spent)})

    for t in range(1, rounds + 1):
        gate = Gate(t, setup.layout, privacy_terms.terms(parsed, clients), pay)
        said = [says(t, k) for k in range(clients)]
        for k, one in enumerate(said):
            if one is not None:
                message = Message(readings=reading(setup.layout, one), update=np.zeros(3))
                gate.put(k, seal(message, setup.layout, gate.terms, t, k))
        for k in range(strangers):
            gate.put(clients + k, np.zeros(2))
        releases = gate.close()
        if crash and t == rounds:
            return record
        state, evidence = monitor.step(plan, state, releases)
        verdict = judge(evidence, releases.get("utility"), parsed.policy.on_alarm, act.past(record))
        for release in releases.values():
            if release.probe != UPDATE:
                record.append("release", records.fields(release))
        record.append(
            "round",
            {
                "round": t,
                "clients": clients,
                "failed": said.count(None),
                "refused": dict(gate.refused),
                "aborted": gate.aborted,
                "adapter": f"{t:032x}",
                "evidence": [records.fields(e) for e in evidence],
                "verdict": records.fields(verdict),
            },
        )
        if verdict.action != "adopt":
            break
    if ends:
        act.end(record)
    return record


class Population:
    """So many clients, without data."""

    digest = "p" * 32

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def __len__(self) -> int:
        return self.clients


def saying(change: Mapping[Mode, float], *, rising: bool = True, wobble: float = 0.01) -> Says:
    """Clients who differ a little, whose modes change by so much, and whose utility rises or falls."""

    def says(t: int, k: int) -> dict[str, Any]:
        noise = stream(1, "made-up", k, t).normal(0, wobble, 8)
        score = float(np.clip(0.6 + 4 * noise[7], 0, 1))
        return {
            "change": {mode: v + noise[i] for i, (mode, v) in enumerate(change.items())},
            "score": score,
            "utility": (score, float(np.clip(score + (0.01 if rising else -0.01) * t, 0, 1))),
        }

    return says


def case(name: str, folder: Path, study: Mapping[str, Any] | None = None) -> RunRecord:
    """One of CASES."""
    bad, fine = dict.fromkeys(Mode, -0.2), dict.fromkeys(Mode, 0.0)
    mixed = fine | {Mode.ALIGNMENT_EROSION: -0.2, Mode.ADAPTATION_MISALIGNMENT: -0.15, Mode.FAIRNESS_COLLAPSE: -0.0885}
    study = study or {}
    match name:
        case "all_alarm":
            return build(folder, saying(bad), rounds=8, clients=60, study=study)
        case "all_clear":
            return build(folder, saying(fine), rounds=4, clients=250, study=study)
        case "all_unknown":
            return build(folder, saying(fine), rounds=3, clients=6, study=study)
        case "mixed":
            return build(folder, saying(mixed, rising=False), rounds=6, clients=80, study=study)
        case "protected":  # in round 2 too few answer, and two messages are of no use
            few = saying(mixed)
            privacy = {"updates": {"noise": "none"}, "epsilon": 4.0, "dropouts": 0.1}
            return build(
                folder,
                lambda t, k: few(t, k) if t != 2 or k < 9 else None,
                rounds=4,
                clients=40,
                study={**study, "privacy": privacy},
                strangers=1,
            )
        case "held":
            hold = {**study, "policy": {"on_alarm": "hold"}}
            return build(folder, saying(bad), rounds=8, clients=60, study=hold)
        case "zero_rounds":
            return build(folder, saying(fine), rounds=0, clients=6, ends=False, study=study)
        case "crashed":  # the charge of round 3 was written, its releases were not
            return build(folder, saying(fine), rounds=3, planned=9, clients=6, ends=False, crash=True, study=study)
        case "unscored":
            mute = {"change": {}, "score": 0.0, "utility": (0.5, 0.5), "missing": True}
            return build(folder, lambda t, k: mute, rounds=3, clients=6, study=study)
        case "nobody":  # round 2 answers; in the others every client failed
            says = saying(fine)
            return build(folder, lambda t, k: says(t, k) if t == 2 else None, rounds=3, clients=6, study=study)
    raise ValueError(name)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunRecord]:
    """A case by name, with changes to its study; built once, because the report only reads it."""
    made: dict[str, RunRecord] = {}

    def one(name: str, **study: Any) -> RunRecord:
        key = f"{name} {study}"
        if key not in made:
            made[key] = case(name, tmp_path_factory.mktemp(name) / "run", study)
        return made[key]

    return one


@pytest.fixture(scope="session", params=CASES)
def any_case(request: pytest.FixtureRequest) -> str:
    """Each case in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def summary_of(make: Callable[..., RunRecord]) -> Callable[[str], dict[str, Any]]:
    """The summary of a case by name, computed once; a copy for whoever wants to change it."""
    made = cache(lambda name: summarise(make(name)))
    return lambda name: copy.deepcopy(made(name))


@pytest.fixture(scope="session")
def any_summary(any_case: str, summary_of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Each case's summary in turn; to be read, not changed."""
    return summary_of(any_case)


@pytest.fixture
def make_from(tmp_path: Path) -> Callable[..., RunRecord]:
    """A record of clients who say what they are told."""
    count = iter(range(100))
    return lambda says, **how: build(tmp_path / f"from-{next(count)}", says, **how)
