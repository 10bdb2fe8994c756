"""Drill-downs over whole runs: made-up clients behind the real door, and the bundled model with a planted region."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from fedcanary import pipeline, study
from fedcanary.cli import main
from fedcanary.drill import DrillDowns, ledger_of
from fedcanary.engines import privacy_terms, slices
from fedcanary.engines.clients import Sent
from fedcanary.engines.consent import contract_of
from fedcanary.engines.plan import plan_of
from fedcanary.engines.setup import Setup, prepare
from fedcanary.errors import BadInput
from fedcanary.pipeline import Progress
from fedcanary.privacy.contract import check, show
from fedcanary.privacy.seal import Message, seal
from fedcanary.probes.base import CLIP
from fedcanary.probes.slices import MEMBER, SLICES
from fedcanary.record import RunRecord
from fedcanary.report.html import render
from fedcanary.report.summary import schema, summarise
from fedcanary.report.text import terminal
from fedcanary.rng import stream
from fedcanary.types import Mode
from oracles.few import Few, MadeUp, bare

FAIRNESS, BIAS, EROSION = Mode.FAIRNESS_COLLAPSE, Mode.AMPLIFIED_BIAS, Mode.ALIGNMENT_EROSION
Harm = Callable[[int], Mapping[str, float]]  # client -> "mode/coordinate": value
BY_REGION = {"slices": {"by": ["region"]}, "rounds": 6}
CENTRAL = {"trust": "central", "epsilon": 8.0, "min_cohort": 10, "updates": {"noise": "none"}}


def in_west(client: int) -> bool:
    return client % 4 == 3


def left_behind(client: int) -> Mapping[str, float]:
    return {f"{FAIRNESS}/tail": float(in_west(client))}


def biased(client: int) -> Mapping[str, float]:
    """Group a gains in the west: too few to move the mean beyond its margin, so that severe falls raise the alarm."""
    return {f"{BIAS}/contrast:a": 0.24, f"{BIAS}/severe": 1.0} if in_west(client) else {}


def healthy(client: int) -> Mapping[str, float]:
    return {}


class Planted(MadeUp):
    """Clients whose differences are small, but for what `harm` says, and who agree to everything without a ledger."""

    harm: Harm = staticmethod(healthy)
    asks_policies = False

    def work(self, asked):
        setup, layout, request = self._setup, privacy_terms.layout(self._setup), asked.request
        streams = [(p.mode, s) for p in plan_of(setup, self.base_answers).modes for s in p.streams]
        for client in asked.cohort:
            reasons = self.consent.refuses(client, request) if self.asks_policies else []
            rng, harm = stream(3, "planted", client, request.round), type(self).harm(client)
            said: dict[str, dict[str, float]] = {p: {c.name: 0.0 for c in coords} for p, coords in layout.items()}
            said["utility"] |= {"score_base": 0.6, "score_gain": 0.05}
            for key, value in harm.items():
                mode, _, coord = key.partition("/")
                said[mode][coord] = value
            for mode, s in streams:
                if s.kind == "mean":
                    d = float(np.clip(harm.get(f"{mode}/{s.coord}", rng.normal(0, 0.03)), -CLIP, CLIP))
                    said[mode] |= {s.coord: d, s.square: d**2}
            readings = {probe: np.array(list(values.values())) for probe, values in said.items()}
            if setup.slices:
                own = setup.population.attributes(client)
                readings[SLICES] = slices.said(setup.slices, own, request.drill_down, setup.probes, readings)
            message = Message(readings=readings, update=np.append(rng.normal(size=6), 1.0))
            sealed = None if reasons else seal(message, layout, asked.terms, request.round, client)
            yield [Sent(client, sealed, reasons)]


def play(folder: Path, count: int, harm: Harm, policies: bool = False, **tables: Any) -> RunRecord:
    """A run, or the rest of one, of made-up clients with some harm."""
    kind = type("Kind", (Planted,), {"harm": staticmethod(harm), "asks_policies": policies})
    how = {"watch": tables.pop("watch", lambda progress: None), "rebaseline": tables.pop("rebaseline", None)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "LocalClients", kind)
        return pipeline.run(bare(count, {**BY_REGION, "privacy": CENTRAL, **tables}), folder, **how)


@pytest.fixture(scope="module")
def west(tmp_path_factory) -> RunRecord:
    """480 clients, those in the west left behind."""
    return play(tmp_path_factory.mktemp("west") / "run", 480, left_behind)


def named(record: RunRecord) -> set[str]:
    """Everything that any round named."""
    return {
        f"{e['mode']} {e['slice']}"
        for body in record.of("round")
        for e in body["slices"]["evidence"]
        if e["state"] == "worse than the margin"
    }


def asked(record: RunRecord) -> dict[int, str]:
    return {b["round"]: b["slices"]["asked"]["mode"] for b in record.of("round") if b["slices"]["asked"]}


# --- who is named -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FAIRNESS, BIAS])
def test_the_planted_region_is_named_and_no_other(west, tmp_path, mode):
    record = west if mode == FAIRNESS else play(tmp_path, 480, biased)
    since = {e["since_round"] for b in record.of("round") for e in b["evidence"] if e["mode"] == mode} - {None}
    first = min(since)
    assert asked(record) == {round: mode for round in range(first + 1, 7)}  # after the alarm, and every round then
    assert named(record) == {f"{mode} region=west"}
    last = {e["slice"]: e for e in list(record.of("round"))[-1]["slices"]["evidence"]}
    west, margin = last["region=west"], {BIAS: 0.03, FAIRNESS: 0.12}[mode]
    assert west["margin"] == margin < west["interval"][0]
    assert west["estimate"] == pytest.approx(1.0, abs=0.2)  # of bits: all in the west
    assert all(last[f"region={r}"]["estimate"] < 0.12 for r in ("north", "east", "south"))
    assert west["clients"] == pytest.approx(20 * (6 - first), abs=6 * MEMBER * math.sqrt(6))
    assert pipeline.replay_slices(record) == [
        {SLICES: b[SLICES]} for b in RunRecord.load(record.path.parent).of("round")
    ]


def test_nobody_is_asked_where_nothing_is_wrong_and_nothing_of_slices_leaves(tmp_path):
    record = play(tmp_path, 240, healthy)
    assert asked(record) == {} and named(record) == set()
    for body in record.of("round"):
        assert body["slices"]["evidence"] == []
    assert_only_noise(record, range(1, 7))


def assert_only_noise(record: RunRecord, rounds) -> None:
    """What leaves outside a drill-down: zeros, and noise. Over 100 sums, 6 sd are passed with p < 1e-6."""
    for round in rounds:
        release = record.releases()[round][SLICES]
        assert np.all(release.noise_std > 0)
        assert np.all(np.abs(release.total) < 6 * release.noise_std)


def test_before_the_alarm_nothing_of_slices_leaves(west):
    first = min(asked(west))
    assert_only_noise(west, range(1, first))
    with pytest.raises(AssertionError):  # the planted bug: a client that answers unasked would be seen here
        assert_only_noise(west, [first])


def test_a_federation_that_is_worse_everywhere_names_every_region(tmp_path):
    record = play(tmp_path, 480, lambda client: {f"{EROSION}/refusal": -0.2})
    assert named(record) == {f"{EROSION} region={r}" for r in ("north", "east", "south", "west")}


def test_attributes_are_asked_together_and_a_harm_in_one_is_diluted_in_another(tmp_path):
    record = play(tmp_path, 480, left_behind, slices={"by": ["region", "device"]})
    last = {e["slice"]: e for e in list(record.of("round"))[-1]["slices"]["evidence"]}
    assert last["region=west"]["state"] == "worse than the margin"
    assert {s for s, e in last.items() if e["state"] == "worse than the margin"} <= {
        "region=west",
        "device=phone",  # a quarter of each device's clients is left behind, and the margin is .12
        "device=laptop",
    }
    assert last["device=phone"]["estimate"] == pytest.approx(0.25, abs=0.12)


def test_slices_below_the_floor_are_reported_without_numbers(tmp_path):
    record = play(tmp_path, 160, left_behind, slices={"by": ["region"], "floor": 60, "rounds": 1}, rounds=4)
    evidence = list(record.of("round"))[-1]["slices"]["evidence"]
    assert {e["state"] for e in evidence} == {"too few to say"}
    assert all(e[key] is None for e in evidence for key in ("estimate", "clients", "e_worse"))
    assert len(asked(record)) == 1  # of one round, as the study says


def test_a_mean_that_is_worse_upwards_is_asked_for_mirrored(tmp_path):
    """Group a gains by the whole clip at half of the clients: mode 1's second stream, whose sign is -1."""
    half = ("region=south", "region=west")
    record = play(tmp_path, 640, lambda client: {f"{BIAS}/contrast:a": 0.25 * (client % 4 > 1)}, rounds=8)
    assert named(record) == {f"{BIAS} {label}" for label in half}
    last = {e["slice"]: e for e in list(record.of("round"))[-1]["slices"]["evidence"]}
    assert all(e["part"] == "a gains" and e["margin"] == 0.08 for e in last.values())
    assert all(last[label]["estimate"] == pytest.approx(0.25, abs=0.05) for label in half)


