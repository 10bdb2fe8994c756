"""One file of users' data as a stream of rows; whatever is wrong with it is noted, never raised halfway.

Every reader yields `Rows`: a few thousand at a time, text columns as UTF-8 strings, all other columns as dictionaries
of strings, and for each row the place a person would look for it.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedcanary.clients.sources import Problems, Source
from fedcanary.errors import did_you_mean

ROWS: Final = 8192  # rows of a batch
CHARS: Final = 1 << 24  # text of a batch; a longer CSV field is a quote that was never closed
_BROKEN: Final = "mend this line or remove it"
_REWRITE: Final = "write the file again; it is damaged or not what its name says"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A batch: one array per wanted column, and where each row stands."""

    columns: Mapping[str, Any]
    path: Path
    places: Sequence[int]
    unit: str = ":"

    def where(self, row: int | np.integer[Any]) -> str:
        """The place of a row of this batch: `file:line`, or `file row n` (from 1) where there are no lines."""
        return f"{self.path}{self.unit}{self.places[int(row)]}"


def read(source: Source, texts: Sequence[str], codes: Sequence[str], problems: Problems) -> Iterator[Rows]:
    """Rows of one file with the columns `texts` and `codes`. Stops at what it cannot read past."""
    before, total = problems.count, 0
    readers = {"csv": _csv, "jsonl": _jsonl, "parquet": _columnar, "arrow": _columnar}
    try:
        for rows in readers[source.kind](source, texts, codes, problems):
            total += len(rows.places)
            if rows.places:
                yield rows
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problems.add("unreadable", str(source.path), f"not readable as {source.kind}: {reason}", _REWRITE)
    if not total and problems.count == before:
        problems.add("empty", str(source.path), "holds no rows", "remove it, or write the rows it should hold")


def code_text(value: object) -> str | None:
    """How a value of a code column is spelled, the same from every format; None where there is no value.

    >>> code_text(3), code_text(3.0), code_text("a"), code_text(True), code_text(""), code_text(float("nan"))
    ('3', '3', 'a', 'true', None, None)
    """
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None or value == "" else str(value)


# --- text files


def _decoded(path: Path, problems: Problems) -> Iterator[str]:
    """Lines of a UTF-8 file, ends kept. A line that is not UTF-8 is noted and passed on with U+FFFD."""
    with path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"not UTF-8 at byte {offset + error.start} of the file: {error.reason}"
                problems.add("not UTF-8", f"{path}:{number}", what, "save the file as UTF-8")
                line = raw.decode("utf-8", errors="replace")
            offset += len(raw)
            yield line.removeprefix(codecs.BOM_UTF8.decode()) if number == 1 else line


