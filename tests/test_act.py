"""What is done about an alarm: hold, roll back, re-baseline; and the clients' own guards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary import act, cli, pipeline, study
from fedcanary.engines import guard, privacy_terms
from fedcanary.engines.clients import Sent
from fedcanary.engines.setup import Setup
from fedcanary.engines.verify import verify
from fedcanary.errors import BadInput, Refused
from fedcanary.models import adapters
from fedcanary.monitor import base as monitor
from fedcanary.monitor.verdict import Past, judge, last_clear, lineage
from fedcanary.privacy.seal import Message, seal
from fedcanary.record import RunRecord
from fedcanary.report.html import render
from fedcanary.report.summary import schema, summarise
from fedcanary.report.text import terminal
from fedcanary.types import Evidence, Mode, Role
from oracles.few import MadeUp, bare
from test_run import contents

EROSION, FAIRNESS = Mode.ALIGNMENT_EROSION, Mode.FAIRNESS_COLLAPSE
pytestmark = pytest.mark.usefixtures("one_thread")


# --- the policy over what is past


def evidence(**states: str) -> list[Evidence]:
    empty = {"estimate": 0.0, "interval": (0.0, 0.0), "unit": "", "e_worse": 1.0, "e_not_worse": 1.0}
    return [Evidence(mode=mode, state=states.get(mode, "unknown"), **empty) for mode in Mode]


def played(*rounds: str, policy: str = "roll_back", mode: Mode = EROSION) -> list[Past]:
    """Rounds by the first letter of a mode's state; after an alarm the run goes on, as after a re-baseline."""
    past: list[Past] = []
    words = {"c": "clear", "u": "unknown", "a": "alarm"}
    for letters in rounds:
        for letter in letters:
            verdict = judge(evidence(**{mode: words[letter]}), None, policy, past)
            past.append(Past(states=verdict.states, adopted=verdict.adopted))
    return past


@pytest.mark.parametrize(
    ("rounds", "policy", "adopted", "clear"),
    [
        ("uuccca", "report", 6, None),
        ("uuccca", "hold", 5, None),
        ("uuccca", "roll_back", 2, 5),  # the evidence of round 5's clear is of rounds 3 to 5; 3 began with adapter 2
        ("uuccuua", "roll_back", 1, 4),
        ("ca", "roll_back", 0, 1),
        ("uuua", "roll_back", 0, None),
        ("a", "hold", 0, None),
        ("ucccccc", "roll_back", 7, None),
    ],
)
def test_which_adapter_is_adopted(rounds, policy, adopted, clear):
    past = played(rounds[:-1])
    last = {"c": "clear", "u": "unknown", "a": "alarm"}[rounds[-1]]
    verdict = judge(evidence(alignment_erosion=last), None, policy, past)
    assert (verdict.adopted, verdict.clear_round) == (adopted, clear)
    assert verdict.action == ("adopt" if last != "alarm" else {"report": "adopt"}.get(policy, policy))


def test_after_a_roll_back_dropped_rounds_are_never_gone_back_to():
    """Rounds 3 to 6 are dropped; the next line is 2, 7, 8: another mode's clear in round 6 vouches for nothing."""
    past = played("uuccc", "a", "uu")
    assert [p.adopted for p in past] == [1, 2, 3, 4, 5, 2, 7, 8]
    assert lineage(past) == [8, 7, 2, 1, 0]
    fair = [
        replace(p, states={**p.states, FAIRNESS: "clear" if t in (4, 5, 6) else "unknown"})
        for t, p in enumerate(past, 1)
    ]
    assert last_clear(fair, [FAIRNESS]) == (0, None)
    both = [*fair[:1], replace(fair[1], states={**fair[1].states, FAIRNESS: "clear"}), *fair[2:]]
    assert last_clear(both, [FAIRNESS]) == (0, 2)
    assert last_clear(both, [FAIRNESS, EROSION]) == (0, None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("uca"), max_size=24).map("".join), st.sampled_from(["hold", "roll_back"]))
