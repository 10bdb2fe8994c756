"""Suites by name or by file: the packaged ones, a user's own JSONL, and files in published formats.

    load("NAME")                                   a packaged suite
    load("mine.jsonl", "general")                  your own (`jsonl.py` has the keys)
    load("crows_pairs_anonymized.csv")             a published format, told by its header or named with `format=`
    load("cases.csv", "safety", pick=Pick(where={"functionality": ["slur_h"]}, at_most=100))

Everything wrong with a file is one `BadInput` that names each `file:line` with its remedy.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcanary.errors import BadInput, FedcanaryError, Problem, did_you_mean
from fedcanary.probes.suites.jsonl import read_jsonl
from fedcanary.probes.suites.published import (
    looks_like,
    read_completions,
    read_crows_pairs,
    read_hatecheck,
    read_xstest,
)
from fedcanary.probes.suites.rows import Pick, Row, Wording, check_role, digest, read_text, select
from fedcanary.probes.suites.winobias import looks_like_winobias, read_winobias
from fedcanary.types import Role, Suite

__all__ = ["FORMATS", "Format", "Pick", "SuiteInfo", "Wording", "digest", "load", "packaged", "read_completions"]

DATA: Final = Path(__file__).with_name("data")
EVERYTHING: Final = Pick()
AS_USUAL: Final = Wording()
VERSION_DIGITS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteInfo:
    """What `data/index.json` says of a packaged suite."""

    name: str
    version: str
    role: Role
    file: str
    source: str
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A published format: the role its suite has unless the caller says otherwise, where it comes from, its reader."""

    role: Role
    source: str
    licence: str
    read: Callable[[Path, str, Wording, list[Problem]], list[Row]]


FORMATS: Final = {
    "crows_pairs": Format(
        role=Role.STEREOTYPE,
        source="CrowS-Pairs, Nangia et al. 2020, github.com/nyu-mll/crows-pairs",
        licence="CC-BY-SA-4.0",
        read=read_crows_pairs,
    ),
    "hatecheck": Format(
        role=Role.BIAS,
        source="HateCheck, Röttger et al. 2021, github.com/paul-rottger/hatecheck-data",
        licence="CC-BY-4.0",
        read=read_hatecheck,
    ),
    "winobias": Format(
        role=Role.BIAS,
        source="WinoBias, Zhao et al. 2018, github.com/uclanlp/corefBias",
        licence="MIT",
        read=read_winobias,
    ),
    "xstest": Format(
        role=Role.SAFETY,
        source="XSTest, Röttger et al. 2024, github.com/paul-rottger/exaggerated-safety",
        licence="CC-BY-4.0",
        read=read_xstest,
    ),
}


def packaged() -> dict[str, SuiteInfo]:
    """The suites that come with the package, by name.

    Raises:
        FedcanaryError: the index is missing or broken, which is a fault of the installation, not of the user.
    """
    try:
        entries = json.loads((DATA / "index.json").read_text(encoding="utf-8"))["suites"]
        infos = [SuiteInfo(**{**entry, "role": Role(entry["role"])}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedcanaryError(f"the index of the packaged suites is missing or broken: {error}") from error
    return {info.name: info for info in infos}


def load(
    name_or_path: str | Path,
    role: Role | str | None = None,
    *,
    format: str | None = None,
    pick: Pick = EVERYTHING,
    wording: Wording = AS_USUAL,
) -> Suite:
    """The suite of that name, or the one made from that file.

    A string that names a packaged suite is that suite; everything else is a path. `role` says what the suite is for:
    a user's own JSONL needs it, others have one that it overrides. The version is the package's for a packaged suite
    (with a digest after `+` if `pick` left items out), and the first digits of the content's digest for a file.

    Raises:
        BadInput: with every problem found.
    """
    problems: list[Problem] = []
    chosen = _role(role, problems)
    info = packaged().get(name_or_path) if isinstance(name_or_path, str) else None
    path = DATA / info.file if info else Path(name_or_path)
    if info is None and not path.exists():
        remedy = did_you_mean(str(name_or_path), packaged())
        problems.append(Problem(str(name_or_path), "neither a packaged suite nor a file", remedy))
    if format is not None and format not in (*FORMATS, "jsonl"):
        problems.append(Problem(str(path), f"unknown format {format!r}", did_you_mean(format, [*FORMATS, "jsonl"])))
    if problems:
        raise BadInput(problems)

    text = read_text(path)
    kind = "jsonl" if info else format or _format(path, text)
    published = FORMATS.get(kind)
    if published is not None:
        rows = published.read(path, text, wording, problems)
        chosen = chosen or published.role
    else:
        rows = read_jsonl(path, text, problems)
        chosen = chosen or (info.role if info else None)
        if wording != AS_USUAL:
            problems.append(Problem(str(path), "a JSONL suite has its own wording", "leave the wording out"))
    if chosen is None:
        remedy = f"give it a role: {', '.join(Role)}"
        problems.append(Problem(str(path), "a file of your own does not say what it is for", remedy))
    if not rows and not problems:
        problems.append(Problem(str(path), "no items", "give at least one line"))
    if rows:
        rows = select(rows, pick, str(path), problems)
        if not rows and not problems:
            problems.append(Problem(str(path), "the filters leave no items", "ask for fewer columns at once"))
    if chosen is not None and rows:
        check_role(rows, chosen, str(path), problems)
    if problems or chosen is None:
        raise BadInput(problems)

    items = tuple(row.item for row in rows)
    content = digest(items)
    version = content[:VERSION_DIGITS]
    if info:
        version = info.version if pick.everything else f"{info.version}+{version}"
    return Suite(
        name=info.name if info else path.stem if published is None else f"{kind}:{path.name}",
        version=version,
        role=chosen,
        items=items,
        source=info.source if info else published.source if published else path.name,
        licence=info.licence if info else published.licence if published else "",
        digest=content,
    )


def _role(role: Role | str | None, problems: list[Problem]) -> Role | None:
    if role is None or role in set(Role):
        return None if role is None else Role(role)
    problems.append(Problem("role", f"unknown role {role!r}", did_you_mean(role, [each.value for each in Role])))
    return None


def _format(path: Path, text: str) -> str:
    """The format of a file, by its name, its first line, or its header."""
    if path.suffix.lower() in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        return "jsonl"
    if looks_like_winobias(text):
        return "winobias"
    try:
        header = next(csv.reader(io.StringIO(text, newline="")), [])
    except csv.Error:
        header = []
    found = looks_like(header)
    if found is None:
        remedy = f"name it with format=, one of: {', '.join([*FORMATS, 'jsonl'])}"
        raise BadInput.of(str(path), "neither JSONL nor a published format by its first line", remedy)
    return found
