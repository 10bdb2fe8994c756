"""The only door: who may build a release, what is refused, and that the charge comes first."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcanary
from fedcanary import types
from fedcanary.errors import FedcanaryError
from fedcanary.privacy import release
from fedcanary.privacy.release import UPDATE, Gate, Message, restore
from fedcanary.types import Coord

SOURCE = Path(fedcanary.__file__).parent
LAYOUT = {
    "safety": (Coord(name="delta", low=-0.25, high=0.25, purpose="x"), Coord(name="tail", low=0, high=1, purpose="x")),
    "utility": (Coord(name="score", low=0.0, high=1.0, purpose="x"),),
}


def message(safety=(0.1, 0.0), utility=(0.5,), update=(1.0, -2.0, 1.0), **more) -> Message:
    readings = {"safety": np.array(safety, dtype=float), "utility": np.array(utility, dtype=float), **more}
    return Message(readings=readings, update=np.array(update, dtype=float))


def gate(charge=lambda charge: None, round: int = 1) -> Gate:
    return Gate(round, LAYOUT, "none", charge)


def builders(tree: ast.AST, name: str) -> list[int]:
    """Lines where the class is called, copied with changes, or put together behind its constructor's back."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = [a.id for a in node.args if isinstance(a, ast.Name)]
        if called == name or (called in ("__new__", "partial") and name in given):
            found.append(node.lineno)
    return found


def test_only_the_door_builds_a_release():
    guilty = {}
    for path in SOURCE.rglob("*.py"):
        if lines := builders(ast.parse(path.read_text("utf-8")), "Release"):
            guilty[path.relative_to(SOURCE).as_posix()] = lines
    assert set(guilty) == {"privacy/release.py"}


def test_nobody_renames_a_release_to_get_around_that():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not [a for a in node.names if a.name == "Release" and a.asname not in (None, "Release")], path


def test_the_guard_itself_sees_every_way(tmp_path):
    for text in ("Release(round=1)", "types.Release(round=1)", "object.__new__(Release)", "partial(Release, round=1)"):
        assert builders(ast.parse(text), "Release") == [1]


def test_no_privacy_is_a_word_that_must_be_said():
    with pytest.raises(FedcanaryError, match="no mechanism"):
        Gate(1, LAYOUT, "", lambda charge: None)  # type: ignore[arg-type]


def test_the_charge_is_written_before_anything_is_released(monkeypatch):
    events = []

    class Watched(types.Release):
        def __init__(self, **fields):
            events.append("release")
            super().__init__(**fields)

    monkeypatch.setattr(release, "Release", Watched)
    one = gate(lambda charge: events.append(charge))
    one.put(message())
    one.put(message())
    assert events == []
    found = one.close()
    charge, *rest = events
    assert rest == ["release"] * 3
    assert (charge.round, charge.event, charge.epsilon) == (1, "NonPrivate", math.inf)
    assert {r.charge_id for r in found.values()} == {charge.id}


def test_a_charge_that_fails_leaves_no_release_behind():
    def refuse(charge):
        raise OSError("disk full")

    one = gate(refuse)
    one.put(message())
    with pytest.raises(OSError, match="disk full"):
        one.close()
    with pytest.raises(FedcanaryError):  # and asking again does not get around the ledger
        one.close()


@pytest.mark.parametrize(
    "bad",
    [
        message(safety=(0.2501, 0.0)),
        message(safety=(0.1, -1e-9)),
        message(utility=(1.0000001,)),
        message(safety=(math.nan, 0.0)),
        message(utility=(math.inf,)),
        message(safety=(0.1,)),
        message(safety=(0.1, 0.0, 0.0)),
        message(safety=((0.1, 0.0),)),
        message(update=(1.0, math.nan, 1.0)),
        message(update=(-math.inf, 0.0, 1.0)),
        message(update=((1.0, 2.0, 3.0),)),
        message(update=(1.0,)),
        message(extra=np.array([3.0])),
        message(update_=np.array([3.0])),
        Message(readings={"safety": np.array([0.1, 0.0])}, update=np.zeros(3)),
        Message(readings={**message().readings, UPDATE: np.zeros(3)}, update=np.zeros(3)),
    ],
)
def test_what_is_out_of_bounds_is_refused_whole(bad):
    charges = []
    one = gate(charges.append)
    one.put(message())
    with pytest.raises(FedcanaryError):
        one.put(bad)
    found = one.close()
    assert set(found) == {"safety", "utility", UPDATE}
    assert {r.count for r in found.values()} == {1.0}
    np.testing.assert_array_equal(found["safety"].total, [0.1, 0.0])
    np.testing.assert_array_equal(found[UPDATE].total, [1.0, -2.0, 1.0])
    assert len(charges) == 1


def test_a_gate_closes_once_and_then_lets_nobody_in():
    charges = []
    one = gate(charges.append)
    one.put(message())
    one.close()
    with pytest.raises(FedcanaryError):
        one.close()
    with pytest.raises(FedcanaryError):
        one.put(message())
    assert len(charges) == 1


def test_without_a_message_nothing_is_charged_or_released():
    charges = []
    assert gate(charges.append).close() == {}
    assert charges == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-0.25, 0.25), st.booleans(), st.floats(0, 1)), min_size=1, max_size=20))
def test_a_release_is_the_sum_and_belongs_to_nobody_else(rows):
    one = gate()
    sent = [message((d, float(b)), (u,), (d, u, 1.0)) for d, b, u in rows]
    for each in sent:
        one.put(each)
        each.update[:] = 99.0  # a client that changes its arrays afterwards changes nothing
        each.readings["safety"][:] = 99.0
    found = one.close()
    assert found["safety"].total == pytest.approx([sum(d for d, _, _ in rows), sum(b for _, b, _ in rows)])
    assert found["safety"].coords == ("delta", "tail")
    assert found["utility"].mean("score") == pytest.approx(np.mean([u for _, _, u in rows]))
    assert found[UPDATE].total[-1] == len(rows)
    for each in found.values():
        assert each.count == len(rows)
        assert (each.noise_std == 0).all() and each.noise_std.shape == each.total.shape
        assert each.sensitivity == math.inf


def test_the_charge_tells_rounds_apart():
    ids = set()
    for round in range(1, 6):
        one = gate(round=round)
        one.put(message())
        ids |= {r.charge_id for r in one.close().values()}
    assert len(ids) == 5


def test_restoring_needs_no_second_charge_and_changes_nothing():
    one = gate()
    one.put(message())
    for made in one.close().values():
        body = {name: getattr(made, name) for name in made.__dataclass_fields__}
        back = restore(body)
        for name in made.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