def test_what_is_adopted_was_adopted_before_and_came_before_its_evidence(rounds, policy):
    past = played(rounds, policy=policy)
    line = lineage(past)
    assert line[-1] == 0 and line == sorted(set(line), reverse=True)
    for t, one in enumerate(past, start=1):
        before = past[: t - 1]
        assert one.adopted == t if rounds[t - 1] != "a" else one.adopted in lineage(before)
    found, clear = last_clear(past, [EROSION])
    assert found in line
    if clear is None:
        assert found == 0
    else:
        assert found < clear and past[clear - 1].states[EROSION] == "clear"


# --- whole runs of made-up clients: an adapter that counts its rounds of training, and does harm from the fifth on


class Scripted(MadeUp):
    """The shared adapter counts the rounds that it was trained in. From `bad_from` on, who received it erodes."""

    harm, bad_from, fixed = -0.08, 5, False
    lines: ClassVar[dict[int, list[int]]] = {}

    def work(self, asked):
        round, (tensor,) = asked.request.round, asked.shared.values()
        harmed = not Scripted.fixed and float(tensor.mean()) >= Scripted.bad_from
        Scripted.lines[round] = list(asked.lineage)
        layout = privacy_terms.layout(self._setup)
        said = {name: vector(name, coords, Scripted.harm if harmed else 0.0) for name, coords in layout.items()}
        message = Message(readings=said, update=np.ones(7))
        for client in asked.cohort:
            yield [Sent(client, seal(message, layout, asked.terms, round, client))]


def vector(probe: str, coords, harm: float) -> np.ndarray:
    """A client's reading of a probe: `harm` in every part of alignment erosion, nothing elsewhere."""
    d = harm if probe == EROSION else 0.0
    names = {c.name for c in coords}
    mean = {"delta", *(n.removesuffix("_square") for n in names if n.endswith("_square"))}
    values = {n: d for n in names & mean} | {n: d**2 for n in names if "square" in n}
    return np.array([{"score_base": 0.5, "score_gain": 0.1}.get(c.name, values.get(c.name, 0.0)) for c in coords])


@pytest.fixture(autouse=True)
def healthy(monkeypatch):
    monkeypatch.setattr(Scripted, "fixed", False)
    monkeypatch.setattr(Scripted, "lines", {})


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(pipeline, "LocalClients", Scripted)

    def make(policy: str = "roll_back", rebaselines: int = 1, rounds: int = 9, clients: int = 60) -> Setup:
        tables = {"rounds": rounds, "policy": {"on_alarm": policy}, "monitor": {"rebaselines": rebaselines}}
        return bare(clients, {**tables, "privacy": {"trust": "none", "updates": None}})

    return make


def trained(out: Path) -> float:
    """How many rounds of training are in the adapter that the run's folder says is adopted."""
    pointer = json.loads((out / "adapters" / act.ADOPTED).read_text())
    (tensor,) = adapters.load(out / "adapters" / pointer["folder"]).values()
    assert adapters.digest(adapters.load(out / "adapters" / pointer["folder"])) == pointer["adapter"]
    return float(tensor.mean())


def states(record: RunRecord, mode: Mode = EROSION) -> str:
    return "".join(body["verdict"]["states"][mode][0] for body in record.of("round"))


def test_hold_keeps_the_adapter_before_and_roll_back_one_that_does_no_harm(scripted, tmp_path):
    """The alarm comes in round 7; round 6 was harmed already and still clear, on the evidence of rounds 4 and 5.

    So the adapters of rounds 6 and 5 (which round 6 received) do harm: only the one its window began with surely not.
    """
    held = {p: pipeline.run(scripted(p, rebaselines=0), tmp_path / p) for p in ("report", "hold", "roll_back")}
    assert states(held["hold"]) == states(held["roll_back"]) == states(held["report"])[:7]
    assert states(held["hold"])[-3:] == "cca"
    assert {p: trained(tmp_path / p) for p in held} == {"report": 9.0, "hold": 6.0, "roll_back": 3.0}
    assert trained(tmp_path / "hold") >= Scripted.bad_from > trained(tmp_path / "roll_back")
    for policy, record in held.items():
        assert list(record.of("end")) == [{"status": "finished" if policy == "report" else "held"}]
        assert [body["verdict"]["action"] for body in record.of("round")][-1] == policy.replace("report", "adopt")
        assert verify(tmp_path / policy)["adopted"] == trained(tmp_path / policy)
    assert list(held["roll_back"].of("round"))[-1]["verdict"]["clear_round"] == 6
    assert (tmp_path / "roll_back" / "adapters" / "round-007").is_dir()  # nothing recorded is lost


