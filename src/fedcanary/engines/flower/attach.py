"""A study of a Flower app that exists already: its one file, what that names in the app, and the parts of a run.

The study is any other study's tables about what is read, protected and judged, and one of its own:

    [attach]
    clients = 12                      # how many the app has
    model = "app.task:Net"            # builds the module whose state dict the app sends; or a [model] table instead:
                                      # then the app sends the peft state dict of an adapter of that base
    encode = "app.task:encode"        # list of texts -> what the module takes
    labels = ["reject", "approve"]    # of the module's logits, in order
    items = "app.task:load_data"      # the client's own held-out examples (reading.py says in which forms)

    [[attach.suites]]                 # public items without another file; or [[probes.suites]] as in any study
    name = "loans"
    role = "bias"
    items = [{text = "...", label = "approve", group = "a"}]

What the app trains and sends of it stays the app's: those messages are no part of the contract, and nothing here
protects, charges or averages them. The base theta_0 is what the app's first round begins with.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field, ValidationError

from fedcanary import study
from fedcanary.clients.population import Split
from fedcanary.engines.flower.reading import ModuleReader, PeftReader, Reader, undisturbed
from fedcanary.engines.setup import Setup, load_base, load_suites, lora_of
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.models import adapters
from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel
from fedcanary.personalize import method
from fedcanary.probes import probes, suites
from fedcanary.probes.base import merge
from fedcanary.probes.suites.jsonl import read_item
from fedcanary.probes.suites.rows import Row, check_role
from fedcanary.study import Study, Table
from fedcanary.types import Item, Role, Suite

OUTSIDE: Final = "the app's own, in its own messages: outside of the contract, and not in the epsilon above"
OWN: Final = {  # tables of a study that are about what the app does itself
    "clients": "say how many there are in attach.clients",
    "personalize": "the app trains",
    "engine": "the app runs",
    "guard": "the app deploys",
    "slices": "attributes of the app's clients are not known here",
}


class SuiteTable(Table):
    """A public suite in the study's own file."""

    name: str
    role: Role
    items: Annotated[tuple[Mapping[str, Any], ...], Field(min_length=1)]
    """As the lines of a suite's file; or, for a classifier, `text` with `label`, and `group`, `domain`, `positive`."""


class AttachTable(Table):
    """What the study names in the app. A name is "module:function"."""

    clients: Annotated[int, Field(ge=2, le=100_000, strict=True)]
    """How many clients the app has."""
    items: str
    """The client's own held-out examples; its arguments are filled by their names, see `reading.call`."""
    model: str | None = None
    """Builds the module whose state dict the app sends; without it, a [model] table."""
    encode: str | None = None
    """From a list of texts to what the module takes."""
    labels: tuple[str, ...] = ()
    """Names of the module's logits, in order."""
    held_out: Annotated[int, Field(ge=1, strict=True)] = 256
    """At most so many of a client's own examples are read."""
    registry: str | None = None
    """File of the clients' keys, for secure sums in a deployment: the server's, and that of nodes without their own."""
    suites: tuple[SuiteTable, ...] = ()


class Attached(Study):
    """The study of an app that exists."""

    attach: AttachTable


