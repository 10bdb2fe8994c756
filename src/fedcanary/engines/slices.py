"""The clients' side of a drill-down: which slices there are, and what a client says of the one it is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedcanary.clients.population import Population
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.monitor.slices import Question, SlicePlan, plan_body
from fedcanary.privacy.contract import DrillDown
from fedcanary.probes import Probe
from fedcanary.probes.slices import SLICES, Values, answer, labels, nothing
from fedcanary.study import Study
from fedcanary.types import Array, missing_bit

MOST: Final = 64  # slices of a study: more would each have too few clients, and its e-values a bar of their number


def values_of(study: Study, population: Population) -> dict[str, tuple[str, ...]]:
    """Every value of the attributes that a study asks for, sorted: public, and the same for everyone.

    Raises:
        BadInput: attributes that no client has, that tell nobody apart, or with too many values; all at once.
    """
    if study.slices is None:
        return {}
    met: dict[str, set[str]] = {}
    for client in range(len(population)):
        for name, value in population.attributes(client).items():
            met.setdefault(name, set()).add(value)
    found = {name: tuple(sorted(met.get(name, ()))) for name in study.slices.by}
    problems = []
    for name, values in found.items():
        if name not in met:
            remedy = did_you_mean(name, met) if met else "name attribute columns in clients.columns.slices"
            problems.append(Problem("slices.by", f"no client has the attribute {name!r}", remedy))
        elif len(values) < 2:
            what = f"{name!r} is {values[0]!r} at every client that has it"
            problems.append(Problem("slices.by", what, "leave it out: it tells nobody apart"))
        elif bad := [value for value in values if not value.isprintable()]:
            remedy = "mend it in the data: it will be read in contracts and reports"
            problems.append(Problem("slices.by", f"{name!r} has the value {ascii(bad[0])[:60]}", remedy))
    count = sum(map(len, found.values()))
    if count > MOST:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in found.items())
        what = f"{count} slices ({sizes}), and at most {MOST} can be told apart"
        problems.append(Problem("slices.by", what, "leave attributes out, or make their values coarser in the data"))
    if problems:
        raise BadInput(problems)
    return found


def plan_of(study: Study, values: Values) -> SlicePlan | None:
    """The plan of a study's drill-downs; None where it has none."""
    table = study.slices
    if table is None:
        return None
    return SlicePlan(
        slices=labels(values),
        alpha=study.alphas[1],
        floor=table.floor or study.privacy.min_cohort,
        rounds=table.rounds,
        horizon=study.rounds,
        disjoint=study.privacy.rotates,
    )


def header(study: Study, values: Values) -> dict[str, Any]:
    """What the record's first entry says of slices: nothing where a study has none."""
    plan = plan_of(study, values)
    return {} if plan is None else {SLICES: plan_body(plan)}


def drill_down(question: Question) -> DrillDown:
    """A question as the request puts it to clients."""
    stream = question.stream
    return DrillDown.model_validate(
        {"probe": str(question.mode), "coord": stream.coord, "kind": stream.kind, "sign": stream.sign}
    )


def said(
    values: Values,
    own: Mapping[str, str],
    asked: DrillDown | None,
    probes: Sequence[Probe],
    readings: Mapping[str, Array],
) -> Array:
    """(3 slices,) what a client with the attributes `own` says of slices in a round, given what its probes read."""
    probe = next((p for p in probes if asked is not None and p.name == asked.probe), None)
    if asked is None or probe is None:
        return nothing(values)
    by_name = dict(zip((c.name for c in probe.coords), readings[probe.name].tolist(), strict=True))
    if by_name.get("missing") or by_name.get(missing_bit(asked.coord)):
        return nothing(values)
    return answer(values, own, by_name[asked.coord], asked.kind, asked.sign)
