"""What the server asks and what a client answers, as values and as bytes.

One Flower message carries a parcel: a list of asks, or the answers to one. The bytes, little-endian:

    parcel  version u8 | what it holds u8 (0 asks, 1 answers) | count u8, at most 16 | items
    ask     kind: word | fields
    answer  id of the ask: 16 bytes | refused: word, empty if not | fields, none if refused
    fields  count u8 | for each, names increasing: name: word | type u8 | value
    word    length u8 | [a-z_], at most 40
    value   0 bytes and 1 UTF-8: length u32, content | 2 int: i64 | 3 float: f64, no NaN

There is one spelling of every parcel: bytes that decode are the bytes that `encode` would write, so an id (a digest of
an ask's bytes) names its content. NaN is refused, as it equals nothing: what has no number has no field.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from fedcanary.errors import FedcanaryError

if TYPE_CHECKING:
    from flwr.app import RecordDict

Value = bytes | str | int | float

VERSION: Final = 1
MOST: Final = 16  # asks in a parcel
LARGEST: Final = 1 << 30  # bytes of a parcel that is read at all
ASKS, ANSWERS = 0, 1
BYTES, TEXT, INT, FLOAT = range(4)
RECORD, KEY = "fedcanary", "parcel"
WORD = re.compile(r"[a-z_]{1,40}")
ID = re.compile(r"[0-9a-f]{32}")


class Malformed(FedcanaryError):
    """The other side's bytes are no parcel. `reason` is one word of ours, so it holds nothing of what was sent."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A thing to do, by its kind and fields; two are equal if their bytes are (so 1 is not 1.0, nor 0.0 -0.0).

    `id` is 32 hex digits of Blake2b over the ask's bytes.

    Raises:
        ValueError: a name that is no word of [a-z_]{1,40}, more than 255 fields, a value that is none of `Value`
            exactly (no bool, no NumPy number), an integer beyond 64 bits, NaN, or text that is not Unicode.
    """

    kind: str
    fields: Mapping[str, Value]
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _frozen(self.fields))
        digest = hashlib.blake2b(digest_size=16)
        for part in _ask(self):
            digest.update(part)
        object.__setattr__(self, "id", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ask) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a client says to the ask with this id: fields, or the one word why not. Raises ValueError as `Ask` does."""

    ask: str
    fields: Mapping[str, Value]
    refused: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _frozen(self.fields))
        if not ID.fullmatch(self.ask) or (self.refused and self.fields):
            raise ValueError("an answer names its ask by 32 hex digits, and has no fields if it is a refusal")
        for _ in _answer(self):
            pass  # every check is in the encoding

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and b"".join(_answer(self)) == b"".join(_answer(other))

    def __hash__(self) -> int:
        return hash(self.ask)


def encode(parcel: Sequence[Ask] | Sequence[Answer]) -> bytes:
    """A parcel's bytes. Raises ValueError for more than 16 items, asks beside answers, or one id twice."""
    what = ASKS if parcel and isinstance(parcel[0], Ask) else ANSWERS
    kind = (Ask, Answer)[what]
    if len(parcel) > MOST or not all(isinstance(item, kind) for item in parcel):
        raise ValueError(f"a parcel is at most {MOST} asks, or as many answers")
    parts = [bytes([VERSION, what, len(parcel)])]
    ids = set()
    for item in parcel:
        parts += _ask(item) if isinstance(item, Ask) else _answer(item)
        ids.add(item.id if isinstance(item, Ask) else item.ask)
    if len(ids) < len(parcel):
        raise ValueError("a parcel holds an ask, or its answer, once")
    return b"".join(parts)


def decode_asks(data: bytes, limit: int) -> tuple[Ask, ...]:
    """The asks, one at least, that `encode` wrote, in at most `limit` bytes. Raises Malformed on anything else."""
    reader = _Reader(data, limit, ASKS)
    if not reader.count:
        raise Malformed("empty")
    asks = tuple(Ask(reader.word(), reader.fields()) for _ in range(reader.count))
    reader.end([ask.id for ask in asks])
    return asks


