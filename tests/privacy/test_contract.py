"""The contract: one text, one digest, and nothing hidden by `check`, `show` or `diff`."""

from __future__ import annotations

import hashlib
import math
import random
import tomllib
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput
from fedcanary.privacy.contract import (
    Contract,
    Examples,
    Kind,
    Number,
    Slices,
    Update,
    check,
    diff,
    load,
    load_policy,
    numbers,
    parse,
    show,
)
from fedcanary.privacy.contract.check import gaussian_delta
from fedcanary.privacy.contract.diff import EXAMPLE_RULES, NUMBER_RULES, RULES, SLICE_RULES, UPDATE_RULES
from fedcanary.privacy.encode import Encoding
from oracles.agreed import (
    BASE,
    BY_EXAMPLE,
    CONTRACTS,
    EXACT,
    LAYOUT,
    LOCAL,
    NOISED,
    NONE,
    SAME,
    SENT,
    SLICED,
    VERSIONS,
    WITH_EXACT,
    WITH_NOISED,
    each,
    put,
    sliced,
    trained,
)

# The text and the digest


GOLDEN = """\
format = 1
title = "t"
study = "s"
model = "m"
suites = []
trust = "none"
unit = "client"
neighbours = "zeroed"
mechanism = "none"
noise_source = "system"
noise_multiplier = 0.0
norm = inf
epsilon_per_panel = inf
epsilon_per_window = inf
delta = 0.0
panel = "same"
rounds = 2
population = 3
min_cohort = 2
dropouts = 0.0
retention = "kept"

[updates]
dimension = 5
weighting = "uniform"
clip = inf
noise = 0.0

[[numbers]]
probe = "a"
version = "1"
coord = "x"
low = -0.1
high = 1e-07
zero = 0.0
purpose = "what x is"
readers = [
    "r",
    "server",
]
"""


def test_the_golden_text_and_its_digest():
    """Digest by `b2sum -l 256` of GOLDEN: another would make every pin in the field refuse."""
    contract = parse(GOLDEN)
    assert contract.text == GOLDEN
    assert contract.digest == "eb433fe467ea4cde79afa90d6ade91e2d132104a77ff7a36de1e2c5fcd30d40d"
    assert check(contract) == []


FAST = settings(max_examples=60, deadline=None)


@FAST
@given(CONTRACTS, CONTRACTS)
def test_any_two_contracts(a, b):
    """Round trip, digest, and `diff` silent exactly if they are the same; whatever is said can be checked and shown."""
    assert parse(a.text) == a
    assert a.digest == hashlib.blake2b(a.text.encode(), digest_size=32).hexdigest()
    assert diff(a, a).changes == () and str(diff(a, a)) == "the same contract"
    assert bool(diff(a, b).changes) == (a.digest != b.digest) == (a.text != b.text)
    check(a)
    assert all(line.isprintable() for line in (show(a) + str(diff(a, b))).splitlines())


@FAST
@given(st.randoms())
def test_the_text_does_not_depend_on_the_order_of_construction(rng: random.Random):
    def shuffled(items: Any) -> list[Any]:
        return rng.sample(list(items), len(items))

    mine = tuple(shuffled(each({"readers": shuffled(["server", "report", "server"])})))
    other = put(WITH_EXACT, numbers=mine, suites=shuffled(["b 1 d", "a 1 d"]))
    assert (
        other.text == put(WITH_EXACT, numbers=each({"readers": ("report", "server")}), suites=("a 1 d", "b 1 d")).text
    )
    tree = tomllib.loads(other.text)
    laid_out = {name: tree[name] for name in shuffled(tree)}
    laid_out["numbers"] = [{name: n[name] for name in shuffled(n)} for n in shuffled(tree["numbers"])]
    assert parse("# a comment\n" + tomli_w.dumps(laid_out)).digest == other.digest


def test_equal_values_have_one_spelling():
    assert put(BASE, norm=1, dropouts=np.float64(0.3), min_cohort=np.int64(200)).text == BASE.text
    assert put(BASE, numbers=each({"zero": -0.0}, "refusal")).text == BASE.text


# What leaves


@pytest.mark.parametrize("trust", ["secure_aggregation", "central", "local"])
def test_a_protected_contract_lists_what_the_message_holds_and_nothing_else(trust):
    listed = numbers(LAYOUT, VERSIONS, trust, readers=("server", "report"))
    sent = [(probe, coord.name) for probe, coord in Encoding(LAYOUT).sent]
    assert [(n.probe, n.coord) for n in listed] == [*sent, ("message", "lost")]
    assert all(n.scale is not None and n.readers == ("report", "server") for n in listed)


