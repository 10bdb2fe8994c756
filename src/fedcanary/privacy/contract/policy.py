"""The client's side: what it allows whatever a contract says, and why it refuses; and the server's count of that."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.privacy.contract.check import check
from fedcanary.privacy.contract.document import (
    Above0,
    Contract,
    Count,
    Digest,
    Examples,
    Number,
    Table,
    Text,
    Trust,
    Unit,
    read_file,
    read_table,
)

ROUNDING: Final = 1e-9  # relative; 0.1 + 0.2 is not over 0.3


class ClientPolicy(Table):
    """What one client allows, whatever a contract says. The ceilings hold for all that it answers in a window.

    Whatever weakens the promise must be allowed by name: trust `none`, updates without noise, simulated noise, and
    examples as the unit, where the price rests on how this client trains.
    """

    contract: Digest | None = None  # the only one it answers to; any sound contract when absent
    max_epsilon: Above0 = math.inf
    max_delta: Annotated[float, Field(ge=0, le=1)] = 1e-5
    forbidden_probes: tuple[Text, ...] = ()
    min_cohort: Annotated[int, Field(ge=2)] = 2  # a sum over one client is that client
    trusts: Annotated[tuple[Trust, ...], Field(min_length=1)] = ("secure_aggregation", "central", "local")
    units: Annotated[tuple[Unit, ...], Field(min_length=1)] = ("client",)
    updates_without_noise: bool = False
    simulated_noise: bool = False
    slices: bool = True  # whether it answers a drill-down, which costs no further epsilon


class DrillDown(Table):
    """What a request asks of slices: one number of one probe, a difference or a bit (`share`), perhaps mirrored."""

    probe: Text
    coord: Text
    kind: Literal["mean", "share"]
    sign: Literal[1, -1]


class Request(Table):
    """What a server asks of a client. It names no price and no trust: those are the contract's."""

    contract: Digest
    round: Count  # from 1
    probes: tuple[Text, ...]
    update: bool
    cohort: Count  # clients asked in this round
    drill_down: DrillDown | None = None


class Reason(StrEnum):
    """Why a client refused: stable words, and all that it tells the server."""

    MALFORMED = "malformed"
    NOT_PINNED = "contract_not_pinned"
    OTHER_CONTRACT = "other_contract"
    UNSOUND = "contract_unsound"
    UNLISTED = "number_not_in_contract"
    TRAINING = "training_not_in_contract"
    PROBE = "probe_not_in_contract"
    UPDATE = "update_not_in_contract"
    APART = "training_apart_not_in_contract"
    ROUND = "round_not_in_contract"
    ANSWERED = "already_answered"
    FLOOR = "cohort_below_floor"
    OWN_COHORT = "cohort_below_own_minimum"
    OWN_TRUST = "trust_not_accepted"
    OWN_UNIT = "unit_not_accepted"
    OWN_EPSILON = "over_own_epsilon"
    OWN_DELTA = "over_own_delta"
    FORBIDDEN = "probe_forbidden"
    UPDATE_NOISE = "update_without_noise"
    SIMULATED = "noise_simulated"
    DRILL_DOWN = "drill_down_not_in_contract"
    OWN_SLICES = "slices_refused"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason to refuse; the sentence, with its remedy, is for the client's own record."""

    reason: Reason
    sentence: str


def load_policy(path: Path, known: Collection[str] | None = None) -> ClientPolicy:
    """Read a client's policy file (TOML; the keys are `ClientPolicy`'s fields).

    With `known` probes, a forbidden probe that is none of them is an error: a misspelt ban bans nothing.

    Raises:
        BadInput: every problem of the file.
    """
    text, policy = read_file(path), None
    problems: list[Problem] = []
    said: Any = ()
    try:
        policy = read_table(ClientPolicy, text, str(path))
        said = policy.forbidden_probes
    except BadInput as error:
        problems += error.problems
        with suppress(ValueError):  # what it does say is still looked at, so that one reading finds everything
            said = tomllib.loads(text).get("forbidden_probes")
    for probe in [p for p in said if isinstance(p, str)] if isinstance(said, list | tuple) else []:
        if known is not None and probe not in known:
            what = f"no probe is called {ascii(probe)[:60]}"
            problems.append(Problem(f"{path}: forbidden_probes", what, did_you_mean(probe, known)))
    if policy is None or problems:
        raise BadInput(problems)
    return policy


