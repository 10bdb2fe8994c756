"""The message's norm is bounded whatever a client measured, and sums come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.privacy import encode
from fedcanary.privacy.encode import UNIT, Encoding, shrink
from fedcanary.probes import probes
from fedcanary.types import Coord, Item, Role

ITEMS = {
    role: [Item(prompt="", choices=("x", "y"), answer=a, domain="kitchen", group="ab"[a]) for a in (0, 1)]
    for role in Role
}
LAYOUT = {p.name: p.coords for p in probes(ITEMS, 0.1)}
ENCODING = Encoding(LAYOUT)
SENT = ENCODING.sent


@st.composite
def readings(draw, extreme: bool = True):
    """Any values inside the bounds; each probe says everything, or is missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([0.0, 0.05, 1.0] if extreme else [0.02]))
    found = {}
    for probe, coords in LAYOUT.items():
        low, high = np.array([[c.low, c.high] for c in coords]).T
        centre = np.clip([c.zero for c in coords], low, high)
        ends = np.where(rng.random(len(coords)) < 0.5, low, high)
        values = np.clip(centre + size * (ends - centre) * rng.random(len(coords)) ** 0.1, low, high)
        gone = extreme and rng.random() < 0.1
        bits = np.array([c.name.endswith("missing") for c in coords])
        found[probe] = np.where(bits, float(gone), 0.0 if gone else values)
    return found


@settings(max_examples=300, deadline=None)
@given(readings())
def test_a_messages_norm_is_bounded_whatever_was_measured(said):
    message = ENCODING.message(said)
    assert message.dtype == np.int64 and message.shape == (ENCODING.size,)
    assert int((message.astype(object) ** 2).sum()) <= UNIT**2
    assert 0 <= message[-1] <= UNIT


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_shrinking_keeps_the_unit_ball(w):
    w = np.array(w)
    v = shrink(w)
    assert np.linalg.norm(v) <= 1 + 1e-12
    assert v[-1] >= 0
    if np.linalg.norm(w) <= 1:
        np.testing.assert_array_equal(v, [*w, 0.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(readings(extreme=False), min_size=1, max_size=20))
def test_sums_of_unshrunken_clients_come_back(clients):
    total = np.sum([ENCODING.message(c) for c in clients], axis=0)
    sums, lost, noise = ENCODING.read(total, len(clients), std=3.0)
    step = len(clients) / (UNIT - 10)
    assert lost == pytest.approx(0.0, abs=1e-12) and noise == pytest.approx(3.0 / UNIT, rel=1e-3)
    for probe, coords in LAYOUT.items():
        sent = [c for c in coords if c.scale is not None]
        assert sums[probe].coords == tuple(c.name for c in sent)
        for coord, total_of in zip(sent, sums[probe].total, strict=True):
            exact = sum(c[probe][[x.name for x in coords].index(coord.name)] for c in clients)
            assert total_of == pytest.approx(exact, abs=coord.scale * step + 1e-9)
            if coord.up:
                assert total_of >= exact - 1e-9  # tests rely on it


@given(readings(), readings())
def test_a_client_that_cannot_say_a_level_is_not_in_its_mean(one, two):
    """Utility's base score has its zero at one half: whoever is missing must not count as one half."""
    names = [c.name for c in LAYOUT["utility"]]
    gone = {**one, "utility": np.array([float(n == "missing") for n in names])}
    small = {p: np.clip(v, -0.01, 0.01) * 0 for p, v in two.items()}
    small["utility"] = np.array([0.7 if n == "score_base" else 0.0 for n in names])
    total = ENCODING.message({**{p: v * 0 for p, v in gone.items()}, "utility": gone["utility"]})
    sums, lost, _ = ENCODING.read(total + ENCODING.message(small), 2, 0.0)
    utility = dict(zip(sums["utility"].coords, sums["utility"].total, strict=True))
    assert utility["score_base"] / (2 - lost - utility["missing"]) == pytest.approx(0.7, abs=1e-3)


def test_details_stay_at_the_client():
    sent = {(probe, c.name) for probe, c in SENT}
    assert ("amplified_bias", "stereotype") not in sent and ("utility", "accuracy_base") not in sent
    assert ("confidence_miscalibration", "brier") not in sent and ("fairness_collapse", "score") not in sent
    assert ("alignment_erosion", "refusal") in sent and ("fairness_collapse", "tail") in sent


def test_a_coordinate_with_a_missing_bit_of_its_own_is_counted_by_it():
    names = {"x": 0.5, "x_missing": 0.0, "y": 0.5, "missing": 0.0}
    layout = {"p": tuple(Coord(name=n, low=0, high=1, purpose="", scale=1.0, zero=z) for n, z in names.items())}
    encoding = Encoding(layout)
    total = encoding.message({"p": np.array([0.7, 0, 0.4, 0])}) + encoding.message({"p": np.array([0.0, 1, 0.5, 0])})
    sums, lost, _ = encoding.read(total, 2, 0.0)
    assert lost == 0.0
    np.testing.assert_allclose(sums["p"].total, [0.7, 1.0, 0.9, 0.0], atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reading_that_is_not_finite_is_refused(value):
    broken = {p: np.zeros(len(c)) for p, c in LAYOUT.items()} | {"utility": np.full(len(LAYOUT["utility"]), value)}
    with pytest.raises(ValueError, match="not finite"):
        ENCODING.message(broken)


def test_a_client_without_the_bound_would_be_seen(monkeypatch):
    """The planted bug: the bound left out. The norm test above must then fail."""
    monkeypatch.setattr(encode, "shrink", lambda w: np.pad(w, ((0, 0), (0, 1))))
    layout = {"p": tuple(Coord(name=n, low=-1, high=1, purpose="x", scale=0.4) for n in "abc")}
    message = Encoding(layout).message({"p": np.ones(3)})
    assert int((message.astype(object) ** 2).sum()) > UNIT**2


@given(st.integers(1, 6), st.data())
def test_many_messages_at_once_are_the_messages_one_by_one(n, data):
    rows = [data.draw(readings()) for _ in range(n)]
    many = ENCODING.messages({probe: np.array([row[probe] for row in rows]) for probe in ENCODING.layout})
    np.testing.assert_array_equal(many, [ENCODING.message(row) for row in rows])
    sums, lost, std = ENCODING.read(np.stack([many.sum(axis=0)] * 3), n, 2.0)
    one, lost_of_one, std_of_one = ENCODING.read(many.sum(axis=0), n, 2.0)
    assert std == std_of_one
    np.testing.assert_array_equal(lost, [lost_of_one] * 3)
    for probe in ENCODING.layout:
        np.testing.assert_array_equal(sums[probe].total, [one[probe].total] * 3)