def test_without_protection_every_coordinate_leaves():
    assert {n.key for n in NONE.numbers} == {f"{probe}/{c.name}" for probe, coords in LAYOUT.items() for c in coords}
    assert all(n.scale is None for n in NONE.numbers)
    assert BASE.probes == NONE.probes == ("alignment_erosion", "utility")


# check


@pytest.mark.parametrize(
    "contract", [BASE, SAME, LOCAL, NONE, WITH_EXACT, WITH_NOISED, SLICED, put(BASE, trust="central")]
)
def test_a_sound_contract_has_no_problem(contract):
    assert check(contract) == []


UNSOUND = [
    (BASE, {"numbers": each({"low": 0.25}, "refusal")}, "numbers alignment_erosion/refusal"),
    (BASE, {"numbers": each({"scale": None}, "refusal")}, "numbers alignment_erosion/refusal"),
    (BASE, {"numbers": (*SENT, *each({"low": -0.1}, "refusal"))}, "numbers alignment_erosion/refusal"),
    (BASE, {"numbers": SENT[:-1]}, "numbers message/lost"),
    (BASE, {"numbers": each({"scale": 9.0}, "lost")}, "numbers message/lost"),
    (NONE, {"numbers": SENT}, "numbers utility/gain"),
    (NONE, {"epsilon_per_panel": 1.0}, "trust"),
    (NONE, {"noise_multiplier": 1.0}, "trust"),
    (BASE, {"trust": "none"}, "trust"),
    (NONE, {"updates": NOISED}, "updates.noise"),
    (BASE, {"updates": NOISED.model_copy(update={"clip": math.inf})}, "updates.noise"),
    (BASE, {"updates": NOISED.model_copy(update={"weighting": "examples"})}, "updates.noise"),
    (LOCAL, {"neighbours": "zeroed"}, "neighbours"),
    (BASE, {"min_cohort": 1}, "min_cohort"),
    (BASE, {"population": 199}, "min_cohort"),
    (BASE, {"delta": 0.0}, "delta"),
    (BASE, {"delta": 1e-4}, "delta"),
    (BASE, {"mechanism": "none"}, "mechanism"),
    (BASE, {"noise_multiplier": 0.0}, "mechanism"),
    (BASE, {"epsilon_per_window": math.inf}, "epsilon_per_window"),
    (BASE, {"epsilon_per_window": 0.5}, "epsilon_per_window"),
    (BASE, {"epsilon_per_window": 2.0}, "epsilon_per_window"),
    (BASE, {"unit": "example"}, "examples"),
    (BY_EXAMPLE, {"unit": "client"}, "examples"),
    (NONE, {"unit": "example", "examples": BY_EXAMPLE.examples}, "unit"),
    (BY_EXAMPLE, {"updates": NOISED}, "updates.noise"),
    (BASE, {"updates": EXACT.model_copy(update={"quantile": 0.5})}, "updates.quantile"),
    (BY_EXAMPLE, {"numbers": SENT}, "numbers alignment_erosion/refusal"),  # bounded, where it says exact
    (BASE, {"numbers": each({"reach": 1.0}, "gain")}, "numbers utility/gain"),
    (SLICED, {"slices": sliced(probe="salary")}, "slices.probe"),
    (SLICED, {"slices": sliced(floor=199)}, "slices.floor"),
    (SLICED, {"slices": sliced(lost_least=0.3)}, "slices.lost_least"),
    (BY_EXAMPLE, {"slices": sliced(probe="utility")}, "slices"),
    # prices below what the noise costs
    (BY_EXAMPLE, {"noise_multiplier": 0.02}, "epsilon_per_panel"),
    (
        BY_EXAMPLE,
        {"numbers": tuple(n.model_copy(update={"reach": None}) for n in BY_EXAMPLE.numbers)},
        "epsilon_per_panel",
    ),
    (BY_EXAMPLE, {"examples": trained(min_held_out=1)}, "epsilon_per_panel"),
    (BY_EXAMPLE, {"examples": trained(noise=0.9)}, "epsilon_per_panel"),
    (BY_EXAMPLE, {"examples": trained(sample_rate=0.2)}, "epsilon_per_panel"),
    (BY_EXAMPLE, {"examples": trained(steps=20)}, "epsilon_per_panel"),
    (BY_EXAMPLE, {"panel": "same"}, "epsilon_per_window"),
    (BY_EXAMPLE, {"neighbours": "substituted"}, "epsilon_per_panel"),
    (BY_EXAMPLE, {"examples": trained(noise=1e-9)}, "epsilon_per_panel"),  # at once, not after an hour of accounting
    (BY_EXAMPLE, {"examples": trained(steps=2**62)}, "epsilon_per_panel"),
    (BASE, {"noise_multiplier": 4.1}, "epsilon_per_panel"),
    (BASE, {"noise_multiplier": 5e-324}, "epsilon_per_panel"),
    (BASE, {"neighbours": "substituted"}, "epsilon_per_panel"),
    (BASE, {"panel": "same"}, "epsilon_per_window"),
    (BASE, {"updates": NOISED}, "epsilon_per_panel"),
    (LOCAL, {"epsilon_per_panel": 1.0, "epsilon_per_window": 1.0}, "epsilon_per_panel"),
]