# --- what a reader sees -----------------------------------------------------------------------------------------


def test_summary_terminal_and_page_say_where_and_at_what_cost(west):
    summary = summarise(RunRecord.load(west.path.parent))
    jsonschema.validate(summary, schema(), cls=jsonschema.Draft202012Validator)
    assert "Fairness collapse was shown to be worse than its margin in region west." in summary["headline"]
    assert summary["error"]["alpha"] == 0.05
    assert summary["error"]["parts"] == pytest.approx({"modes": 0.04, "slices": 0.01})
    assert summary["error"]["spent"] == pytest.approx(0.045)
    assert summary["slices"]["attributes"] == {"region": ["east", "north", "south", "west"]}
    assert [one["round"] for one in summary["slices"]["asked"]] == sorted(asked(west))
    text = " ".join(terminal(summary).split())
    assert "slices fairness collapse, left behind: not shown: region east" in text
    assert "worse than the margin: region west" in text
    assert "at no further epsilon; of a client's message" in text
    assert "any false alarm, all modes and rounds: at most 4%" in text
    assert "of the slices named, wrongly: at most 1%" in text
    page = render(summary)
    assert "Where it is worse" in page and "<strong>west</strong>" in page
    assert "is at most 4%" in page


def test_a_slice_with_too_few_shows_no_number_and_a_hostile_name_no_markup(tmp_path, west):
    record = play(tmp_path, 160, left_behind, slices={"by": ["region"], "floor": 60}, rounds=4)
    summary = summarise(record)
    jsonschema.validate(summary, schema(), cls=jsonschema.Draft202012Validator)
    assert "too few to say: region east, region north, region south, region west" in " ".join(terminal(summary).split())
    hostile = summarise(west)
    for one in hostile["slices"]["found"]:
        one["value"] = "<script>alert(1)</script>\x1b[31m"
    assert "<script>alert" not in render(hostile)
    assert "\x1b" not in terminal(hostile)