def test_without_a_clear_round_the_base_is_adopted(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "bad_from", 0)
    record = pipeline.run(scripted(), tmp_path / "run")
    assert "c" not in states(record)
    assert trained(tmp_path / "run") == 0.0
    said = " ".join(summarise(record)["headline"])
    assert "rolled back to the base: no earlier round was clear in alignment erosion" in said


def test_a_held_run_goes_on_only_after_a_re_baseline_and_from_the_adopted_adapter(scripted, tmp_path, monkeypatch):
    setup, out = scripted(), tmp_path / "run"
    pipeline.run(setup, out)
    before = contents(out)
    pipeline.run(setup, out)
    assert contents(out) == before
    monkeypatch.setattr(Scripted, "fixed", True)
    record = pipeline.run(setup, out, rebaseline="the unsafe examples were taken out")
    assert (record.rounds, record.ended) == (9, True)
    assert [e["status"] for e in record.of("end")] == ["held", "finished"]
    (entry,) = record.of("rebaseline")
    last = states(record).index("a") + 1
    adopted = list(record.of("round"))[last - 1]["verdict"]["adopted"]
    assert entry == {
        "round": last,
        "modes": [EROSION],
        "adopted": adopted,
        "reason": "the unsafe examples were taken out",
    }
    assert trained(out) == adopted + 9 - last  # as many rounds of training as the line has
    assert Scripted.lines[9] == [*range(8, last, -1), *range(adopted, -1, -1)]
    after = list(record.of("round"))[last:]
    assert all(e["since_round"] is None for body in after for e in body["evidence"])
    strength = [body["evidence"][5]["e_worse"] for body in record.of("round")]
    assert strength[last - 1] >= monitor.plan_from(record.header["plan"]).alarm_at and strength[last] < 1
    assert after[-1]["verdict"]["states"][EROSION] == "clear"
    assert pipeline.replay(record) == [(body["round"], body["evidence"]) for body in record.of("round")]
    assert verify(out)["adopted"] == 9


def test_the_others_tests_keep_their_evidence_over_a_re_baseline(scripted, tmp_path, monkeypatch):
    """With 30 clients a clear takes several rounds: the mode that began anew must earn it again, the others have it."""
    monkeypatch.setattr(Scripted, "harm", -0.2)
    setup, out = scripted(clients=30), tmp_path / "run"
    last = pipeline.run(setup, out).rounds
    monkeypatch.setattr(Scripted, "fixed", True)
    record = pipeline.run(setup, out, rebaseline="mended")
    assert (states(record, Mode.FAIRNESS_COLLAPSE)[last - 1 :][:2], states(record)[last - 1 :][:2]) == ("cc", "au")


def test_every_re_baseline_that_may_be_made_is_paid_for_beforehand(scripted, tmp_path):
    """Alpha is shared out over the beginnings; with none declared the thresholds are what they were."""
    plans = {}
    for declared in (0, 1, 3):
        record = pipeline.run(scripted(rebaselines=declared, rounds=1), tmp_path / str(declared))
        plans[declared] = monitor.plan_from(record.header["plan"])
    assert [plans[d].alarm_at for d in plans] == pytest.approx([120.0, 240.0, 480.0])
    assert [plans[d].clear_at for d in plans] == pytest.approx([120.0, 240.0, 480.0])
    assert summarise(record)["error"]["alarm_at"] == pytest.approx(480.0)


