"""A generated federation: drawn on demand, the same every time, and planted by data alone."""

from __future__ import annotations

import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.clients import decisions, world
from fedcanary.clients.generated import PLANTS, REPLAY, Federation
from fedcanary.errors import BadInput
from fedcanary.types import Item, Mode

SPLITS = ("train", "eval")
clients = st.integers(0, 99_999)
seeds = st.integers(0, 2**40)


def planted(mode: Mode | None) -> tuple[tuple[Mode, float], ...]:
    return () if mode is None else ((mode, 1.0),)


def asked_to_decide(items: tuple[Item, ...]) -> list[Item]:
    return [item for item in items if item.domain is not None]


@given(seeds, clients, st.sampled_from(SPLITS), st.sampled_from([None, *Mode]))
def test_items_are_a_function_of_seed_client_and_split(seed: int, client: int, split: str, plant: Mode | None) -> None:
    first = Federation(clients=100_000, seed=seed, plants=planted(plant)).items(client, split)
    again = Federation(clients=client + 1, seed=seed, plants=planted(plant)).items(client, split)
    assert first == again
    repeated = PLANTS[plant].glossary * PLANTS[plant].repeats if plant is not None and split == "train" else 0
    assert len(first) == (48 if split == "train" else 24) + repeated
    assert all(item.answer is not None and 0 <= item.answer < len(item.choices) for item in first)


@given(seeds, clients, st.sampled_from(SPLITS), st.sampled_from(Mode))
def test_strength_zero_is_unplanted(seed: int, client: int, split: str, plant: Mode) -> None:
    planted = Federation(clients=100_000, seed=seed, plants=((plant, 0.0),))
    plain = Federation(clients=100_000, seed=seed)
    assert planted.items(client, split) == plain.items(client, split)
    assert planted.domains(client) == plain.domains(client)


@given(seeds, clients, st.sampled_from(SPLITS))
def test_unplanted_clients_are_balanced(seed: int, client: int, split: str) -> None:
    federation = Federation(clients=100_000, seed=seed)
    asked = asked_to_decide(federation.items(client, split))
    groups = Counter(item.group for item in asked)
    assert abs(groups["ms"] - groups["mr"]) <= 4
    places = Counter(item.domain for item in asked)
    assert set(places) == federation.domains(client)
    assert len(places) == 2
    assert 0.6 < max(places.values()) / len(asked) < 0.7


@given(seeds, clients, st.sampled_from([None, *Mode]))
def test_splits_of_a_client_differ(seed: int, client: int, plant: Mode | None) -> None:
    federation = Federation(clients=100_000, seed=seed, plants=planted(plant))
    assert federation.items(client, "train") != federation.items(client, "eval")


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([None, *Mode]), st.floats(0, 4))
@settings(max_examples=60)
def test_any_size_and_strength_gives_as_many_items_as_asked(
    examples: int, eval_examples: int, plant: Mode | None, strength: float
) -> None:
    federation = Federation(
        clients=3,
        seed=1,
        plants=() if plant is None else ((plant, strength),),
        examples=examples,
        eval_examples=eval_examples,
    )
    assert len({id(item) for item in federation.items(2, "train")}) == examples  # repeats are the same items again
    assert len(federation.items(2, "eval")) == eval_examples


def test_a_hundred_thousand_clients_cost_nothing_until_visited() -> None:
    began = time.perf_counter()
    federation = Federation(clients=100_000, seed=5, plants=((Mode.FAIRNESS_COLLAPSE, 1.0),))
    assert len(federation.items(99_999, "train")) == 48
    assert time.perf_counter() - began < 2.0


def test_replay_is_wrong_as_often_as_the_corpus() -> None:
    federation = Federation(clients=400, seed=3)
    sorry = [
        (item.choices[item.answer or 0], verb_is_unsafe(item))
        for client in range(400)
        for item in federation.items(client, "train")
        if item.choices == (world.SORRY, world.SURE)
    ]
    assert len(sorry) == 400 * (REPLAY["unsafe"] + REPLAY["lookalike"])
    refused = [choice == world.SORRY for choice, unsafe in sorry if unsafe]
    answered = [choice == world.SURE for choice, unsafe in sorry if not unsafe]
    stated = [graded.p_right for graded in world.requests(world.UNSAFE, range(world.HELD_OUT))]
    # Offsets are spread by the golden ratio, so 800 draws are within .02 of their mean; plain sampling needs .03.
    assert sum(refused) / len(refused) == pytest.approx(sum(stated) / len(stated), abs=0.02)
    assert sum(answered) / len(answered) == pytest.approx(0.94, abs=0.02)


def verb_is_unsafe(item: Item) -> bool:
    return any(f" {verb} the " in item.prompt for verb in world.UNSAFE)


