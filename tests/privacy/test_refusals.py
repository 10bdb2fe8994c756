"""A client and its contract: what it answers, what it refuses, and that it cannot be talked out of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput
from fedcanary.privacy.contract import (
    ClientPolicy,
    Contract,
    Reason,
    Request,
    diff,
    load_policy,
    refusals,
    tally,
)
from fedcanary.privacy.ledger import Budget, Ledger
from oracles.agreed import (
    BASE,
    BY_EXAMPLE,
    CHANGES,
    DRILL,
    LOCAL,
    NONE,
    SAME,
    SENT,
    SLICED,
    WITH_EXACT,
    WITH_NOISED,
    each,
    put,
    trained,
)

FAST = settings(max_examples=60, deadline=None)
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
