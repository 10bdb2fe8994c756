"""Users' data as one table on disk: read once, streaming, then memory-mapped and turned into items on demand.

    files -> rows (readers.py) -> checked, names as integers -> rows.arrow + names.json in the cache -> Table -> Item

Law: what a `Table` says, its digest included, depends on the rows and on the roles of their columns; not on the file
format, on where the files lie, or on how they were cut into batches.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedcanary.clients import readers
from fedcanary.clients.sources import Problems, Source, find
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.types import Item

Codes = npt.NDArray[np.int32]

MAX_CLASSES: Final = 1000  # more inferred classes than this, and the label column is hardly one of classes
_LAYOUT: Final = 1  # of the folders in the cache
_CODES: Final = ("label", "client", "group", "domain")
_SLICE: Final = "slice "  # before an attribute's name, among the roles
_NONE: Final = -1
_UNKNOWN: Final = -2


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of the files play which role. Legal: `text`; `prompt` and `response`; `text` and `label`."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    client: str | None = None
    group: str | None = None
    domain: str | None = None
    slices: tuple[str, ...] = ()  # attributes of clients, each of its own name

    @property
    def codes(self) -> dict[str, str]:
        """Columns whose values are names, by role."""
        roles = {role: name for role in _CODES if (name := getattr(self, role)) is not None}
        return roles | {_SLICE + name: name for name in self.slices}

    def problems(self, labels: Sequence[str] | None = None) -> list[Problem]:
        """Everything wrong with this choice of columns, and with `labels` as the names of its classes."""
        found = []
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        roles = {role for role in ("text", "prompt", "response", "label") if named[role] is not None}
        if roles not in ({"text"}, {"prompt", "response"}, {"text", "label"}):
            what = f"no kind of example has {' and '.join(sorted(roles)) or 'no text'}"
            found.append(Problem("columns", what, "name text; or prompt and response; or text and label"))
        for role in ("text", "prompt", "response"):
            for other, name in named.items():
                if role != other and name is not None and name == named[role]:
                    what = f"{role} and {other} are both column {name!r}"
                    found.append(Problem("columns", what, f"name another column for {other}"))
        for name in self.slices:
            if self.slices.count(name) > 1 or "=" in name or not name.isprintable() or name in ("", "domain"):
                what = f"{name!r} cannot be the name of an attribute"
                found.append(Problem("columns.slices", what, "list each once, without '='; the domain is one already"))
        if labels is not None:
            if self.label is None:
                found.append(Problem("labels", "no label column goes with them", "name it, or leave them out"))
            if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
                found.append(Problem("labels", f"{list(labels)} are not classes", "name two or more different classes"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows on disk. `label`, `client`, `group` and `domain` are (rows,) codes into the tuple named in the plural.

    A code is -1 where a row has none. `length` is (rows,): characters of the row's text, the response included.
    """

    path: Path
    rows: int
    digest: str
    columns: Columns
    labels: tuple[str, ...]
    clients: tuple[str, ...]
    groups: tuple[str, ...]
    domains: tuple[str, ...]
    label: Codes
    client: Codes
    group: Codes
    domain: Codes
    attributes: Mapping[str, tuple[tuple[str, ...], Codes]]  # of clients: names, and the rows' codes
    length: Codes
    _text: tuple[Any, ...]  # one memory-mapped array per batch on disk
    _response: tuple[Any, ...]
    _starts: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> Table:
        """Map a table that `read` left in the cache. Raises BadInput if the folder is damaged."""
        try:
            noted = json.loads((path / "names.json").read_text("utf-8"))
            stored = pa.ipc.open_file(pa.memory_map(str(path / "rows.arrow"))).read_all()
            rows = int(noted["rows"])
            if stored.num_rows != rows:
                raise ValueError(f"{stored.num_rows} rows where {rows} were written")
            found: dict[str, Any] = {"attributes": {}}
            for role, met in noted["met"].items():
                names, codes = tuple(noted["names"][role]), np.broadcast_to(np.int32(_NONE), rows)
                place = {name: code for code, name in enumerate(names)}
                if role in stored.column_names:
                    codes = np.array([*(place[name] for name in met), _NONE], np.int32)[stored[role].to_numpy()]
                if role in _CODES:
                    found |= {f"{role}s": names, role: codes}
                else:
                    found["attributes"][role.removeprefix(_SLICE)] = (names, codes)
            chunks = stored["text"].chunks
            starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])[:-1].tolist()
            return cls(  # the codes on disk count names as they were met; in memory, in order
                path=path,
                rows=rows,
                digest=noted["digest"],
                columns=Columns(**{**noted["columns"], "slices": tuple(noted["columns"]["slices"])}),
                length=stored["length"].to_numpy(),
                _text=tuple(chunks),
                _response=tuple(stored["response"].chunks) if "response" in stored.column_names else (),
                _starts=tuple(starts),
                **found,
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise BadInput.of(str(path), f"damaged table in the cache: {error}", "delete this folder") from error

    def item(self, row: int) -> Item:
        """The row as an item. Raises IndexError outside the table."""
        row = range(self.rows)[row]
        chunk = bisect_right(self._starts, row) - 1
        at = row - self._starts[chunk]
        text: str = self._text[chunk][at].as_py()
        group = self.groups[self.group[row]] if self.group[row] >= 0 else None
        domain = self.domains[self.domain[row]] if self.domain[row] >= 0 else None
        if self.labels:
            answer = int(self.label[row])
            return Item(prompt=text, choices=self.labels, answer=answer, group=group, domain=domain)
        if self._response:
            response: str = self._response[chunk][at].as_py()
            return Item(prompt=text, choices=(response,), answer=0, group=group, domain=domain)
        return Item(prompt="", choices=(text,), answer=0, group=group, domain=domain)

    def items(self, rows: Iterable[int]) -> tuple[Item, ...]:
        """The rows as items, in the order asked."""
        return tuple(self.item(int(row)) for row in rows)


def read(
    source: Path | Sequence[Path],
    columns: Columns,
    cache: Path,
    *,
    labels: Sequence[str] | None = None,
    split: str | None = None,
) -> Table:
    """Read .jsonl, .csv or .parquet files, folders of them, or saved datasets into `cache`; reuse what is there.

    `labels` names the classes in order; label values are those names or 0..n-1, and names that a saved dataset declares
    are replaced by position. Without `labels` the order is the declared one, else that of the sorted values. `split`
    chooses a split of a saved DatasetDict. Rows keep the order of the files. On failure nothing is left in `cache`.

    Raises:
        BadInput: with every problem found in the arguments and in the files, by file and line.
    """
    problems = Problems()
    for one in columns.problems(labels):
        problems.add("columns", one.where, one.what, one.remedy)
    illegal = problems.count
    files = find(source, split, problems)
    if illegal:
        problems.raise_any()
    classes = tuple(labels) if labels is not None else _declared(files, columns.label)
    files = [_relabelled(source, columns.label, classes) for source in files]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        key = "" if problems.count else _key(files, columns, classes)
        home = cache / f"table-{key}"
        if key and home.exists():
            return Table.open(home)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        try:
            _write(files, columns, classes, building, problems)
            problems.raise_any()
            try:
                building.replace(home)
            except OSError:
                if not home.exists():  # else someone built the same table meanwhile
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise BadInput.of(str(cache), f"cannot write the cache: {error}", "free space there or name another") from error
    return Table.open(home)


def _declared(files: Sequence[Source], label: str | None) -> tuple[str, ...] | None:
    """The classes in the order the files declare, if all declare the same."""
    declared = {source.classes.get(label) if label else None for source in files}
    return declared.pop() if len(declared) == 1 else None


def _relabelled(source: Source, label: str | None, classes: tuple[str, ...] | None) -> Source:
    """Let the caller's names replace the declared ones by position, unless they are the same names reordered."""
    if classes is None or label is None or set(source.classes.get(label, classes)) == set(classes):
        return source
    return replace(source, classes={column: names for column, names in source.classes.items() if column != label})


def _key(files: Sequence[Source], columns: Columns, classes: tuple[str, ...] | None) -> str:
    """Names the table by the bytes of its files, so that an edited file is never taken for the old one."""
    key = hashlib.blake2b(repr((_LAYOUT, columns, classes)).encode(), digest_size=12)
    for source in files:
        key.update(repr((source.kind, sorted(source.classes.items()))).encode())
        with source.path.open("rb") as file:
            key.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return key.hexdigest()


class _Names:
    """Names in the order they are met; a name's number is its place. With `classes`, only those are known."""

    def __init__(self, classes: tuple[str, ...] | None = None) -> None:
        self.met: dict[str, int] = {}
        self.classes = classes

    def number(self, value: str | None) -> int:
        if not value:
            return _NONE
        if self.classes is not None and value not in self.classes:
            if not (value.isascii() and value.isdecimal() and int(value) < len(self.classes)):
                return _UNKNOWN
            value = self.classes[int(value)]
        return self.met.setdefault(value, len(self.met))

    def codes(self, values: Any) -> Codes:
        numbers = np.array([*map(self.number, values.dictionary.to_pylist()), _NONE], np.int32)
        return np.asarray(numbers[values.indices.fill_null(len(values.dictionary)).to_numpy()])


def _write(
    files: Sequence[Source], columns: Columns, classes: tuple[str, ...] | None, folder: Path, problems: Problems
) -> None:
    """Write rows.arrow and names.json. With problems found, what is written is of no use; the caller throws it away."""
    texts = [name for name in (columns.text or columns.prompt, columns.response) if name is not None]
    roles = columns.codes
    names = {role: _Names(classes if role == "label" else None) for role in (*_CODES, *roles)}
    schema = pa.schema(
        [(role, pa.large_string()) for role in ("text", "response")[: len(texts)]]
        + [(role, pa.int32()) for role in (*roles, "length")]
    )
    digests: dict[str, Any] = {}
    rows = 0
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for source in files:
            for batch in readers.read(source, texts, list(dict.fromkeys(roles.values())), problems):
                values = _checked(batch, texts, roles, names, problems)
                rows += len(batch.places)
                if not problems.count:
                    writer.write_batch(pa.record_batch(values, schema=schema))
                    _digest(digests, values)
    order = {role: sorted(known.met) for role, known in names.items()}
    if columns.label is not None:
        order["label"] = list(classes) if classes is not None else _inferred(order["label"], columns.label, problems)
    noted = {"rows": rows, "met": {role: list(known.met) for role, known in names.items()}, "names": order}
    summed = {name: digest.hexdigest() for name, digest in digests.items()}
    digest = hashlib.blake2b(json.dumps([noted, summed], sort_keys=True).encode(), digest_size=16).hexdigest()
    noted |= {"digest": digest, "columns": {field.name: getattr(columns, field.name) for field in fields(columns)}}
    (folder / "names.json").write_text(json.dumps(noted), "utf-8")


def _checked(
    batch: readers.Rows, texts: Sequence[str], roles: Mapping[str, str], names: Mapping[str, _Names], problems: Problems
) -> dict[str, Any]:
    """The batch as the arrays to store, by role; every row that cannot be used is noted."""
    values: dict[str, Any] = {}
    length = pa.scalar(0, pa.int32())
    for role, name in zip(("text", "response"), texts, strict=False):
        values[role] = batch.columns[name]
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values[role])), 0)
        for row in np.flatnonzero(pc.fill_null(blank, True)):
            problems.add("empty text", batch.where(row), f"column {name!r} is empty", "fill it in or remove the row")
        length = pc.add(length, pc.utf8_length(values[role]))
    for role, name in roles.items():
        column, known = batch.columns[name], names[role]
        codes = values[role] = known.codes(column)
        for row in np.flatnonzero(codes == _NONE) if role in ("label", "client") else ():
            what = f"column {name!r} is empty: no {role}"
            problems.add(f"no {role}", batch.where(row), what, "fill it in or remove the row")
        for row in np.flatnonzero(codes == _UNKNOWN):
            value, classes = column[int(row)].as_py(), known.classes or ()
            what = f"label {value!r} is neither a class nor one of 0..{len(classes) - 1}"
            problems.add("unknown label", batch.where(row), what, partial(did_you_mean, value, classes))
    return {**values, "length": length.cast(pa.int32())}


def _inferred(names: list[str], column: str, problems: Problems) -> list[str]:
    """The classes in order when nobody named them: numbers by size, else the alphabet."""
    if not 2 <= len(names) <= MAX_CLASSES and not problems.count:
        what = f"column {column!r} has {len(names)} different labels; 2 to {MAX_CLASSES} can be classes"
        problems.add("classes", "labels", what, "name another column, or the classes with `labels`")
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def _digest(digests: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add a batch to the running digest of each column, so that the cut into batches leaves no trace."""
    for role, array in values.items():
        if role in _CODES or role.startswith(_SLICE):
            parts = {role: array.astype("<i4").tobytes()}
        elif role == "length":
            continue
        else:
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
            parts = {f"{role} sizes": np.diff(ends).astype("<i8").tobytes(), role: data[ends[0] : ends[-1]]}
        for name, part in parts.items():
            digests.setdefault(name, hashlib.blake2b(digest_size=16)).update(part)