def decode_answers(data: bytes, limit: int) -> tuple[Answer, ...]:
    """The answers that `encode` wrote, in at most `limit` bytes. Raises Malformed on anything else.

    None at all is what a client answers to a parcel that it could not read, and so knows no ask's id of.
    """
    reader = _Reader(data, limit, ANSWERS)
    answers = []
    for _ in range(reader.count):
        ask, refused, fields = reader.take(16).hex(), reader.word(empty=True), reader.fields()
        if refused and fields:
            raise Malformed("refused")
        answers.append(Answer(ask, fields, refused))
    reader.end([answer.ask for answer in answers])
    return tuple(answers)


def record(data: bytes) -> RecordDict:
    """A parcel's bytes as the content of a Flower message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({RECORD: ConfigRecord({KEY: data})})


def data_of(content: RecordDict) -> bytes:
    """The bytes that `record` put there. Raises Malformed if there is anything else beside them, or not they."""
    from flwr.app import ConfigRecord

    found = content.get(RECORD)
    if len(content) != 1 or not isinstance(found, ConfigRecord) or len(found) != 1:
        raise Malformed("record")
    data = found.get(KEY)
    if not isinstance(data, bytes):
        raise Malformed("record")
    return data


def _frozen(fields: Mapping[str, Value]) -> Mapping[str, Value]:
    return MappingProxyType(dict(sorted(fields.items())))


def _ask(ask: Ask) -> Iterator[bytes]:
    yield _word(ask.kind)
    yield from _fields(ask.fields)


def _answer(answer: Answer) -> Iterator[bytes]:
    yield bytes.fromhex(answer.ask)
    yield _word(answer.refused) if answer.refused else b"\0"
    yield from _fields(answer.fields)


def _word(word: str) -> bytes:
    if not WORD.fullmatch(word):
        raise ValueError(f"{word!r} is not of the letters a-z and _, at most 40")
    return bytes([len(word)]) + word.encode()


def _fields(fields: Mapping[str, Value]) -> Iterator[bytes]:
    if len(fields) > 255:
        raise ValueError("at most 255 fields")
    yield bytes([len(fields)])
    for name, value in fields.items():
        yield _word(name)
        if type(value) is int and -(1 << 63) <= value < 1 << 63:
            yield struct.pack("<Bq", INT, value)
        elif type(value) is float and not math.isnan(value):
            yield struct.pack("<Bd", FLOAT, value)
        elif type(value) is str:
            yield from _sized(TEXT, value.encode())
        elif type(value) is bytes:
            yield from _sized(BYTES, value)
        else:
            raise ValueError(f"field {name!r} is not bytes, text, an integer of 64 bits or a float that is a number")


def _sized(kind: int, content: bytes) -> Iterator[bytes]:
    if len(content) >= 1 << 32:
        raise ValueError("a value is under 4 GiB")
    yield struct.pack("<BI", kind, len(content))
    yield content


class _Reader:
    """Reads from the front; nothing is copied before the bytes it is said to have are known to be there."""

    def __init__(self, data: bytes, limit: int, what: int) -> None:
        if len(data) > limit:
            raise Malformed("oversized")
        self.data, self.at = data, 0
        version, found, self.count = self.take(3)
        if version != VERSION:
            raise Malformed("version")
        if found != what or self.count > MOST:
            raise Malformed("parcel")

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise Malformed("truncated")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def word(self, *, empty: bool = False) -> str:
        content = self.take(self.take(1)[0])
        word = content.decode("latin-1")
        if not WORD.fullmatch(word) and not (empty and not word):
            raise Malformed("word")
        return word

    def fields(self) -> dict[str, Value]:
        found: dict[str, Value] = {}
        last = ""
        for _ in range(self.take(1)[0]):
            name = self.word()
            if name <= last:
                raise Malformed("order")
            found[name] = self.value(self.take(1)[0])
            last = name
        return found

    def value(self, kind: int) -> Value:
        if kind == INT:
            return int(struct.unpack("<q", self.take(8))[0])
        if kind == FLOAT:
            number = float(struct.unpack("<d", self.take(8))[0])
            if math.isnan(number):
                raise Malformed("number")
            return number
        if kind not in (BYTES, TEXT):
            raise Malformed("type")
        content = self.take(struct.unpack("<I", self.take(4))[0])
        if kind == BYTES:
            return content
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise Malformed("text") from None

    def end(self, ids: Sequence[str]) -> None:
        if self.at != len(self.data):
            raise Malformed("trailing")
        if len(set(ids)) < len(ids):
            raise Malformed("repeated")