@dataclass(frozen=True, slots=True)
class Nodes:
    """The app's clients as the rest of the program may know them: by number."""

    count: int

    @property
    def digest(self) -> str:
        """Of their number: who they are, and what they hold, is the app's."""
        return hashlib.blake2b(f"{self.count} nodes of a Flower app".encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.count

    def name(self, client: int) -> str:
        """Its number."""
        return f"node {client}"

    def items(self, client: int, split: Split) -> tuple[Item, ...]:
        """None that the server knows of."""
        return ()

    def domains(self, client: int) -> frozenset[str]:
        """None that the server knows of."""
        return frozenset()

    def attributes(self, client: int) -> Mapping[str, str]:
        """None that the server knows of."""
        return {}


@dataclass(frozen=True)
class Theta0(BaseModel):
    """The base: what the app's first round begins with. It stands for the arrays, and holds none."""

    arrays: str = ""

    @cached_property
    def digest(self) -> str:
        """Of how the model is made, and of its first arrays."""
        return self.arrays


@dataclass(frozen=True, kw_only=True)
class AppSetup(Setup):
    """A study's parts, where the app trains: nothing is shared by this program."""

    reader: Reader
    theta_0: Adapter

    def header(self) -> dict[str, Any]:
        """See `Setup.header`; and what is not this program's."""
        return super().header() | {"attached": {"updates": OUTSIDE}}


def find(name: str | Path) -> Path:
    """A study's file: beside the file that names it, or in a folder above up to the one with a pyproject.toml.

    Raises:
        BadInput: it is not there.
    """
    path = Path(name)
    if path.is_absolute():
        places = [path]
    else:
        frame = sys._getframe(1)
        while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("fedcanary", "flwr"):
            frame = frame.f_back
        here = Path(frame.f_globals.get("__file__") or "app.py").resolve().parent
        above = [here, *here.parents]
        last = next((i for i, folder in enumerate(above) if (folder / "pyproject.toml").exists()), 0)
        places = [folder / path for folder in above[: last + 1]] + [path.resolve()]
    for place in places:
        if place.is_file():
            return place
    raise BadInput.of(str(name), f"is neither in {places[0].parent} nor above", "put the study there, or name its path")


def load(path: Path) -> Attached:
    """Read an app's study.

    Raises:
        BadInput: every problem of the file, those of what it names in the app not among them (see `reader_of`).
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput.of(str(path), f"cannot be read as TOML ({error})", "mend it") from error
    table = tree.pop("attach", None)
    problems: list[Problem] = []
    remedy = "is about what the app does itself"
    problems += [Problem(f"{path}: {name}", remedy, f"leave it out: {OWN[name]}") for name in OWN if name in tree]
    attach = None
    if isinstance(table, dict):
        try:
            attach = AttachTable.model_validate(table)
            problems += _misfits(path, attach, "model" in tree)
        except ValidationError as error:
            problems += [_explained(path, entry) for entry in error.errors()]
    else:
        what, remedy = "is missing", "say what the study names in the app: clients, items, and model or a [model] table"
        problems.append(Problem(f"{path}: attach", what, remedy))
    known = {name: value for name, value in tree.items() if name not in OWN}
    if attach is not None and attach.model is not None:
        known["model"] = {"source": attach.model, "task": "classify", "labels": list(attach.labels)}
    known["clients"] = {
        "source": "a Flower app",
        "count": attach.clients if attach is not None else 2,
        "columns": {"text": "text", "client": "node"},
    }
    known["personalize"] = {"method": "local_only"}
    parsed = None
    try:
        parsed = study.parse(known, where=str(path), folder=path.parent)
    except BadInput as error:
        problems += error.problems
    if parsed is not None:
        problems += _beyond(path, parsed)
    if problems or parsed is None or attach is None:
        raise BadInput(problems)
    return Attached.model_validate({**parsed.model_dump(), "attach": attach.model_dump()})


def _misfits(path: Path, attach: AttachTable, table: bool) -> Iterable[Problem]:
    """What in [attach] does not go together; `table`: there is a [model] table."""
    if attach.model is None and not table:
        remedy = 'name what builds the module ("app.task:Net"), or give a [model] table for a peft adapter of that base'
        yield Problem(f"{path}: attach.model", "is missing", remedy)
    if attach.model is not None:
        if table:
            yield Problem(f"{path}: model", "is given twice", "leave out the [model] table, or attach.model")
        if attach.encode is None:
            yield Problem(
                f"{path}: attach.encode", "is missing", "name what makes the module's input of a list of texts"
            )
        if len(set(attach.labels)) < 2 or len(set(attach.labels)) < len(attach.labels):
            yield Problem(
                f"{path}: attach.labels", "are not two names or more", "name each of the module's logits once"
            )
    elif attach.encode is not None:
        yield Problem(f"{path}: attach.encode", "is for a module", "leave it out: the [model]'s tokenizer encodes")


def _beyond(path: Path, parsed: Study) -> Iterable[Problem]:
    """What a study may ask for, and no app that is only attached to can give."""
    privacy = parsed.privacy
    for place, wrong, remedy in (
        ("privacy.unit", privacy.unit == "example", "the app's training hides no example from us: leave it out"),
        ("privacy.updates", privacy.updates is not None, "the app's updates are its own: leave it out"),
        (
            "policy.on_alarm",
            parsed.policy.on_alarm != "report",
            'the app deploys: say "report", and act on the verdict',
        ),
        ("probes.generate", parsed.probes.generate, "replies of an app's model are not read: leave it out"),
        ("monitor.rebaselines", parsed.monitor.rebaselines > 0, "an attached run is never held: leave it out"),
    ):
        if wrong:
            yield Problem(f"{path}: {place}", "cannot be had of an app that exists", remedy)


def _explained(path: Path, entry: Any) -> Problem:
    where = ".".join(str(part) for part in ("attach", *entry["loc"]))
    if entry["type"] == "extra_forbidden":
        table = SuiteTable if entry["loc"][0] == "suites" else AttachTable
        remedy = did_you_mean(str(entry["loc"][-1]), table.model_fields)
        return Problem(f"{path}: {where}", "unknown key", remedy)
    if entry["type"] == "missing":
        return Problem(f"{path}: {where}", "is missing", "add it")
    return Problem(f"{path}: {where}", f"{entry.get('input')!r}: {entry['msg'].lower()}", "give a value that fits")


@dataclass(frozen=True, slots=True)
class Named:
    """What a study names in the app, found."""

    reader: Reader
    items: Callable[..., Any]
    suites: tuple[Suite, ...]
    base: BaseModel | None  # of a [model] table


def named(attached: Attached, where: Path) -> Named:
    """Find what a study names, and the public items.

    Raises:
        BadInput: every name that cannot be found, and every problem of the suites and of the model.
    """
    attach, problems = attached.attach, list[Problem]()

    def found(key: str, name: str) -> Any:
        try:
            with undisturbed():
                return _resolve(f"{where}: attach.{key}", name)
        except BadInput as error:
            problems.extend(error.problems)
            return None

    items = found("items", attach.items)
    reader: Reader | None = None
    base = None
    if attach.model is not None:
        build, encode = found("model", attach.model), found("encode", attach.encode or "")
        if build is not None and encode is not None:
            reader = ModuleReader(build, encode, attach.labels)
    else:
        try:
            base = load_base(attached)
            reader = PeftReader(base, lora_of(attached, base))
        except BadInput as error:
            problems += error.problems
    shown = _suites(attached, where, problems)
    if reader is not None and attach.labels:
        for suite in shown:
            if not any(set(item.choices) <= set(attach.labels) for item in suite.items):
                what = f"none of its items has choices that are all among {', '.join(attach.labels)}"
                problems.append(
                    Problem(f"suite {suite.name}", what, "leave it out (probes.packaged = false), or mend it")
                )
    if problems or reader is None or items is None:
        raise BadInput(problems)
    return Named(reader, items, shown, base)


def _resolve(where: str, name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise BadInput.of(where, f"{name!r} is not module:function", 'write for example "app.task:Net"')
    try:
        found = importlib.import_module(module)
    except Exception as error:
        what = f"{module} cannot be imported ({type(error).__name__}: {error})"
        raise BadInput.of(where, what, "name a module of the app as the app itself imports it") from error
    if not callable(value := getattr(found, attribute, None)):
        own = [word for word, each in vars(found).items() if callable(each) and not word.startswith("_")]
        raise BadInput.of(where, f"{module} has no function or class {attribute!r}", did_you_mean(attribute, own))
    return value


def _suites(attached: Attached, where: Path, problems: list[Problem]) -> tuple[Suite, ...]:
    """The study's suites, and those in the file itself; of a role that neither has, a packaged one if they may be."""
    own = []
    for at, table in enumerate(attached.attach.suites):
        rows = []
        for number, raw in enumerate(table.items, start=1):
            place = f"{where}: attach.suites[{at}] {table.name}, item {number}"
            item = read_item(place, _spelt(raw, attached.attach.labels), problems)
            rows += [] if item is None else [Row(where=place, item=item, columns={})]
        check_role(rows, table.role, f"{where}: attach.suites[{at}]", problems)
        items = tuple(row.item for row in rows)
        digest = suites.digest(items)
        own.append(Suite(name=table.name, version=digest[:12], role=table.role, items=items, digest=digest))
    try:
        shown = load_suites(attached)
    except BadInput as error:
        problems += error.problems
        return ()
    taken, packaged = {suite.role for suite in own}, suites.packaged()
    if attached.attach.model is not None:  # the packaged ones are questions to a language model
        taken |= set(Role)
    named_too = {table.source for table in attached.probes.suites}
    more = [s for s in shown if s.role not in taken or s.name not in packaged or s.name in named_too]
    if not own and not more:
        remedy = "give some in [[attach.suites]], or a file's in [[probes.suites]]"
        problems.append(Problem(f"{where}: attach.suites", "there are no public items", remedy))
    return (*own, *more)


def _spelt(raw: Mapping[str, Any], labels: Collection[str]) -> dict[str, Any]:
    """A classifier's `text` and `label` as an item's keys."""
    words = {"text": "prompt", "label": "answer"}
    spelt = {words.get(key, key): value for key, value in raw.items()}
    return {"choices": list(labels), **spelt} if labels and "text" in raw else spelt


def setup_of(attached: Attached, found: Named, theta_0: Adapter) -> AppSetup:
    """The parts of a run, from the app's first arrays. Raises BadInput where the model cannot take those."""
    found.reader.check(theta_0)
    parts = [json.dumps(attached.model.model_dump(mode="json"), sort_keys=True), adapters.digest(theta_0)]
    parts += [attached.attach.encode or "", "" if found.base is None else found.base.digest]
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()
    task, source = attached.model.task, attached.model.source
    public = {role: merge(found.suites, role) for role in Role}
    return AppSetup(
        study=attached,
        base=Theta0(torch.nn.Identity(), None, task, source, attached.model.revision, 0, arrays=digest),
        lora=Lora(
            r=1,
            alpha=1.0,
            targets=(),
            heads=(),
            head_modules=(),
            names=(),
            layers=None,
            fan_in_fan_out=False,
        ),
        initial={},
        method=method("local_only"),
        population=Nodes(attached.attach.clients),
        suites=found.suites,
        probes=probes(
            public, attached.probes.tail, pooled=attached.monitor.pooled > 0, spread=attached.monitor.spread > 0
        ),
        reader=found.reader,
        theta_0=theta_0,
    )
