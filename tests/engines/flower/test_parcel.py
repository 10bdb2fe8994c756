from __future__ import annotations

import math
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.engines.flower import wire
from fedcanary.engines.flower.wire import Answer, Ask, Malformed, decode_answers, decode_asks, encode

LIMIT = 1 << 20
words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=40)
values = st.one_of(
    st.binary(max_size=40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False),
)
tables = st.dictionaries(words, values, max_size=5)
asks = st.builds(Ask, words, tables)
ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
answers = st.builds(Answer, ids, tables) | st.builds(lambda i, w: Answer(i, {}, w), ids, words)
parcels = st.lists(asks, min_size=1, max_size=4, unique_by=lambda a: a.id) | st.lists(
    answers, max_size=4, unique_by=lambda a: a.ask
)
ASK = Ask("train", {"model": b"\x00\xff", "note": "grüße", "rate": -0.0, "round": -3, "scale": math.inf})
PARCELS = [
    encode([ASK, Ask("agree", {})]),
    encode([Answer(ASK.id, {"bits": b"12", "loss": 0.1}), Answer("00" * 16, {}, "stale")]),
    encode([]),
]


def decode(data: bytes, limit: int = LIMIT) -> tuple:
    """Whichever of the two reads it; what one refuses for another reason than its kind the other must refuse too."""
    try:
        return decode_asks(data, limit)
    except Malformed:
        return decode_answers(data, limit)


@given(parcels)
def test_what_is_encoded_comes_back(parcel):
    found = decode(encode(parcel))
    assert list(found) == parcel
    for got, was in zip(found, parcel, strict=True):
        assert dict(got.fields) == dict(was.fields)
        assert [type(v) for v in got.fields.values()] == [type(v) for v in was.fields.values()]
        if isinstance(was, Ask):
            assert got.id == was.id and got.kind == was.kind
        else:
            assert (got.ask, got.refused) == (was.ask, was.refused)


@given(st.floats(allow_nan=False), st.integers(-(1 << 63), (1 << 63) - 1))
def test_numbers_are_exact(number, integer):
    (ask,) = decode_asks(encode([Ask("a", {"x": number, "n": integer})]), LIMIT)
    assert struct.pack("<d", ask.fields["x"]) == struct.pack("<d", number) and ask.fields["n"] == integer


@given(tables, st.randoms(use_true_random=False))
def test_the_order_in_which_fields_were_given_does_not_matter(table, random):
    shuffled = list(table.items())
    random.shuffle(shuffled)
    assert Ask("a", table).id == Ask("a", dict(shuffled)).id
    assert encode([Answer("ab" * 16, table)]) == encode([Answer("ab" * 16, dict(shuffled))])


def test_equal_is_equal_in_bytes():
    assert Ask("a", {"x": 1}) != Ask("a", {"x": 1.0}) and Ask("a", {"x": 0.0}) != Ask("a", {"x": -0.0})
    assert Ask("a", {"x": b"1"}) != Ask("a", {"x": "1"}) and Ask("a", {}) != Ask("b", {})
    assert Answer("ab" * 16, {"x": 1}) != Answer("ab" * 16, {"x": 1.0}) and Answer("ab" * 16, {}, "no") != "no"
    assert len({ASK, Ask(ASK.kind, dict(reversed(ASK.fields.items())))}) == 1


def test_an_ask_does_not_change_with_the_table_it_was_made_of():
    table = {"x": 1}
    ask = Ask("a", table)
    table["x"] = 2
    assert ask.fields["x"] == 1 and decode_asks(encode([ask]), LIMIT)[0].id == ask.id
    with pytest.raises(TypeError):
        ask.fields["x"] = 2


def reads_as_itself_or_is_malformed(data: bytes) -> bool:
    """The law that makes an id name a content: bytes are refused, or are the one spelling of what they say."""
    try:
        found = decode(data)
    except Malformed as error:
        assert error.reason.isalpha() and str(error) == error.reason
        return False
    assert encode(found) == data
    return True


@pytest.mark.parametrize("data", PARCELS, ids=["asks", "answers", "none"])
def test_every_truncation_is_refused(data):
    for size in range(len(data)):
        with pytest.raises(Malformed):
            decode(data[:size])
    with pytest.raises(Malformed):
        decode(data + b"\0")


@pytest.mark.parametrize("data", PARCELS, ids=["asks", "answers", "none"])
def test_every_change_of_one_byte_is_refused_or_read_as_something_else(data):
    before = decode(data)
    names = {item.id for item in before if isinstance(item, Ask)}
    other = 0
    for at in range(len(data)):
        for value in range(256):
            if value == data[at]:
                continue
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            if reads_as_itself_or_is_malformed(changed):
                other += 1
                after = decode(changed)
                assert after != before
                assert not names or {item.id for item in after} != names
    assert other > 0 or not before  # the loop was not refused wholesale


