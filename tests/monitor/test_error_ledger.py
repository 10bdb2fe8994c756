"""The error ledger: what fits, what is refused and with which advice, and that the record rebuilds it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcanary.errors import EXIT_REFUSED, BadInput, Refused
from fedcanary.monitor.error_ledger import (
    Budget,
    Charge,
    ErrorLedger,
    OverAlpha,
    body,
    of_drill_down,
    of_mode,
)
from fedcanary.types import Mode

BUDGET = Budget(alpha=0.05, parts={"modes": 0.04, "slices": 0.01})


def charge(id: str = "a", part: str = "slices", amount: float = 0.004, round: int = 1) -> Charge:
    return Charge(id=id, part=part, purpose="a test", round=round, mode="alignment_erosion", amount=amount)


def test_modes_are_paid_once_for_each_epoch_and_slices_by_drill_down():
    ledger = ErrorLedger(BUDGET)
    for epoch in (1, 2):
        for mode in Mode:
            ledger.charge(of_mode(mode, epoch, 1 + 5 * (epoch - 1), 0.04 / 12))
    assert ledger.spent("modes") == pytest.approx(0.04)
    assert ledger.remaining("modes") == pytest.approx(0.0, abs=1e-12)
    for number, round in enumerate((3, 8, 9), start=1):
        ledger.charge(of_drill_down(Mode.AMPLIFIED_BIAS, number, round, 0.01))
    assert [c.amount for c in ledger.rows()[12:]] == pytest.approx([0.005, 0.01 / 6, 0.01 / 12])
    assert ledger.remaining("slices") == pytest.approx(0.01 / 4)
    assert ledger.spent() == pytest.approx(ledger.spent("modes") + ledger.spent("slices"))
    assert len({c.id for c in ledger.rows()}) == 15


@given(st.integers(1, 10_000), st.floats(1e-6, 0.5))
def test_no_number_of_drill_downs_spends_more_than_their_alpha(count, alpha):
    amounts = [of_drill_down(Mode.AMPLIFIED_BIAS, n, n, alpha).amount for n in range(1, count + 1)]
    assert math.fsum(amounts) == pytest.approx(alpha * count / (count + 1))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    ledger = ErrorLedger(BUDGET)
    ledger.charge(charge(amount=0.008))
    with pytest.raises(OverAlpha) as caught:
        ledger.charge(charge("b", amount=0.004))
    assert caught.value.exit_code == EXIT_REFUSED
    assert "would reach 0.012 of 0.01" in str(caught.value)
    assert "would fit: the same at 0.00199" in str(caught.value) or "at 0.002 or less" in str(caught.value)
    assert [c.id for c in ledger.rows()] == ["a"]
    ledger.charge(charge("b", amount=ledger.remaining("slices")))  # exactly what is left does fit
    with pytest.raises(OverAlpha, match="nothing more"):
        ledger.check(charge("c", amount=1e-6))
    ledger.charge(charge("d", part="modes", amount=0.04))  # the other part is untouched by that
    with pytest.raises(OverAlpha, match="no alpha is set aside for 'rounds'"):
        ledger.charge(charge("e", part="rounds"))


def test_check_spends_nothing_and_a_charge_repeated_costs_nothing():
    ledger = ErrorLedger(BUDGET)
    ledger.check(charge())
    assert ledger.rows() == ()
    assert ledger.charge(charge()) == ledger.charge(charge()) == 0.004
    assert ledger.spent() == 0.004
    with pytest.raises(Refused, match="for something else"):
        ledger.charge(charge(amount=0.001))
    assert ledger.spent() == 0.004


@given(st.lists(st.tuples(st.sampled_from(["modes", "slices"]), st.floats(0, 0.02)), max_size=12))
def test_never_more_than_its_part_is_spent_and_the_record_rebuilds_it(asked):
    ledger = ErrorLedger(BUDGET)
    for i, (part, amount) in enumerate(asked):
        before = ledger.remaining(part)
        try:
            ledger.charge(charge(str(i), part, amount))
        except OverAlpha:
            assert amount > before
        assert ledger.spent(part) <= BUDGET.parts[part] * (1 + 1e-9)
        assert ledger.spent(part) + ledger.remaining(part) == pytest.approx(BUDGET.parts[part])
    written = json.loads(json.dumps([body(c) for c in ledger.rows()]))
    again = ErrorLedger.of(BUDGET, written)
    assert again.rows() == ledger.rows()
    assert again.spent() == ledger.spent() <= BUDGET.alpha * (1 + 1e-9)


def test_a_record_with_more_than_alpha_is_refused():
    with pytest.raises(OverAlpha):
        ErrorLedger.of(BUDGET, [body(charge(str(i))) for i in range(3)])


@pytest.mark.parametrize(
    ("alpha", "parts", "where"),
    [
        (0.0, {}, "alpha"),
        (1.0, {}, "alpha"),
        (math.nan, {}, "alpha"),
        (0.05, {"modes": -0.01}, "modes"),
        (0.05, {"modes": math.nan}, "modes"),
        (0.05, {"modes": 0.04, "slices": 0.02}, "parts"),
    ],
)
def test_budgets_that_make_no_sense_are_named(alpha, parts, where):
    with pytest.raises(BadInput) as caught:
        Budget(alpha=alpha, parts=parts)
    assert [p.where for p in caught.value.problems] == [f"error budget: {where}"]


def test_a_budget_cannot_be_changed_behind_the_ledgers_back():
    parts = {"slices": 0.01}
    budget = Budget(alpha=0.05, parts=parts)
    parts["slices"] = 1.0
    assert budget.parts["slices"] == 0.01
    with pytest.raises(TypeError):
        budget.parts["slices"] = 1.0


def test_charges_name_every_wrong_field():
    with pytest.raises(BadInput) as caught:
        Charge(id="", part="", purpose="", round=0, mode="", amount=math.nan)
    assert len(caught.value.problems) == 6
