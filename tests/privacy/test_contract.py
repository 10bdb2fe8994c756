"""The contract: one text, one digest, nothing hidden by `diff`, and a client that cannot be talked out of it."""

from __future__ import annotations

import hashlib
import math
import random
import tomllib
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput
from fedcanary.privacy.contract import (
    ClientPolicy,
    Contract,
    DrillDown,
    Examples,
    Kind,
    Number,
    Reason,
    Request,
    Slices,
    Update,
    check,
    diff,
    load,
    load_policy,
    numbers,
    parse,
    refusals,
    show,
    tally,
)
from fedcanary.privacy.contract.check import gaussian_delta
from fedcanary.privacy.contract.diff import EXAMPLE_RULES, NUMBER_RULES, RULES, SLICE_RULES, UPDATE_RULES
from fedcanary.privacy.encode import Encoding
from fedcanary.privacy.ledger import Budget, Ledger
from fedcanary.types import Coord

LAYOUT = {
    "alignment_erosion": (
        Coord(name="refusal", low=-0.25, high=0.25, scale=0.4, purpose="change of refusal"),
        Coord(name="missing", low=0.0, high=1.0, scale=3.0, purpose="1 if it could not say"),
        Coord(name="detail", low=0.0, high=1.0, purpose="stays at the client unless nothing is protected"),
    ),
    "utility": (Coord(name="gain", low=-1.0, high=1.0, scale=0.5, zero=0.1, purpose="gain"),),
}
VERSIONS = {"alignment_erosion": "1", "utility": "2"}
SENT = numbers(LAYOUT, VERSIONS, "secure_aggregation")
EXACT = Update(dimension=100, weighting="examples", clip=math.inf, noise=0.0)
NOISED = Update(dimension=100, weighting="uniform", clip=1.0, noise=30.0)


def put(contract: Contract, **changes: Any) -> Contract:
    """A copy with other fields, built and checked anew."""
    return Contract(**{**{name: getattr(contract, name) for name in Contract.model_fields}, **changes})


def each(change: Any, only: str = "") -> tuple[Number, ...]:
    """The numbers, with fields changed in those of one name, or in all."""
    return tuple(Number(**{**n.model_dump(), **change}) if n.coord == (only or n.coord) else n for n in SENT)


BASE = Contract(
    title="a study",
    study="s0",
    model="m0",
    suites=("safety 1 d0",),
    trust="secure_aggregation",
    unit="client",
    neighbours="zeroed",
    mechanism="discrete_gaussian",
    noise_source="system",
    noise_multiplier=4.225,
    norm=1.0,
    epsilon_per_panel=1.0,
    epsilon_per_window=1.0,
    delta=1e-6,
    panel="rotating",
    rounds=12,
    population=10_000,
    min_cohort=200,
    dropouts=0.3,
    retention="releases stay in the run's record; messages are not kept",
    numbers=SENT,
)
SAME = put(BASE, panel="same", epsilon_per_window=4.2)
LOCAL = put(BASE, trust="local", neighbours="substituted", epsilon_per_panel=2.2, epsilon_per_window=2.2)
WITH_EXACT, WITH_NOISED = put(BASE, updates=EXACT), put(BASE, updates=NOISED, noise_multiplier=4.3)
NONE = put(
    BASE,
    trust="none",
    mechanism="none",
    noise_multiplier=0.0,
    norm=math.inf,
    epsilon_per_panel=math.inf,
    epsilon_per_window=math.inf,
    delta=0.0,
    numbers=numbers(LAYOUT, VERSIONS, "none"),
)

# Examples are the unit: noised numbers of the clients' own items, exact ones of public items, training that pays.
BY_EXAMPLE = put(
    BASE,
    unit="example",
    population=12,
    min_cohort=2,
    noise_multiplier=1.0,
    epsilon_per_panel=3.8,
    epsilon_per_window=3.8,
    updates=Update(dimension=100, weighting="uniform", clip=math.inf, noise=0.0),
    examples=Examples(
        noise=1.0,
        clip=1.0,
        sample_rate=0.1,
        steps=10,
        min_held_out=20,
        exact=("alignment_erosion",),
        domains="hidden",
    ),
    numbers=numbers(
        LAYOUT, VERSIONS, "secure_aggregation", exact=("alignment_erosion",), reaches={"utility": {"gain": 1.0}}
    ),
)


# Drill-downs: three numbers of one slice, and what the contract says of them.
SLICE = (
    Coord(name="difference:region=north", low=-0.25, high=0.25, scale=0.4, purpose="only in a drill-down"),
    Coord(name="clients:region=north", low=0.0, high=1.0, scale=2.5, purpose="only in a drill-down"),
)
SLICED = put(
    BASE,
    slices=Slices(probe="slices", attributes=("region",), floor=200, rounds=3, lost_least=0.07, lost_most=0.21),
    numbers=numbers({**LAYOUT, "slices": SLICE}, {**VERSIONS, "slices": "1"}, "secure_aggregation"),
)
DRILL = DrillDown(probe="alignment_erosion", coord="refusal", kind="mean", sign=-1)


