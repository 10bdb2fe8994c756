"""The laws of probes/base.py, held by every probe on random views; and one example of each mode worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.probes import Answers, ClientView, probes
from fedcanary.probes.adaptation import AdaptationMisalignment
from fedcanary.probes.base import CLIP
from fedcanary.probes.bias import AmplifiedBias, amplification, contrasts, groups_of
from fedcanary.probes.calibration import BINS, Miscalibration
from fedcanary.probes.domain import OutOfDomain
from fedcanary.probes.erosion import AlignmentErosion
from fedcanary.probes.fairness import FairnessCollapse
from fedcanary.probes.utility import Utility
from fedcanary.types import Item, Mode, Role

NAN = float("nan")
MODELS = ("base", "received", "personalized")
GROUPS = ("a", "b", "c", "d", "e")


def instruments_for(groups, tail=0.1):
    """Every probe, with every part that public items can speak of."""
    items = {role: [Item(prompt="", choices=("x", "y"), answer=a, domain="kitchen") for a in (0, 1)] for role in Role}
    return probes({**items, Role.BIAS: [Item(prompt="", choices=("x",), group=g) for g in groups]}, tail)


ALL = instruments_for("ab")


def named(probe, reading) -> dict[str, float]:
    return dict(zip([c.name for c in probe.coords], reading.values.tolist(), strict=True))


def read(probe, view) -> dict[str, float]:
    return named(probe, probe.read(view))


# --- random views -----------------------------------------------------------------------------------------------


@st.composite
def answer_tables(draw, min_items: int = 0) -> Answers:
    n = draw(st.integers(min_items, 12))
    groups = draw(st.sampled_from([(), GROUPS[:1], GROUPS[:2], GROUPS]))
    width = draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blank = draw(st.sampled_from([0.0, 0.3, 1.0]))
    sharp = draw(st.sampled_from([1.0, 40.0]))
    items, tables = [], {which: np.zeros((n, width)) for which in MODELS}
    for i in range(n):
        c = int(rng.integers(1, width + 1))
        items.append(
            Item(
                prompt=f"{i}",
                choices=tuple("wxyz"[:c]),
                answer=None if rng.random() < 0.2 else int(rng.integers(c)),
                group=str(rng.choice(groups)) if groups and rng.random() < 0.8 else None,
                domain=None if rng.random() < 0.2 else str(rng.choice(["kitchen", "garden", "office"])),
                positive=None if rng.random() < 0.2 else int(rng.integers(c)),
            )
        )
        for table in tables.values():
            p = np.exp(sharp * rng.normal(size=c))
            table[i, :c] = p / p.sum() if c > 1 else rng.random()
            if rng.random() < blank:
                table[i] = NAN
    return Answers(items=tuple(items), **tables)


@st.composite
def views(draw) -> ClientView:
    roles = draw(st.sets(st.sampled_from(list(Role))))
    return ClientView(
        local=draw(answer_tables()),
        suites={role: draw(answer_tables()) for role in sorted(roles)},
        domains=frozenset(draw(st.sets(st.sampled_from(["kitchen", "garden"])))),
    )


@st.composite
def instruments(draw):
    groups = draw(st.sampled_from([(), GROUPS[:1], GROUPS[:2], GROUPS]))
    return instruments_for(groups, draw(st.sampled_from([0.05, 0.1])))


def reordered(answers: Answers, order: np.ndarray) -> Answers:
    tables = {which: answers.probability(which)[order] for which in MODELS}
    return Answers(items=tuple(answers.items[int(i)] for i in order), **tables)


@settings(max_examples=150, deadline=None)
@given(instruments(), views())
def test_every_value_is_inside_its_bounds_and_a_reading_is_repeatable(instruments, view):
    for probe in instruments:
        reading = probe.read(view)
        values = reading.values
        assert reading.probe == probe.name
        assert values.shape == (len(probe.coords),)
        assert values.dtype == np.float64
        for value, coord in zip(values, probe.coords, strict=True):
            assert coord.low <= value <= coord.high, (probe.name, coord.name)
        assert reading.scored >= 0
        assert reading.unscoreable >= 0
        np.testing.assert_array_equal(probe.read(view).values, values)


@settings(max_examples=100, deadline=None)
@given(instruments(), views(), st.integers(0, 2**32))
def test_the_order_of_items_does_not_matter(instruments, view, seed):
    rng = np.random.default_rng(seed)
    mixed = ClientView(
        local=reordered(view.local, rng.permutation(len(view.local))),
        suites={role: reordered(a, rng.permutation(len(a))) for role, a in view.suites.items()},
        domains=view.domains,
    )
    for probe in instruments:
        one, two = probe.read(view), probe.read(mixed)
        np.testing.assert_allclose(two.values, one.values, rtol=0, atol=1e-12)
        assert (two.scored, two.unscoreable) == (one.scored, one.unscoreable)


@settings(max_examples=100, deadline=None)
@given(instruments(), views())
def test_a_client_with_nothing_to_say_says_that_and_nothing_else(instruments, view):
    for probe in instruments:
        values = read(probe, view)
        if "missing" not in values:
            assert probe.mode is None  # utility is the curve beside the modes
            continue
        assert values["missing"] in (0.0, 1.0)
        if values["missing"] == 1.0:
            assert {n for n, v in values.items() if v != 0.0} == {n for n in values if n.endswith("missing")}


@settings(max_examples=60, deadline=None)
@given(instruments(), views())
def test_unscoreable_items_might_as_well_not_be_there(instruments, view):
    def scoreable(answers: Answers) -> Answers:
        return answers.only(~np.isnan(answers.base).any(axis=1))

    kept = {role: scoreable(a) for role, a in view.suites.items()}
    without = ClientView(local=scoreable(view.local), suites=kept, domains=view.domains)
    for probe in instruments:
        if isinstance(probe, Miscalibration) and Role.CALIBRATION in view.suites:
            continue  # a suite without items of the client's is no suite, and its own items take the place: see below
        ours, bare = probe.read(view), probe.read(without)
        np.testing.assert_allclose(ours.values, bare.values, rtol=0, atol=1e-12)
        assert bare.unscoreable == 0
        assert ours.scored == bare.scored


def test_nothing_at_all_can_be_read():
    empty = Answers(items=(), base=np.zeros((0, 2)), received=np.zeros((0, 2)), personalized=np.zeros((0, 2)))
    for suites in ({}, dict.fromkeys(Role, empty)):
        for groups in ((), ("a",), ("a", "b"), GROUPS):
            for probe in instruments_for(groups):
                values = read(probe, ClientView(local=empty, suites=suites))
                assert values.get("missing", 1.0) == 1.0
                assert all(value == float(name.endswith("missing")) for name, value in values.items())


def test_coordinates_are_named_once_and_explained():
    assert [p.mode for p in ALL if p.mode is not None] == list(Mode)
    for probe in ALL:
        names = [c.name for c in probe.coords]
        assert len(set(names)) == len(names)
        assert all(c.low < c.high and c.purpose for c in probe.coords)


# --- what each mode compares (mission, table A) -----------------------------------------------------------------

COMPARES = {
    Mode.AMPLIFIED_BIAS: {"base", "personalized"},
    Mode.CONFIDENCE_MISCALIBRATION: {"base", "personalized"},
    Mode.FAIRNESS_COLLAPSE: {"base", "received"},
    Mode.ADAPTATION_MISALIGNMENT: {"received", "personalized"},
    Mode.OUT_OF_DOMAIN_DEGRADATION: {"base", "personalized"},
    Mode.ALIGNMENT_EROSION: {"base", "received"},
}
READS = {
    Mode.AMPLIFIED_BIAS: {Role.BIAS},
    Mode.CONFIDENCE_MISCALIBRATION: {Role.CALIBRATION},
    Mode.FAIRNESS_COLLAPSE: {"local"},
    Mode.ADAPTATION_MISALIGNMENT: {Role.GENERAL, Role.SAFETY},
    Mode.OUT_OF_DOMAIN_DEGRADATION: {Role.DOMAIN, Role.GENERAL},
    Mode.ALIGNMENT_EROSION: {Role.SAFETY, Role.PERSONA},
}


def two_way(*right: float, **fields) -> Answers:
    """Items with two choices whose answer (0) has these probabilities, the same under all three models."""
    items = tuple(
        Item(prompt=f"{i}", choices=("p", "q"), answer=0, positive=0, domain="garden", group="ab"[i % 2])
        for i in range(len(right))
    )
    table = np.array([[p, 1 - p] for p in right])
    return Answers(items=items, **{which: fields.get(which, table) for which in MODELS})


def headline(probe, values: dict[str, float]) -> list[float]:
    return [values[part] for part in probe.parts]


@pytest.mark.parametrize("probe", [p for p in ALL if p.mode is not None], ids=lambda p: p.name)
def test_a_mode_compares_the_models_and_reads_the_items_that_it_is_about(probe):
    places: dict[object, Answers] = {role: two_way(0.7, 0.6, 0.8, 0.9) for role in Role}
    places["local"] = two_way(0.7, 0.6, 0.8, 0.9)

    def at(places) -> list[float]:
        suites = {role: answers for role, answers in places.items() if role != "local"}
        return headline(probe, read(probe, ClientView(local=places["local"], suites=suites)))

    assert not any(at(places))
    moved_by: set[str] = set()
    read_from: set[object] = set()
    for place in places:
        for which in MODELS:
            table = np.array([[p, 1 - p] for p in (0.61, 0.59, 0.64, 0.87)])
            if at({**places, place: two_way(0.7, 0.6, 0.8, 0.9, **{which: table})}) != at(places):
                moved_by.add(which)
                read_from.add(place)
    assert moved_by == COMPARES[probe.mode]
    assert read_from == READS[probe.mode]


# --- by hand ----------------------------------------------------------------------------------------------------


def answers_of(items, base, received=None, personalized=None) -> Answers:
    tables = [np.array(t if t is not None else base, dtype=float) for t in (base, received, personalized)]
    return Answers(items=tuple(items), base=tables[0], received=tables[1], personalized=tables[2])


def pq(*probabilities: float) -> list[list[float]]:
    return [[p, 1 - p] for p in probabilities]


def decisions(*rows: tuple[str, int]) -> list[Item]:
    """Yes or no about a group's member, yes being favourable, with the right answer."""
    return [Item(prompt="", choices=("yes", "no"), positive=0, answer=k, group=g) for g, k in rows]


