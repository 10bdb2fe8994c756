"""What was tried and whether it is in use, and the page that says what each gave."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import speed

from engine_attempts.measuring import MISSED, REPEATS, Gain, gain, percent
from fedcanary.types import Array


@dataclass(frozen=True, slots=True)
class Thing:
    """What was tried, what came of it, and a reason that holds whatever is measured."""

    what: str
    use: Literal["in use", "not in use", "a setting", "measured"]
    why: str


INT8 = "int8"
THINGS = {
    "allocator": Thing(
        "freed memory is kept (`keep_memory`)", "in use", "no new pages for every tensor; the process keeps its peak"
    ),
    "stack": Thing("clients in a pass as the search chose", "measured", "found on a run's own first passes"),
    "lean": Thing("lean norms and rotary positions", "in use", "fewer passes over memory, forward and backward"),
    "mask": Thing("no attention mask for causal models", "in use", "padding is at the right, where no token looks"),
    "one_table": Thing(
        "a Function of one table of logits in place of log_softmax and an index",
        "not in use",
        "between the passes log_softmax keeps one table too",
    ),
    "cross_entropy": Thing(
        "cross_entropy in place of log_softmax and an index",
        "not in use",
        "a copy of the logits, a row for each target",
    ),
    "table": Thing(
        "our table in place of torch's AdamW",
        "in use",
        "a client has its own rate, norm, end and failure: see the remarks",
    ),
    "lower": Thing(
        "adapters in the upper half only, layers below asked once",
        "in use",
        "where `model.lora.layers` leaves lower layers without; kept for later rounds as memory allows",
    ),
    "branches": Thing(
        "four choices of 3 words as branches of one row, in place of a row each",
        "in use",
        "where the model heeds our mask and positions",
    ),
    "compile": Thing(
        "torch.compile of the backbone in place of lean parts, forward and backward",
        "not in use",
        "every shape is compiled anew, and a compiled graph does not see that other adapters are attached",
    ),
    "bfloat16": Thing(
        "frozen base in bfloat16 (`engine.precision`)", "a setting", "another model than in float32: see the remarks"
    ),
    INT8: Thing(
        "frozen linear layers in int8 (quantize_dynamic)",
        "not in use",
        "for reading only: see the remarks on training through it",
    ),
    "sdpa": Thing("attention: sdpa in place of eager", "in use", "the library's own default"),
    "threads": Thing("two threads in place of one", "measured", "more are taken only if wall time is a fifth shorter"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A thing in one cell. Seconds before and after, (repeats,), of `per` units of work."""

    thing: str
    cell: str
    before: Array
    after: Array
    per: float
    detail: str = ""

    @property
    def gain(self) -> Gain:
        """After against before."""
        return gain(self.before, self.after)

    @property
    def what(self) -> str:
        """The thing, in words."""
        return THINGS[self.thing].what + self.detail

    def line(self) -> str:
        """Of the table."""
        columns = (self.before, self.after)
        times = [f"{np.median(t) / self.per * 1e3:.3g} ({t.min() / self.per * 1e3:.3g})" for t in columns]
        found, thing = self.gain, THINGS[self.thing]
        said = f"{found.middle:.2f} [{found.low:.2f}, {found.high:.2f}] | {found.verdict}"
        return f"| {self.what} | {self.cell} | {' | '.join(times)} | {said} | {thing.use}: {thing.why} |"

    @property
    def against(self) -> bool:
        """Whether the figure speaks against what is done."""
        return (THINGS[self.thing].use, self.gain.verdict) in (("in use", "slower"), ("not in use", "faster"))


Part = tuple[list[Row], list[str]]  # of the table, and remarks below it


def table(rows: Iterable[Row]) -> list[str]:
    """Of all attempts."""
    head = ["what", "cell", "without, ms", "with, ms", "gain", "verdict", "kept or not"]
    return [f"| {' | '.join(head)} |", "|---|---|--:|--:|---|---|---|", *(row.line() for row in rows)]


def page(rows: Sequence[Row], remarks: Sequence[str], load: tuple[float, float], spent: float) -> str:
    """engine_attempts.md."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in speed.PACKAGES)
    spread = np.array(
        [np.subtract(*np.quantile(t, [0.75, 0.25])) / np.median(t) for r in rows for t in (r.before, r.after)]
    )
    against = [
        f"- {row.what} ({row.cell}): {row.gain.verdict}; {THINGS[row.thing].use}: {THINGS[row.thing].why}."
        for row in rows
        if row.against
    ]
    typical, worst = percent(float(np.median(spread))), percent(float(spread.max()))
    kept = "\n".join(against) or "Nothing."
    listed = "\n".join(table(rows))
    below = "\n\n".join("\n".join(group) for group in grouped(remarks))
    return f"""# What was tried to make stacked training and reading faster

Written by `make bench-engine` (`python benchmarks/engine_attempts`) in {spent / 60:.0f} CPU-minutes on
{speed.machine()}; {packages}. Load, one of it ours: {load[0]:.1f} at the start, {load[1]:.1f} at the end.

One thread, CPU time of the process (`time.process_time`). Both ways of a thing take turns in one process, {REPEATS}
times after a call that does not count. Median (fastest), in ms of a client-step, which is one step of one client,
unless the cell says otherwise. Timed is `fit` as a whole, with clipping and the layout of the batch, unless a row says
what is. The gain is the median ratio of neighbours, above 1 where the thing helps, in an interval that holds the true
median with 98% or more; "within noise" if it holds 1. Of {len(rows)} rows about {MISSED * len(rows):.0f} would have the
wrong word by chance if nothing made a difference. The middle half of a column's repeats spans {typical} of its median
(median of all columns; at worst {worst}). Where both ways should give the same losses (lean parts, mask,
log-probabilities, lower layers, attention), the script stops if they do not.

{listed}

## Where a figure speaks against what is done

{kept}

## Remarks

{below}
"""


def grouped(lines: Sequence[str]) -> list[list[str]]:
    """Paragraphs; a table's lines stay together, with the line before it and an empty line between."""
    groups: list[list[str]] = []
    for line in lines:
        if groups and (not line or line.startswith("|")):
            groups[-1] += [line]
        else:
            groups.append([line])
    return [[*g[:-1]] if not g[-1] else g for g in groups]