def _csv(source: Source, texts: Sequence[str], codes: Sequence[str], problems: Problems) -> Iterator[Rows]:
    wanted = [*texts, *codes]
    batch = _Batch(source.path, texts, codes)
    limit = csv.field_size_limit(CHARS)  # the standard library keeps one limit per process
    try:
        reader = csv.reader(_decoded(source.path, problems), strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problems.add("broken CSV", f"{source.path}:{line}", f"not CSV: {error}", "close or double the quotes")
                continue
            if not fields:  # a blank line
                continue
            if header is None:
                header = fields
                if not _complete(source.path, wanted, header, problems):
                    return
                places = [header.index(name) for name in wanted]
            elif len(fields) != len(header):
                what = f"{len(fields)} fields where the header has {len(header)}"
                remedy = "quote fields that hold a comma or a line break"
                problems.add("fields", f"{source.path}:{line}", what, remedy)
            elif batch.add(line, [fields[place] for place in places], sum(map(len, fields))):
                yield batch.take()
    finally:
        csv.field_size_limit(limit)
    if batch.places:
        yield batch.take()


def _jsonl(source: Source, texts: Sequence[str], codes: Sequence[str], problems: Problems) -> Iterator[Rows]:
    wanted = [*texts, *codes]
    batch = _Batch(source.path, texts, codes)
    keys: set[str] | None = set()  # of the first batch: a column that none of its lines has is missing
    for number, line in enumerate(_decoded(source.path, problems), 1):
        if not line.strip():
            continue
        where = f"{source.path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add("broken JSON", where, f"broken JSON at character {error.pos + 1}: {error.msg}", _BROKEN)
            continue
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            problems.add("broken JSON", where, f"unusable JSON: {error}", _BROKEN)
            continue
        if not isinstance(record, dict):
            what = f"a {type(record).__name__} where an object is expected"
            problems.add("not an object", where, what, 'write each line as {"column": value, ...}')
            continue
        if keys is not None:
            keys.update(record)
        values = [record.get(name) for name in wanted]
        if _spelled(where, wanted, len(texts), values, problems) and batch.add(number, values, len(line)):
            if keys is not None and not _complete(source.path, wanted, keys, problems):
                return
            keys = None
            yield batch.take()
    if keys is not None and (keys or batch.places) and not _complete(source.path, wanted, keys, problems):
        return
    if batch.places:
        yield batch.take()


def _spelled(where: str, names: Sequence[str], texts: int, values: list[Any], problems: Problems) -> bool:
    """Turn JSON values into strings in place; False, with the problem noted, where one cannot be."""
    for place, value in enumerate(values):
        name = names[place]
        if isinstance(value, dict | list) or (place < texts and not isinstance(value, str | None)):
            wanted = "text" if place < texts else "text or a number"
            what = f"column {name!r} holds a {type(value).__name__}, not {wanted}"
            problems.add("wrong type", where, what, f"write it as {wanted}")
            return False
        if place >= texts:
            values[place] = value = code_text(value)
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            problems.add("half characters", where, f"column {name!r} holds half of a surrogate pair", _BROKEN)
            return False
    return True


class _Batch:
    """Values gathered row by row until there are enough for a batch."""

    def __init__(self, path: Path, texts: Sequence[str], codes: Sequence[str]) -> None:
        self._path, self._texts, self._codes = path, texts, codes
        self._empty()

    def _empty(self) -> None:
        self.places: list[int] = []
        self._rows: list[Sequence[str | None]] = []
        self._chars = 0

    def add(self, place: int, values: Sequence[str | None], chars: int) -> bool:
        """Add a row; True when the batch is full."""
        self.places.append(place)
        self._rows.append(values)
        self._chars += chars
        return len(self.places) >= ROWS or self._chars >= CHARS

    def take(self) -> Rows:
        """The batch so far; begins a new one."""
        arrays = [pa.array(values, pa.large_string()) for values in zip(*self._rows, strict=True)]
        columns = dict(zip(self._texts, arrays, strict=False))
        columns |= {
            name: array.dictionary_encode() for name, array in zip(self._codes, arrays[len(self._texts) :], strict=True)
        }
        rows = Rows(columns=columns, path=self._path, places=self.places)
        self._empty()
        return rows


def _complete(path: Path, wanted: Sequence[str], present: Iterable[str], problems: Problems) -> bool:
    names = list(present)
    good = True
    for name in dict.fromkeys(wanted):
        if names.count(name) != 1:
            what = f"has no column {name!r}" if name not in names else f"has {names.count(name)} columns named {name!r}"
            remedy = did_you_mean(name, {known for known in names if known}) if name not in names else "rename one"
            problems.add("columns", str(path), what, remedy)
            good = False
    return good


# --- columnar files


def _columnar(source: Source, texts: Sequence[str], codes: Sequence[str], problems: Problems) -> Iterator[Rows]:
    wanted = list(dict.fromkeys([*texts, *codes]))
    with pa.memory_map(str(source.path)) as mapped:
        if source.kind == "parquet":
            file = pq.ParquetFile(mapped, page_checksum_verification=True)
            schema, batches = file.schema_arrow, file.iter_batches(ROWS, columns=wanted)
        else:
            batches = pa.ipc.open_stream(mapped)
            schema = batches.schema
        if not _complete(source.path, wanted, schema.names, problems):
            return
        good = True
        for name in wanted:
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if (name in texts and not _textual(kind)) or pa.types.is_nested(kind):
                what = f"column {name!r} holds {kind}, not {'text' if name in texts else 'text or a number'}"
                problems.add("wrong type", str(source.path), what, "name a column of text, or convert this one")
                good = False
        start = 1
        for batch in batches if good else ():
            places = range(start, start + len(batch))
            columns = {name: _column(source, name, batch.column(name), places, problems) for name in wanted}
            columns = {
                name: values if name in texts else _coded(values, source.classes.get(name, ()))
                for name, values in columns.items()
            }
            yield Rows(columns=columns, path=source.path, places=places, unit=" row ")
            start += len(batch)


def _column(source: Source, name: str, values: Any, places: Sequence[int], problems: Problems) -> Any:
    """A column as it is, strings as sound `large_string`: Parquet does not promise that they are UTF-8."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not _textual(values.type):
        return values
    values = values.cast(pa.large_string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        raw = values.cast(pa.large_binary()).to_pylist()
        for place, value in zip(places, raw, strict=True):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                what = f"column {name!r} is not UTF-8 at byte {error.start} of its value: {error.reason}"
                problems.add("not UTF-8", f"{source.path} row {place}", what, "encode the text as UTF-8")
        values = pa.array([(value or b"").decode(errors="replace") for value in raw], pa.large_string())
    return values


def _coded(values: Any, classes: Sequence[str]) -> Any:
    """A code column as a dictionary of strings; integers that the file declares to be classes get their names."""
    values = values.dictionary_encode()
    names = [
        classes[value] if isinstance(value, int) and 0 <= value < len(classes) else code_text(value)
        for value in values.dictionary.to_pylist()
    ]
    return pa.DictionaryArray.from_arrays(values.indices, pa.array(names, pa.large_string()))


def _textual(kind: Any) -> bool:
    of = pa.types
    return bool(of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind) or of.is_null(kind))