@given(st.binary(max_size=200), st.sampled_from(PARCELS), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=300)
def test_no_bytes_raise_anything_but_malformed(noise, data, start, stop):
    reads_as_itself_or_is_malformed(noise)
    reads_as_itself_or_is_malformed(b"\x01" + noise)
    reads_as_itself_or_is_malformed(data[:start] + noise + data[stop:])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"\x02\x00\x01", "version"),
        (b"\x01\x02\x00", "parcel"),
        (b"\x01\x00\x11", "parcel"),
        (b"\x01\x00\x00", "empty"),
        (b"\x01\x00\x01\x01A\x00", "word"),
        (b"\x01\x00\x01\x00\x00", "word"),
        (b"\x01\x00\x01\x01a\x02\x01b\x02" + b"\0" * 8 + b"\x01a\x02" + b"\0" * 8, "order"),
        (b"\x01\x00\x01\x01a\x02\x01b\x02" + b"\0" * 8 + b"\x01b\x02" + b"\0" * 8, "order"),
        (b"\x01\x00\x01\x01a\x01\x01b\x03" + struct.pack("<d", math.nan), "number"),
        (b"\x01\x00\x01\x01a\x01\x01b\x04" + b"\0" * 8, "type"),
        (b"\x01\x00\x01\x01a\x01\x01b\x01\x02\x00\x00\x00\xc0\x80", "text"),
        (b"\x01\x00\x01\x01a\x00\x00", "trailing"),
        (b"\x01\x00\x02\x01a\x00\x01a\x00", "repeated"),
    ],
)
def test_why_bytes_are_no_asks(data, reason):
    with pytest.raises(Malformed, match=f"^{reason}$"):
        decode_asks(data, LIMIT)


def test_why_bytes_are_no_answers():
    head = b"\x01\x01\x01" + bytes(16)
    for data, reason in [
        (encode([ASK]), "parcel"),
        (head + b"\x02no\x01\x01b\x02" + b"\0" * 8, "refused"),
        (b"\x01\x01\x02" + (bytes(16) + b"\0\0") * 2, "repeated"),
    ]:
        with pytest.raises(Malformed, match=f"^{reason}$"):
            decode_answers(data, LIMIT)
    assert decode_answers(encode([]), LIMIT) == ()


def test_size_is_checked_before_anything_is_read():
    data = encode([Ask("a", {"x": bytes(1000)})])
    assert decode_asks(data, len(data))
    with pytest.raises(Malformed, match="oversized"):
        decode_asks(data, len(data) - 1)
    # four bytes that claim 4 GiB: refused without allocating them
    claim = b"\x01\x00\x01\x01a\x01\x01b\x00\xff\xff\xff\xff"
    tracemalloc.start()
    with pytest.raises(Malformed, match="truncated"):
        decode_asks(claim, LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_reading_takes_one_copy_and_linear_time():
    def most_fields(size: int) -> bytes:
        names = [f"{'x' * 30}{chr(97 + a)}{chr(97 + b)}" for a in range(15) for b in range(16)]
        return encode([Ask("k" * (1 + i), dict.fromkeys(names, bytes(size))) for i in range(16)])

    small, large = most_fields(100), most_fields(1000)
    times = []
    for data in (small, large):
        start = time.process_time()
        decode_asks(data, len(data))
        times.append(time.process_time() - start)
    assert times[1] < 20 * times[0] + 0.05
    blob = encode([Ask("a", {"x": bytes(8 << 20)})])
    tracemalloc.start()
    decode_asks(blob, len(blob))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * len(blob)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ask("Train", {}),
        lambda: Ask("", {}),
        lambda: Ask("a" * 41, {}),
        lambda: Ask("a\n", {}),
        lambda: Ask("a", {"n": 1 << 63}),
        lambda: Ask("a", {"n": True}),
        lambda: Ask("a", {"n": math.nan}),
        lambda: Ask("a", {"n": None}),
        lambda: Ask("a", {"n": bytearray(b"x")}),
        lambda: Ask("a", {"n": "\ud800"}),
        lambda: Ask("a", {"x" * (1 + i % 40) + "y" * (i // 40): 1 for i in range(256)}),
        lambda: Answer("xy", {}),
        lambda: Answer("AB" * 16, {}),
        lambda: Answer("ab" * 16, {"x": 1}, "no"),
        lambda: Answer("ab" * 16, {}, "no!"),
        lambda: encode([ASK] * 2),
        lambda: encode([Ask("a", {"n": i}) for i in range(17)]),
        lambda: encode([ASK, Answer("ab" * 16, {})]),
        lambda: encode([Answer("ab" * 16, {}), ASK]),
    ],
)
def test_what_cannot_be_said_is_a_value_error(make):
    with pytest.raises(ValueError):
        make()


def test_a_record_holds_the_parcel_and_nothing_else():
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    data = encode([ASK])
    content = wire.record(data)
    assert wire.data_of(content) == data and list(content) == ["fedcanary"]
    for wrong in (
        RecordDict(),
        RecordDict({"fedcanary": MetricRecord({"parcel": 1})}),
        RecordDict({"fedcanary": ConfigRecord({"parcel": "text"})}),
        RecordDict({"fedcanary": ConfigRecord({"parcel": data, "more": 1})}),
        RecordDict({"fedcanary": ConfigRecord({"parcels": data})}),
        RecordDict({"fedcanary": ConfigRecord({"parcel": data}), "loss": MetricRecord({"x": 1.0})}),
    ):
        with pytest.raises(Malformed, match="record"):
            wire.data_of(wrong)