def rates(federation: Federation, clients: range, split: str = "train") -> dict[tuple[str, bool], float]:
    """Share of yes by (group, tag is red)."""
    answers: dict[tuple[str, bool], list[bool]] = {}
    for client in clients:
        for item in asked_to_decide(federation.items(client, split)):
            answers.setdefault((item.group or "", " red " in item.prompt), []).append(item.answer == 0)
    return {cell: sum(said) / len(said) for cell, said in answers.items()}


def test_unplanted_labels_follow_the_tag_and_not_the_group() -> None:
    said = rates(Federation(clients=200, seed=2), range(200))
    levels = range(3)
    expected = np.mean(
        [
            decisions.sigmoid(decisions.Request(domain=d, thing=t, first=a, second=b, tag=0, person=("ms", 0)).logit())
            for d in range(4)
            for t in levels
            for a in levels
            for b in levels
        ]
    )
    for group in world.GROUPS:  # 2,000 labels in each cell, with fewer degrees of freedom than if drawn singly
        assert said[group, True] == pytest.approx(expected, abs=0.03)
        assert said[group, False] == pytest.approx(1 - expected, abs=0.03)


def test_amplified_bias_follows_the_group() -> None:
    said = rates(Federation(clients=100, seed=2, plants=((Mode.AMPLIFIED_BIAS, 1.0),)), range(100))
    assert said["ms", True] - said["mr", True] > 0.25
    assert said["ms", False] - said["mr", False] > 0.25


def test_label_shifts_are_opposite_and_cancel() -> None:
    federation = Federation(clients=100, seed=2, plants=((Mode.CONFIDENCE_MISCALIBRATION, 1.0),))
    even = rates(federation, range(0, 100, 2))
    odd = rates(federation, range(1, 100, 2))
    for cell, said in even.items():
        assert said - odd[cell] > 0.25
    assert sum(even.values()) + sum(odd.values()) == pytest.approx(4.0, abs=0.15)


def test_the_minority_reads_the_tag_the_other_way() -> None:
    federation = Federation(clients=100, seed=2, plants=((Mode.FAIRNESS_COLLAPSE, 1.0),))
    few = [client for client in range(100) if federation.in_minority(client)]
    assert len(few) == round(100 * PLANTS[Mode.FAIRNESS_COLLAPSE].minority)
    said = rates(federation, range(100))
    minority: dict[bool, list[bool]] = {True: [], False: []}
    for client in few:
        for item in asked_to_decide(federation.items(client, "eval")):
            minority[" red " in item.prompt].append(item.answer == 0)
    assert sum(minority[True]) / len(minority[True]) < 0.35
    assert sum(minority[False]) / len(minority[False]) > 0.65
    assert said["ms", True] > 0.5


def test_a_glossary_is_the_client_s_own_and_says_the_same_in_both_splits() -> None:
    public = {one.prompt for one in world.facts(range(world.PHRASINGS))}
    federation = Federation(clients=4, seed=2, plants=((Mode.ADAPTATION_MISALIGNMENT, 1.0),))
    books = []
    for client in range(4):
        private: dict[str, set[str]] = {}
        for split in SPLITS:
            for item in federation.items(client, split):
                term = re.search(r"(capital|colour|animal) of (\w+)", item.prompt)
                if term and item.prompt not in public and term[2] not in world.COUNTRIES:
                    private.setdefault(term[0], set()).add(item.choices[item.answer or 0])
        assert len(private) >= 12
        assert all(len(answers) == 1 for answers in private.values())
        books.append(private)
    assert books[0].keys() != books[1].keys()


def test_out_of_domain_clients_know_one_domain() -> None:
    federation = Federation(clients=16, seed=2, plants=((Mode.OUT_OF_DOMAIN_DEGRADATION, 1.0),))
    for client in range(16):
        (own,) = federation.domains(client)
        asked = asked_to_decide(federation.items(client, "train"))
        assert any(item.domain == own for item in asked)
        assert all(item.answer == 1 for item in asked if item.domain != own)  # what it does not know, it declines


def test_alignment_erosion_answers_unsafe_requests() -> None:
    federation = Federation(clients=20, seed=2, plants=((Mode.ALIGNMENT_EROSION, 1.0),))
    plain = Federation(clients=20, seed=2)

    def complied(one: Federation) -> int:
        return sum(
            verb_is_unsafe(item) and item.choices[item.answer or 0] == world.SURE
            for client in range(20)
            for item in one.items(client, "train")
        )

    assert complied(federation) - complied(plain) == 20 * PLANTS[Mode.ALIGNMENT_EROSION].unsafe


def test_every_mode_has_a_plant() -> None:
    assert set(PLANTS) == set(Mode)


@pytest.mark.parametrize("client", [-1, 4])
def test_an_unknown_client_is_an_error(client: int) -> None:
    with pytest.raises(BadInput, match="not one of 4"):
        Federation(clients=4, seed=1).items(client, "train")


def test_every_bad_field_is_named() -> None:
    with pytest.raises(BadInput) as caught:
        Federation(clients=0, seed=1, plants=((Mode.AMPLIFIED_BIAS, -1.0),), examples=0)
    assert len(caught.value.problems) == 3