def test_what_a_drill_down_takes_of_full_messages_is_measured(tmp_path):
    """Utility's level far from its zero fills the messages: the bits then do not fit in, as the contract said."""

    def full(client: int) -> Mapping[str, float]:
        return {**left_behind(client), "utility/score_gain": 0.3}

    lost = summarise(play(tmp_path, 480, full))["slices"]["lost"]
    assert lost["in_drill_downs"] > lost["otherwise"] + 0.02  # a round's noise has sd .009


# --- one alpha --------------------------------------------------------------------------------------------------


def test_alpha_is_spent_once_and_shared(west):
    header = west.header
    assert header["plan"]["alpha"] == pytest.approx(0.04) and header[SLICES]["alpha"] == pytest.approx(0.01)
    ledger = DrillDowns.of(west, []).ledger
    assert ledger.spent() == pytest.approx(0.04)  # before the first round, all modes are paid for
    charges = [c for b in west.of("round") for c in b["slices"]["charges"]]
    assert [c["part"] for c in charges] == ["modes"] * 6 + ["slices"]
    assert sum(c["amount"] for c in charges) == pytest.approx(0.045)
    (drill,) = [c for c in charges if c["part"] == "slices"]
    assert (drill["mode"], drill["round"]) == (FAIRNESS, min(asked(west)))


