"""The study: one frozen tree that says everything a run does. Written as TOML, checked whole, digested.

`study_tables.py` has its tables; here is what they must agree on, and how a file becomes a study. Unknown keys are
errors with a suggestion, and all problems of a file are reported at once.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, ValidationError, model_validator

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.study_tables import (
    ClientsTable,
    ColumnsTable,
    EngineTable,
    GuardTable,
    LoraTable,
    MarginTable,
    ModelTable,
    MonitorTable,
    PartitionTable,
    PersonalizeTable,
    PlantTable,
    PolicyTable,
    Positive,
    PrivacyTable,
    ProbesTable,
    RecordTable,
    SlicesTable,
    SuiteTable,
    Table,
    UpdatesTable,
)
from fedcanary.types import Mode

__all__ = [
    "ClientsTable",
    "ColumnsTable",
    "EngineTable",
    "GuardTable",
    "LoraTable",
    "MarginTable",
    "ModelTable",
    "MonitorTable",
    "PartitionTable",
    "PersonalizeTable",
    "PlantTable",
    "PolicyTable",
    "PrivacyTable",
    "ProbesTable",
    "RecordTable",
    "SlicesTable",
    "Study",
    "SuiteTable",
    "Table",
    "UpdatesTable",
    "load",
    "parse",
]


class Study(Table):
    """Everything a run does. `digest` identifies it."""

    title: str = ""
    seed: Annotated[int, Field(strict=True)] = 1
    rounds: Positive = 12
    model: ModelTable = ModelTable()
    clients: ClientsTable = ClientsTable()
    personalize: PersonalizeTable = PersonalizeTable()
    probes: ProbesTable = ProbesTable()
    privacy: PrivacyTable = PrivacyTable()
    monitor: MonitorTable = MonitorTable()
    slices: SlicesTable | None = None
    policy: PolicyTable = PolicyTable()
    guard: GuardTable | None = None
    engine: EngineTable = EngineTable()

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        problems = []
        columns, partition = self.clients.columns, self.clients.partition
        generated = self.clients.source == "generated"
        if self.model.task == "classify" and generated:
            problems.append("clients.source: the generated population is text for a language model, not a classifier")
        if self.clients.plants and not generated:
            problems.append("clients.plants: only the generated population can be planted; set clients.source")
        if not generated and not (columns.text or columns.prompt):
            problems.append("clients.columns: name the data's columns: text, prompt and response, or text and label")
        if not generated and partition.kind == "column" and not columns.client:
            problems.append("clients.columns.client: a partition by column needs the client column's name")
        if not generated and partition.kind != "column" and partition.clients is None:
            problems.append(f"clients.partition.clients: say how many clients a {partition.kind} partition makes")
        if self.clients.also_train:
            problems += self._training_problems()
        problems += [*self._privacy_problems(), *self._acting_problems(), *self._slices_problems()]
        if not self.probes.packaged and not self.probes.suites:
            problems.append("probes.suites: with packaged = false, name at least one suite")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _training_problems(self) -> list[str]:
        """Why no clients can train that do not answer."""
        updates, found = self.privacy.updates, []
        if self.personalize.method == "local_only":
            found.append("clients.also_train: local_only sends no update, so who does not answer does nothing")
        if self.privacy.unit == "example":
            found.append('clients.also_train: the unit "example" pays for each training; leave it out')
        if updates is not None and updates.noise != "none":
            found.append("clients.also_train: noised updates are paid for once in a window; leave it out")
        if self.guard is not None:
            found.append(
                "clients.also_train: a guard judges by readings, which these clients do not take; leave it out"
            )
        return found

    def _privacy_problems(self) -> list[str]:
        privacy, found = self.privacy, self._record_problems()
        updates = privacy.updates
        if privacy.trust == "none":
            if updates is not None:
                found.append('privacy.updates: trust "none" sends everything as it is; leave it out')
            return found
        if updates is not None and updates.quantile is not None:
            if updates.clip is None:
                found.append("privacy.updates.clip: a quantile needs a bound to start from")
            if self.personalize.method == "local_only":
                found.append("privacy.updates.quantile: local_only sends no update; leave it out")
        if privacy.unit == "example":
            if updates is not None and updates.noise != "none":
                found.append('privacy.updates.noise: examples are hidden by the noise of training; say "none"')
        elif updates is None:
            if self.personalize.method != "local_only":
                found.append(
                    'privacy.updates.noise: say how adapter updates leave: "none" for exact sums, which are not '
                    "differentially private, or a noise multiplier with a clip"
                )
        elif updates.noise != "none":
            if updates.clip is None:
                found.append("privacy.updates.clip: a noised update needs a bound on its norm")
            if self.personalize.weighting != "uniform":
                found.append('personalize.weighting: noised updates must weigh alike; say "uniform"')
        return found

    def _record_problems(self) -> list[str]:
        privacy, found = self.privacy, []
        if privacy.unit == "client":
            if privacy.record is not None:
                found.append('privacy.record: is for the unit "example"; leave it out, or set privacy.unit')
            return found
        if privacy.record is None:
            found.append('privacy.record: the unit "example" needs noise, clip and sample_rate of the training')
        if self.monitor.spread:
            found.append("monitor.spread: the square of a client's change shows one example too much; leave it out")
        if self.personalize.dropout or self.personalize.early_stop:
            found.append(
                "personalize: dropout and early_stop are not part of the private training that hides an example; "
                "leave them out"
            )
        if privacy.trust == "none":
            found.append('privacy.trust: "none" sends readings of single examples as they are; choose another trust')
        if self.personalize.method == "dual":
            found.append(
                "personalize.method: the gate of dual is an exact mean of training examples, which no noise hides; "
                "choose another method"
            )
        return found

    def _acting_problems(self) -> list[str]:
        found = []
        if self.monitor.rebaselines and self.policy.on_alarm == "report":
            found.append(
                "monitor.rebaselines: a run that goes on at an alarm is never re-baselined, and would only pay for it; "
                'leave it out, or set policy.on_alarm to "hold" or "roll_back"'
            )
        guard = self.guard
        if guard is None:
            return found
        if guard.modes is not None and (other := sorted(guard.limits.keys() - set(guard.modes))):
            found.append(f"guard.limits: {', '.join(other)}: not guarded; add to guard.modes, or leave out")
        if self.privacy.unit == "example" and Mode.FAIRNESS_COLLAPSE in (guard.modes or tuple(Mode)):
            found.append(
                "guard.modes: a refusal over fairness_collapse would tell of the client's own examples, which the unit "
                '"example" hides; name the modes to guard, without it'
            )
        return found

    def _slices_problems(self) -> list[str]:
        slices, privacy = self.slices, self.privacy
        if slices is None:
            return []
        found = []
        if len(set(slices.by)) < len(slices.by):
            found.append("slices.by: name each attribute once")
        if self.policy.on_alarm != "report":
            found.append(
                f'slices: under policy.on_alarm = "{self.policy.on_alarm}" an alarm ends the run before anything is '
                'asked of slices; say "report", or leave the table out'
            )
        if privacy.unit == "example":
            found.append('slices: are about whole clients; leave them out, or set privacy.unit = "client"')
        if slices.floor is not None and privacy.trust != "none" and slices.floor < privacy.min_cohort:
            found.append(f"slices.floor: no sum over fewer than {privacy.min_cohort} is opened; say that or more")
        return found

    @property
    def alphas(self) -> tuple[float, float]:
        """What of `monitor.alpha` the modes' tests may err, and what the naming of slices may."""
        share = 0.0 if self.slices is None else self.slices.alpha_share
        return self.monitor.alpha * (1 - share), self.monitor.alpha * share

    @property
    def digest(self) -> str:
        """Hex digest of the study's content, however its file was laid out."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def toml(self) -> str:
        """The whole study as TOML, defaults included."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load(path: Path, overrides: Iterable[str] = ()) -> Study:
    """Read a study file and apply `key.sub=value` overrides (values in TOML notation, or bare words).

    Relative paths in the file are taken from the file's own folder.

    Raises:
        BadInput: every problem of the file and the overrides.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput.of(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    try:
        tree = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadInput.of(str(path), f"is not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput.of(str(path), f"is not TOML: {error}", "mend the line named") from error
    return parse(tree, overrides, where=str(path), folder=path.parent)


def parse(
    tree: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "study", folder: Path | None = None
) -> Study:
    """Check a study given as nested dicts. Raises BadInput with every problem."""
    merged: dict[str, Any] = json.loads(json.dumps(tree))
    problems = [p for text in overrides if (p := _override(merged, text))]
    if folder is not None:
        _anchor_paths(merged, folder)
    try:
        study = Study.model_validate(merged)
    except ValidationError as error:
        for entry in error.errors():
            problems += _explain(entry, where)
        raise BadInput(problems) from None
    if problems:
        raise BadInput(problems)
    return study


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    def anchor(table: Any, key: str = "source", words: tuple[str, ...] = ()) -> None:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and value not in words and not Path(value).is_absolute():
            candidate = folder / Path(value).expanduser()
            if candidate.exists() or value.startswith(".") or key != "source":
                table[key] = str(candidate.resolve())

    anchor(tree.get("model"), words=("bundled",))
    anchor(tree.get("clients"), words=("generated",))
    anchor(tree.get("clients"), "policies")
    anchor(tree.get("privacy"), "ledger")
    probes = tree.get("probes")
    for suite in probes.get("suites", []) if isinstance(probes, dict) else []:
        anchor(suite)


def _override(tree: dict[str, Any], text: str) -> Problem | None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return Problem(f"--set {text}", "is not key=value", "write for example --set rounds=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    *tables, last = key.strip().split(".")
    at = tree
    for name in tables:
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            return Problem(f"--set {text}", f"{name!r} is not a table", "name a key inside a table")
    at[last] = parsed
    return None


def _explain(entry: Any, where: str) -> list[Problem]:
    path = ".".join(str(part) for part in entry["loc"])
    place = f"{where}: {path}" if path else where
    kind, given = entry["type"], entry.get("input")
    if kind == "extra_forbidden":
        return [Problem(place, "unknown key", did_you_mean(str(entry["loc"][-1]), _keys_beside(entry["loc"])))]
    if kind == "missing":
        remedy = "add it"
        if path.endswith("updates.noise"):
            remedy = 'say "none" for exact sums, which are not differentially private, or a noise multiplier'
        return [Problem(place, "is missing", remedy)]
    if kind in ("literal_error", "enum"):
        expected = str(entry.get("ctx", {}).get("expected", ""))
        options = [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]
        return [Problem(place, f"{given!r} is not allowed", did_you_mean(str(given), options))]
    if kind == "value_error":
        lines = str(entry["ctx"]["error"]).splitlines()
        return [
            Problem(f"{where}: {line.partition(': ')[0]}", "does not fit", line.partition(": ")[2]) for line in lines
        ]
    return [Problem(place, f"{given!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}", "give a value that fits")]


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    at: Any = Study
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = at.model_fields[part].annotation
        tables = [annotation, *getattr(annotation, "__args__", ())]
        at = next((t for t in tables if isinstance(t, type) and issubclass(t, Table)), at)
    return list(at.model_fields)
