"""The contract as a value: its types, its one canonical text (TOML), and the digest of that text.

Laws (tests/privacy/test_contract.py)
    parse(contract.text) == contract, and the text does not depend on the order in which anything was listed
    contracts that differ in anything have different digests
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.privacy.encode import reach
from fedcanary.types import Coord


class Table(BaseModel):
    """A table of a contract, a policy or a request: checked when built, and then fixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T", bound=Table)


def _printable(text: str) -> str:
    if not text.isprintable():  # a contract comes from others, and must not steer a terminal
        raise ValueError(f"{ascii(text)[:60]} has unprintable characters")
    return text


def _in_order(items: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(set(items), key=repr))


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=1, lt=2**63)]  # TOML's own limit
Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(lambda x: x + 0.0)]  # -0.0 is 0.0
Above0 = Annotated[float, Field(gt=0)]  # may be infinite
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Unit = Literal["client", "example"]
Trust = Literal["secure_aggregation", "central", "local", "none"]


class Number(Table):
    """One number that may leave a client, with the bounds of its value.

    A value of `zero` uses nothing of the message's norm, one that differs from it by `scale` all. Without a `scale` the
    number is no part of a bounded message: it leaves as it is, under trust `none`, or because the noise of training
    already protects what it is made of (`Examples.exact`). `reach` belongs to the unit `example`: n times how far one
    of a client's n held-out examples, made unscoreable, moves the number.
    """

    probe: Text
    version: Text
    coord: Text
    low: Finite
    high: Finite
    zero: Finite
    scale: Annotated[Finite, Field(gt=0)] | None = None
    reach: Annotated[Finite, Field(ge=0)] | None = None
    purpose: Text
    readers: Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(_in_order)]

    @property
    def key(self) -> str:
        """Its name in the whole contract."""
        return f"{self.probe}/{self.coord}"


class Update(Table):
    """The model update: `dimension` numbers and the client's weight.

    `clip` bounds the L2 norm of the unweighted change (infinite for no bound). `noise` is the standard deviation of the
    sum's noise over `clip`; at 0 sums leave exactly: not differentially private and in no epsilon, unless training was
    (unit `example`). With a `quantile` the clip follows it from round to round, and `clip` is the first. With `apart`
    clients are also asked for an update in rounds in which they say nothing else.
    """

    dimension: Count
    weighting: Literal["uniform", "examples"]
    clip: Above0
    noise: Annotated[Finite, Field(ge=0)]
    quantile: Annotated[Finite, Field(gt=0, lt=1)] | None = None
    apart: Literal[True] | None = None


class Examples(Table):
    """Where examples are the unit: how a client trains on its own, and how little one of them shows.

    In each of a round's `steps` an example joins with probability `sample_rate`, its gradient is clipped to `clip`, and
    noise of `noise * clip` is added. Trained tensors are then protected, and with them the update and the readings of
    `exact`, probes of public items alone. A client with fewer than `min_held_out` held-out examples says nothing of
    them. Which domains it has is `hidden` (it is asked the public items of all), or held to be `public`.
    """

    noise: Annotated[Finite, Field(gt=0)]
    clip: Annotated[Finite, Field(gt=0)]
    sample_rate: Annotated[Finite, Field(gt=0, le=1)]
    steps: Count
    min_held_out: Count
    exact: Annotated[tuple[Text, ...], AfterValidator(_in_order)]
    domains: Literal["hidden", "public"]


class Slices(Table):
    """Drill-downs: what a client says of its own place in the federation, in the rounds whose request asks for it.

    A request names one number of one of the contract's probes. Of the numbers of `probe` the client then says those of
    its own value of each of `attributes`, and 0 of all others; in every other round all of them are 0. This costs no
    epsilon, because the norm of the whole message stays bounded, but room in the message: of one that is full without
    it, a share from `lost_least` to `lost_most` is taken away. Slices of fewer clients than `floor` are not reported.
    """

    probe: Text
    attributes: Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(_in_order)]
    floor: Count
    rounds: Count | None = None  # of one drill-down; until the end of the window when absent
    lost_least: Annotated[Finite, Field(ge=0, lt=1)]
    lost_most: Annotated[Finite, Field(ge=0, lt=1)]