@pytest.mark.parametrize(("base", "changes", "where"), UNSOUND)
def test_a_contract_that_contradicts_itself(base, changes, where):
    found = {problem.where.removeprefix("contract: "): problem for problem in check(put(base, **changes))}
    assert found[where].what and found[where].remedy


@pytest.mark.parametrize("mu", [0.05, 1 / 4.225, 1.0, 5.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_the_closed_form_is_the_hockey_stick_divergence(mu, epsilon):
    """Against the definition, integrated: the mass by which N(mu, 1) exceeds e^epsilon N(0, 1)."""
    x = np.linspace(-12, 18, 300_001)
    excess = np.exp(-((x - mu) ** 2) / 2) - np.exp(epsilon - x**2 / 2)
    direct = np.maximum(excess, 0).sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    assert gaussian_delta(epsilon, mu) == pytest.approx(direct, rel=1e-4, abs=1e-12)


# show


def test_show_says_everything_that_leaves_and_hides_no_price():
    shown = " ".join(show(WITH_EXACT).split())
    for words in (
        *(WITH_EXACT.digest, "4 numbers", "-0.25 to 0.25", "change of refusal", "[read by server]", "masked sums"),
        *("at delta 1e-06: epsilon 1 per panel", "fewer than 200", "WITHOUT NOISE", "NOT CLIPPED", BASE.retention),
    ):
        assert words in shown
    assert "NO PRIVACY" in show(NONE) and "none is sent" in show(BASE)
    assert "SIMULATED" in show(put(BASE, noise_source="simulated"))
    said = " ".join(show(BY_EXAMPLE).split())
    assert "10 steps of DP-SGD" in said and "post-processing" in said and "no noise but that of training" in said


# diff


WORSE = [
    ({"norm": 2.0}, Kind.REVEAL),
    ({"updates": EXACT}, Kind.REVEAL),
    ({"numbers": each({"low": -0.5}, "refusal")}, Kind.REVEAL),
    ({"numbers": each({"high": 0.5}, "refusal")}, Kind.REVEAL),
    ({"numbers": each({"scale": 0.1}, "refusal")}, Kind.WEAKEN),
    ({"numbers": each({"readers": ("auditor", "server")})}, Kind.REVEAL),
    ({"numbers": (*SENT, *each({"coord": "persona"}, "gain"))}, Kind.REVEAL),
    ({"suites": ("bias 1 d1", "safety 1 d0")}, Kind.REVEAL),
    ({"epsilon_per_panel": 1.5}, Kind.COST),
    ({"epsilon_per_window": math.inf}, Kind.COST),
    ({"delta": 2e-6}, Kind.COST),
    ({"unit": "example"}, Kind.WEAKEN),
    ({"updates": NOISED.model_copy(update={"quantile": 0.5})}, Kind.REVEAL),
    ({"trust": "central"}, Kind.REVEAL),
    ({"trust": "none"}, Kind.WEAKEN),
    ({"mechanism": "none"}, Kind.WEAKEN),
    ({"noise_source": "simulated"}, Kind.WEAKEN),
    ({"noise_multiplier": 4.0}, Kind.WEAKEN),
    ({"min_cohort": 199}, Kind.WEAKEN),
    ({"dropouts": 0.4}, Kind.WEAKEN),
    ({"panel": "same"}, Kind.WEAKEN),
]


@pytest.mark.parametrize(("changes", "kind"), WORSE)
def test_worse_needs_consent_and_the_way_back_does_not(changes, kind):
    worse = put(BASE, **changes)
    there, back = diff(BASE, worse), diff(worse, BASE)
    assert there.consent and kind in {c.kind for c in there.changes}
    assert not back.consent and {c.kind for c in back.changes} == {Kind.NARROW}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "m1"},
        {"retention": "sold"},
        {"suites": ("safety 1 d1",)},
        {"trust": "local"},  # no trust in sums needed, but every single message is seen
        {"numbers": each({"version": "2"}, "refusal")},
        {"numbers": each({"purpose": "something else"}, "refusal")},
        {"numbers": each({"zero": 0.1}, "refusal")},
    ],
)
def test_what_a_program_cannot_judge_needs_consent_both_ways(changes):
    other = put(BASE, **changes)
    assert diff(BASE, other).consent and diff(other, BASE).consent


