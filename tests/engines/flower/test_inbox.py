"""What the server of a run gets from its nodes: nothing about one client but what the table in `node.py` lists.

The table is checked byte by byte against all replies of whole runs; what must look random is held against chance; and
nodes that say more than they should are found by the same check, and change nothing at the server.
"""

from __future__ import annotations

import sqlite3
import struct

import numpy as np
import pytest
from inbox import Inbox
from rough import Rough, intact, kept, study
from sums import memory, train_fields

from fedcanary.engines.flower.certificates import IDENTITY
from fedcanary.engines.flower.node import HELLO, TRAIN, Node
from fedcanary.engines.flower.wire import Answer, Ask, decode_answers
from fedcanary.engines.places import place
from fedcanary.privacy.seal import FIXED

SAID = b"the patient is 71"
READING = 0.7300001
CHANCE = 1e-9  # that bytes which are uniform fail here, for each kind of field and run


@pytest.fixture(scope="module")
def whole():
    """A run that nothing happened to, with all that the server got."""
    with memory() as folder:
        far = Rough(study(8, rounds=4), folder)
        box = Inbox(far)
        far.run()
        intact(folder)
        yield far, box, box.look()


def test_nothing_comes_but_what_the_table_lists(whole):
    _, box, wrong = whole
    assert wrong == []
    assert len(box.raw) == 8 * (1 + 2 + 3 * 4)
    assert set(box.random) == {
        *("keys mask_key", "keys seal_key", "keys commitment", "keys signature", "share rows"),
        *("train values", "train rows", "agree signature", "unmask seed", "unmask rows"),
    }


def test_what_is_masked_looks_uniform(whole):
    """Chi-square of byte counts, 255 degrees of freedom; ten kinds of fields: a right program fails once in 10^8."""
    far, box, _ = whole
    found = box.chi_square()
    assert {"train values", "share rows", "unmask rows"} <= found.keys()
    # X25519 keys and Ed25519 signatures have a few bits that are always 0, and are public
    assert all(p > CHANCE for name, p in found.items() if "key" not in name.split()[1] and "signature" not in name)
    sealed = [vector_of(far, client, round).tobytes() for client in range(8) for round in range(1, 5)]
    box.random["train values"] = sealed
    assert box.chi_square()["train values"] < 1e-300  # without masks it would be seen


def vector_of(far: Rough, client: int, round: int) -> np.ndarray:
    request = far.host.clients.consent.request(round, 8)
    return far.node(client)._measured(request, Ask(TRAIN, train_fields(far, round, 8)))[0]


def test_no_number_of_any_client_is_in_what_the_server_got(whole):
    """Two neighbouring entries of any sealed vector, at any offset of what came; planted, they are found."""
    far, box, _ = whole
    entries = np.concatenate([vector_of(far, client, round) for client in range(8) for round in range(1, 5)])
    pairs = {entries[k : k + 2].tobytes() for k in range(len(entries) - 1) if np.all(np.abs(entries[k : k + 2]) > 255)}
    assert len(pairs) > 1000

    def found(parts: list[bytes]) -> int:
        return sum(part[at : at + 16] in pairs for part in parts for at in range(len(part) - 15))

    assert found(box.raw) == 0
    assert found([*box.raw, b"x" + entries[:3].tobytes()]) == 2


def test_exchanges_a_round(whole):
    """Three, with training; two more before the first round, and one in which the nodes say who they are."""
    far, _, _ = whole
    assert far.link.exchanges == 1 + 2 + 3 * 4
    assert sum(far.link.sent.values()) > 0
    assert not far.link.faults


# --- nodes that say more