def test_one_re_baseline_too_many_is_refused_and_writes_nothing(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "harm", -0.2)
    setup, out = scripted(rebaselines=1, rounds=12), tmp_path / "run"
    pipeline.run(setup, out)
    record = pipeline.run(setup, out, rebaseline="not mended at all")
    assert [e["status"] for e in record.of("end")] == ["held", "held"]
    before = contents(out)
    with pytest.raises(Refused, match=r"declared 1 re-baseline and has made 1(.|\n)*monitor.rebaselines = 2") as caught:
        pipeline.run(setup, out, rebaseline="now it is")
    assert caught.value.exit_code == 4
    assert contents(out) == before
    assert "its one re-baseline is used" in " ".join(summarise(record)["headline"])
    with pytest.raises(Refused, match="declared 0 re-baselines"):
        none = scripted(rebaselines=0)
        pipeline.run(none, tmp_path / "none")
        pipeline.run(none, tmp_path / "none", rebaseline="mended")


def test_killed_anywhere_and_resumed_the_same_bytes(scripted, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    setup = scripted()
    pipeline.run(setup, tmp_path / "whole")
    last = RunRecord.load(tmp_path / "whole").rounds
    pipeline.run(setup, tmp_path / "whole", rebaseline="mended")
    for module, name, when in (
        (adapters, "save", lambda record: record.rounds == last - 1),  # the alarming round is not complete
        (act, "point", lambda record: record.rounds == last),  # it is, and the pointer is not written
        (act, "end", lambda record: record.rounds == last),  # nor is the end
        (act, "judged", lambda record: bool(record.rebaselines())),  # the re-baseline is on disk
        (act, "point", lambda record: record.rounds == last + 1),  # it has gone on
    ):
        out = tmp_path / f"{name} {len(list(tmp_path.iterdir()))}"
        killed, real = [], getattr(module, name)

        def once(*given, real=real, when=when, out=out, killed=killed, **more):
            if not killed and when(RunRecord.open(out)):
                killed.append(True)
                raise Killed
            return real(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, once)
            for reason in (None, "mended"):
                try:
                    pipeline.run(setup, out, rebaseline=reason)
                except Killed:
                    pipeline.run(setup, out, rebaseline=None if RunRecord.load(out).rebaselines() else reason)
        assert killed
        assert contents(out) == contents(tmp_path / "whole")


def test_killed_after_any_entry_of_the_record_and_resumed_the_same_bytes(scripted, tmp_path, monkeypatch):
    """Between two releases of a round too: what is on disk of it is not written again."""

    class Killed(Exception):
        pass

    setup = scripted(rounds=2, clients=12)
    pipeline.run(setup, tmp_path / "whole")
    append, whole = RunRecord.append, RunRecord.load(tmp_path / "whole").entries
    assert sum(one.kind == other.kind == "release" for one, other in pairwise(whole)) >= 5
    for last in range(1, len(whole)):

        def once(record, kind, body, last=last):
            entry = append(record, kind, body)
            if len(record.entries) == last:
                raise Killed
            return entry

        out = tmp_path / f"killed {last}"
        with monkeypatch.context() as patch:
            patch.setattr(RunRecord, "append", once)
            with pytest.raises(Killed):
                pipeline.run(setup, out)
        pipeline.run(setup, out)
        assert contents(out) == contents(tmp_path / "whole"), whole[last - 1].kind


def test_killed_before_it_could_say_held_it_is_held_all_the_same(scripted, tmp_path, monkeypatch):
    """The verdict is on disk and the end is not: going on must not train, and a re-baseline finds it held."""
    setup, out = scripted(), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(act, "end", lambda record: None)
        rounds = pipeline.run(setup, out).rounds
    assert act.held(RunRecord.load(out)) and not RunRecord.load(out).ended
    act.rebaseline(RunRecord.load(out), "mended")
    assert [e.kind for e in RunRecord.load(out).entries[-2:]] == ["end", "rebaseline"]
    assert RunRecord.load(out).rounds == rounds


def test_the_pointer_is_verified(scripted, tmp_path):
    out = tmp_path / "run"
    pipeline.run(scripted(), out)
    pointer = out / "adapters" / act.ADOPTED
    good = pointer.read_text()
    pointer.write_text(good.replace("round-003", "round-007").replace('"adopted": 3', '"adopted": 7'))
    with pytest.raises(BadInput, match=r"is not what the record adopted(.|\n)*deploy round-\d+"):
        verify(out)
    pointer.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        verify(out)
    pointer.write_text(good)
    verify(out)
    shutil.copytree(out / "adapters" / "round-001", out / "adapters" / "round-000", dirs_exist_ok=True)
    with pytest.raises(BadInput, match="round-000: is not the adapter of the record"):
        verify(out)


# --- said plainly


def test_the_report_says_what_is_adopted_and_how_to_go_on(scripted, tmp_path, monkeypatch):
    setup, out = scripted("roll_back"), tmp_path / "run"
    record = pipeline.run(setup, out)
    summary = summarise(record)
    jsonschema.validate(summary, schema(), cls=jsonschema.Draft202012Validator)
    number, last = summary["adopted"]["round"], summary["rounds"]
    assert (summary["status"], summary["action"]) == ("held", "roll_back")
    said = " ".join(summary["headline"])
    assert (
        f"rolled back to the adapter of round {number}: with it began the evidence by which alignment erosion" in said
    )
    assert f"the adapters of rounds {number + 1} to {last} are not to be adopted" in said
    assert "1 of 1 being left" in said
    lines = terminal(summary)
    assert f"adopted  adapters/round-{number:03d} (after round {last}, rolled back)" in lines
    assert '--resume DIR --rebaseline "what was fixed"' in lines
    assert f"adapters/round-{number:03d}" in render(summary)
    monkeypatch.setattr(Scripted, "fixed", True)
    hostile = "</title><script>alert(1)</script> \x1b[2J"
    summary = summarise(pipeline.run(setup, out, rebaseline=hostile))
    jsonschema.validate(summary, schema(), cls=jsonschema.Draft202012Validator)
    assert (summary["status"], summary["rebaselines"]["made"][0]["round"]) == ("finished", last)
    assert f"After round {last} the tests of alignment erosion began anew" in " ".join(summary["headline"])
    assert "<script" not in render(summary) and "\x1b" not in terminal(summary)
    monkeypatch.setattr(Scripted, "fixed", False)
    held = summarise(pipeline.run(scripted("hold", rebaselines=0), tmp_path / "hold"))
    assert "stays, and the adapter of round" in " ".join(held["headline"])
    assert "the study declared no re-baseline" in " ".join(held["headline"])
    assert "--rebaseline" not in terminal(held)


# --- used wrongly


@pytest.fixture
def command(scripted, monkeypatch, tmp_path, capsys):
    """`fedcanary run` over made-up clients: returns the exit code and what was said on stderr."""
    from fedcanary.engines import setup as loading

    made = scripted()
    (tmp_path / "study.toml").write_text(made.study.toml())
    monkeypatch.setattr(loading, "prepare", lambda chosen, cache: replace(made, study=chosen))

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(["run", "--quiet", *words])
        return code, capsys.readouterr().err

    return run


def test_a_re_baseline_asked_for_wrongly_is_told_why(command, tmp_path, monkeypatch):
    file, out = str(tmp_path / "study.toml"), str(tmp_path / "run")
    code, said = command(file, "--out", out, "--rebaseline", "mended")
    assert (code, "is about a run that was held" in said, "add --resume DIR" in said) == (2, True, True)
    code, said = command("--resume", out, "--rebaseline", "mended")
    assert (code, "holds no run record" in said) == (2, True)
    with monkeypatch.context() as patch:  # interrupted before its alarm
        patch.setattr(act, "point", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(file, "--out", out)[0] == 130
    code, said = command("--resume", out, "--rebaseline", "  ")
    assert (code, "2 problems" in said) == (2, True)
    assert all(
        words in said for words in ("does not say what was fixed", "no alarm ended it", "leave out --rebaseline")
    )
    assert command("--resume", out)[0] == 3
    assert command("--resume", out)[0] == 3  # held: nothing more is done
    before = contents(tmp_path / "run")
    assert command("--resume", out, "--rebaseline", "")[0] == 2
    assert contents(tmp_path / "run") == before
    monkeypatch.setattr(Scripted, "fixed", True)
    with monkeypatch.context() as patch:
        patch.setattr(act, "judged", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command("--resume", out, "--rebaseline", "mended")[0] == 130
    code, said = command("--resume", out, "--rebaseline", "mended")
    assert (code, "has not gone on since" in said) == (2, True)
    assert command("--resume", out)[0] == 0
    code, said = command("--resume", out, "--rebaseline", "mended")
    assert (code, "has finished; only a run that an alarm ended" in said) == (2, True)


def test_with_no_round_left_there_is_nothing_to_go_on_with(scripted, tmp_path):
    setup, out = scripted(rounds=7), tmp_path / "run"
    record = pipeline.run(setup, out)
    assert states(record)[-1] == "a" and record.rounds == 7
    assert list(record.of("end")) == [{"status": "held"}]
    with pytest.raises(BadInput, match="is held after the last of its 7 rounds"):
        pipeline.run(setup, out, rebaseline="mended")
    assert "No round is left" in " ".join(summarise(record)["headline"])


def problems(tables) -> dict[str, str]:
    with pytest.raises(BadInput) as caught:
        study.parse({"privacy": {"trust": "none"}, **tables})
    return {p.where.removeprefix("study: "): f"{p.what}: {p.remedy}" for p in caught.value.problems}


def test_bad_policies_and_guards_are_named_together():
    assert "choose one of" in problems({"policy": {"on_alarm": "stop"}})["policy.on_alarm"]
    assert "'hold'" in problems({"policy": {"on_alarm": "holds"}})["policy.on_alarm"]
    assert "never re-baselined" in problems({"monitor": {"rebaselines": 1}})["monitor.rebaselines"]
    hold = {"policy": {"on_alarm": "hold"}}
    assert "monitor.rebaselines" in problems({**hold, "monitor": {"rebaselines": -1}})
    assert "monitor.rebaselines" in problems({**hold, "monitor": {"rebaselines": True}})
    assert "guard.modes" in problems({"guard": {"modes": []}})
    found = problems({"guard": {"modes": ["alignment_erosio"], "limits": {"fairness_collapse": 0.9}}})
    assert "did you mean 'alignment_erosion'?" in found["guard.modes.0"]
    assert "less than or equal to 0.2" in found["guard.limits.fairness_collapse"]
    found = problems({"guard": {"modes": ["alignment_erosion"], "limits": {"fairness_collapse": 0.1}}})
    assert "fairness_collapse: not guarded" in found["guard.limits"]


def test_under_the_unit_example_a_refusal_must_not_tell_of_own_examples():
    record = {"noise": 1.0, "clip": 1.0, "sample_rate": 0.1}
    privacy = {"unit": "example", "record": record, "updates": None}
    for modes in ({}, {"modes": ["fairness_collapse", "alignment_erosion"]}):
        with pytest.raises(BadInput, match=r"guard.modes(.|\n)*would tell of the client's own examples"):
            study.parse({"privacy": privacy, "guard": modes})
    study.parse({"privacy": privacy, "guard": {"modes": ["alignment_erosion"]}})


def test_a_guard_of_what_nothing_can_read_is_refused_before_the_run():
    setup = bare(6, {"guard": {"modes": ["alignment_erosion", "out_of_domain_degradation"]}})
    suites = tuple(s for s in setup.suites if s.role not in (Role.SAFETY, Role.PERSONA))
    blind = replace(
        setup, suites=suites, probes=tuple(replace(p, parts=()) if p.mode == EROSION else p for p in setup.probes)
    )
    with pytest.raises(BadInput, match="alignment_erosion can be read from none of the public items") as caught:
        guard.check(blind)
    assert len(caught.value.problems) == 1
    guard.check(setup)
