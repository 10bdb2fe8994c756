"""The ledger: nothing is charged beyond its budget or twice, and a file that was touched vouches for nothing.

What crashes and other processes may do to it: test_ledger_crashes.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput, FedcanaryError, Refused
from fedcanary.privacy.accounting import Mechanism, compose
from fedcanary.privacy.ledger import Budget, Charge, Damaged, Head, Ledger, OverBudget, by_addition
from fedcanary.privacy.ledger import anchor as anchors
from fedcanary.privacy.ledger import chain as chains

BUDGET = Budget(epsilon=1.0, delta=1e-6)


def charge(id: str = "r1", epsilon: float = 0.25, **other) -> Charge:
    usual = {"window": 1, "panel": "a", "round": 1, "purpose": "probes", "delta": 1e-7, "mechanism": {"kind": "x"}}
    return Charge(**{"id": id, "epsilon": epsilon} | usual | other)


def opened(folder: Path, budget: Budget = BUDGET, **other) -> Ledger:
    return Ledger.open(folder / "ledger", owner="town", budget=budget, **other)


def anchor(folder: Path) -> Path:
    return folder / "ledger.anchor"


def anchored(folder: Path) -> int:
    return json.loads(anchor(folder).read_text())["count"]


def filled(folder: Path, charges: int = 3) -> tuple[Head, ...]:
    """A closed ledger; its head after each entry."""
    with opened(folder) as ledger:
        heads = [ledger.head]
        for number in range(charges):
            heads.append(ledger.charge(charge(f"r{number}", epsilon=0.75 / charges, delta=0.0, round=number)).head)
    return tuple(heads)


def content(folder: Path) -> tuple[object, ...]:
    with opened(folder) as ledger:
        return ledger.owner, ledger.budget, ledger.rows(), ledger.head


# --- paying


def test_a_charge_is_in_the_file_when_charge_returns(tmp_path):
    with opened(tmp_path) as ledger:
        receipt = ledger.charge(charge())
        shutil.copytree(tmp_path, tmp_path / "as kill -9 leaves it")
        with opened(tmp_path / "as kill -9 leaves it") as other:
            assert [(row.charge, row.status, row.head) for row in other.rows()] == [(charge(), "charged", receipt.head)]
        assert anchored(tmp_path) == receipt.head.count == 2
        assert ledger.spent(1) == Budget(epsilon=0.25, delta=1e-7) and ledger.spent(2) == Budget(epsilon=0, delta=0)
        assert ledger._chain._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: no power cut undoes a commit
        assert ledger._chain._db.execute("PRAGMA journal_mode").fetchone() == (b"wal",)


def test_the_same_charge_again_is_paid_once(tmp_path):
    with opened(tmp_path) as ledger:
        first = ledger.charge(charge(mechanism={"a": 1, "b": (2.0,)}))
        again = ledger.charge(charge(mechanism={"b": [2.0], "a": 1}))
        assert (first.repeated, again.repeated, again == first) == (False, True, True)
    with opened(tmp_path) as ledger:
        assert ledger.charge(charge(mechanism={"a": 1, "b": (2.0,)})) == first
        assert len(ledger.rows()) == 1 and ledger.spent(1).epsilon == 0.25


@pytest.mark.parametrize(
    "other",
    [
        *({"epsilon": 0.2}, {"delta": 0.0}, {"window": 2}, {"panel": "b"}, {"round": 2}, {"purpose": "update"}),
        {"mechanism": {"kind": "y"}},
    ],
)
def test_an_id_stands_for_one_content(tmp_path, other):
    with opened(tmp_path) as ledger:
        ledger.charge(charge())
        with pytest.raises(Refused, match="for something else"):
            ledger.charge(charge(**other))
        assert len(ledger.rows()) == 1


def test_a_settled_charge_pays_for_nothing_more(tmp_path):
    with opened(tmp_path) as ledger:
        for id, outcome, opposite in (("r1", "released", "aborted"), ("r2", "aborted", "released")):
            ledger.charge(charge(id))
            ledger.settle(id, outcome)
            ledger.settle(id, outcome)
            with pytest.raises(Refused, match="is closed"):
                ledger.charge(charge(id))
            with pytest.raises(Refused, match=f"was {outcome}"):
                ledger.settle(id, opposite)
        with pytest.raises(Refused, match="no charge"):
            ledger.settle("r3", "released")
        assert [row.status for row in ledger.rows()] == ["released", "aborted"]
        assert ledger.spent(1).epsilon == 0.5  # an aborted round stays paid
        rows = ledger.rows()
    with opened(tmp_path) as ledger:
        assert ledger.rows() == rows


def test_over_budget_is_refused_with_what_is_left_and_what_would_fit(tmp_path):
    with opened(tmp_path) as ledger:
        ledger.charge(charge("r1", 0.7))
        with pytest.raises(OverBudget) as refusal:
            ledger.charge(charge("r2", 0.4))
        assert refusal.value.exit_code == 4
        text = str(refusal.value)
        assert "would reach epsilon 1.1 of 1" in text and "left: epsilon 0.3 and delta 9e-07" in text
        assert "the same from a panel not yet charged in window 1; the same in the next window" in text
        at_most = float(text.split("the same at epsilon ")[1].split(";")[0])
        assert 0.2999 < at_most <= 0.3
        ledger.charge(charge("r2", 0.4, panel="b"))  # as it said
        ledger.charge(charge("r3", 0.4, window=2))
        ledger.charge(charge("r4", at_most, delta=9e-7))
        with pytest.raises(OverBudget, match=r"and delta 0\n    would fit: the same from a panel") as refusal:
            ledger.charge(charge("r5", 0.0))  # no noise buys delta
        with pytest.raises(OverBudget, match="would fit: nothing of this kind within epsilon 1 a window"):
            ledger.charge(charge("r6", 0.5, panel="c", delta=1e-3))
        assert len(ledger.rows()) == 4


def composed(charges):
    mechanisms = [Mechanism.from_json(json.dumps(dict(c.mechanism))) for c in charges]
    return compose(mechanisms, 1e-6, neighbours="zeroed"), 1e-6 if charges else 0.0


def test_a_rule_of_mechanisms_says_how_much_noise_would_fit(tmp_path):
    def gaussian(number: int, z: float) -> Charge:
        mechanism = asdict(Mechanism(kind="gaussian", noise_multiplier=z))
        return charge(f"r{number}", 0.2, mechanism=mechanism, delta=1e-6)

    advice = []
    with opened(tmp_path, spent=composed, fits=lambda *given: advice.append(given) or "or ask a doctor") as ledger:
        for number in range(3):
            ledger.charge(gaussian(number, 8.0))
        with pytest.raises(OverBudget, match=r"at delta 1e-06\n.*or ask a doctor") as refusal:
            ledger.charge(gaussian(3, 4.0))
        factor = float(str(refusal.value).split("the same with ")[1].split(" times the noise")[0])
        with pytest.raises(OverBudget):
            ledger.charge(gaussian(3, 4.0 * (factor - 0.002)))
        ledger.charge(gaussian(3, 4.0 * factor))  # as it said
        assert 0.999 < ledger.spent(1).epsilon <= 1
    assert [(len(before), refused.id, budget) for before, refused, budget in advice] == [(3, "r3", BUDGET)] * 2
    (tmp_path / "nan").mkdir()
    with opened(tmp_path / "nan", spent=lambda charges: (math.nan, 0.0)) as ledger, pytest.raises(OverBudget):
        ledger.charge(charge())


def test_no_privacy_needs_an_infinite_budget(tmp_path):
    def nothing(charges):
        return 0.0, 0.0

    with opened(tmp_path, spent=nothing) as ledger, pytest.raises(OverBudget, match="infinite budget"):
        ledger.charge(charge(epsilon=math.inf))  # whatever the rule says
    (tmp_path / "free").mkdir()
    for _ in range(2):
        with opened(tmp_path / "free", Budget(epsilon=math.inf, delta=1e-6)) as ledger:
            ledger.charge(charge(epsilon=math.inf))
            assert ledger.spent(1).epsilon == math.inf


def test_ten_tenths_are_one_and_no_more(tmp_path):
    with opened(tmp_path, Budget(epsilon=0.3, delta=1.0)) as ledger:
        for number in range(3):
            ledger.charge(charge(f"r{number}", 0.1))
        with pytest.raises(OverBudget):
            ledger.charge(charge("r3", 1e-9))


def test_another_owners_or_budgets_ledger_is_not_taken(tmp_path):
    filled(tmp_path)
    with pytest.raises(BadInput) as error:
        Ledger.open(tmp_path / "ledger", owner="village", budget=Budget(epsilon=2.0, delta=1e-6))
    assert [p.where.rsplit(" ", 1)[1] for p in error.value.problems] == ["owner", "budget"]


def test_bad_values_are_all_named():
    with pytest.raises(BadInput) as error:
        charge("", math.nan, delta=2.0, window="1", panel=3, round=1.5, mechanism={"x": math.inf}, purpose="")
    named = {p.where.rsplit(" ", 1)[1] for p in error.value.problems}
    assert named == {"id", "epsilon", "delta", "window", "panel", "round", "mechanism", "purpose"}
    for epsilon, delta in ((-0.1, 0.0), (math.nan, 0.0), (1.0, -1e-9), (1.0, math.nan)):
        with pytest.raises(BadInput):
            Budget(epsilon=epsilon, delta=delta)


costs = st.tuples(st.integers(1, 2), st.sampled_from("ab"), st.integers(0, 12))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wishes=st.lists(costs, max_size=12))
def test_a_charge_is_taken_exactly_if_its_panel_can_pay(tmp_path, wishes):
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        paid: dict[tuple[int, str], int] = {}
        with opened(Path(folder)) as ledger:
            for number, (window, panel, tenths) in enumerate(wishes):
                fits = paid.get((window, panel), 0) + tenths <= 10
                try:
                    ledger.charge(charge(f"r{number}", tenths / 10, window=window, panel=panel, delta=0.0))
                    assert fits
                    paid[window, panel] = paid.get((window, panel), 0) + tenths
                except OverBudget:
                    assert not fits
            for window in (1, 2):
                most = max([t for (w, _), t in paid.items() if w == window], default=0)
                assert ledger.spent(window).epsilon == pytest.approx(most / 10)
            rows, head = ledger.rows(), ledger.verify()
        with opened(Path(folder)) as ledger:
            assert (ledger.rows(), ledger.head) == (rows, head)
            assert by_addition([r.charge for r in rows]) == pytest.approx(by_addition([r.charge for r in rows][::-1]))


def test_equal_histories_have_equal_heads(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    assert filled(tmp_path / "a") == filled(tmp_path / "b")


def test_a_client_pays_for_all_its_panels_and_counts_what_it_refused(tmp_path):
    """The client's side: every charge concerns itself, so all name one panel and add up; strangers fill no disk."""
    with opened(tmp_path) as ledger:
        for number in range(4):
            ledger.charge(charge(f"town, panel {number}", panel="me", round=number))
        with pytest.raises(OverBudget):
            ledger.charge(charge("town, panel 5", panel="me"))
        head = ledger.head
        for reason in ("digest", "over_budget", "digest"):
            ledger.note_refusal(reason)
        for text in ("", "Two words", "x" * 65, "caf\u00e9", "a\n"):
            with pytest.raises(FedcanaryError):
                ledger.note_refusal(text)
        for number in range(62):
            ledger.note_refusal(f"reason_{number}")
        with pytest.raises(FedcanaryError):
            ledger.note_refusal("one_more")
        assert ledger.head == head
    with opened(tmp_path) as ledger:
        assert ledger.refusals() == {"digest": 2, "over_budget": 1, **{f"reason_{n}": 1 for n in range(62)}}


