"""What the server's side receives in a run under secure aggregation, byte by byte: sums, and nothing of one client.

What "the server's side" is in one process, and where a client's vector is until it is masked, is said in wire.py.
Masks are drawn anew, so chance matters: a correct program fails the search for a secret's 8 bytes with probability
below 1e-7 (under 1e5 secrets, 1e7 places, 2^64 values), and the test of 12 masked vectors below 1e-8.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import stats
from wire import tap, walk

from fedcanary.engines import local
from fedcanary.engines.clients import Sent
from fedcanary.engines.local import LocalClients
from fedcanary.engines.privacy_terms import layout
from fedcanary.privacy import secagg
from fedcanary.privacy.encode import Encoding
from fedcanary.privacy.secagg.messages import Advert, Agreement, MaskedInput, Shares, Unmasking
from fedcanary.privacy.secagg.terms import Step
from fedcanary.record import RunRecord
from fedcanary.report.summary import summarise
from oracles.few import setup_of

CLIENTS, PANEL = 12, 6


pytestmark = pytest.mark.usefixtures("one_thread")


def study(tiny, rounds=2):
    """Weighted by the number of examples, so that it too is in the masked vector; guards, and slices to ask for."""
    guard = {"limits": {"alignment_erosion": 0.01}}
    more = {"rounds": rounds, "personalize": {"weighting": "examples"}, "guard": guard, "slices": {"by": ["region"]}}
    return setup_of(tiny["llama"], CLIENTS if rounds == 2 else PANEL, more)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A tapped run of two rounds, six clients each; its folder."""
    out = tmp_path_factory.mktemp("wire") / "run"
    wire = tap(study(tiny), out)
    summary = json.dumps(summarise(RunRecord.load(out)))
    (out / "summary.json").write_text(summary)
    return wire, out


def planted(tiny, folder, plant):
    return tap(study(tiny, rounds=1), folder / "run", plant)


def uniform(vector: bytes) -> float:
    """P-value of its bytes being uniform (chi-square over 256 values)."""
    return float(stats.chisquare(np.bincount(np.frombuffer(vector, dtype=np.uint8), minlength=256)).pvalue)


def plain_of(wire) -> set[str]:
    """Names of what was handed over in clear about single clients, beside the messages of the protocol."""
    return {name for one in wire.beside for name in one}


# --- the real thing


def test_the_taps_see_everything(run):
    """Every step of both rounds, from every client; and there are secrets to look for."""
    wire, out = run
    steps = [type(message) for _, message in wire.messages]
    assert {kind: steps.count(kind) for kind in steps} == dict.fromkeys(
        (Advert, Shares, MaskedInput, Agreement, Unmasking), CLIENTS
    )
    assert {body["aborted"] for body in RunRecord.load(out).of("round")} == {""}
    sizes = {kind: len(needles) for kind, needles in wire.needles().items()}
    assert sizes["update"] > 5_000 and sizes["sealed or encoded vector"] > 5_000
    assert sizes["reading"] > 300 and sizes["loss"] >= CLIENTS and sizes["number of examples"] == 3 * CLIENTS
    assert sum(sizes.values()) < 1e5
    assert sum(map(len, wire.everything())) < 1e7


def test_no_secret_is_on_the_wire_or_with_the_server(run):
    wire, _ = run
    assert wire.leaks(wire.everything()) == {}


