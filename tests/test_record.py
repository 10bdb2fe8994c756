"""The record: a chain in which every changed byte is found, except that a torn last line is a crash and is mended."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput
from fedcanary.privacy.release import restore
from fedcanary.record import NAME, RunRecord, environment, fields, number, plain
from fedcanary.types import Mode, Release


def body(round: int) -> dict[str, object]:
    return {
        "round": round,
        "values": [0.1 + round, 1e-7, -0.0, 12345678901234567890, True, None],
        "name": 'Größe \U0001f989 "quoted"\n\x1f',
        "inf": math.inf,
    }


def written(folder: Path, entries: int = 4) -> Path:
    record = RunRecord.open(folder)
    record.append("header", {"schema": 1})
    for round in range(1, entries):
        record.append("round", body(round))
    return folder / NAME


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("record")
    return folder, written(folder).read_bytes()


def test_what_is_appended_is_on_disk_and_chained(tmp_path):
    record = RunRecord.open(tmp_path / "new" / "folder")
    assert record.entries == []
    first = record.append("header", {"schema": 1})
    assert len(RunRecord.load(tmp_path / "new" / "folder").entries) == 1  # before anything else happens
    second = record.append("round", {"round": 1})
    assert (first.seq, first.prev) == (0, "")
    assert (second.seq, second.prev) == (1, first.digest)
    again = RunRecord.load(tmp_path / "new" / "folder")
    assert again.entries == record.entries
    assert again.digest == record.digest == second.digest
    assert (again.header, again.rounds, again.ended) == ({"schema": 1}, 1, False)
    again.append("end", {"status": "finished"})
    assert RunRecord.load(tmp_path / "new" / "folder").ended


def test_equal_runs_have_equal_records(tmp_path):
    assert written(tmp_path / "a").read_bytes() == written(tmp_path / "b").read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_found(intact, data):
    folder, content = intact
    at = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != content[at]))
    check_changed(folder, content, at, bytes([new]))


def test_changes_that_leave_the_values_as_they_are_are_found_too(intact):
    """Another space, another spelling of a number or of an escape: the same JSON, not the same record."""
    folder, content = intact
    for old, new in ((b": ", b":\t"), (b", ", b",\r"), (b"1e-07", b"1E-07"), (b"u001f", b"u001F")):
        at = content.index(old) + next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        check_changed(folder, content, at, content[at : at + 1].translate(bytes.maketrans(old, new)))


def test_a_new_line_put_into_the_last_line_is_found(intact):
    """Not taken for a crash either, which leaves the beginning of a line and never a whole one."""
    folder, content = intact
    for at in range(content[:-1].rindex(b"\n") + 1, len(content) - 1):  # in the last line, where a crash would be
        check_changed(folder, content, at, b"\n")


def check_changed(folder: Path, content: bytes, at: int, new: bytes) -> None:
    path = folder / NAME
    path.write_bytes(content[:at] + new + content[at + 1 :])
    try:
        if at == len(content) - 1:  # the last newline: nobody can tell this from a crash while writing
            assert len(RunRecord.load(folder).entries) == 3
            return
        with pytest.raises(BadInput, match="was changed since it was written") as caught:
            RunRecord.load(folder)
        line = content[:at].count(b"\n") + 1
        assert f"{NAME}:{line}" in caught.value.problems[0].where
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:1], *lines[2:]],  # dropped
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],  # swapped
        lambda lines: [*lines[:2], lines[1], *lines[2:]],  # doubled
        lambda lines: lines[1:],  # beheaded
        lambda lines: [*lines[:2], b"", *lines[2:]],  # an empty line
        lambda lines: [*lines[:2], b"[]", *lines[2:]],
        lambda lines: [*lines[:2], b"\xff\xfe", *lines[2:]],
    ],
)
def test_lines_that_were_moved_are_found(tmp_path, edit):
    path = written(tmp_path)
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"\n".join(edit(lines)) + b"\n")
    with pytest.raises(BadInput, match="was changed"):
        RunRecord.load(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_torn_last_line_is_left_out_and_mended(tmp_path_factory, intact, data):
    _, content = intact
    begin = content[:-1].rindex(b"\n") + 1
    cut = data.draw(st.integers(begin, len(content) - 1))
    place = tmp_path_factory.mktemp("torn")
    (place / NAME).write_bytes(content[:cut])
    record = RunRecord.load(place)
    assert len(record.entries) == 3
    assert (place / NAME).read_bytes() == content[:cut]  # reading mends nothing
    record.append("round", body(3))
    assert (place / NAME).read_bytes() == content  # the same entry again gives the same record
    record.append("end", {"status": "finished"})
    assert len(RunRecord.load(place).entries) == 5


def test_a_first_line_torn_by_a_crash_is_an_empty_record(tmp_path):
    path = written(tmp_path, entries=1)
    path.write_bytes(path.read_bytes()[:-4])
    record = RunRecord.open(tmp_path)
    assert record.entries == []
    record.append("header", {"schema": 1})
    assert len(RunRecord.load(tmp_path).entries) == 1


def test_no_record_is_bad_input(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="holds no run record"):
            RunRecord.load(folder)


# --- values -----------------------------------------------------------------------------------------------------


@given(st.floats())
def test_every_float_survives(value):
    back = number(json.loads(json.dumps(plain(value), allow_nan=False)))
    assert math.isnan(back) if math.isnan(value) else np.float64(back).tobytes() == np.float64(value).tobytes()


def test_plain_reaches_into_everything():
    given = {Mode.AMPLIFIED_BIAS: (1, np.float64(np.inf)), 3: {"x": np.array([[np.nan, -np.inf], [1.0, 2.0]])}}
    text = json.dumps(plain(given), allow_nan=False)
    assert json.loads(text) == {"amplified_bias": [1, "inf"], "3": {"x": [[None, "-inf"], [1.0, 2.0]]}}
    assert plain(np.int64(3)) == 3 and type(plain(np.int64(3))) is int
    assert plain(True) is True


FLOATS = st.floats(allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6), st.integers(0, 10**6), FLOATS)
def test_a_release_read_back_is_the_release(tmp_path_factory, pairs, count, sensitivity):
    made = restore(
        {
            "round": 3,
            "probe": "p",
            "coords": [f"c{i}" for i in range(len(pairs))],
            "total": [a for a, _ in pairs],
            "count": count,
            "noise_std": [b for _, b in pairs],
            "sensitivity": sensitivity,
            "event": "NonPrivate",
            "charge_id": "x",
        }
    )
    record = RunRecord.open(tmp_path_factory.mktemp("release"))
    record.append("release", fields(made))
    (entry,) = RunRecord.load(record.path.parent).of("release")
    back = restore(entry)
    for name in Release.__dataclass_fields__:
        ours, theirs = getattr(back, name), getattr(made, name)
        if isinstance(theirs, np.ndarray):
            assert ours.tobytes() == theirs.tobytes()
            assert ours.dtype == theirs.dtype
        else:
            assert (ours, type(ours)) == (theirs, type(theirs))


def test_only_complete_rounds_are_replayed(tmp_path):
    record = RunRecord.open(tmp_path)
    record.append("header", {})
    release = {"probe": "p", "coords": ["c"], "total": [1.0], "count": 1, "noise_std": [0.0]}
    release |= {"sensitivity": math.inf, "event": "NonPrivate", "charge_id": "x"}
    for round in (1, 2):
        record.append("release", {"round": round, **release})
    record.append("round", {"round": 1})
    table = RunRecord.load(tmp_path).releases()
    assert list(table) == [1]
    assert table[1]["p"].mean("c") == 1.0
    assert table[1]["p"].sensitivity == math.inf


def test_the_environment_says_what_the_run_ran_on():
    found = environment()
    assert found["packages"]["torch"] != "absent"
    assert {"python", "machine", "system", "commit", "dirty"} <= found.keys()
    assert not [v for v in found.values() if isinstance(v, str) and "/" in v]  # no paths of the machine