class Contract(Table):
    """Everything that may leave a client in one window: the `rounds` of one study.

    All numbers of a client, over their scales, form one message of L2 norm at most `norm` (infinite under trust
    `none`). Noise of `noise_multiplier * norm` is in each sum over the fewest clients that a round allows; under trust
    `local` it is in each message. The epsilons are at `delta`, for everything noised, for one `unit`.
    """

    format: Literal[1] = 1
    title: Annotated[str, AfterValidator(_printable)] = ""
    study: Text  # digest
    model: Text  # digest of the base model
    suites: Annotated[tuple[Text, ...], AfterValidator(_in_order)] = ()  # name, version and digest of public items
    trust: Trust
    unit: Unit
    neighbours: Literal["zeroed", "substituted"]
    mechanism: Literal["discrete_gaussian", "none"]
    noise_source: Literal["system", "simulated"]  # simulated: whoever knows the study's seed can take it off again
    noise_multiplier: Annotated[Finite, Field(ge=0)]
    norm: Above0
    epsilon_per_panel: Above0
    epsilon_per_window: Above0
    delta: Annotated[Finite, Field(ge=0, lt=1)]
    panel: Literal["rotating", "same"]  # a client answers in one round of the window, or in every round it is drawn for
    rounds: Count
    population: Count  # clients that can be drawn
    min_cohort: Count  # no sum over fewer clients is opened
    dropouts: Annotated[
        Finite, Field(ge=0, lt=1)
    ]  # share of a round's clients that may vanish before its sum is opened
    retention: Text
    updates: Update | None = None
    examples: Examples | None = None
    slices: Slices | None = None
    numbers: Annotated[tuple[Number, ...], Field(min_length=1), AfterValidator(_in_order)]

    @property
    def text(self) -> str:
        """The canonical TOML: plain values, then the tables and the numbers. The layout is ours, so it stays."""
        plain = self.model_dump(exclude_none=True)
        numbers = plain.pop("numbers")
        tables = {name: plain.pop(name, None) for name in ("updates", "examples", "slices")}
        blocks = [tomli_w.dumps(plain)]
        blocks += [f"[{name}]\n{tomli_w.dumps(table)}" for name, table in tables.items() if table]
        blocks += [f"[[numbers]]\n{tomli_w.dumps(number)}" for number in numbers]
        return "\n".join(blocks)

    @property
    def digest(self) -> str:
        """64 hex digits: what clients pin. `b2sum -l 256` of the text gives the same."""
        return _digest(self)

    @property
    def reach(self) -> float:
        """How far what epsilon hides moves a client's message, in units of `norm`: 1 for a whole message.

        For one example see `encode.py`. Two messages differ by 2 at most; `substituted` neighbours count twice.
        """
        if self.examples is None:
            return 1.0
        bounded = [n for n in self.numbers if n.scale is not None and n.probe != LOST.probe]
        items, most = self.examples.min_held_out, 1.0 if self.neighbours == "substituted" else 2.0
        far = [math.inf if n.reach is None else n.reach / items for n in bounded]
        return min(most, reach(min(f, n.high - n.low) / (n.scale or 1.0) for f, n in zip(far, bounded, strict=True)))

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the probes that may be asked."""
        return tuple(sorted({n.probe for n in self.numbers} - {LOST.probe}))


@lru_cache(maxsize=16)  # every client of a simulation asks for the same one
def _digest(contract: Contract) -> str:
    # Who drafts a contract must not find two with one digest; at 128 bits that is 2**64 work.
    return hashlib.blake2b(contract.text.encode(), digest_size=32).hexdigest()


LOST: Final = Number(
    probe="message",
    version="1",
    coord="lost",
    low=0.0,
    high=1.0,
    zero=0.0,
    scale=1.0,
    purpose="share of the message that the bound on its norm took away",
    readers=("server",),
)


def numbers(
    layout: Mapping[str, Sequence[Coord]],
    versions: Mapping[str, str],
    trust: Trust,
    readers: Iterable[str] = ("server",),
    *,
    exact: Collection[str] = (),
    reaches: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> tuple[Number, ...]:
    """What leaves a client whose probes, by name, have these coordinates and versions.

    Under a trust that protects, only coordinates with a scale leave, and with them the lost mass (encode.py); under
    trust `none` every coordinate does, and so does every one of the `exact` probes. `reaches`: see `Number.reach`.
    """
    bounded, readers = trust != "none", tuple(sorted(set(readers)))
    found = [
        Number(
            probe=probe,
            version=versions[probe],
            coord=coord.name,
            low=coord.low,
            high=coord.high,
            zero=coord.zero,
            scale=coord.scale if bounded and probe not in exact else None,
            reach=reaches.get(probe, {}).get(coord.name),
            purpose=coord.purpose,
            readers=readers,
        )
        for probe, coords in layout.items()
        for coord in coords
        if coord.scale is not None or not bounded or probe in exact
    ]
    return (*found, LOST.model_copy(update={"readers": readers})) if bounded else tuple(found)


def parse(text: str, where: str = "contract") -> Contract:
    """The contract that a TOML text says, however it was laid out.

    Raises:
        BadInput: every problem of the text. Whether its parts fit together is for `check`.
    """
    return read_table(Contract, text, where)


def load(path: Path) -> Contract:
    """Read a contract's file. Raises BadInput with every problem."""
    return parse(read_file(path), where=str(path))


def read_file(path: Path) -> str:
    """The text of a file. Raises BadInput if there is none."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise BadInput.of(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput.of(str(path), f"is not UTF-8 (byte {error.start})", "save the file as UTF-8") from error


def read_table(table: type[T], text: str, where: str) -> T:
    """What a TOML text says. Raises BadInput with every problem."""
    try:
        return table.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise BadInput(_problem(each, table, where) for each in error.errors()) from None
    except (ValueError, RecursionError) as error:  # not only TOML's own: numbers too long, brackets too deep
        raise BadInput.of(where, f"is not TOML: {str(error)!a}", "mend the line named") from error


def _problem(error: Any, table: type[Table], where: str) -> Problem:
    place = ": ".join([where, ".".join(ascii(part).strip("'") for part in error["loc"])])
    if error["type"] == "missing":
        return Problem(place, "is missing", "add it")
    if error["type"] == "extra_forbidden":
        tables = (table, Number, Update, Examples, Slices)
        known = {field for each in tables for field in each.model_fields}
        return Problem(place, "unknown key", did_you_mean(str(error["loc"][-1]), known))
    return Problem(place, f"{ascii(error['input'])[:60]} is not allowed", error["msg"])
