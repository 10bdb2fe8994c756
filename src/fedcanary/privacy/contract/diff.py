"""What a new contract would newly reveal and cost, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from fedcanary.privacy.contract.document import Contract
from fedcanary.privacy.contract.words import SEEN, describe, drill_down


class Kind(StrEnum):
    """What a change does; the value begins its sentence. All but the last two need consent."""

    REVEAL = "would newly reveal"
    COST = "would newly cost"
    WEAKEN = "would weaken"
    CHANGE = "would change"  # a program cannot judge the direction
    NARROW = "would narrow"
    RENAME = "would rename"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two contracts."""

    kind: Kind
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True, slots=True)
class Difference:
    """All differences, the grave ones first. `str` is what `contract diff` prints."""

    changes: tuple[Change, ...]

    @property
    def consent(self) -> bool:
        """Whether the client must be asked again."""
        return any(change.kind not in (Kind.NARROW, Kind.RENAME) for change in self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "the same contract"
        end = "consent is needed again" if self.consent else "nothing is revealed, charged or weakened: no new consent"
        return "\n".join([*map(str, self.changes), end])


# field: what it is in words, which direction is worse for the client ("": a program cannot judge), what that does
Rules = dict[str, tuple[str, Literal["higher", "lower", ""], Kind]]
RULES: Final[Rules] = {
    "norm": ("the bound on a client's whole message", "higher", Kind.REVEAL),
    "model": ("the base model that readings are compared with", "", Kind.CHANGE),
    "epsilon_per_panel": ("epsilon per panel", "higher", Kind.COST),
    "epsilon_per_window": ("epsilon per window", "higher", Kind.COST),
    "delta": ("delta", "higher", Kind.COST),
    "rounds": ("the rounds of a window", "higher", Kind.COST),
    "trust": ("who must be trusted", "lower", Kind.WEAKEN),
    "unit": ("who is protected", "lower", Kind.WEAKEN),
    "neighbours": ("what neighbouring cohorts differ in", "lower", Kind.WEAKEN),
    "mechanism": ("the mechanism", "lower", Kind.WEAKEN),
    "noise_source": ("where noise comes from", "lower", Kind.WEAKEN),
    "noise_multiplier": ("the noise multiplier", "lower", Kind.WEAKEN),
    "panel": ("how clients are asked", "lower", Kind.WEAKEN),
    "min_cohort": ("the fewest clients in a sum", "lower", Kind.WEAKEN),
    "dropouts": ("the share of clients that may vanish before a sum", "higher", Kind.WEAKEN),
    "population": ("the population", "lower", Kind.WEAKEN),
    "retention": ("what is kept, and how long", "", Kind.CHANGE),
    "format": ("the format", "", Kind.CHANGE),
    "title": ("the title", "", Kind.RENAME),
    "study": ("the study behind it", "", Kind.RENAME),
}
UPDATE_RULES: Final[Rules] = {
    "dimension": ("the numbers in a model update", "higher", Kind.REVEAL),
    "weighting": ("the weights of model updates", "lower", Kind.REVEAL),
    "clip": ("the bound on a model update", "higher", Kind.REVEAL),
    "noise": ("the noise multiplier of the model update", "lower", Kind.WEAKEN),
    "quantile": ("the quantile that the bound on a model update follows", "higher", Kind.REVEAL),
    "apart": ("whether updates are asked for without an answer", "higher", Kind.REVEAL),
}
EXAMPLE_RULES: Final[Rules] = {
    "noise": ("the noise multiplier of training", "lower", Kind.WEAKEN),
    "clip": ("the bound on one example's gradient", "", Kind.CHANGE),
    "sample_rate": ("the chance that an example joins a step", "higher", Kind.COST),
    "steps": ("the steps of training in a round", "higher", Kind.COST),
    "min_held_out": ("the fewest held-out examples that are spoken of", "lower", Kind.WEAKEN),
    "domains": ("a client's domains", "lower", Kind.REVEAL),
}
SLICE_RULES: Final[Rules] = {
    "probe": ("the name of what a drill-down says", "", Kind.CHANGE),
    "attributes": ("what a drill-down asks a client about itself", "", Kind.CHANGE),
    "floor": ("the fewest clients of a slice that is reported", "lower", Kind.WEAKEN),
    "rounds": ("the rounds of a drill-down", "higher", Kind.REVEAL),
    "lost_least": ("the least that a drill-down takes of a full message", "", Kind.CHANGE),
    "lost_most": ("the most that a drill-down takes of a full message", "", Kind.CHANGE),
}
NUMBER_RULES: Final[Rules] = {
    "low": ("its lower bound", "lower", Kind.REVEAL),
    "high": ("its upper bound", "higher", Kind.REVEAL),
    "scale": ("its scale (the smaller, the further it stands out of the noise)", "lower", Kind.WEAKEN),
    "zero": ("the value that says nothing", "", Kind.CHANGE),
    "reach": ("how far one example moves it", "higher", Kind.WEAKEN),
    "version": ("how it is measured", "", Kind.CHANGE),
    "purpose": ("what it is", "", Kind.CHANGE),
}
# From weak to strong. Local noise asks no trust in sums, but shows single messages: neither is above the other.
RANKS: Final = {
    **{word: 0 for word in ("none", "example", "zeroed", "same", "simulated", "examples", "public")},
    **{word: 1 for word in ("central", "client", "substituted", "rotating", "system", "uniform", "hidden")},
    "discrete_gaussian": 1,
    **{word: 2 for word in ("secure_aggregation", "local")},
}


def diff(old: Contract, new: Contract) -> Difference:
    """What the new contract would reveal, cost, weaken, change, narrow or rename; empty only if they are equal."""
    if old.text == new.text:
        return Difference(())
    found = [*_by_rules(RULES, old, new), *_numbers(old, new)]
    if old.trust == "secure_aggregation" != new.trust:
        found.append(Change(Kind.REVEAL, f"each client's own message, not only sums: {SEEN[new.trust]}"))
    was, now = set(old.suites), set(new.suites)
    found += [Change(Kind.REVEAL, f"answers to public items: {suite}") for suite in sorted(now - was)]
    found += [Change(Kind.NARROW, f"answers to public items no more: {suite}") for suite in sorted(was - now)]
    if old.updates and new.updates:
        found += _by_rules(UPDATE_RULES, old.updates, new.updates)
    elif new.updates:
        found.append(Change(Kind.REVEAL, f"the model update: {describe(new.updates, new.unit)}"))
    elif old.updates:
        found.append(Change(Kind.NARROW, "the model update, sent no more"))
    was, now = (set(c.examples.exact) if c.examples else set() for c in (old, new))
    found += [Change(Kind.REVEAL, f"without noise, after training with it: {probe}") for probe in sorted(now - was)]
    found += [Change(Kind.NARROW, f"without noise no more: {probe}") for probe in sorted(was - now)]
    if old.examples and new.examples:
        found += _by_rules(EXAMPLE_RULES, old.examples, new.examples)
    if old.slices and new.slices:
        found += _by_rules(SLICE_RULES, old.slices, new.slices)
    elif new.slices:
        found.append(Change(Kind.REVEAL, f"where a client stands, in drill-downs: {drill_down(new.slices)}"))
    elif old.slices:
        found.append(Change(Kind.NARROW, "where a client stands, asked no more"))
    order = list(Kind)
    return Difference(tuple(sorted(found, key=lambda change: order.index(change.kind))))


def _by_rules(rules: Rules, old: Any, new: Any, name: str = "") -> Iterable[Change]:
    for field, (label, worse, kind) in rules.items():
        was, now = getattr(old, field), getattr(new, field)
        if repr(was) == repr(now):
            continue
        higher = _below(was, now)
        if worse and (higher or _below(now, was)):
            found = kind if higher == (worse == "higher") else Kind.NARROW
        else:
            found = Kind.RENAME if kind is Kind.RENAME else Kind.CHANGE
        yield Change(found, f"{name}{label}, {_word(now)} instead of {_word(was)}")


def _below(a: Any, b: Any) -> bool:
    """Whether a is surely below b; what has no order is not."""
    a, b = (RANKS.get(x) if isinstance(x, str) else x for x in (a, b))
    return a is not None and b is not None and bool(a < b)


def _word(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _numbers(old: Contract, new: Contract) -> Iterable[Change]:
    """Numbers that differ are paired by name; what is left has come or gone."""
    gone = [n for n in old.numbers if n not in new.numbers]
    readers: dict[tuple[Kind, str], list[str]] = {}
    for n in new.numbers:
        if n in old.numbers:
            continue
        was = next((other for other in gone if other.key == n.key), None)
        if was is None:
            read = f"read by {', '.join(n.readers)}"
            yield Change(Kind.REVEAL, f"{n.purpose} [{n.key}, {n.low!r} to {n.high!r}, {read}]")
            continue
        gone.remove(was)
        yield from _by_rules(NUMBER_RULES, was, n, f"{n.key}: ")
        for reader in set(was.readers) ^ set(n.readers):
            kind = Kind.REVEAL if reader in n.readers else Kind.NARROW
            readers.setdefault((kind, reader), []).append(n.key)
    for n in gone:
        yield Change(Kind.NARROW, f"{n.purpose} [{n.key}], asked no more")
    for (kind, reader), keys in sorted(readers.items()):
        verb = "also" if kind is Kind.REVEAL else "no longer"
        yield Change(kind, f"{reader} {verb} reads {', '.join(keys)}")