NOTHING = answers_of([], np.zeros((0, 2)))


def test_bias_by_hand_with_two_groups():
    """Group a: .50 -> .62 and .50 -> .58, so +.10; group b: .40 -> .32 and one that cannot be scored, so -.08."""
    items = decisions(("a", 0), ("a", 1), ("b", 0), ("b", 0))
    suite = answers_of(items, pq(0.5, 0.5, 0.4, 0.9), None, [*pq(0.62, 0.58, 0.32), [NAN, NAN]])
    pairs = answers_of(
        [Item(prompt="", choices=("she", "he"))] * 2, pq(0.5, 0.4), None, pq(0.7, 0.5)
    )  # +.2 and +.1 towards the stereotype
    # own items: predicted gap |.9 - .4| = .5; the data says yes to 1 of 2 and 0 of 1: gap .5 -> amplification 0
    local = answers_of(decisions(("a", 0), ("a", 1), ("b", 1)), pq(0.5, 0.5, 0.5), None, pq(1.0, 0.8, 0.4))
    probe = AmplifiedBias(("a", "b"), 0.1)
    values = read(probe, ClientView(local=local, suites={Role.BIAS: suite, Role.STEREOTYPE: pairs}))
    assert values == pytest.approx(
        {
            "contrast:a": 0.18,
            "square:a": 0.0324,
            "tpr:a": 0.12 - (-0.08),  # only items whose right answer is the favourable one
            "tpr:a_missing": 0.0,
            "amplification": 0.0,
            "amplification_missing": 0.0,
            "stereotype": 0.15,
            "stereotype_missing": 0.0,
            "tail": 1.0,
            "severe": 0.0,
            "missing": 0.0,
        }
    )
    assert probe.read(ClientView(local=local, suites={Role.BIAS: suite})).unscoreable == 1
    alone = read(probe, ClientView(local=NOTHING, suites={Role.BIAS: suite}))  # not measured is not zero
    assert [alone[f"{name}_missing"] for name in ("stereotype", "amplification", "tpr:a")] == [1.0, 1.0, 0.0]
    assert alone["missing"] == 0.0


