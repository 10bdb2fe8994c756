"""From a study to everything a run needs, or to one error that lists all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedcanary import record as records
from fedcanary.clients.data import Columns, read
from fedcanary.clients.generated import Federation
from fedcanary.clients.partition import FilePopulation, PartitionSpec, partition
from fedcanary.clients.population import Population
from fedcanary.engines.slices import values_of
from fedcanary.engines.stacking import keep_memory
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.models import adapters
from fedcanary.models import base as models
from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel
from fedcanary.personalize import Method, method
from fedcanary.probes import Probe, probes, suites
from fedcanary.probes.base import asked, merge
from fedcanary.rng import derive
from fedcanary.study import Study
from fedcanary.types import Coord, Item, Role, Suite


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A study's parts, loaded and checked."""

    study: Study
    base: BaseModel
    lora: Lora
    initial: Adapter
    method: Method
    population: Population
    suites: tuple[Suite, ...]
    probes: tuple[Probe, ...]
    slices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # attributes to ask about, and their values
    cache: Path | None = None  # where public readings of the base are kept between runs

    @property
    def shared(self) -> Adapter:
        """The shared tensors every client starts from."""
        return self.method.split(self.initial).shared

    @property
    def layout(self) -> dict[str, tuple[Coord, ...]]:
        """Every number that may leave a client, by probe; a severe bit that no test asks for stays."""
        return {probe.name: asked(probe.coords, self.study.monitor.severe > 0) for probe in self.probes}

    @property
    def items(self) -> dict[Role, tuple[Item, ...]]:
        """The public items by role."""
        return {role: merge(self.suites, role) for role in Role}

    def header(self) -> dict[str, Any]:
        """What the record's first entry says of these parts."""
        return {
            "schema": records.SCHEMA,
            "study": self.study.model_dump(mode="json"),
            "digests": {
                "study": self.study.digest,
                "base_model": self.base.digest,
                "population": self.population.digest,
                "suites": {suite.name: suite.digest for suite in self.suites},
            },
            "clients": len(self.population),
            "lora": {"targets": len(self.lora.targets), "parameters": sum(t.numel() for t in self.initial.values())},
            "shared_parameters": sum(t.numel() for t in self.shared.values()),
            "suites": [
                {"name": s.name, "version": s.version, "role": s.role, "items": len(s.items), "licence": s.licence}
                for s in self.suites
            ],
            "coords": {p.name: [c.name for c in p.coords] for p in self.probes},
            "environment": records.environment(),
        }


def cache() -> Path:
    """Where tables of users' data are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedcanary"


def prepare(study: Study, cache: Path) -> Setup:
    """Load everything a study names.

    Raises:
        BadInput: every problem of model, suites and data together.
    """
    keep_memory()
    problems: list[Problem] = []
    base = _try(problems, lambda: load_base(study).on(_device(study)))
    loaded = _try(problems, lambda: load_suites(study))
    population = _try(problems, lambda: _population(study, cache))
    asked = _try(problems, lambda: values_of(study, population)) if population is not None else {}
    lora = None
    if base is not None:
        lora = _try(problems, lambda: lora_of(study, base))
    if problems or base is None or lora is None or loaded is None or population is None:
        raise BadInput(problems)
    initial = adapters.initial(base, lora, derive(study.seed, "adapter"))
    return Setup(
        study=study,
        base=base,
        lora=lora,
        initial=initial,
        method=method(study.personalize.method, study.personalize.mu),
        population=population,
        suites=loaded,
        probes=probes(
            {role: merge(loaded, role) for role in Role},
            study.probes.tail,
            study.probes.generate and study.model.task == "causal",
            pooled=study.monitor.pooled > 0,
            spread=study.monitor.spread > 0,
        ),
        slices=asked or {},
        cache=cache,
    )


def _try(problems: list[Problem], make: Any) -> Any:
    try:
        return make()
    except BadInput as error:
        problems += error.problems
        return None


def load_base(study: Study) -> BaseModel:
    """The study's base model, on the CPU."""
    table = study.model
    return models.load(
        table.source,
        task=table.task,
        revision=table.revision,
        labels=table.labels,
        max_length=table.max_length,
        dtype=getattr(torch, study.engine.precision),
    )


def lora_of(study: Study, base: BaseModel) -> Lora:
    """The layers that the study's adapters are on."""
    table = study.model.lora
    return adapters.find_targets(base, r=table.r, alpha=table.alpha, targets=table.targets, layers=table.layers)


def _device(study: Study) -> torch.device:
    engine = study.engine
    there = torch.cuda.is_available() and study.privacy.unit == "client"  # private training of examples is the CPU's
    if engine.device == "cuda" and not there:
        why, remedy = "this torch sees no GPU", 'install a CUDA build of torch, or say "auto"'
        if torch.cuda.is_available():
            why, remedy = 'the unit "example" trains on the CPU', 'say "auto" or "cpu"'
        raise BadInput.of("engine.device", why, remedy)
    return torch.device("cuda" if there and engine.device != "cpu" else "cpu")


def load_suites(study: Study) -> tuple[Suite, ...]:
    """The study's own suites, and the packaged ones of every role the study has none for."""
    problems: list[Problem] = []
    own: list[Suite] = []
    for table in study.probes.suites:
        pick = suites.Pick(where=table.where, at_most=table.limit)
        suite = _try(problems, lambda t=table, p=pick: suites.load(t.source, t.role, format=t.format, pick=p))
        if suite is not None:
            own.append(suite)
    if problems:
        raise BadInput(problems)
    taken = {suite.role for suite in own}
    packaged = suites.packaged().values() if study.probes.packaged else ()
    return (*own, *(suites.load(info.name) for info in packaged if info.role not in taken))


def _population(study: Study, cache: Path) -> Population:
    table = study.clients
    if table.source == "generated":
        return Federation(
            clients=table.count,
            seed=study.seed,
            plants=tuple((plant.mode, plant.strength) for plant in table.plants),
            examples=table.examples,
            eval_examples=table.eval_examples,
        )
    columns = Columns(**table.columns.model_dump())
    data = read(Path(table.source), columns, cache, labels=table.labels or None, split=table.split)
    spec = PartitionSpec(
        kind=table.partition.kind,
        by=table.partition.by or "label",
        clients=table.partition.clients,
        alpha=table.partition.alpha,
        too_small=table.partition.too_small,
        min_examples=table.min_examples,
        eval_fraction=table.eval_fraction,
    )
    favourable = None
    if table.favourable is not None:
        if table.favourable not in data.labels:
            what = f"{table.favourable!r} is none of the labels {', '.join(data.labels) or '(there are none)'}"
            raise BadInput.of("clients.favourable", what, did_you_mean(table.favourable, data.labels))
        favourable = data.labels.index(table.favourable)
    return FilePopulation(table=data, partition=partition(data, spec, study.seed), favourable=favourable)
