"""The summary against its schema, its document, the record it came from, and independent computations."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from fedcanary.errors import BadInput
from fedcanary.pipeline import replay
from fedcanary.probes import probes
from fedcanary.probes.statistics import bin_sums, ece, masking_gap
from fedcanary.record import RunRecord
from fedcanary.report.html import render
from fedcanary.report.summary import DETAILS, LABELS, headline, schema, summarise
from fedcanary.report.text import terminal
from fedcanary.rng import stream
from fedcanary.types import Item, Mode, Role

DOCUMENT = Path(__file__).parents[2] / "docs" / "summary-schema.md"


def test_every_case_fits_the_schema_and_is_json(any_summary):
    summary = any_summary
    jsonschema.validate(summary, schema(), cls=jsonschema.Draft202012Validator)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary["modes"]) == list(Mode)
    for mode in summary["modes"].values():
        assert len(mode["per_round"]) == summary["rounds"]
        assert bool(mode["next"]) == bool(mode["why"]) == (mode["state"] == "unknown")


def test_it_is_pure_and_reads_the_record_from_disk_alike(make, any_case, any_summary):
    record = make(any_case)
    assert summarise(record) == any_summary
    assert summarise(RunRecord.load(record.path.parent)) == any_summary


def test_states_are_those_a_replay_computes(make):
    record = make("mixed")
    summary = summarise(record)
    for round, evidence in replay(record):
        for e in evidence:
            shown = summary["modes"][e["mode"]]["per_round"][round - 1]
            assert shown == [e["estimate"], *e["interval"], e["state"]]


def test_the_schema_is_itself_valid_and_refuses_strangers(summary_of):
    jsonschema.Draft202012Validator.check_schema(schema())
    good = summary_of("all_unknown")
    for spoil in (
        lambda s: s.update(extra=1),
        lambda s: s["modes"].pop("alignment_erosion"),
        lambda s: s["modes"]["amplified_bias"].update(state="pass"),
        lambda s: s["privacy"].update(epsilon=-1),
        lambda s: s["modes"]["amplified_bias"].update(client="client-7"),
    ):
        bad = copy.deepcopy(good)
        spoil(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema())


def properties(node):
    if isinstance(node, dict):
        for name, child in node.get("properties", {}).items():
            yield name, child
        for child in node.values():
            yield from properties(child)
    elif isinstance(node, list):
        for child in node:
            yield from properties(child)


def test_the_document_explains_every_field():
    text = DOCUMENT.read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_0-9.]+)`", text))
    explained |= {part for name in explained for part in name.split(".")}
    names = {name for name, _ in properties(schema())}
    assert not names - explained, f"docs/summary-schema.md does not explain {sorted(names - explained)}"


def test_a_record_without_a_header_is_bad_input(tmp_path):
    with pytest.raises(BadInput):
        summarise(RunRecord.open(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        ("all_alarm", "Utility rose from 0.60 to 0.68 over 8 rounds; all six modes failed silently: ", None),
        ("all_clear", "All six modes are clear", None),
        ("all_unknown", "all six are unknown, which is not a pass", None),
        (
            "mixed",
            "Utility fell from 0.60 to 0.54 over six rounds; two modes failed while utility fell too",
            "not a pass",
        ),
        ("held", "all since round 1.", "The run was held after round 1 of 8"),
        ("zero_rounds", "No round is complete, so nothing is known", "0 of 5 rounds"),
        ("crashed", "all six are unknown", "The run has not ended: 2 of 9 rounds are complete."),
        ("unscored", "Utility stayed at 0.50", None),
        ("nobody", "Utility is not known.", None),
    ],
)
def test_headlines(summary_of, name, first, later):
    said = summary_of(name)["headline"]
    assert first in said[0]
    assert later is None or any(later in sentence for sentence in said[1:])
    assert all(sentence.endswith(".") and ".." not in sentence for sentence in said)


def test_a_planted_failure_is_said(make):
    plants = {"clients": {"count": 6, "plants": [{"mode": "alignment_erosion", "strength": 2}]}}
    said = summarise(make("all_unknown", **plants))["headline"]
    assert any("on purpose: alignment erosion (strength 2)" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (["unknown"] * 4, "The other four are unknown, which is not a pass."),
        (["clear"] * 3, "The other three are clear."),
        (["unknown"], "The other mode is unknown, which is not a pass."),
        (["clear", "unknown", "unknown"], "Of the other three, one is clear and two are unknown, which is not a pass."),
    ],
)
def test_what_the_modes_beside_an_alarm_are(summary_of, rest, said):
    summary = summary_of("all_alarm")
    for mode, state in zip(Mode, rest, strict=False):
        summary["modes"][mode]["state"] = state
    assert said in headline(summary)


def test_no_headline_calls_unknown_fine(summary_of):
    """False reassurance is the central failure: with one mode unknown, no sentence says all is clear."""
    summary = summary_of("all_clear")
    summary["modes"]["fairness_collapse"]["state"] = "unknown"
    said = " ".join(headline(summary))
    assert "All six" not in said
    assert "five are clear and one is unknown, which is not a pass" in said


def test_epsilon_is_infinite_once_anything_left_and_counts_a_crashed_round(summary_of):
    assert summary_of("zero_rounds")["privacy"]["epsilon"] == 0.0
    crashed = summary_of("crashed")["privacy"]
    assert crashed["epsilon"] == "inf"
    assert crashed["charges"] == 6  # readings and update, in each of three rounds
    assert crashed["trust"] == "none"
    assert "no noise" in crashed["mechanism"]


def test_nothing_measured_is_null_and_never_zero(summary_of):
    for name in ("unscored", "nobody"):
        for mode in summary_of(name)["modes"].values():
            assert mode["estimate"] is None
            assert mode["interval"] == [None, None]
            assert mode["state"] == "unknown"
    rows = summary_of("nobody")["modes"]["amplified_bias"]["per_round"]
    assert [row[0] is None for row in rows] == [True, False, True]


def test_an_unscored_mode_is_told_what_it_lacks(summary_of):
    modes = summary_of("unscored")["modes"]
    assert "100% of the clients could not score it" in modes["alignment_erosion"]["why"]
    assert modes["alignment_erosion"]["next"] == "give the clients a suite of role safety or persona"


def test_spread_is_the_distribution_of_the_clients_scores(make_from):
    scores = stream(2, "scores").uniform(0.2, 0.9, 12)
    fallen = np.arange(12) < 3

    def says(t, k):
        return {
            "change": {Mode.FAIRNESS_COLLAPSE: -0.2 if fallen[k] else 0.0},
            "score": float(scores[k]),
            "utility": (0.5, 0.6),
        }

    summary = summarise(make_from(says, rounds=2, clients=12))
    for row in summary["spread"]["per_round"]:
        assert row["mean"] == pytest.approx(scores.mean())
        assert row["sd"] == pytest.approx(scores.std())
        assert row["left_behind"] == pytest.approx(0.25)
    assert set(summary["spread"]) == {"tau", "per_round"}


def test_what_noise_carries_beyond_a_probability_is_cut(make_from):
    said = summarise(make_from(lambda t, k: {"change": {}, "score": 0.5, "utility": (0.9, 1.3)}, rounds=2, clients=12))[
        "utility"
    ]
    for block in (said, said["accuracy"]):
        assert block["base"] == pytest.approx(0.9)
        assert (block["last"], block["per_round"]) == (1.0, [1.0, 1.0])


def test_masking_gap_agrees_with_the_clients_own_tables(make_from):
    bins, items, clients = 5, 20, 9
    confidence = stream(3, "confidence").uniform(0.3, 1.0, (clients, items))
    correct = (stream(3, "correct").uniform(0, 1, (clients, items)) < 0.7).astype(float)
    tables = np.array([bin_sums(confidence[k], correct[k], bins) for k in range(clients)])

    def says(t, k):
        sums = tables[k] / items
        more = {f"{what}:{b}": sums[b, i] for i, what in enumerate(("n", "conf", "correct")) for b in range(bins)}
        more["ece"] = ece(confidence[k], correct[k], bins)
        return {"change": {}, "score": 0.5, "utility": (0.5, 0.5), "more": more}

    details = summarise(make_from(says, rounds=1, clients=clients))["modes"]["confidence_miscalibration"]["details"]
    shown = {d["name"]: d["value"] for d in details}
    assert shown["masking_gap"] == pytest.approx(masking_gap(tables))
    assert shown["ece_pooled"] <= shown["ece"]


def test_the_smallest_next_step_keeps_its_promise(make_from):
    """Where it says "k times the clients that answer alike would be clear", k times the clients are clear."""

    def says(t, k):
        return {"change": {Mode.ALIGNMENT_EROSION: -0.16}, "score": 0.5, "utility": (0.5, 0.5)}

    few = summarise(make_from(says, rounds=3, clients=5))["modes"]
    found = {}
    for mode, shown in few.items():
        match = re.search(r"with ([0-9.]+) times the clients .* it would be (in alarm|clear)", shown["next"])
        assert match, shown
        found[mode] = (float(match[1]), match[2].removeprefix("in "))
    for times in {times for times, _ in found.values() if times == int(times)}:
        many = summarise(make_from(says, rounds=3, clients=int(5 * times)))["modes"]
        assert all(many[m]["state"] == state for m, (t, state) in found.items() if t == times)
    assert found[Mode.ALIGNMENT_EROSION][1] == "alarm"
    assert found[Mode.AMPLIFIED_BIAS][1] == "clear"


def test_upstream_evidence_weighs_only_modes_in_alarm(summary_of):
    summary = summary_of("mixed")
    modes = summary["modes"]
    (weighed,) = modes["alignment_erosion"]["upstream_evidence"]
    assert (weighed["mode"], weighed["edge"]) == ("adaptation_misalignment", "feedback")
    assert weighed["log10_ratio"] == pytest.approx(weighed["log10_order"] + weighed["log10_strength"])
    assert weighed["log10_ratio"] < 0  # so much erosion is not what adaptation brings
    assert modes["alignment_erosion"]["likely_upstream"] == []
    assert all(not modes[m]["upstream_evidence"] for m in modes if m != "alignment_erosion")
    words = " ".join(terminal(summary).split())
    assert "upstream alignment erosion: no alarm upstream of it explains it better than its having arisen" in words


def test_likely_upstream_is_what_explains_an_alarm_better_than_nothing(make_from):
    changes = {Mode.AMPLIFIED_BIAS: -0.22, Mode.CONFIDENCE_MISCALIBRATION: -0.045}

    def says(t, k):
        return {"change": changes, "score": 0.5, "utility": (0.5, 0.5)}

    summary = summarise(make_from(says, rounds=6, clients=200))
    calibration = summary["modes"]["confidence_miscalibration"]
    assert calibration["state"] == "alarm"
    assert calibration["likely_upstream"] == ["amplified_bias"] == [u["mode"] for u in calibration["upstream_evidence"]]
    assert 0.5 < calibration["upstream_evidence"][0]["weight"] < 1
    assert "upstream confidence miscalibration: likely upstream" in " ".join(terminal(summary).split())
    assert "Likely upstream, by the order and strength of the alarms: amplified bias" in render(summary)


def test_every_detail_is_a_coordinate_of_its_probe():
    items = {role: [Item(prompt="", choices=("x", "y"), answer=k, domain="d") for k in (0, 1)] for role in Role}
    coords = {p.name: {c.name for c in p.coords} for p in probes(items, 0.1)}
    for mode, labels in DETAILS.items():
        assert set(labels) <= coords[mode]
    assert set(LABELS) == set(Mode)


def test_no_client_is_named_or_shown_alone(summary_of):
    """Lists are as long as rounds, suites or modes: nothing in a summary has one entry for each client."""
    summary = summary_of("all_unknown")
    clients = summary["clients"]["population"]
    assert clients not in (summary["rounds"], len(summary["suites"]))

    def lists(node):
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if isinstance(node, list):
            yield node
        for child in children:
            yield from lists(child)

    by_mode = ("modes", "error")  # six modes, and six charges for their tests
    found = [item for key, value in summary.items() if key not in by_mode for item in lists(value)]
    found += [item for mode in summary["modes"].values() for item in lists(mode["per_round"])]
    assert all(len(item) != clients for item in found)


def test_the_terminal_shows_all_six_within_its_width(any_summary):
    summary = any_summary
    text = terminal(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    protected = summary["privacy"]["trust"] != "none"
    assert protected != ("epsilon is infinite" in text or "without noise" in text)
    rows = {line[:27].strip(): line[27:].split() for line in text.splitlines() if line[:27].strip()}
    for mode in summary["modes"].values():
        cells = rows[mode["label"].lower()]
        assert cells[0] == mode["state"]
        assert (cells[-1] == "silent") == mode["silent"]
    assert not re.search(r"\b(nan|None|null)\b", text)


def test_the_terminal_paints_only_when_asked(summary_of):
    summary = summary_of("mixed")
    painted = terminal(summary, colour=True)
    assert "\x1b[1;31malarm\x1b[0m" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == terminal(summary)


def test_refusals_are_counted_by_reason_and_closed_rounds_say_why(summary_of):
    summary = summary_of("protected")
    assert summary["clients"]["refused"] == {"wrong shape": 4}
    (round, why), *rest = summary["clients"]["not_opened"].items()
    assert (round, rest) == ("2", [])
    assert why == "9 clients answered, and no sum over fewer than 36 is opened"
    words = " ".join(terminal(summary, colour=False).split())
    assert "refused 4 wrong shape" in words
    assert "closed round 2: 9 clients answered" in words


def test_a_protected_run_says_what_was_spent_and_what_epsilon_does_not_cover(summary_of):
    summary = summary_of("protected")
    privacy = summary["privacy"]
    assert 0 < privacy["epsilon"] <= privacy["budget"]["epsilon"] == 4.0
    assert (privacy["trust"], privacy["updates_private"], privacy["noise"]) == (
        "secure_aggregation",
        False,
        "simulated",
    )
    assert "not in the epsilon above" in privacy["updates"]
    assert "rotating" in privacy["panel"]
    assert all(mode["noise"] > 0 for mode in summary["modes"].values())
    stayed = [d for mode in summary["modes"].values() for d in mode["details"] if d["name"] in ("ece", "stereotype")]
    assert stayed and all(d["value"] is None for d in stayed)
    assert summary["utility"]["accuracy"]["last"] is None
    words = " ".join(terminal(summary, colour=False).split())
    assert "of 4, delta 1e-06 per client" in words
    assert "the adapter updates left as exact sums, which this epsilon does not cover" in words
    assert "a simulation" in words
