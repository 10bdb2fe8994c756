"""From a file's bytes to checked rows, and from rows to the selection a suite is made of.

Readers collect every `Problem` they meet in a list that is passed along; whoever calls them raises once, at the end.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.types import Item, Role

ANSWERED = frozenset({Role.CALIBRATION, Role.GENERAL, Role.SAFETY, Role.PERSONA, Role.DOMAIN})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An item, where it was read (`file:line`), and the columns by which `Pick.where` may choose it."""

    where: str
    item: Item
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Which items of a file to keep; the default keeps all of them, in the file's order.

    `where` maps a column to the values wanted (columns combine with *and*, values with *or*). `at_most` then keeps
    that many items or fewer: those whose content digest is smallest (`by="digest"`, a sample that depends on nothing
    but the content and grows by nesting) or the first ones (`by="order"`). Items of one pair stay together.
    """

    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    at_most: int | None = None
    by: Literal["digest", "order"] = "digest"

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return not self.where and self.at_most is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How a published format is put to the model: `template` holds `{prompt}`; `choices` replaces the usual ones."""

    template: str | None = None
    choices: tuple[str, str] | None = None


def canonical(item: Item) -> str:
    """One item as JSON with sorted keys and no spaces: equal items give equal text."""
    return json.dumps(asdict(item), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(items: Iterable[Item]) -> str:
    """32 hexadecimal digits that identify the items and their order (BLAKE2b over their canonical lines).

    >>> digest([Item(prompt="a", choices=("b",))]) == digest([Item(prompt="a", choices=("c",))])
    False
    """
    state = hashlib.blake2b(digest_size=16)
    for item in items:
        state.update(canonical(item).encode() + b"\n")
    return state.hexdigest()


def read_text(path: Path) -> str:
    """The file as text.

    Raises:
        BadInput: the file cannot be read, or some of its lines are not UTF-8 (every such line is listed).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise BadInput.of(str(path), what, "name a file you can read") from error
    problems = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line is not UTF-8"
            problems.append(Problem(f"{path}:{number}", what, "save the file as UTF-8"))
    if problems:
        raise BadInput(problems)
    return content.decode("utf-8-sig")


def read_table(
    path: Path, text: str, needed: Iterable[str], problems: list[Problem], delimiter: str = ","
) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV text as (`file:line`, column -> value), the line being the one on which the row starts."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[tuple[str, dict[str, str]]] = []
    line = 1
    try:
        header = next(reader, [])
        missing = [name for name in needed if name not in header]
        for name in missing:
            remedy = did_you_mean(name, header) if header else "begin the file with a line of column names"
            problems.append(Problem(f"{path}:1", f"column {name!r} is missing", remedy))
        if missing:
            return []
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(fields) == len(header):
                rows.append((where, dict(zip(header, fields, strict=True))))
            elif fields:
                what = f"{len(fields)} fields where the header has {len(header)}"
                problems.append(Problem(where, what, "quote fields that hold commas or line breaks"))
    except csv.Error as error:
        what = f"not a CSV row: {error}"
        problems.append(Problem(f"{path}:{line}", what, "close every quote and double those inside"))
    return rows


def select(rows: Sequence[Row], pick: Pick, source: str, problems: list[Problem]) -> list[Row]:
    """The rows that `pick` keeps, in the order they came."""
    kept = list(rows)
    for column, wanted in pick.where.items():
        values = [wanted] if isinstance(wanted, str) else list(wanted)
        known = {row.columns[column] for row in rows if column in row.columns}
        if not known:
            columns = {name for row in rows for name in row.columns}
            remedy = did_you_mean(column, columns) if columns else "leave the filter out"
            problems.append(Problem(source, f"no item has a column {column!r} to choose by", remedy))
            continue
        for value in sorted(set(values) - known):
            problems.append(Problem(source, f"no item has {column} = {value!r}", did_you_mean(value, known)))
        kept = [row for row in kept if row.columns.get(column) in values]
    if pick.at_most is None:
        return kept
    if pick.at_most < 1:
        problems.append(Problem(source, f"cannot keep at most {pick.at_most} items", "keep at least one"))
        return kept
    units: dict[str, list[int]] = {}
    for index, row in enumerate(kept):
        units.setdefault(f"item {index}" if row.item.pair is None else f"pair {row.item.pair}", []).append(index)
    groups = list(units.values())
    if pick.by == "digest":
        groups.sort(key=lambda unit: (digest(kept[index].item for index in unit), unit))
    chosen: list[int] = []
    for unit in groups:
        if len(chosen) + len(unit) > pick.at_most:
            break
        chosen += unit
    if kept and not chosen:
        what = f"at most {pick.at_most} items, but the first pair alone has {len(groups[0])}"
        problems.append(Problem(source, what, f"keep at least {len(groups[0])}"))
    return [kept[index] for index in sorted(chosen)]


def check_role(rows: Sequence[Row], role: Role, source: str, problems: list[Problem]) -> None:
    """Whether the items can serve the role: a right answer, two sentences, or two groups."""
    if role is Role.BIAS and len({row.item.group for row in rows} - {None}) < 2:
        problems.append(Problem(source, "a bias suite needs items of at least two groups", "give items a 'group'"))
    for row in rows:
        if role is Role.STEREOTYPE and len(row.item.choices) != 2:
            what = f"a stereotype item has two choices, the stereotyped one first; this has {len(row.item.choices)}"
            problems.append(Problem(row.where, what, "give two choices, or the suite another role"))
        if role in ANSWERED and row.item.answer is None:
            what = f"no 'answer', which every item of a {role} suite has"
            problems.append(Problem(row.where, what, "give the index or the text of the right choice"))
