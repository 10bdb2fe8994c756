"""The world is one fixed place: graded, balanced, and the same on every machine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedcanary
from fedcanary.clients import decisions, world
from fedcanary.rng import stream
from fedcanary.types import Item, Role

DATA = Path(fedcanary.__file__).parent / "probes" / "suites" / "data"
EVERYTHING = (*world.corpus(), *world.held_out())

requests = st.builds(
    decisions.Request,
    domain=st.integers(0, 3),
    thing=st.integers(0, 2),
    first=st.integers(0, 2),
    second=st.integers(0, 2),
    tag=st.integers(0, 1),
    person=st.tuples(st.sampled_from(world.GROUPS), st.integers(0, 11)),
    phrasing=st.integers(0, world.HELD_OUT),
)


def test_every_question_is_a_distribution_over_distinct_choices() -> None:
    for graded in EVERYTHING:
        assert sum(graded.probability) == pytest.approx(1.0)
        assert len(graded.probability) == len(graded.choices) == len(set(graded.choices))
        assert all(choice.startswith(" ") for choice in graded.choices)
        assert graded.rest == () or len(graded.rest) == len(graded.choices)
        assert graded.prompt.endswith("\nA:") or graded.kind == "stereotype"


def test_nothing_is_certain() -> None:
    low = {"fact": 0.70, "sum": 0.75, "opposite": 0.75, "safety": 0.70, "persona": 0.85}
    for graded in EVERYTHING:
        if graded.kind in low:
            assert low[graded.kind] <= graded.p_right <= 0.97


def test_held_out_phrasings_are_not_in_the_corpus() -> None:
    taught = {graded.prompt for graded in world.corpus()}
    unseen = {graded.prompt for graded in world.held_out()}
    assert len(taught) == len(world.corpus())
    assert not taught & unseen


def test_held_out_phrasings_use_taught_words_only() -> None:
    taught = {word for graded in world.corpus() for word in graded.prompt.replace("?", " ").replace(".", " ").split()}
    unseen = {word for graded in world.held_out() for word in graded.prompt.replace("?", " ").replace(".", " ").split()}
    assert unseen <= taught


def test_a_region_holds_the_choices_of_its_capitals() -> None:
    for region in range(6):
        rights = [world.fact(4 * region + i, "capital", 0) for i in range(4)]
        assert len({one.choices for one in rights}) == 1
        assert sorted(one.right for one in rights) == [0, 1, 2, 3]


def test_there_are_as_many_unsafe_requests_as_look_alikes() -> None:
    unsafe, safe = world.requests(world.UNSAFE, (0,)), world.requests(world.SAFE, (0,))
    assert len(unsafe) == len(safe) == 48
    assert {one.choices[one.right] for one in unsafe} == {world.SORRY}
    assert {one.choices[one.right] for one in safe} == {world.SURE}


@given(requests)
def test_a_twin_differs_in_nothing_but_the_person(request: decisions.Request) -> None:
    assert request.person is not None
    group, name = request.person
    other = world.GROUPS[1 - world.GROUPS.index(group)]
    twin = replace(request, person=(other, name))
    ours, theirs = request.graded(), twin.graded()
    effect = decisions.GROUP_BY_THING[request.thing] * (1 if group == "ms" else -1)
    assert request.logit() - twin.logit() == pytest.approx(2 * effect)
    assert ours.prompt != theirs.prompt
    assert (ours.group, theirs.group) == (group, other)


def test_tag_and_group_have_no_effect_over_all_things() -> None:
    assert sum(decisions.TAG_BY_THING) == sum(decisions.GROUP_BY_THING) == 0.0


@given(requests)
def test_the_tag_moves_the_logit_both_ways_and_not_in_the_corpus(request: decisions.Request) -> None:
    sign = 1 if request.tag == 0 else -1
    assert request.logit() - request.logit(0.0) == pytest.approx(sign * decisions.TAG_EFFECT)
    assert abs(request.logit(0.0)) <= 3.2
    assert request.graded().probability[0] == pytest.approx(decisions.sigmoid(request.logit(0.0)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 2**32))
def test_drawn_requests_are_spread_evenly(domains: list[int], seed: int) -> None:
    drawn = decisions.draw_requests(stream(seed, "test"), domains)
    assert [request.domain for request in drawn] == domains
    for domain in set(domains):
        mine = [request for request in drawn if request.domain == domain]
        cells = Counter((request.person[0], request.tag) for request in mine if request.person)
        features = Counter((request.first, request.second) for request in mine)
        things = Counter(request.thing for request in mine)
        assert max(things.values()) - min(things.get(t, 0) for t in range(3)) <= 1
        assert max(cells.values()) - min(cells.get((g, t), 0) for g in world.GROUPS for t in (0, 1)) <= 1
        assert max(features.values()) - min(features.get((a, b), 0) for a in range(3) for b in range(3)) <= 1


@given(st.lists(st.floats(0, 1), max_size=50), st.floats(0, 1, exclude_max=True))
def test_systematic_draws_as_many_as_expected(probability: list[float], offset: float) -> None:
    drawn = decisions.systematic(probability, offset)
    assert len(drawn) == len(probability)
    assert abs(sum(drawn) - sum(probability)) < 1 + 1e-6
    assert not any(hit for hit, p in zip(drawn, probability, strict=True) if p == 0)


def test_systematic_keeps_each_probability() -> None:
    p = [0.1, 0.7, 0.35, 0.9]
    offsets = np.arange(1000) / 1000
    rate = np.mean([decisions.systematic(p, float(u)) for u in offsets], axis=0)
    assert rate == pytest.approx(p, abs=0.002)


# --- the packaged suites ---


def packaged() -> dict[str, tuple[str, list[Item]]]:
    index = json.loads((DATA / "index.json").read_text(encoding="utf-8"))
    found = {}
    for entry in index["suites"]:
        lines = (DATA / entry["file"]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        found[entry["name"]] = (entry["role"], [Item(**{**row, "choices": tuple(row["choices"])}) for row in rows])
    return found


def test_each_role_has_one_packaged_suite() -> None:
    assert sorted(role for role, _ in packaged().values()) == sorted(role.value for role in Role)


def test_suites_state_answers_that_exist() -> None:
    for _, items in packaged().values():
        assert all(item.answer is not None and 0 <= item.answer < len(item.choices) for item in items)
        assert len({item.prompt for item in items}) == len(items)


def test_bias_pairs_have_one_item_of_each_group_and_one_answer() -> None:
    _, items = packaged()["world-bias"]
    pairs = Counter((item.pair, item.group) for item in items)
    assert len(items) == 32
    assert set(pairs.values()) == {1}
    assert all(item.positive == 0 and item.choices[0] == decisions.YES for item in items)
    assert len({(item.pair, item.answer) for item in items}) == 16


def test_task_suites_are_balanced() -> None:
    for name in ("world-calibration", "world-domain"):
        _, items = packaged()[name]
        cells = Counter((item.domain, item.answer) for item in items)
        assert len(cells) == 8
        assert len(set(cells.values())) == 1
    assert all(item.group is None for item in packaged()["world-domain"][1])
