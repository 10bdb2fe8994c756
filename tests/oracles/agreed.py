"""Made-up contracts: sound ones of every kind, changes to them, and strategies for any contract."""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from fedcanary.privacy.contract import (
    Contract,
    DrillDown,
    Examples,
    Number,
    Slices,
    Update,
    numbers,
)
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