class Chatty(Node):
    """Says more than it is asked."""

    how = ""

    def answer(self, asks):
        return [self._more(ask, answer) for ask, answer in zip(asks, super().answer(asks), strict=True)]

    def _more(self, ask: Ask, answer: Answer) -> Answer:
        fields = dict(answer.fields)
        if self.how == "a reading" and ask.kind == TRAIN:
            fields["reading"] = READING
        elif self.how == "a float in hello" and ask.kind == HELLO:
            fields["loss"] = READING
        elif self.how == "a longer version" and ask.kind == HELLO:
            fields["version"] += f" {READING}"
        elif self.how == "reasons" and ask.kind == TRAIN:
            fields = {"reasons": f"{SAID.decode()},already_answered"}
        elif self.how == "a refusal" and ask.kind == TRAIN:
            return Answer(ask.id, {}, "the_patient_is_ill")
        elif self.how == "bytes after a message" and "message" in fields:
            fields["message"] += struct.pack("<d", READING)
        elif self.how == "a field of each step" and "message" in fields:
            fields["vector"] = struct.pack("<d", READING) * 3
        return Answer(answer.ask, fields, answer.refused)


CHATTY = {
    "a reading": (True, "fields ['message', 'reading'] to train"),
    "a float in hello": (True, "hello with"),
    "a longer version": (True, "hello with"),
    "reasons": (False, "reasons that are not"),
    "a refusal": (False, "the word the_patient_is_ill"),
    "a field of each step": (True, "fields ['message', 'vector'] to"),
}


@pytest.mark.parametrize(("how", "outcome"), CHATTY.items(), ids=CHATTY)
def test_a_node_that_says_more_is_found_and_changes_nothing(room, how, outcome):
    harmless, seen = outcome
    calm = Rough(study(rounds=2), room / "calm")
    calm.run()
    far = Rough(study(rounds=2), room / "run")
    box = Inbox(far)
    far.odd[3] = Chatty(far.host, 3, place(far.out / "clients", 3) / IDENTITY)
    far.odd[3].how = how
    far.run()
    record = intact(room / "run")
    assert any(seen in wrong for wrong in box.look()), box.wrong
    assert (kept(room / "run") == kept(room / "calm")) == harmless
    if not harmless:
        words = {"already_answered": 1} if how == "reasons" else {}
        assert [body["refused"] for body in record.of("round")] == [words, words]
        assert [int(next(iter(t.values())).count) for t in record.releases().values()] == [5, 5]
    # nothing of it is on the server's disk, nor in what its operator is told
    needles = [SAID, struct.pack("<d", READING), struct.pack("<q", int(READING * FIXED)), b"the_patient", b"0.7300001"]
    files = [file for file in (room / "run").rglob("*") if file.is_file() and "clients" not in file.parts]
    content = b"".join(file.read_bytes() for file in files) + str(dict(far.clients.refused)).encode()
    assert [needle for needle in needles if needle in content] == []


def test_an_app_whose_handler_raises_is_found_and_its_text_goes_no_further(room):
    """Flower sends the text of what a handler raises. Ours raise nothing; another's would be counted, and not kept."""
    far = Rough(study(rounds=2), room)
    box = Inbox(far)

    class Raising(Node):
        def answer(self, asks):
            if asks[0].kind == TRAIN:
                raise ValueError(SAID.decode())
            return super().answer(asks)

    far.odd[3] = Raising(far.host, 3, place(room / "clients", 3) / IDENTITY)
    far.run()
    intact(room)
    assert any(SAID.decode() in wrong for wrong in box.look())
    files = [file for file in room.rglob("*") if file.is_file() and "clients" not in file.parts]
    assert not any(SAID in file.read_bytes() for file in files)
    assert far.link.faults["error_2"] == 4


def test_what_the_server_keeps_has_listed_fields_alone(room):
    far = Rough(study(rounds=2), room)
    far.run()
    with sqlite3.connect(room / "flower.sqlite") as db:
        rows = db.execute("SELECT kind, body FROM entry").fetchall()
    db.close()
    answers = [decode_answers(body, 1 << 24)[0] for kind, body in rows if kind not in ("closed", "sum")]
    assert answers
    assert {name for answer in answers for name in answer.fields} == {"message"}


def test_a_parcel_of_another_program_is_not_looked_into(room):
    far = Rough(study(rounds=2), room)
    far.odd[3] = type("Other", (Node,), {"answer": lambda self, asks: [Answer(Ask("x", {}).id, {"reading": READING})]})(
        far.host, 3, place(room / "clients", 3) / IDENTITY
    )
    far.run()
    intact(room)
    assert far.link.faults["unasked"] >= 1