# --- damage


def run_sql(folder: Path, *statements: str) -> None:
    db = sqlite3.connect(folder / "ledger", isolation_level=None)
    db.execute("PRAGMA writable_schema = ON")
    for statement in statements:
        db.execute(statement)
    db.close()


def rechain(folder: Path, first: int, old: str, new: str) -> str:
    """A forger's work: change a text from entry `first` on, and hash everything after it anew; the last hash."""
    db = sqlite3.connect(folder / "ledger", isolation_level=None)
    entries = db.execute("SELECT seq, body, hash FROM entry ORDER BY seq").fetchall()
    before = ""
    for seq, body, hash in entries:
        if seq >= first:
            body = body.replace(old, new)
            hash = anchors.link(before, body.encode())
            db.execute("UPDATE entry SET body = ?, hash = ? WHERE seq = ?", (body, hash, seq))
        before = hash
    db.close()
    return before


def insert(folder: Path, seq: int) -> None:
    db = sqlite3.connect(folder / "ledger", isolation_level=None)
    db.execute("INSERT INTO entry VALUES (?, '{}', ?)", (seq, anchors.link("", b"{}")))
    db.close()


def patch(folder: Path, offset: int, new: bytes) -> None:
    with (folder / "ledger").open("r+b") as file:
        file.seek(offset)
        file.write(new)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "edited": lambda f: run_sql(f, "UPDATE entry SET body = replace(body, '0.25', '0.05') WHERE seq = 2"),
    "spelled otherwise": lambda f: run_sql(f, "UPDATE entry SET body = replace(body, ',', ', ') WHERE seq = 3"),
    "another type": lambda f: run_sql(f, "UPDATE entry SET body = 7 WHERE seq = 2"),
    "not UTF-8": lambda f: run_sql(f, "UPDATE entry SET body = CAST(x'ff00fe' AS TEXT) WHERE seq = 2"),
    "edited and hashed anew": lambda f: rechain(f, 2, "0.25", "0.05"),
    "budget raised and hashed anew": lambda f: rechain(f, 0, '"epsilon":1.0', '"epsilon":9.0'),
    "first deleted": lambda f: run_sql(f, "DELETE FROM entry WHERE seq = 0"),
    "middle deleted": lambda f: run_sql(f, "DELETE FROM entry WHERE seq = 2"),
    "last deleted": lambda f: run_sql(f, "DELETE FROM entry WHERE seq = 3"),
    "all deleted": lambda f: run_sql(f, "DELETE FROM entry"),
    "two swapped": lambda f: run_sql(
        f,
        "UPDATE entry SET seq = 9 WHERE seq = 1",
        "UPDATE entry SET seq = 1 WHERE seq = 2",
        "UPDATE entry SET seq = 2 WHERE seq = 9",
    ),
    "last renumbered": lambda f: run_sql(f, "UPDATE entry SET seq = 9 WHERE seq = 3"),
    "one added in front": lambda f: insert(f, -1),
    "one added at the end": lambda f: insert(f, 4),
    "table gone": lambda f: run_sql(f, "DROP TABLE entry"),
    "table made anew": lambda f: run_sql(f, "DROP TABLE entry", chains._TABLES[b"entry"].decode()),
    "a trigger": lambda f: run_sql(f, "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM entry; END"),
    "file gone": lambda f: (f / "ledger").unlink(),
    "file emptied": lambda f: (f / "ledger").write_bytes(b""),
    "schema's text damaged": lambda f: patch(f, (f / "ledger").read_bytes().index(b"CREATE TABLE entry"), b"CREAT\xe1"),
    "page header damaged": lambda f: patch(f, 4096 + 7, b"\x05"),
    "file cut": lambda f: os.truncate(f / "ledger", 4096),
    "file overwritten": lambda f: (f / "ledger").write_bytes(b"x" * 8192),
    "anchor gone": lambda f: anchor(f).unlink(),
    "anchor emptied": lambda f: anchor(f).write_bytes(b""),
    "anchor of another file": lambda f: anchor(f).write_bytes(anchors.content_of(Head(count=3, hash="00" * 32))),
    "anchor of no entries": lambda f: anchor(f).write_bytes(anchors.content_of(Head(count=0, hash=""))),
    "anchor spelled otherwise": lambda f: anchor(f).write_bytes(anchor(f).read_bytes() + b"\n"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_touched_ledger_is_refused(tmp_path, attack):
    filled(tmp_path)
    ATTACKS[attack](tmp_path)
    with pytest.raises(Damaged, match="remedy: release nothing") as refusal:
        opened(tmp_path)
    assert refusal.value.exit_code == 4
    assert (tmp_path / "ledger").exists() == (attack != "file gone")  # nothing is put in its place


def test_an_old_file_put_back_is_refused_and_the_witness_outside_sees_even_a_whole_set(tmp_path):
    now, old = tmp_path / "now", tmp_path / "old"
    now.mkdir()
    filled(now)
    shutil.copytree(now, old)
    with opened(now) as ledger:
        ledger.charge(charge("r4"))
        recorded = ledger.head
    shutil.copy(old / "ledger", now / "ledger")
    with pytest.raises(Damaged, match="rolled back: its anchor knows 5 entries, the file holds 4"):
        opened(now)
    shutil.copy(anchor(old), anchor(now))
    with opened(now) as ledger:  # both together: not to be seen from inside
        with pytest.raises(Damaged, match="rolled back: the record knows 5 entries, the file holds 4"):
            ledger.verify(recorded)
        ledger.charge(charge("another"))
        with pytest.raises(Damaged, match="entry 4 is another one than the record knows"):
            ledger.verify(recorded)


def test_heads_seen_before_stay_on_the_chain_and_a_forger_of_the_whole_set_has_none_of_them(tmp_path):
    heads = filled(tmp_path)
    with opened(tmp_path) as ledger:
        assert {ledger.verify(head) for head in heads} == {heads[-1]} == {ledger.head}
    last = rechain(tmp_path, 1, "0.25", "0.01")
    anchor(tmp_path).write_bytes(anchors.content_of(Head(count=4, hash=last)))
    with opened(tmp_path) as ledger:
        ledger.verify(heads[0])
        for head in heads[1:]:
            with pytest.raises(Damaged, match="the record knows"):
                ledger.verify(head)


@pytest.mark.parametrize("how", ["renamed over", "copied over", "removed", "entry deleted", "anchor newer"])
def test_what_is_done_to_an_open_ledger_is_seen_by_its_next_charge(tmp_path, how):
    filled(tmp_path)
    shutil.copy(tmp_path / "ledger", tmp_path / "copy")
    with opened(tmp_path) as ledger:
        ledger.charge(charge("r4"))
        ledger._chain._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the log would bring the copy up to date
        if how == "renamed over":
            os.replace(tmp_path / "copy", tmp_path / "ledger")
        elif how == "copied over":  # by another process: closing the file here would let go of SQLite's locks
            subprocess.run(["cp", tmp_path / "copy", tmp_path / "ledger"], check=True)
            ledger._chain._db.execute("PRAGMA shrink_memory")
        elif how == "removed":
            (tmp_path / "ledger").unlink()
        elif how == "entry deleted":
            run_sql(tmp_path, "DELETE FROM entry WHERE seq = 4")
        else:
            anchor(tmp_path).write_bytes(anchors.content_of(Head(count=6, hash="00" * 32)))
        for use in (lambda: ledger.charge(charge("r5")), lambda: ledger.spent(1), ledger.verify):
            with pytest.raises(Damaged):
                use()
    with pytest.raises(Damaged):
        opened(tmp_path)


@pytest.mark.parametrize("hashed_anew", [False, True])
def test_an_entry_changed_under_an_open_ledger_is_found_by_verify(tmp_path, hashed_anew):
    filled(tmp_path)
    with opened(tmp_path) as ledger:
        run_sql(tmp_path, "UPDATE entry SET body = replace(body, '0.25', '0.05') WHERE seq = 1")
        if hashed_anew:  # this entry alone, so that those after it still follow what this process knows
            db = sqlite3.connect(tmp_path / "ledger", isolation_level=None)
            bodies = [body for (body,) in db.execute("SELECT body FROM entry ORDER BY seq")]
            hash = anchors.link(anchors.link("", bodies[0].encode()), bodies[1].encode())
            db.execute("UPDATE entry SET hash = ? WHERE seq = 1", (hash,))
            db.close()
        with pytest.raises(Damaged, match="entry 1 is missing or was changed"):
            ledger.verify()


def live_copy(folder: Path, into: Path) -> None:
    """The files as kill -9 leaves them: everything still in the log."""
    into.mkdir()
    with opened(folder) as ledger:
        for number in range(3):
            ledger.charge(charge(f"r{number}", round=number))
        subprocess.run(["cp", *(folder / n for n in ("ledger", "ledger-wal", "ledger.anchor")), into], check=True)


@pytest.mark.parametrize("drawn", [60, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ledger", "ledger-wal", "ledger.anchor"])
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, name, drawn):
    """Bytes drawn with seed 4, and both ends. A byte that no entry uses may change; what the ledger says may not."""
    folder, original, scratch = (tmp_path / n for n in ("set", "original", "scratch"))
    if name == "ledger-wal":
        (tmp_path / "live").mkdir()
        live_copy(tmp_path / "live", folder)
    else:
        folder.mkdir()
        filled(folder)
    shutil.copytree(folder, original)
    said, chance = content(original), random.Random(4)
    whole = (folder / name).read_bytes()
    unharmed = []
    for position in {0, len(whole) - 1, *chance.sample(range(len(whole)), min(drawn, len(whole)))}:
        shutil.copytree(folder, scratch)
        flipped = bytearray(whole)
        flipped[position] ^= 1 << chance.randrange(8)
        (scratch / name).write_bytes(flipped)
        try:
            assert content(scratch) == said, f"byte {position} of {name} changed what the ledger says"
            unharmed.append(position)
        except (Refused, BadInput) as error:
            assert "remedy" in str(error)
        shutil.rmtree(scratch)
    assert name == "ledger" or not unharmed  # the anchor and the log are checked to the last byte
    assert len(unharmed) < min(drawn, len(whole))


def test_a_lost_log_is_a_rollback(tmp_path):
    (tmp_path / "live").mkdir()
    live_copy(tmp_path / "live", tmp_path / "set")
    (tmp_path / "set" / "ledger-wal").unlink()
    with pytest.raises(Damaged):
        opened(tmp_path / "set")


# --- files that cannot be used


def test_files_that_are_no_ledgers_are_left_as_they_are(tmp_path):
    path = tmp_path / "ledger"
    path.write_text("[privacy]\n" * 200)
    with pytest.raises(BadInput, match="is not a database"):
        opened(tmp_path)
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE t (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(BadInput, match="not a privacy ledger"):
        opened(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger"]
    for nowhere in (tmp_path, tmp_path / "no" / "ledger"):
        with pytest.raises(BadInput, match="cannot be opened"):
            Ledger.open(nowhere, owner="town", budget=BUDGET)


def test_another_schemas_ledger_is_not_guessed_at(tmp_path):
    filled(tmp_path)
    run_sql(tmp_path, "PRAGMA user_version = 2")
    with pytest.raises(BadInput, match=r"has schema 2, and this program knows schema 1\n.*version of fedcanary"):
        opened(tmp_path)


def test_a_full_disk_refuses_and_the_round_can_be_repeated(tmp_path):
    with opened(tmp_path) as ledger:
        db, big = ledger._chain._db, {"panel_members": "x" * 20_000}
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages + 1}")  # SQLite then says what it says of a full disk
        ledger.charge(charge("r1"))
        full = r"the disk is full.*nothing may be released\n    remedy: make room"
        with pytest.raises(Refused, match=full) as refusal:
            ledger.charge(charge("r2", mechanism=big))
        assert refusal.value.exit_code == 4
        assert [row.charge.id for row in ledger.rows()] == ["r1"]
        db.execute("PRAGMA max_page_count = 1000000")
        assert not ledger.charge(charge("r2", mechanism=big)).repeated


def test_no_room_for_the_anchor_gives_no_receipt_but_loses_no_charge(tmp_path, monkeypatch):
    def fails(number: int):
        def failing(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return failing

    with opened(tmp_path) as ledger:
        with monkeypatch.context() as patch, pytest.raises(Refused, match="the disk is full"):
            patch.setattr(anchors.os, "fsync", fails(errno.ENOSPC))
            ledger.charge(charge())
        assert anchored(tmp_path) == 1
        assert ledger.charge(charge()).repeated
        assert anchored(tmp_path) == 2
        with (
            monkeypatch.context() as patch,
            pytest.raises(Refused, match=r"anchor cannot be read or written \(.*Input"),
        ):
            patch.setattr(anchors.os, "replace", fails(errno.EIO))
            ledger.charge(charge("r2"))
    with opened(tmp_path) as ledger:
        assert [row.charge.id for row in ledger.rows()] == ["r1", "r2"]


def test_whoever_holds_it_too_long_is_named_as_the_reason(tmp_path, monkeypatch):
    opened(tmp_path).close()
    monkeypatch.setattr(chains, "_WAIT_S", 0.05)
    holder = sqlite3.connect(tmp_path / "ledger", isolation_level=None)
    with opened(tmp_path) as ledger:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refused, match="another process holds it"):
            ledger.charge(charge())
        holder.execute("ROLLBACK")
        holder.close()
        assert not ledger.charge(charge()).repeated


def test_a_forked_or_closed_ledger_says_so(tmp_path, monkeypatch):
    with opened(tmp_path) as ledger, monkeypatch.context() as patch:
        patch.setattr(chains.os, "getpid", lambda: -1)
        with pytest.raises(FedcanaryError, match="after a fork"):
            ledger.charge(charge())
    with pytest.raises(sqlite3.ProgrammingError):
        ledger.charge(charge())
