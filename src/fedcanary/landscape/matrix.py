"""The landscape: 12 benchmarks x 6 modes as published, and a row 13 that is computed from figures and never stated.

The 12 rows are those of Oh & Bui (arXiv 2606.00947; PROVENANCE.txt beside this file), and so is the scale:
    direct   the mode's metric is reported by the benchmark's official scripts
    proxy    derivable with limited post-processing, or part of the benchmark only
    none     not addressed
Row 13 has to earn a cell. Only figures taken under a finite epsilon count; "measured" is on readings of real
federations (source `real`: they were run, or `recorded`: their clients' readings were drawn again and again).
    direct   measured: false alarms whose interval ends at or below ALPHA over at least NULL_RUNS null runs, and power
             against the mode's planted failure whose interval begins at or above POWER
    proxy    the same measured false alarms, and such power in simulation only
    none     anything else; and whatever else there is, a measured false-alarm interval that begins above ALPHA
So one good figure cannot outvote a measured breach of the guarantee, while low power at few clients, which is what
few clients can give, takes nothing away from the power that more of them have.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.types import Mode

SCHEMA: Final = 1
ALPHA: Final = 0.05
NULL_RUNS: Final = 1000
POWER: Final = 0.9
HERE: Final = Path(__file__).parent
EVIDENCE: Final = HERE / "evidence.json"
NAME: Final = "fedcanary"

Level = Literal["direct", "proxy", "none"]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Text = Annotated[str, Field(min_length=1)]
Epsilon = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | Literal["inf"]


class Figure(BaseModel):
    """One measured number, with what it was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    mode: Mode
    kind: Literal["false_alarm", "power", "delay", "clear"]
    private: bool = Field(strict=True)
    """Whether it was taken under privacy noise."""
    epsilon: Epsilon | None = None
    clients: Count
    """In a round's panel."""
    source: Literal["real", "recorded", "simulated"]
    value: Number
    interval: tuple[Number, Number]
    """95%."""
    runs: Count
    condition: str = ""
    where: Text
    """Page or file, and section, that shows it and the command that made it."""

    @model_validator(mode="after")
    def _consistent(self) -> Figure:
        wrong = []
        low, high = self.interval
        if not low <= self.value <= high:
            wrong.append(f"interval: [{low:g}, {high:g}] does not hold the value {self.value:g}")
        if self.kind != "delay" and not (low >= 0 and high <= 1):
            wrong.append(f"interval: a {self.kind.replace('_', ' ')} is a share; give numbers from 0 to 1")
        if self.private and self.epsilon in (None, "inf"):
            wrong.append("epsilon: a private figure has a finite epsilon; give it, or set private to false")
        if not self.private and self.epsilon not in (None, "inf"):
            wrong.append("epsilon: without privacy it is infinite; leave it out, or set private to true")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def measured(self) -> bool:
        """Whether it comes from readings of real federations."""
        return self.source != "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The figures of a results file."""

    path: str
    made_by: str
    environment: Mapping[str, Any]
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark as published."""

    category: str
    benchmark: str
    focus: str
    cells: Mapping[Mode, Level]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of row 13: its level, every figure that earns it, and what a higher level lacks."""

    level: Level
    earned: tuple[Figure, ...] = ()
    missing: tuple[str, ...] = ()


def published() -> tuple[Row, ...]:
    """The 12 rows, in the file's order."""
    with (HERE / "benchmark_matrix.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Row(
                category=line["category"],
                benchmark=line["benchmark"],
                focus=line["primary_focus"],
                cells={mode: _level(line[mode]) for mode in Mode},
            )
            for line in csv.DictReader(file)
        )


def _level(word: str) -> Level:
    levels: Mapping[str, Level] = {"direct": "direct", "proxy": "proxy", "none": "none"}
    return levels[word]


def provenance() -> str:
    """Where the 12 rows are from, and their scale."""
    return (HERE / "PROVENANCE.txt").read_text(encoding="utf-8").strip()