def refusals(
    contract: Contract,
    policy: ClientPolicy,
    request: Request | Mapping[str, Any],
    *,
    sends: Iterable[Number],
    spent: tuple[float, float],
    answered: int,
    trains: Examples | None = None,
) -> tuple[Refusal, ...]:
    """Everything for which a client refuses a request; empty if it may answer. Client-side code.

    Args:
        contract: the contract that the client holds.
        policy: the client's own.
        request: as it came from the server; nothing in it is believed.
        sends: what this client's own probes would send (`numbers`); who reads it is the contract's to say.
        spent: epsilon and delta of this client's current window so far, all contracts together, from its own ledger.
        answered: rounds of this contract that it has answered, from the same ledger.
        trains: how its own code trains, where examples are the unit: the price rests on that.

    The first answer is charged the price of the whole window, so that later rounds cost nothing more. An update without
    noise has no finite price: no ceiling covers it, and `updates_without_noise` is what allows it.
    """
    try:
        q = Request.model_validate(request)
    except ValidationError as error:
        wrong = _few({ascii(each["loc"][:1]) for each in error.errors()})
        return (Refusal(Reason.MALFORMED, f"the request makes no sense ({wrong}): ask the server's operator"),)
    c = contract
    found = _contract_refusals(c, policy, q.contract)
    if found:  # then there is nothing to measure the rest by
        return tuple(found)

    def refuse(when: bool, reason: Reason, sentence: str) -> None:
        if when:
            found.append(Refusal(reason, sentence))

    listed, asked = {_unread(n) for n in c.numbers}, set(q.probes)
    unlisted = [n.key for n in sends if _unread(n) not in listed]
    refuse(bool(unlisted), Reason.UNLISTED, f"the contract does not list {_few(unlisted)}: use the version it is for")
    other = trains is not None and trains != c.examples
    refuse(other, Reason.TRAINING, "clients here train in another way: use the study that the contract is for")
    unknown, forbidden = asked - set(c.probes), asked & set(policy.forbidden_probes)
    refuse(bool(unknown), Reason.PROBE, f"the contract does not list {_few(unknown)}: ask only what it lists")
    refuse(bool(forbidden), Reason.FORBIDDEN, f"{_few(forbidden)} forbidden here: leave out, or allow in the policy")
    if q.drill_down is not None:
        named = _may_be_drilled(c, q.drill_down)
        refuse(not named, Reason.DRILL_DOWN, "the contract has no such drill-down: ask for one that it has")
        refuse(not policy.slices, Reason.OWN_SLICES, "slices are refused here: ask for none, or set slices = true")
    apart = c.updates is not None and c.updates.apart is not None
    refuse(not asked and not apart, Reason.APART, "the contract has no training without an answer: ask for readings")
    refuse(q.update and c.updates is None, Reason.UPDATE, "the contract sends no model update: ask for none")
    exact = c.updates is not None and c.updates.noise == 0 and c.examples is None
    bare = q.update and exact and not policy.updates_without_noise
    refuse(bare, Reason.UPDATE_NOISE, "the model update has no noise: add it, or set updates_without_noise = true")
    simulated = c.noise_source == "simulated" and c.trust != "none" and not policy.simulated_noise
    refuse(simulated, Reason.SIMULATED, "noise from a seed hides nothing: draw it anew, or set simulated_noise = true")
    refuse(c.trust not in policy.trusts, Reason.OWN_TRUST, f"trust {c.trust}: change it, or add it to trusts")
    refuse(c.unit not in policy.units, Reason.OWN_UNIT, f"unit {c.unit}: change it, or add it to units")
    refuse(q.round > c.rounds, Reason.ROUND, f"round {q.round} of {c.rounds}: ask in the contract's rounds")
    most = 1 if c.panel == "rotating" else c.rounds
    refuse(
        bool(asked) and answered >= most,
        Reason.ANSWERED,
        f"{answered} rounds answered of {most}: wait for another contract",
    )
    floor, own = c.min_cohort, policy.min_cohort
    refuse(q.cohort < floor, Reason.FLOOR, f"{q.cohort} clients, the floor is {floor}: draw more clients")
    refuse(q.cohort < own, Reason.OWN_COHORT, f"{q.cohort} clients, own minimum {own}: draw more clients")
    for reason, name, before, price in (
        (Reason.OWN_EPSILON, "max_epsilon", spent[0], c.epsilon_per_window if asked and not answered else 0.0),
        (Reason.OWN_DELTA, "max_delta", spent[1], c.delta if asked and not answered else 0.0),
    ):
        ceiling = getattr(policy, name)
        fits = before >= 0 and before + price <= ceiling * (1 + ROUNDING)  # false for NaN
        refuse(not fits, reason, f"{price!r} after {before!r} is over {ceiling!r}: wait, or raise {name}")
    return tuple(found)


def _contract_refusals(c: Contract, policy: ClientPolicy, asked: str) -> list[Refusal]:
    found = []
    if policy.contract not in (None, c.digest):
        found.append(Refusal(Reason.NOT_PINNED, "this is not the contract pinned: read its difference, then pin it"))
    if asked != c.digest:
        found.append(Refusal(Reason.OTHER_CONTRACT, "the request names another contract: fetch and read that one"))
    if not _sound(c):
        found.append(Refusal(Reason.UNSOUND, "the contract contradicts itself: see `fedcanary contract check`"))
    return found


def _may_be_drilled(c: Contract, d: DrillDown) -> bool:
    """Whether the number asked is one that leaves in any case, and has the bounds that a slice's number has."""
    if c.slices is None or d.probe == c.slices.probe:
        return False
    asked = next((n for n in c.numbers if (n.probe, n.coord) == (d.probe, d.coord)), None)
    most = max((n.high for n in c.numbers if n.probe == c.slices.probe and n.low < 0), default=0.0)
    low, high = (0.0, 1.0) if d.kind == "share" else (-most, most)
    return asked is not None and (asked.low, asked.high) == (low, high)


def _few(words: Collection[str]) -> str:
    """The first three words, none of them long: a server may have sent any number of any length."""
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(word[:60] for word in sorted(words)[:3]) + more


def _unread(number: Number) -> Number:
    return number.model_copy(update={"readers": ()})


@lru_cache(maxsize=16)
def _sound(contract: Contract) -> bool:
    return not check(contract)


def tally(reasons: Iterable[str]) -> Mapping[str, int]:
    """How often each reason was given, for the server: no names, and no words but ours (a client may send any)."""
    known = set(Reason)
    return dict(sorted(Counter(str(r) if r in known else "other" for r in reasons).items()))