def test_amplification_is_the_predicted_gap_minus_the_datas_over_all_the_clients_groups():
    """Predicted .9, .5 and .2: gap .7; the data favours 1, 1 and 0 of one each: gap 1."""
    local = answers_of(decisions(("a", 0), ("b", 0), ("c", 1)), pq(0.5, 0.5, 0.5), None, pq(0.9, 0.5, 0.2))
    assert amplification(local) == pytest.approx(0.7 - 1.0)
    assert np.isnan(amplification(local.only([True, False, False])))
    bare = [Item(prompt="", choices=("yes", "no"), answer=0, group=g) for g in "ab"]
    assert np.isnan(amplification(answers_of(bare, pq(0.5, 0.5))))


def test_bias_by_hand_with_three_groups_and_the_clip():
    """Changes +.6, 0, -.3: contrasts .6 - (-.15) = .75, 0 - .15 = -.15, -.3 - .3 = -.6."""
    items = [Item(prompt="", choices=("yes", "no"), positive=0, group=g) for g in "abc"]
    suite = answers_of(items, pq(0.2, 0.5, 0.7), None, pq(0.8, 0.5, 0.4))
    values = read(AmplifiedBias(("a", "b", "c"), 0.1), ClientView(local=NOTHING, suites={Role.BIAS: suite}))
    assert [values[f"contrast:{g}"] for g in "abc"] == pytest.approx([CLIP, -0.15, -CLIP])
    assert [values[f"square:{g}"] for g in "abc"] == pytest.approx([CLIP**2, 0.0225, CLIP**2])
    assert (values["tail"], values["missing"]) == (1.0, 0.0)
    assert values["severe"] == 0.0  # the gaps were -.4, .05 and .35, and are .35, -.1 and -.25: none is much wider
    level = answers_of(items, pq(0.5, 0.5, 0.5), None, pq(0.8, 0.5, 0.4))  # a's is .35 wider
    assert read(AmplifiedBias(("a", "b", "c"), 0.1), ClientView(local=NOTHING, suites={Role.BIAS: level}))["severe"]


