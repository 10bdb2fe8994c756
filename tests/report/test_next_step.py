"""Each step that is named keeps its promise when it is taken, and the cheapest comes first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcanary.monitor import base as monitor
from fedcanary.record import RunRecord
from fedcanary.report import next_step
from fedcanary.report.summary import summarise
from fedcanary.types import Mode

Make = Callable[..., RunRecord]
CHANGES = {Mode.ALIGNMENT_EROSION: -0.16, Mode.ADAPTATION_MISALIGNMENT: -0.02, Mode.OUT_OF_DOMAIN_DEGRADATION: -0.052}


def says(t: int, k: int) -> dict[str, Any]:
    """Always the same, so that more rounds or clients "like these" can really be had."""
    return {"change": CHANGES, "score": 0.5, "utility": (0.5, 0.5)}


def ways(record: RunRecord) -> dict[Mode, dict[str, next_step.Step]]:
    plan = monitor.plan_from(record.header["plan"])
    states = {m: v["state"] for m, v in summarise(record)["modes"].items()}
    found = next_step.steps(record, plan, [m for m in Mode if states[m] == "unknown"])
    return {mode: {step.kind: step for step in steps} for mode, steps in found.items()}


def test_a_step_that_is_taken_leads_where_it_was_said_to(make_from: Make) -> None:
    rounds, clients = 1, 20
    taken: dict[str, Any] = {}
    found = ways(make_from(says, rounds=rounds, clients=clients))
    assert found
    kept = 0
    for mode, steps in found.items():
        for kind, step in steps.items():
            how: dict[str, Any] = {"rounds": rounds, "clients": clients}
            if kind == "panels":
                how["rounds"] += int(step.size)
                assert step.answers == step.size * clients
            elif kind == "clients":
                if step.size * clients != int(step.size * clients):
                    continue
                how["clients"] = int(step.size * clients)
                assert step.answers == pytest.approx((step.size - 1) * rounds * clients)
            else:
                how["study"] = {"probes": {"margins": {str(mode): step.size}}}
                assert step.answers == 0
            if str(how) not in taken:
                taken[str(how)] = summarise(make_from(says, **how))["modes"]
            assert taken[str(how)][mode]["state"] == step.state != "unknown", (mode, step)
            kept += 1
    assert kept >= 6


def test_a_smaller_step_of_the_same_kind_would_not_do(make_from: Make) -> None:
    rounds, clients = 1, 9
    found = ways(make_from(says, rounds=rounds, clients=clients))
    before: dict[str, list[str]] = {"panels": [], "clients": []}
    for mode, steps in found.items():
        if (step := steps.get("panels")) and step.size > 1:
            fewer = max(k for k in next_step.MORE_PANELS if k < step.size)
            taken = summarise(make_from(says, rounds=rounds + fewer, clients=clients))["modes"][mode]
            before["panels"].append(taken["state"])
        if (step := steps.get("clients")) and step.size > 2:
            fewer = max(f for f in next_step.TIMES_CLIENTS if f < step.size)
            taken = summarise(make_from(says, rounds=rounds, clients=int(clients * fewer)))["modes"][mode]
            before["clients"].append(taken["state"])
    assert before["panels"] and before["clients"]
    assert {state for states in before.values() for state in states} == {"unknown"}


def test_the_cheapest_comes_first_and_a_weaker_question_last(make_from: Make) -> None:
    record = make_from(says, rounds=1, clients=20)
    plan = monitor.plan_from(record.header["plan"])
    for steps in next_step.steps(record, plan, list(Mode)).values():
        asked = [step for step in steps if step.kind != "margin"]
        assert [s.answers for s in asked] == sorted(s.answers for s in asked)
        assert [s.kind for s in steps if s.kind == "margin"] == [s.kind for s in steps[len(asked) :]]
    said = summarise(record)["modes"]
    told = {mode: shown["next"] for mode, shown in said.items() if shown["next"]}
    pattern = (
        r"with [0-9]+ more rounds? like the last ones \([0-9]+ in all\) it would be (in alarm|clear)"
        r"|with [0-9.]+ times the clients \(about [0-9]+ a round\) that answer alike, it would be (in alarm|clear)"
        r"|against a margin of [0-9.]+ it would have been (in alarm|clear)"
    )
    assert told and all(re.fullmatch(pattern, way) for text in told.values() for way in text.split("; or "))
    assert any("more round" in text for text in told.values())


def test_what_lies_at_its_margin_is_told_that_nothing_tried_is_enough(make_from: Make) -> None:
    def at(t: int, k: int) -> dict[str, Any]:
        return {"change": {Mode.ALIGNMENT_EROSION: -0.05}, "score": 0.5, "utility": (0.5, 0.5)}

    near = summarise(make_from(at, rounds=3, clients=4, study={"probes": {"margins": {"alignment_erosion": 0.05}}}))
    assert near["modes"]["alignment_erosion"]["next"].startswith("neither answer is near: 24 more rounds")


def test_no_margin_is_named_that_a_study_may_not_set(make_from: Make) -> None:
    margins = {"alignment_erosion": 0.19, "fairness_collapse": 0.7, "amplified_bias": 0.2}
    record = make_from(says, rounds=2, clients=20, study={"probes": {"margins": margins}})
    for mode, steps in ways(record).items():
        if step := steps.get("margin"):
            assert step.size <= (1.0 if mode == Mode.FAIRNESS_COLLAPSE else monitor.REACH)


def test_a_looser_margin_moves_the_streams_that_are_in_its_unit_and_no_other() -> None:
    def stream(kind: str, margin: float) -> monitor.Stream:
        return monitor.Stream(name=kind, kind=kind, coord="x", margin=margin)

    bias = monitor.ModePlan(
        mode=Mode.AMPLIFIED_BIAS, unit="", margin=0.08, streams=(stream("mean", 0.08), stream("mean", 0.3))
    )
    moved = next_step._looser(bias, 1.5)
    assert (moved.margin, *(s.margin for s in moved.streams)) == pytest.approx((0.12, 0.12, 0.34))
    fairness = monitor.ModePlan(
        mode=Mode.FAIRNESS_COLLAPSE, unit="", margin=0.4, streams=(stream("share", 0.4), stream("spread", 0.01))
    )
    moved = next_step._looser(fairness, 2)
    assert (moved.margin, *(s.margin for s in moved.streams)) == pytest.approx((0.8, 0.8, 0.01))


def test_a_window_with_a_closed_round_needs_only_more_rounds(make_from: Make) -> None:
    """Every client failed in the last round, so no `clear` can stand; it is not the clients that are too few."""

    def last_fails(t: int, k: int) -> dict[str, Any] | None:
        return None if t == 4 else {"change": {}, "score": 0.5, "utility": (0.5, 0.5)}

    steps = ways(make_from(last_fails, rounds=4, clients=300))
    for mode in Mode:
        assert "clients" not in steps[mode]
        assert (steps[mode]["panels"].size, steps[mode]["panels"].state) == (3, "clear")


def test_nothing_is_asked_of_an_empty_record(tmp_path: Path, make: Make) -> None:
    record = make("zero_rounds")
    assert next_step.steps(record, monitor.plan_from(record.header["plan"]), list(Mode)) == {}


def test_further_panels_are_the_last_three_again_in_a_plan_as_long_as_they(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, asked = make("all_unknown"), []
    real = next_step._states

    def spy(plan: monitor.Plan, rounds: next_step.Rounds, fresh: Any) -> Any:
        asked.append((plan.horizon, [sorted(r["alignment_erosion"].total) for r in rounds]))
        return real(plan, rounds, fresh)

    monkeypatch.setattr(next_step, "_states", spy)
    plan = monitor.plan_from(record.header["plan"])
    next_step.steps(record, plan, list(Mode))
    recorded = [sorted(r["alignment_erosion"].total) for _, r in sorted(record.releases().items())]
    longer = [(horizon, totals) for horizon, totals in asked if len(totals) > len(recorded)]
    assert [horizon for horizon, _ in longer] == [len(recorded) + k for k in next_step.MORE_PANELS]
    for horizon, totals in longer:
        assert totals == (recorded + recorded[-monitor.WINDOW :] * horizon)[:horizon]