def test_tests_that_begin_anew_pay_anew(tmp_path):
    """A run that is held, mended and re-baselined: mode 3 has a second epoch, and its half of a sixth of alpha."""
    how = {"slices": None, "policy": {"on_alarm": "hold"}, "monitor": {"rebaselines": 1}}
    held = play(tmp_path, 480, left_behind, **how)
    assert [c.id for c in ledger_of(held).rows()] == [f"modes {mode} 1" for mode in Mode]
    record = play(tmp_path, 480, healthy, rebaseline="the west was mended", **how)
    *_, last = ledger_of(record).rows()
    assert (last.id, last.round) == (f"modes {FAIRNESS} 2", held.rounds + 1)
    assert last.amount == pytest.approx(0.05 / 12)
    assert summarise(record)["error"]["spent"] == pytest.approx(7 * 0.05 / 12)


def test_without_the_table_nothing_of_it_is_there(tmp_path):
    record = play(tmp_path, 240, left_behind, slices=None)
    assert SLICES not in record.header and record.header["plan"]["alpha"] == 0.05
    assert all(SLICES not in body for body in record.of("round"))
    assert all(SLICES not in releases for releases in record.releases().values())
    assert "slices" not in (record.path.parent / "contract.toml").read_text()
    assert pipeline.replay_slices(record) == [{}] * 6


# --- resuming, replaying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5])
def test_an_interrupted_run_goes_on_to_the_same_record(west, tmp_path, at):
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.round == at and progress.done:
            raise Enough

    with pytest.raises(Enough):
        play(tmp_path, 480, left_behind, watch=stop)
    assert RunRecord.load(tmp_path).rounds == at - 1
    halves = play(tmp_path, 480, left_behind)
    assert [e.body for e in halves.entries] == [e.body for e in west.entries]
    assert halves.digest == west.digest


def test_replay_finds_a_record_that_says_more_of_slices_than_its_releases(west, tmp_path, capsys):
    assert main(["replay", str(west.path.parent)]) == 0
    forged, altered = RunRecord.open(tmp_path / "forged"), False
    for entry in west.entries:
        body = dict(entry.body)
        if entry.kind == "round" and body["slices"]["evidence"] and not altered:
            wrong = [{**e, "state": "worse than the margin"} for e in body["slices"]["evidence"]]
            body, altered = {**body, "slices": {**body["slices"], "evidence": wrong}}, True
        forged.append(entry.kind, body)
    assert main(["replay", str(tmp_path / "forged")]) == 2
    assert "the replay differs in rounds" in capsys.readouterr().err


# --- consent ----------------------------------------------------------------------------------------------------

AGREES = (
    'max_delta = 1.0\ntrusts = ["central"]\nupdates_without_noise = true\nsimulated_noise = true\nslices = {slices}\n'
)


def test_a_client_may_refuse_slices_and_is_counted_only_when_they_are_asked_for(tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "default.toml").write_text(AGREES.format(slices="true"))
    for client in (0, 1, 2):
        (folder / f"user-{client}.toml").write_text(AGREES.format(slices="false"))
    record = play(
        tmp_path / "run",
        12,
        lambda client: {f"{FAIRNESS}/tail": 1.0},
        policies=True,
        clients={"count": 12, "policies": str(folder)},
        privacy={**CENTRAL, "panel": "same", "epsilon": 50.0, "min_cohort": 4},
        rounds=3,
    )
    rounds = asked(record)
    assert rounds and min(rounds) > 1
    refused = {b["round"]: b["refused"] for b in record.of("round")}
    assert refused == {t: {"slices_refused": 3} if t in rounds else {} for t in range(1, 4)}