def test_one_group_alone_has_no_contrast():
    assert np.isnan(contrasts([Item(prompt="", choices=("x",), group="a")], np.array([0.5]), ("a",))).all()
    assert groups_of([Item(prompt="", choices=("x",), group=g) for g in ("b", None, "a", "b")]) == ("a", "b")


def test_calibration_by_hand():
    """Base: confidence .75 and right 3 of 4, ECE 0. Personalized: .95 and right 2 of 4, ECE .45."""
    items = [Item(prompt="", choices=("p", "q"), answer=k) for k in (0, 0, 0, 1)]
    suite = answers_of(items, pq(*[0.75] * 4), None, pq(0.95, 0.95, 0.05, 0.95))
    values = read(Miscalibration(0.1), ClientView(local=NOTHING, suites={Role.CALIBRATION: suite}))
    assert values["delta"] == -CLIP  # -.45, clipped
    assert values["square"] == CLIP**2
    assert (values["tail"], values["severe"], values["missing"]) == (1.0, 1.0, 0.0)
    assert values["ece"] == pytest.approx(0.45)
    assert values["overconfidence"] == pytest.approx(0.45)
    # Brier: base (3 * .25^2 + .75^2) / 4 = .1875; personalized (2 * .05^2 + 2 * .95^2) / 4 = .4525
    assert values["brier"] == pytest.approx(0.4525 - 0.1875)
    last = BINS - 1
    assert [values[f"{what}:{last}"] for what in ("n", "conf", "correct")] == pytest.approx([1.0, 0.95, 0.5])
    assert sum(values[f"n:{b}"] for b in range(BINS)) == pytest.approx(1.0)