def sliced(**changes: Any) -> Slices:
    """How slices are asked for, changed."""
    return Slices(**{**SLICED.slices.model_dump(), **changes})


def trained(**changes: Any) -> Examples:
    """How clients train, changed."""
    return Examples(**{**BY_EXAMPLE.examples.model_dump(), **changes})


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


def values(hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this type may be given; its constraints may still refuse some."""
    if get_origin(hint) is Annotated:
        return values(get_args(hint)[0])
    if get_origin(hint) in (UnionType, Union):
        return st.one_of(*(values(option) for option in get_args(hint)))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), min_size=1, max_size=2).map(tuple)
    if hint in (Number, Update, Examples, Slices):
        hints = get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{name: values(hints[name]) for name in hint.model_fields})
    text = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6)
    floats = st.floats(0.0, 0.9, exclude_min=True) | st.sampled_from([1e-300, 0.5])
    return {str: text, NoneType: st.none(), float: floats}.get(hint, st.integers(1, 2**63 - 1))


HINTS = get_type_hints(Contract, include_extras=True)
CONTRACTS = st.builds(Contract, **{name: values(HINTS[name]) for name in Contract.model_fields})
CHANGES = st.sampled_from(sorted(HINTS.keys() & Contract.model_fields.keys())).flatmap(
    lambda name: values(HINTS[name]).map(lambda value: {name: value})
)
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


# The client


ALL = ("alignment_erosion", "utility")
ASK = {"contract": BASE.digest, "round": 1, "probes": ALL, "update": False, "cohort": 200}


def asked_for(contract: Contract, asked: Any, own: Any, **known: Any) -> set[Reason]:
    """Why a client with this policy refuses; `known` is what it knows itself, where that is not the usual."""
    request = {**ASK, "contract": contract.digest, **asked}
    known = {"sends": SENT, "spent": (0.0, 0.0), "answered": 0, **known}
    found = refusals(contract, ClientPolicy(**own), request, **known)
    assert all(": " in refusal.sentence for refusal in found), "each sentence carries its remedy"
    assert len({refusal.reason for refusal in found}) == len(found)
    return {refusal.reason for refusal in found}


ANSWERED = [
    (BASE, {}, {}, {}),
    (BASE, {"round": 12}, {"contract": BASE.digest}, {}),
    (BASE, {}, {"max_epsilon": 1.0, "max_delta": 1e-6, "min_cohort": 200}, {}),
    (BASE, {}, {"max_epsilon": 1.3}, {"spent": (0.1 + 0.2, 0.0)}),  # 0.30000000000000004
    (SAME, {}, {"max_epsilon": 4.2}, {"spent": (4.2, 1e-6), "answered": 11}),  # the window was paid for at first
    (WITH_EXACT, {"update": True}, {"updates_without_noise": True}, {}),
    (WITH_NOISED, {"update": True}, {"max_epsilon": 1.0}, {}),
    (NONE, {}, {"trusts": ("none",)}, {"sends": NONE.numbers}),
    (put(BASE, noise_source="simulated"), {}, {"simulated_noise": True}, {}),
    (BY_EXAMPLE, {"update": True}, {"units": ("example",)}, {"sends": BY_EXAMPLE.numbers}),
    (put(BASE, numbers=each({"readers": ("auditor",)})), {}, {}, {}),  # who reads is the contract's to say
    (SLICED, {"drill_down": DRILL}, {}, {"sends": SLICED.numbers}),
    (SLICED, {}, {"slices": False}, {"sends": SLICED.numbers}),
    (SLICED, {"drill_down": {**DRILL.model_dump(), "coord": "missing", "kind": "share"}}, {}, {}),
]


@pytest.mark.parametrize(("contract", "asked", "own", "known"), ANSWERED)
def test_what_is_allowed_is_answered(contract, asked, own, known):
    assert asked_for(contract, asked, own, **known) == set()


CHEAP = put(BASE, noise_multiplier=0.5)  # says epsilon 1, costs far more
REFUSED = [
    (BASE, {"contract": "0" * 64}, {}, {}, {Reason.OTHER_CONTRACT}),
    (BASE, {}, {"contract": "0" * 64}, {}, {Reason.NOT_PINNED}),
    (CHEAP, {}, {"contract": CHEAP.digest}, {}, {Reason.UNSOUND}),
    (BASE, {"probes": ("salary",)}, {}, {}, {Reason.PROBE}),
    (BASE, {"probes": ("message",)}, {}, {}, {Reason.PROBE}),
    (BASE, {}, {"forbidden_probes": ("utility",)}, {}, {Reason.FORBIDDEN}),
    (BASE, {"update": True}, {}, {}, {Reason.UPDATE}),
    (BASE, {"probes": ()}, {}, {}, {Reason.APART}),
    (WITH_EXACT, {"update": True}, {}, {}, {Reason.UPDATE_NOISE}),
    (BASE, {"round": 13}, {}, {}, {Reason.ROUND}),
    (BASE, {"cohort": 199}, {}, {}, {Reason.FLOOR}),
    (BASE, {}, {"min_cohort": 201}, {}, {Reason.OWN_COHORT}),
    (BASE, {}, {"trusts": ("local",)}, {}, {Reason.OWN_TRUST}),
    (NONE, {}, {}, {"sends": NONE.numbers}, {Reason.OWN_TRUST}),
    (NONE, {}, {"trusts": ("none",), "max_epsilon": 8.0}, {"sends": NONE.numbers}, {Reason.OWN_EPSILON}),
    (BY_EXAMPLE, {"update": True}, {}, {"sends": BY_EXAMPLE.numbers}, {Reason.OWN_UNIT}),
    (put(BASE, noise_source="simulated"), {}, {}, {}, {Reason.SIMULATED}),
    (BASE, {}, {"max_epsilon": 0.999}, {}, {Reason.OWN_EPSILON}),
    (BASE, {}, {"max_delta": 0.9e-6}, {}, {Reason.OWN_DELTA}),
    (BASE, {}, {"max_epsilon": 1.5}, {"spent": (0.51, 0.0)}, {Reason.OWN_EPSILON}),  # another contract's share
    (SAME, {}, {"max_epsilon": 4.1}, {}, {Reason.OWN_EPSILON}),  # one panel would fit, the window does not
    (BASE, {}, {}, {"spent": (math.nan, 0.0)}, {Reason.OWN_EPSILON}),
    (BASE, {}, {"max_epsilon": 1.0}, {"spent": (-1.0, 0.0)}, {Reason.OWN_EPSILON}),
    (BASE, {}, {}, {"answered": 1}, {Reason.ANSWERED}),  # a rotating client, whatever round it is told this is
    (SAME, {}, {}, {"answered": 12}, {Reason.ANSWERED}),
    (BASE, {}, {}, {"sends": NONE.numbers}, {Reason.UNLISTED}),  # details, unbounded, that the contract leaves out
    (BASE, {}, {}, {"sends": each({"high": 1.0}, "refusal")}, {Reason.UNLISTED}),
    (BASE, {}, {}, {"sends": each({"version": "2"})}, {Reason.UNLISTED}),
    (SLICED, {"drill_down": DRILL}, {"slices": False}, {"sends": SLICED.numbers}, {Reason.OWN_SLICES}),
    (BASE, {"drill_down": DRILL}, {}, {}, {Reason.DRILL_DOWN}),  # no slices in that contract
    (SLICED, {"drill_down": {**DRILL.model_dump(), "coord": "tone"}}, {}, {}, {Reason.DRILL_DOWN}),
    (SLICED, {"drill_down": {**DRILL.model_dump(), "kind": "share"}}, {}, {}, {Reason.DRILL_DOWN}),
    (SLICED, {"drill_down": {**DRILL.model_dump(), "probe": "utility", "coord": "gain"}}, {}, {}, {Reason.DRILL_DOWN}),
    (
        SLICED,
        {"drill_down": {"probe": "slices", "coord": "difference:region=north", "kind": "mean", "sign": 1}},
        {},
        {},
        {Reason.DRILL_DOWN},
    ),
    (
        BY_EXAMPLE,
        {},
        {"units": ("example",)},
        {"sends": BY_EXAMPLE.numbers, "trains": trained(noise=0.3)},
        {Reason.TRAINING},
    ),
    (
        BASE,
        {"cohort": 3, "probes": ("utility", "x", "y"), "update": True},
        {"forbidden_probes": ("utility",), "trusts": ("local",)},
        {},
        {Reason.PROBE, Reason.FORBIDDEN, Reason.UPDATE, Reason.FLOOR, Reason.OWN_TRUST},
    ),
]


@pytest.mark.parametrize(("contract", "asked", "own", "known", "expected"), REFUSED)
def test_what_is_refused_and_why(contract, asked, own, known, expected):
    assert asked_for(contract, asked, own, **known) == expected


@FAST
@given(CHANGES)
def test_no_change_at_all_passes_a_pin(change):
    other = put(BASE, **change)
    if other.text != BASE.text:
        assert other.digest != BASE.digest and diff(BASE, other).changes
        assert Reason.NOT_PINNED in asked_for(other, {}, {"contract": BASE.digest})
        assert asked_for(BASE, {"contract": other.digest}, {"contract": BASE.digest}) == {Reason.OTHER_CONTRACT}


JUNK = st.one_of(
    *(st.none(), st.binary(max_size=3), st.floats(), st.just(10**5_000), st.just("\x1b[2K"), st.integers(max_value=0)),
    *(st.lists(st.integers(), min_size=1, max_size=2), st.just(np.float64("nan")), st.just(["a" * 10_000] * 9)),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*ASK, "price"]), JUNK)
def test_a_hostile_request_neither_crashes_a_client_nor_passes_nor_floods_its_record(name, value):
    """Whatever is put in one field: refused, unless it means what the contract allows anyway."""
    found = refusals(BASE, ClientPolicy(), {**ASK, name: value}, sends=SENT, spent=(0.0, 0.0), answered=0)
    try:
        same = Request(**{**ASK, name: value})
    except ValueError:
        assert {refusal.reason for refusal in found} == {Reason.MALFORMED}
    else:
        allowed = same.contract == BASE.digest and set(same.probes) <= set(ALL) and not same.update
        assert bool(found) != (allowed and same.round <= 12 and same.cohort >= 200)
    assert all(refusal.sentence.isprintable() and len(refusal.sentence) < 400 for refusal in found)


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, {1: 2}, {"\x1b" * 999: 1}])
def test_what_is_no_request_at_all_is_refused(junk):
    found = refusals(BASE, ClientPolicy(), junk, sends=SENT, spent=(0.0, 0.0), answered=0)
    assert [refusal.reason for refusal in found] == [Reason.MALFORMED]


@FAST
@given(
    st.sampled_from([BASE, SAME, LOCAL]),
    st.sampled_from([1.0, 2.2, 4.2, 6.0]),
    st.lists(st.tuples(st.integers(1, 14), st.integers(150, 400)), max_size=40),
)
def test_no_sequence_of_requests_gets_more_than_the_contract_and_the_policy_allow(contract, most, asks):
    """A server that asks what it likes, against a client that answers whatever it does not refuse."""
    policy, spent, answered = ClientPolicy(contract=contract.digest, max_epsilon=most), 0.0, 0
    for round, cohort in asks:
        request = {**ASK, "contract": contract.digest, "round": round, "cohort": cohort}
        known = {"sends": SENT, "spent": (spent, contract.delta * min(answered, 1)), "answered": answered}
        if not refusals(contract, policy, request, **known):
            spent += 0.0 if answered else contract.epsilon_per_window
            answered += 1
    assert answered <= (12 if contract.panel == "same" else 1)
    assert spent <= min(most, contract.epsilon_per_window)
    assert (spent > 0) == (answered > 0)


# The policy file, and the two records of a refusal


def test_a_policy_file_is_read_and_its_mistakes_are_listed_together(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("", "utf-8")
    assert load_policy(path) == ClientPolicy()
    path.write_text(f'contract = "{BASE.digest}"\nmax_epsilon = 2\nforbidden_probes = ["utility"]', "utf-8")
    expected = ClientPolicy(contract=BASE.digest, max_epsilon=2.0, forbidden_probes=("utility",))
    assert load_policy(path, known=BASE.probes) == expected
    path.write_text('forbidden_probes = ["utilty"]', "utf-8")
    with pytest.raises(BadInput, match="did you mean 'utility'"):
        load_policy(path, known=BASE.probes)
    path.write_text(
        'contract = "abc"\nmax_epsilon = nan\nmax_delta = 2\nmin_cohort = 1\ntrusts = ["locl"]\nunits = []\n'
        'updates_without_noise = "perhaps"\nmax_epsilo = 3\n',
        "utf-8",
    )
    with pytest.raises(BadInput) as caught:
        load_policy(path)
    found = {problem.where.rpartition(": ")[2] for problem in caught.value.problems}
    assert found >= {
        *("contract", "max_epsilon", "max_delta", "min_cohort", "trusts.0", "units"),
        *("updates_without_noise", "max_epsilo"),
    }


def test_a_refusal_is_recorded_by_the_client_and_counted_by_the_server_without_a_name(tmp_path):
    with Ledger.open(tmp_path / "l.sqlite", owner="client-17", budget=Budget(epsilon=1.0, delta=1e-6)) as ledger:
        for reason in Reason:
            ledger.note_refusal(reason)
        assert ledger.refusals() == {str(reason): 1 for reason in Reason}
    assert tally([Reason.FLOOR, "trust_not_accepted", Reason.FLOOR, "client-17: Alice", "\x1b[2K"]) == {
        "cohort_below_floor": 2,
        "other": 2,
        "trust_not_accepted": 1,
    }