def test_the_contract_lists_slices_as_only_in_a_drill_down_and_their_cost():
    setup = bare(480, {**BY_REGION, "privacy": CENTRAL})
    contract = contract_of(setup)
    assert check(contract) == []
    own = [n for n in contract.numbers if n.probe == SLICES]
    assert len(own) == 12 and all(n.purpose.startswith("only in a drill-down") for n in own)
    assert contract.slices is not None and contract.slices.floor == 10
    said = " ".join(show(contract).split())
    assert "a message that is full without it loses 11.1% to 24.1%" in said
    without = contract_of(bare(480, {"rounds": 6, "privacy": CENTRAL}))
    assert without.epsilon_per_window == contract.epsilon_per_window  # no extra epsilon
    assert without.noise_multiplier == contract.noise_multiplier


# --- what a study may say ---------------------------------------------------------------------------------------

EXAMPLE = {"unit": "example", "record": {"noise": 1.0, "clip": 1.0, "sample_rate": 0.1}, "updates": {"noise": "none"}}


@pytest.mark.parametrize(
    ("tables", "where"),
    [
        ({"slices": {"by": []}}, "slices.by"),
        ({"slices": {}}, "slices.by"),
        ({"slices": {"by": ["region", "region"]}}, "slices.by"),
        ({"slices": {"by": ["region"], "alpha_share": 1.0}}, "slices.alpha_share"),
        ({"slices": {"by": ["region"], "floor": 9}, "privacy": CENTRAL}, "slices.floor"),
        ({"slices": {"by": ["region"]}, "policy": {"on_alarm": "hold"}}, "slices"),
        ({"slices": {"by": ["region"]}, "privacy": EXAMPLE}, "slices"),
    ],
)
def test_studies_that_make_no_sense_are_told_so(tables, where):
    with pytest.raises(BadInput) as caught:
        study.parse({"privacy": {"updates": {"noise": "none"}}, **tables})
    assert [p.where for p in caught.value.problems] == [f"study: {where}"]


class Odd(Few):
    def attributes(self, client: int) -> Mapping[str, str]:
        return {"region": "north", "town": f"town {client}"}


def test_attributes_that_cannot_be_slices_are_all_named_at_once():
    parsed = study.parse({"privacy": {"trust": "none"}, "slices": {"by": ["region", "town", "regoin"]}})
    with pytest.raises(BadInput) as caught:
        slices.values_of(parsed, Odd(100))
    assert [p.what.split(" ")[0] for p in caught.value.problems] == ["'region'", "no", "101"]
    assert "did you mean 'region'?" in str(caught.value)


# --- the bundled model ------------------------------------------------------------------------------------------


def small(setup_plants: list[dict[str, Any]], folder: Path) -> Setup:
    names = ("bias", "stereotype", "calibration", "general", "safety", "persona", "domain")
    parsed = study.parse(
        {
            "seed": 301,
            "rounds": 7,
            "clients": {"count": 40, "plants": setup_plants},
            "personalize": {"lr": 8e-3, "epochs": 2, "save_personalized": 0},
            "privacy": {"trust": "none"},
            "probes": {"suites": [{"source": f"world-{name}", "limit": 12} for name in names]},
            "slices": {"by": ["region"], "floor": 10},
            "engine": {"threads": 1},
        }
    )
    return prepare(parsed, folder / "cache")


@pytest.mark.slow
def test_a_real_federation_with_a_planted_region(tmp_path):
    """Forty clients, the tag learned the other way round in the west: mode 3 alarms in round 6, then asks (55 s)."""
    record = pipeline.run(small([{"mode": FAIRNESS}], tmp_path), tmp_path / "run")
    assert named(record) == {f"{FAIRNESS} region=west"}
    assert main(["replay", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_a_real_federation_without_a_plant_names_none(tmp_path):
    record = pipeline.run(small([], tmp_path), tmp_path / "run")
    assert named(record) == set()