def test_calibration_bins_by_hand():
    """Confidences .55, .55, .7, .7: two bins, (.4, .6] and (.6, .8]; right 2 of 2 and 0 of 2."""
    items = [Item(prompt="", choices=("p", "q"), answer=0)] * 4
    suite = answers_of(items, pq(0.55, 0.55, 0.7, 0.7), None, pq(0.55, 0.55, 0.3, 0.3))
    values = read(Miscalibration(0.1), ClientView(local=NOTHING, suites={Role.CALIBRATION: suite}))
    assert values["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.7)
    base = 0.5 * 0.45 + 0.5 * 0.3
    assert values["delta"] == pytest.approx(base - values["ece"])
    table = [[values[f"{what}:{b}"] for b in (2, 3)] for what in ("n", "conf", "correct")]
    np.testing.assert_allclose(table, [[0.5, 0.5], [0.275, 0.35], [0.5, 0.0]])


def test_calibration_falls_back_to_the_clients_own_items_and_leaves_free_text_out():
    items = [Item(prompt="", choices=("p", "q"), answer=0), Item(prompt="", choices=("text",), answer=0)]
    local = answers_of(items, [[0.9, 0.1], [0.3, 0.0]], None, [[0.8, 0.2], [0.3, 0.0]])
    values = read(Miscalibration(0.15), ClientView(local=local, suites={}))
    assert values["delta"] == pytest.approx(0.1 - 0.2)
    assert values["tail"] == 0.0


def test_calibration_leaves_out_what_cannot_be_scored_and_domains_that_are_not_the_clients():
    items = [Item(prompt="", choices=("p", "q"), answer=0, domain=d) for d in ("kitchen", "kitchen", "garden")]
    suite = answers_of(items, [[0.9, 0.1], [NAN, NAN], [0.9, 0.1]], None, pq(0.8, 0.1, 0.1))
    probe = Miscalibration(0.15)
    reading = probe.read(ClientView(local=NOTHING, suites={Role.CALIBRATION: suite}, domains=frozenset({"kitchen"})))
    assert named(probe, reading)["delta"] == pytest.approx(0.1 - 0.2)
    assert (reading.scored, reading.unscoreable) == (1, 1)


def test_fairness_by_hand():
    """Own items: base .7 and .8, received .3 and .7, personalized .9 and .9."""
    items = [Item(prompt="", choices=("p", "q"), answer=0)] * 2
    local = answers_of(items, pq(0.7, 0.8), pq(0.3, 0.7), pq(0.9, 0.9))
    values = read(FairnessCollapse(0.1), ClientView(local=local, suites={}))
    assert values == pytest.approx(
        {
            "delta": -0.25,
            "square": 0.0625,
            "tail": 1.0,
            "severe": 1.0,
            "missing": 0.0,
            "score": 0.5,
            "score_square": 0.25,
            "after_training": 0.15,
        }
    )


def test_free_text_is_compared_in_nats_per_token():
    """Likelihood per token .04 -> .036, which is -.105 nats (and -.004 in probability: no tail could see it)."""
    items = [Item(prompt="", choices=("text",), answer=0)] * 2
    local = answers_of(items, [[0.04], [0.08]], [[0.036], [0.072]], [[0.04], [1e-9]])
    values = read(FairnessCollapse(0.1), ClientView(local=local, suites={}))
    assert (values["delta"], values["tail"]) == pytest.approx((np.log(0.9), 1.0))
    assert values["after_training"] == pytest.approx(-0.5)  # 0 and -18 nats, clipped to -1


def test_adaptation_by_hand():
    """Two capability items lose .1 and .05; refusing loses .3 while answering gains .3: no part hides another."""
    items = [Item(prompt="", choices=tuple("wxyz"), answer=2)] * 2
    after = [[0.1, 0.1, 0.5, 0.3], [0.1, 0.1, 0.55, 0.25]]
    general = answers_of(items, [[0.0, 0.1, 0.9, 0.0]] * 2, [[0.2, 0.1, 0.6, 0.1]] * 2, after)
    requests = [Item(prompt="", choices=("no", "yes"), answer=k) for k in (0, 1)]
    safety = answers_of(requests, pq(0.2, 0.2), pq(0.9, 0.4), pq(0.6, 0.1))
    probe = AdaptationMisalignment(tail=0.1)
    values = read(probe, ClientView(local=NOTHING, suites={Role.GENERAL: general, Role.SAFETY: safety}))
    expected = {"general": -0.075, "refusal": -CLIP, "compliance": CLIP}
    expected |= {"tail": 1.0, "severe": 1.0, "missing": 0.0}
    expected |= {f"{p}_square": expected[p] ** 2 for p in probe.parts} | {f"{p}_missing": 0.0 for p in probe.parts}
    assert values == pytest.approx(expected)
    alone = read(probe, ClientView(local=NOTHING, suites={Role.GENERAL: general}))
    assert (alone["general"], alone["tail"], alone["missing"]) == pytest.approx((-0.075, 0.0, 0.0))
    assert (alone["refusal"], alone["refusal_missing"], alone["general_missing"]) == (0.0, 1.0, 0.0)


def test_out_of_domain_by_hand():
    """The client knows the kitchen: its own .4 -> .8; elsewhere .7 -> .5 and .9 -> .8; items of no domain are left."""
    items = [Item(prompt="", choices=("p", "q"), answer=0, domain=d) for d in ("kitchen", "garden", "office", None)]
    suite = answers_of(items, pq(0.5, 0.7, 0.9, 0.5), pq(0, 0, 0, 0), pq(0.9, 0.5, 0.8, 0.0))
    general = answers_of(items[:1], pq(0.6), None, pq(0.55))
    local = answers_of(items[:1], pq(0.4), None, pq(0.8))
    view = ClientView(local=local, suites={Role.DOMAIN: suite, Role.GENERAL: general}, domains=frozenset({"kitchen"}))
    values = read(OutOfDomain(tail=0.1), view)
    expected = {"outside": -0.15, "outside_square": 0.0225, "zero_shot": -0.05, "zero_shot_square": 0.0025}
    expected |= {"outside_missing": 0.0, "zero_shot_missing": 0.0, "in_domain": 0.4, "in_domain_missing": 0.0}
    assert values == pytest.approx(expected | {"tail": 1.0, "severe": 0.0, "missing": 0.0})
    everywhere = ClientView(local=local, suites=view.suites, domains=frozenset({"kitchen", "garden", "office"}))
    values = read(OutOfDomain(tail=0.1), everywhere)
    assert (values["outside_missing"], values["missing"]) == (1.0, 0.0)
    assert read(OutOfDomain(parts=("outside",)), everywhere)["missing"] == 1.0


def test_erosion_by_hand():
    """Unsafe refused .9 -> .8; look-alike answered .7 -> .6; persona .5 -> .46; the last model does not matter."""
    safety = [Item(prompt="", choices=("Sorry", "Sure"), answer=k) for k in (0, 1)]
    suites = {
        Role.SAFETY: answers_of(safety, pq(0.9, 0.3), pq(0.8, 0.4), pq(0.0, 1.0)),
        Role.PERSONA: answers_of([Item(prompt="", choices=("Hello", "Ugh"), answer=0)], pq(0.5), pq(0.46), pq(0.0)),
    }
    probe = AlignmentErosion(tail=0.1)
    values = read(probe, ClientView(local=NOTHING, suites=suites))
    expected = {"refusal": -0.1, "compliance": -0.1, "persona": -0.04}
    expected |= {"tail": 0.0, "severe": 0.0, "missing": 0.0}
    expected |= {f"{p}_square": expected[p] ** 2 for p in probe.parts} | {f"{p}_missing": 0.0 for p in probe.parts}
    assert values == pytest.approx(expected)


def test_only_what_public_items_can_speak_of_leaves_a_client():
    bare = {p.mode: p.parts for p in probes({Role.SAFETY: [Item(prompt="", choices=("no", "yes"), answer=0)]}, 0.1)}
    assert bare[Mode.ADAPTATION_MISALIGNMENT] == bare[Mode.ALIGNMENT_EROSION] == ("refusal",)
    assert bare[Mode.OUT_OF_DOMAIN_DEGRADATION] == bare[Mode.AMPLIFIED_BIAS] == ()
    domains = {Role.DOMAIN: [Item(prompt="", choices=("p", "q"), answer=0)]}  # of no domain: outside of none
    assert {p.mode: p.parts for p in probes(domains, 0.1)}[Mode.OUT_OF_DOMAIN_DEGRADATION] == ()


def test_utility_by_hand():
    """Probability .6 and .2 -> .9 and .4; the likelier choice is right once of two, then once of two."""
    items = [Item(prompt="", choices=("p", "q"), answer=0)] * 2
    values = read(Utility(), ClientView(local=answers_of(items, pq(0.6, 0.2), None, pq(0.9, 0.4)), suites={}))
    assert values == pytest.approx(
        {
            "score_base": 0.4,
            "score_gain": 0.25,
            "accuracy_base": 0.5,
            "accuracy_gain": 0.0,
            "missing": 0.0,
        }
    )


def test_an_item_one_model_cannot_score_counts_for_none():
    items = [Item(prompt="", choices=("p", "q"), answer=0)] * 2
    local = answers_of(items, pq(0.9, 0.2), [[NAN, NAN], [0.3, 0.7]], pq(0.8, 0.2))
    reading = FairnessCollapse(0.1).read(ClientView(local=local, suites={}))
    assert (reading.scored, reading.unscoreable) == (1, 1)
    assert named(FairnessCollapse(0.1), reading)["delta"] == pytest.approx(0.1)
    assert read(Utility(), ClientView(local=local, suites={}))["score_base"] == pytest.approx(0.2)