def test_no_field_is_forgotten_by_diff():
    assert {*RULES, "numbers", "suites", "updates", "examples", "slices"} == set(Contract.model_fields)
    assert {*EXAMPLE_RULES, "exact"} == set(Examples.model_fields)
    assert set(UPDATE_RULES) == set(Update.model_fields)
    assert set(SLICE_RULES) == set(Slices.model_fields)
    assert {*NUMBER_RULES, "probe", "coord", "readers"} == set(Number.model_fields)


def test_drill_downs_are_in_the_words_with_their_cost_and_a_new_one_needs_consent():
    said = " ".join(show(SLICED).split())
    assert "a client says that number once more under its own region" in said
    assert "a message that is full without it loses 7.0% to 21.0%" in said
    assert "A slice of fewer than 200 clients (noisy count less 2 sd) is not reported" in said
    assert "drill-down" not in show(BASE) and "slices" not in BASE.text
    new = diff(BASE, SLICED)
    assert new.consent and any("where a client stands" in change.what for change in new.changes)
    assert not diff(SLICED, BASE).consent
    assert diff(SLICED, put(SLICED, slices=sliced(floor=250))).consent is False
    assert diff(SLICED, put(SLICED, slices=sliced(floor=201, attributes=("device", "region")))).consent


def test_the_words_of_a_difference():
    new = put(
        WITH_NOISED,
        title="b",
        min_cohort=10,
        epsilon_per_window=0.5,
        updates=EXACT,
        numbers=(SENT[0], *each({"readers": ("server", "spy")})[2:], *each({"coord": "tone"}, "refusal")[:1]),
    )
    assert str(diff(WITH_NOISED, new)).splitlines() == [
        "would newly reveal: change of refusal [alignment_erosion/tone, -0.25 to 0.25, read by server]",
        "would newly reveal: spy also reads message/lost, utility/gain",
        "would newly reveal: the weights of model updates, examples instead of uniform",
        "would newly reveal: the bound on a model update, inf instead of 1.0",
        "would weaken: the fewest clients in a sum, 10 instead of 200",
        "would weaken: the noise multiplier of the model update, 0.0 instead of 30.0",
        "would narrow: epsilon per window, 0.5 instead of 1.0",
        "would narrow: 1 if it could not say [alignment_erosion/missing], asked no more",
        "would rename: the title, b instead of a study",
        "consent is needed again",
    ]
    assert str(diff(new, put(new, study="s1"))).endswith("no new consent")


# Reading


def test_every_problem_of_a_text_is_listed_with_its_remedy(tmp_path):
    path = tmp_path / "c.toml"
    text = WITH_EXACT.text.replace('unit = "client"', 'unit = "clinet"').replace("population = 10000", "populaton = 1")
    text = text.replace("low = -0.25", "low = nan").replace("format = 1", "format = 9").replace("noise = 0.0", "")
    path.write_text(text.replace("min_cohort = 200", f"min_cohort = {10**30}"), "utf-8")
    with pytest.raises(BadInput) as caught:
        load(path)
    found = {problem.where.rpartition(": ")[2]: problem.remedy for problem in caught.value.problems}
    assert found["populaton"] == "did you mean 'population'?"
    assert "'client' or 'example'" in found["unit"]
    assert {"population", "format", "min_cohort", "updates.noise", "numbers.1.low"} <= found.keys()
    path.write_text(BASE.text, "utf-8")
    assert load(path) == BASE


@pytest.mark.parametrize(
    "text",
    [
        *("= 1", "a = " + "[" * 5_000, "a = " + "9" * 5_000, "format = 1\nformat = 1", "numbers = 3", "updates = 1"),
        BASE.text.replace("change of refusal", r"harmless\u001b[1A\u001b[2K"),  # would erase a line at a terminal
        BASE.text.replace("change of refusal", r"harmless\u202e"),  # would turn the text around
        BASE.text + '"\\u001b[2K" = 1',
    ],
)
def test_a_hostile_or_torn_text_is_bad_input_and_says_so_safely(text):
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert all(line.isprintable() for line in str(caught.value).splitlines())


def test_a_missing_or_binary_file_is_bad_input(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for read in (load, load_policy):
        for name in ("a", "b"):
            with pytest.raises(BadInput):
                read(tmp_path / name)