def test_the_search_would_find_each_secret_at_any_offset(run):
    wire, _ = run
    for kind, needles in wire.needles().items():
        for place in (0, 3, 8):
            hidden = bytes(range(place)) + int(needles[len(needles) // 2]).to_bytes(8, "little") + b"\xff\xfe"
            assert kind in wire.leaks([b"nothing here", hidden])


def test_each_masked_vector_alone_is_uniform(run):
    """12 vectors, each tested at 1e-10; the vector under the mask is nothing like it."""
    wire, _ = run
    assert len(wire.masked) == CLIENTS
    assert min(uniform(vector) for vector in wire.masked) > 1e-10
    assert max(uniform(vector.tobytes()) for vector in wire.sealed) < 1e-10
    for bit in range(64):  # no bit of the 64 is left alone: the top ones of a small number would be
        ones = sum(int((np.frombuffer(v, dtype="<u8") >> np.uint64(bit) & np.uint64(1)).sum()) for v in wire.masked)
        trials = sum(len(v) // 8 for v in wire.masked)
        assert abs(ones - trials / 2) < 8 * math.sqrt(trials) / 2  # eight deviations


def test_the_server_object_never_holds_what_a_client_sealed(run):
    """`Gate._sealed` is the client's side; a Server is only ever given the masked vectors."""
    wire, _ = run
    assert len(wire.sealed) == 2 * CLIENTS
    held = wire.held
    assert all(vector.tobytes() not in held for vector in wire.sealed)
    assert all(vector in held for vector in wire.masked)


def test_the_only_plain_numbers_of_a_client_are_those_the_protocol_lists(run):
    """Who it is, and with whom it shares keys: the rest are keys, seals, masks and signatures, each of its one length.

    There is no place for a client's number of examples, loss and metrics, which are sent in clear elsewhere.
    """
    wire, _ = run
    assert plain_of(wire) == {"client", "masked", "refused"}
    assert all(one["refused"] == () and one["client"] in range(CLIENTS) for one in wire.beside)
    length = len(wire.masked[0])
    for sender, message in wire.messages:
        fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
        assert fields.pop("client") == sender
        assert len(fields.pop("session")) == 32
        shapes = {}
        for name, value in fields.items():
            if isinstance(value, bytes):
                shapes[name] = len(value)
            else:
                assert {peer for peer, _ in value} <= set(range(CLIENTS)) - {sender}
                (shapes[name],) = {len(content) for _, content in value}
        assert (
            shapes
            == {
                Advert: {"mask_key": 32, "seal_key": 32, "commitment": 32, "signature": 64},
                Shares: {"sealed": 48},
                MaskedInput: {"values": length, "acks": 16},
                Agreement: {"signature": 64},
                Unmasking: {"seed": 16, "shares": 16},
            }[type(message)]
        )
    assert length % 8 == 0


def test_the_length_of_a_message_says_nothing(run, tiny):
    wire, _ = run
    setup = study(tiny)
    shared = sum(tensor.numel() for tensor in setup.shared.values())
    assert {len(v) // 8 for v in wire.masked} == {Encoding(layout(setup)).size + shared + 1}


def test_what_is_written_outside_the_clients_own_folders_holds_only_sums(run):
    wire, out = run
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.relative_to(out).parts[0] != "clients"]
    names = {p.name for p in files}
    assert {"record.jsonl", "summary.json", "contract.toml", "ledger.sqlite", "adapter_model.safetensors"} <= names
    assert wire.leaks([p.read_bytes() for p in files]) == {}
    for path in files:
        text = path.read_bytes().decode("latin-1")
        assert wire.said_in(text) == {}, path
        assert not re.search(r"user-\d", text), path  # nor who anybody is
    record = RunRecord.load(out)
    for body in record.of("release"):
        assert body["count"] == PANEL
        assert all(std > 0 for std in body["noise_std"])
    per_client = [body for body in record.of("round") if any(len(v) == PANEL for v in body.values() if _is_list(v))]
    assert all(len(body["evidence"]) == PANEL for body in per_client)  # six modes, not six clients
    assert all(not _is_list(v) or k == "evidence" for body in record.of("round") for k, v in body.items())


def _is_list(value) -> bool:
    return isinstance(value, list)


def test_decimals_are_found(run):
    wire, _ = run
    update = wire.secrets["update"][0]
    value = float(update[np.argmax(np.abs(update))])
    assert wire.said_in(json.dumps({"x": [1.0, value]})) == {"update": 1}
    assert wire.said_in(json.dumps(float(np.float32(value))))
    assert wire.said_in("0.25 1.0 17") == {}


# --- planted leaks


@dataclass(frozen=True, slots=True)
class Chatty(Sent):
    """A client that tells more than its vector, as metrics beside a message do."""

    metrics: dict = field(default_factory=dict)


def unmasked(patch):
    mask = secagg.Client.mask

    def bare(self, delivery, vector):
        return replace(mask(self, delivery, vector), values=vector.tobytes())

    patch.setattr(secagg.Client, "mask", bare)


def chatting(tell):
    """A plant: each client's `Sent` gets metrics, from what it measured."""

    def plant(patch):
        work, said = LocalClients.work, {}
        stack = LocalClients._stack

        def remember(self, *rest):
            messages = stack(self, *rest)
            said.update(messages)
            return messages

        def chatty(self, asked):
            for sent in work(self, asked):
                yield [Chatty(one.client, one.vector, one.refused, tell(said[one.client])) for one in sent]

        patch.setattr(local.LocalClients, "_stack", remember)
        patch.setattr(local.LocalClients, "work", chatty)

    return plant


def test_a_client_that_does_not_mask_is_caught(tiny, tmp_path):
    wire = planted(tiny, tmp_path, unmasked)
    assert "sealed or encoded vector" in wire.leaks(wire.everything())
    assert max(uniform(vector) for vector in wire.masked) < 1e-10
    assert any(vector.tobytes() in wire.held for vector in wire.sealed)


@pytest.mark.parametrize(
    ("kind", "tell"),
    [
        ("reading", lambda message: {"score": float(message.readings["utility"][0])}),
        ("number of examples", lambda message: {"num_examples": int(message.update[-1])}),
        ("update", lambda message: {"delta": message.update[:4].astype(np.float32)}),
    ],
)
def test_a_number_beside_the_message_is_caught(tiny, tmp_path, kind, tell):
    wire = planted(tiny, tmp_path, chatting(tell))
    assert plain_of(wire) == {"client", "masked", "refused", "metrics"}
    assert kind in wire.leaks(wire.everything())


def test_a_number_inside_a_message_of_the_protocol_is_caught(tiny, tmp_path):
    """The round aborts as well: the server takes no signature of another length."""

    def plant(patch):
        advertise = secagg.Client.advertise

        def tells(self):
            advert = advertise(self)
            return replace(advert, signature=advert.signature + struct.pack("<d", 17 + self.client))

        patch.setattr(secagg.Client, "advertise", tells)

    wire = planted(tiny, tmp_path, plant)
    assert "number of examples" in wire.leaks(wire.everything())
    assert wire.masked == []
    (body,) = RunRecord.load(tmp_path / "run").of("round")
    assert str(Step.ADVERTISE) in body["aborted"]


def test_a_record_that_names_a_client_s_number_is_caught(run, tmp_path):
    wire, _ = run
    reading = next(float(v) for a in wire.secrets["reading"] for v in a if float(f"{v:.6g}") != v)
    RunRecord.open(tmp_path).append("note", {"worst": reading})
    assert wire.said_in((tmp_path / "record.jsonl").read_text())


def test_a_server_that_is_handed_the_sealed_vectors_is_caught(tiny, tmp_path):
    def plant(patch):
        roster = secagg.Server.roster
        aggregate = secagg.aggregate
        given = {}

        def keeps(vectors, *rest, **more):
            given.update(vectors)
            return aggregate(vectors, *rest, **more)

        def with_them(self):
            self.vectors = dict(given)
            return roster(self)

        patch.setattr(secagg, "aggregate", keeps)
        patch.setattr(secagg.Server, "roster", with_them)

    wire = planted(tiny, tmp_path, plant)
    assert "sealed or encoded vector" in wire.leaks(wire.everything())
    assert walk(wire.sealed[0]) <= wire.held