def read(path: Path = EVIDENCE) -> Evidence:
    """The figures of a results file, schema 1.

    Raises:
        BadInput: every problem of the file, each with the figure it is in.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput.of(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    except ValueError as error:
        raise BadInput.of(str(path), f"is not JSON: {error}", "write it again with the benchmark's command") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        said = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise BadInput.of(f"{path}: schema", f"is {said!r}", f"this version reads schema {SCHEMA}")
    known = ("schema", "made_by", "environment", "figures")
    problems = [Problem(f"{path}: {k}", "unknown key", did_you_mean(k, known)) for k in sorted({*body} - {*known})]
    for key, kind, name in (("made_by", str, "a text"), ("environment", dict, "a table"), ("figures", list, "a list")):
        if not isinstance(body.get(key, kind()), kind) or (key == "figures" and key not in body):
            problems.append(Problem(f"{path}: {key}", "is missing or of another kind", f"give {name}"))
    figures: list[Figure] = []
    seen: set[str] = set()
    for i, entry in enumerate(body["figures"] if isinstance(body.get("figures"), list) else ()):
        where = f"{path}: figures[{i}]"
        try:
            figures.append(Figure.model_validate(entry))
        except ValidationError as error:
            problems += [p for each in error.errors() for p in _explain(each, where)]
        named = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(named, str):
            if named in seen:
                problems.append(Problem(f"{where}.id", f"{named!r} is the id of another figure", "give each its own"))
            seen.add(named)
    if problems:
        raise BadInput(problems)
    return Evidence(
        path=str(path),
        made_by=body.get("made_by", ""),
        environment=body.get("environment", {}),
        figures=tuple(figures),
    )


def _explain(entry: Any, where: str) -> list[Problem]:
    place = ".".join([where, *(str(part) for part in entry["loc"])])
    if entry["type"] == "extra_forbidden":
        return [Problem(place, "unknown key", did_you_mean(str(entry["loc"][-1]), Figure.model_fields))]
    if entry["type"] == "missing":
        return [Problem(place, "is missing", "add it")]
    if entry["type"] == "value_error":
        lines = [line.partition(": ") for line in str(entry["ctx"]["error"]).splitlines()]
        return [Problem(f"{where}.{name}", "does not fit", what) for name, _, what in lines]
    return [Problem(place, f"{entry['input']!r} does not fit", entry["msg"])]


def cell(mode: Mode, figures: Sequence[Figure]) -> Cell:
    """What the figures earn for a mode, by the rule at the top of this file."""
    private = [f for f in figures if f.mode == mode and f.private]
    alarms = [f for f in private if f.kind == "false_alarm" and f.measured]
    quiet = [f for f in alarms if f.runs >= NULL_RUNS and f.interval[1] <= ALPHA]
    breached = [f for f in alarms if f.interval[0] > ALPHA]
    strong = [f for f in private if f.kind == "power" and f.interval[0] >= POWER]
    missing = [f"{f.id} breaches alpha: its interval begins at {f.interval[0]:g}" for f in breached]
    if not quiet:
        missing.append(
            f"false alarms under a finite epsilon, on real readings, at most {ALPHA:g} with their interval, over at "
            f"least {NULL_RUNS:,} null runs"
        )
    if not any(f.measured for f in strong):
        missing.append(f"power under a finite epsilon, on real readings, at least {POWER:g} with its interval")
    if breached or not quiet or not strong:
        return Cell(level="none", missing=tuple(missing))
    measured = [f for f in strong if f.measured]
    earned = (*quiet, *(measured or strong))
    return Cell(level="direct" if measured else "proxy", earned=earned, missing=tuple(missing))


def ours(evidence: Evidence) -> dict[Mode, Cell]:
    """Row 13, one cell for each mode."""
    return {mode: cell(mode, evidence.figures) for mode in Mode}


def shown(cell: Cell) -> tuple[Figure, ...]:
    """The figures that stand for a cell: its least favourable false alarms, and its power at the fewest clients."""
    quiet = [f for f in cell.earned if f.kind == "false_alarm"]
    strong = [f for f in cell.earned if f.kind == "power"]
    if not quiet or not strong:
        return ()
    return (
        max(quiet, key=lambda f: f.interval[1]),
        min(strong, key=lambda f: (f.clients, _finite(f.epsilon), -f.interval[0])),
    )


def _finite(epsilon: float | str | None) -> float:
    return epsilon if isinstance(epsilon, float) else math.inf
