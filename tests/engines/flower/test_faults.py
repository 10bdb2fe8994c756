"""Whole runs while nodes and network fail. What must hold, whatever happens: nothing is released below the floor,
nothing that was recorded is lost, every charge is written once, and the run ends, or stops with what to do about it.
"""

from __future__ import annotations

import gc
import random
import shutil
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from federation import FIRST, Federation
from flwr.app import Message
from rough import Rough, asks, client_of, intact, kept, on, study
from sums import memory

from fedcanary.engines.flower.certificates import IDENTITY, REGISTRY
from fedcanary.engines.flower.clients import Patience, Sum, Unreachable
from fedcanary.engines.flower.grid import Fault
from fedcanary.engines.flower.journal import Journal
from fedcanary.engines.flower.node import AGREE, HELLO, KEYS, SHARE, TRAIN, UNMASK, Host, Node
from fedcanary.engines.flower.wire import Answer
from fedcanary.engines.places import place
from fedcanary.engines.protection import LEDGER, open_ledger
from fedcanary.privacy import secagg
from fedcanary.record import RunRecord

STEPS = (KEYS, SHARE, TRAIN, AGREE, UNMASK)
EVER = 10**9
HARMLESS = {
    "the request is lost": Fault(kind="drop_request"),
    "the reply is lost": Fault(kind="drop_reply"),
    "twice": Fault(kind="duplicate"),
    "late": Fault(kind="delay", polls=5),
    "the node's app raised": Fault(kind="error", code=2),
    "the node was offline": Fault(kind="error", code=5),
    "the app died": Fault(kind="error", code=8),
    "killed before, and back": Fault(kind="kill", polls=2),
    "killed after, and back": Fault(kind="kill_after", polls=2),
}


@pytest.fixture(scope="module")
def calm():
    """What is kept of the run that nothing happened to."""
    with memory() as folder:
        far = Rough(study(), folder)
        far.run()
        intact(folder)
        yield kept(folder)


def counts(record: RunRecord) -> list[int]:
    """How many clients each round's releases are over; 0 if it has none."""
    return [int(next(iter(table.values())).count) if table else 0 for table in record.releases().values()]


def live() -> int:
    """Secure sums that something still holds, whichever test made them."""
    gc.collect()
    return sum(type(one) in (secagg.Server, secagg.Client, Sum) for one in gc.get_objects())


def storm(seed: int, share: float):
    """Every message has its fault with this probability; those that are asked again are spared."""
    drawn, hit = random.Random(seed), set()

    def decide(message: Message) -> Fault | None:
        about = client_of(message), tuple(ask.id for ask in asks(message).values())
        if about in hit or drawn.random() > share:
            return None
        hit.add(about)
        return drawn.choice(list(HARMLESS.values()))

    decide.hit = hit
    return decide


# --- faults that change nothing


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_that_spares_what_is_asked_again_changes_no_byte(room, calm, seed):
    weather = storm(seed, 0.4)
    far = Rough(study(), room, faults=weather)
    far.run()
    intact(room)
    assert len(weather.hit) >= 20
    assert kept(room) == calm


@pytest.mark.slow
@pytest.mark.parametrize("fault", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("kind", STEPS)
def test_a_fault_at_a_step_that_passes_changes_no_byte(room, calm, kind, fault):
    far = Rough(study(), room, faults=on(kind, fault, clients=(1, 4), rounds=(1, 2, 3)))
    far.run()
    intact(room)
    assert kept(room) == calm
    again = Counter(far.asked)
    assert all(times <= 2 for (_, asked, _), times in again.items() if asked != HELLO)


@pytest.mark.parametrize("trust", ["local", "central"])
def test_a_storm_under_other_trusts(room, trust):
    setup = study(privacy={"trust": trust})
    Federation(setup, room / "calm").run()
    far = Rough(setup, room / "storm", faults=storm(7, 0.5))
    far.run()
    assert kept(room / "storm") == kept(room / "calm")
    intact(room / "storm")


# --- a node that is gone for good


@pytest.mark.parametrize(
    ("kind", "fault"),
    [*((kind, "killed") for kind in STEPS), (TRAIN, "killed after"), (AGREE, "hangs"), (TRAIN, "errors")],
)
def test_a_node_that_is_gone_from_a_step_on(room, calm, kind, fault):
    """Before training, during it, between masking and unmasking: the sum is opened, with its input or without."""
    what = {"hangs": "drop_request", "killed": "kill", "killed after": "kill_after", "errors": "error"}[fault]
    gone: set[int] = set()

    def faults(message: Message) -> Fault | None:
        ask = asks(message).get(kind)
        if client_of(message) == 2 and ((ask is not None and ask.fields["round"] == 2) or gone):
            gone.add(2)
            return Fault(kind=what, code=8)
        return None

    far = Rough(study(), room, faults=faults)
    far.run()
    record = intact(room)
    assert counts(record) == [6, 6 if kind in (AGREE, UNMASK) else 5, 5]
    assert gone


def test_what_comes_after_its_exchange_was_closed_is_void(room):
    """A masked input comes while the others' sum is being unmasked: pulled, counted, and not looked into."""
    slow = on(TRAIN, Fault(kind="delay", polls=65), clients=(2,), rounds=(2,), times=EVER)
    far = Rough(study(), room, faults=slow)
    far.run()
    assert counts(intact(room)) == [6, 5, 6]
    assert far.link.faults["late"] == 1
    with Journal(room / "flower.sqlite") as journal:
        assert not [entry for entry in journal.of(TRAIN, 2) if entry.key.endswith("/2")]


@pytest.mark.parametrize("kind", [TRAIN, AGREE, UNMASK])
def test_too_many_gone_at_a_step_is_a_round_without_a_release(room, kind):
    """Two of six stay silent where five are needed: the round is given up, with its charge, and the next goes on."""
    far = Rough(study(), room, faults=on(kind, Fault(kind="drop_request"), clients=(1, 2), rounds=(2,), times=EVER))
    far.run()
    record = intact(room)
    assert counts(record) == [6, 0, 6]
    assert [bool(body["aborted"]) for body in record.of("round")] == [False, True, False]
    assert sum(body["round"] == 2 for body in record.of("charge")) == 2  # readings and update
    with open_ledger(far.setup, room / "ledger.sqlite") as ledger:
        status = {(row.charge.round, row.status) for row in ledger.rows()}
    assert status == {(1, "released"), (2, "aborted"), (3, "released")}


class Reluctant(Node):
    """Refuses a step of the second round, once."""

    kind = KEYS

    def answer(self, asks):
        said = super().answer(asks)
        for k, ask in enumerate(asks):
            if ask.kind == self.kind and ask.fields["round"] == 2:
                self.kind = ""
                said[k] = Answer(ask.id, {}, "failed")
        return said


@pytest.mark.parametrize("kind", [KEYS, SHARE])
def test_keys_that_too_few_sent_ahead_are_agreed_on_anew(room, calm, kind):
    """They come along with a round's last steps: that round does not suffer."""
    far = Rough(study(), room)
    for client in (1, 2):
        far.odd[client] = Reluctant(far.host, client, place(room / "clients", client) / IDENTITY)
        far.odd[client].kind = kind
    far.run()
    intact(room)
    assert kept(room) == calm
    assert far.link.exchanges == 1 + 2 + 3 * 3 + 2


def test_a_node_that_hangs_is_asked_who_it_is_for_half_a_minute_a_round(room):
    silent = on(HELLO, Fault(kind="drop_request"), clients=(3,), rounds=(0,), times=EVER)
    far = Rough(study(), room, faults=silent)
    far.run()
    assert counts(intact(room)) == [5, 5, 5]
    assert far.link.exchanges == 1 + 2 + 3 * 3 + 2  # who are you, of all, and of it once in each later round
    assert far.clock.now < 3 * 60


# --- nodes that are not what they should be


def other_node(far: Rough, room: Path, client: int, changed: str) -> Node:
    """A node of another contract, or with another base model."""
    odd = study(privacy={"epsilon": 3.0}) if changed == "contract" else study()
    odd.base.digest = odd.base.digest if changed == "contract" else "c" * 32
    there = Federation(odd, room / "odd")
    shutil.copy(far.out / REGISTRY, there.out / REGISTRY)
    return Node(there.host, client, place(far.out / "clients", client) / IDENTITY)


@pytest.mark.parametrize(("changed", "word"), [("contract", "other_contract"), ("model", "other_model")])
def test_a_node_of_another_contract_or_model_takes_no_part(room, changed, word):
    far = Rough(study(), room / "run")
    far.odd[3] = other_node(far, room, 3, changed)
    far.run()
    assert counts(intact(room / "run")) == [5, 5, 5]
    assert far.clients.refused[word] >= 1


@pytest.mark.parametrize("at_once", [True, False])  # or when the server has seen that it was gone
@pytest.mark.parametrize(("changed", "word"), [("contract", "other_contract"), ("model", "other_model")])
def test_a_node_that_comes_back_with_another_contract_or_model_takes_no_part(room, changed, word, at_once):
    far = Rough(
        study(), room / "run", faults=on(TRAIN, Fault(kind="kill", polls=3 * at_once), clients=(3,), rounds=(2,))
    )

    def watch(progress) -> None:
        if progress.verdict is not None and 3 not in far.odd:
            far.odd[3] = other_node(far, room, 3, changed)
        if progress.verdict is not None and progress.round == 2:
            far.grid.offline.clear()

    far.run(watch=watch)
    record = intact(room / "run")
    assert counts(record) == [6, 5, 5]
    if at_once:  # it says so itself
        assert list(record.of("round"))[1]["refused"] == {"other_contract": 1}
    else:
        assert far.clients.refused[word] >= 1


@pytest.mark.parametrize(("id", "others"), [(FIRST + 90, 6), (FIRST - 1, 5)])
def test_two_nodes_that_claim_one_client(room, id, others):
    """One is without the client's key. At worst the client is out; nobody answers in its name."""
    far = Rough(study(), room)
    far.odd[90] = Node(far.host, 3, place(room / "clients", 0) / IDENTITY)
    far.grid._configs[id] = {"client": 90}
    far.run()
    assert counts(intact(room)) == [others] * 3
    assert far.clients.refused["client_twice"] >= 3


@pytest.mark.parametrize("keys", [True, False])
def test_a_node_speaks_for_the_client_whose_key_it_showed(room, keys):
    """The attack: client 0's node says that it is client 3, where no key of the clients' own would tell."""
    far = Rough(study(privacy={"trust": "local"}), room)
    far.odd[0] = Node(far.host, 3, place(room / "clients", 0) / IDENTITY)
    far.run(nodes={FIRST + client: client for client in range(6)} if keys else None)
    assert counts(intact(room)) == [5, 5, 5]
    assert far.clients.refused["client_twice" if not keys else "other_client"] >= 3
    honest = [client for client, kind, _ in far.asked if kind == TRAIN]
    assert (3 in honest) is keys  # else the client itself is out, and another speaks in its name


def test_a_node_with_a_wrong_identity_is_left_out(room):
    far = Rough(study(), room)
    shutil.copy(place(room / "clients", 0) / IDENTITY, place(room / "clients", 3) / IDENTITY)
    far.run()
    assert counts(intact(room)) == [5, 5, 5]


def test_a_vector_of_another_length_costs_nobody_else_the_round(room):
    """Under trusts where the server sees vectors: the first one that comes must not say how long they are."""
    far = Rough(study(privacy={"trust": "local"}), room)

    class Long(Node):
        def answer(self, asks):
            return [
                Answer(a.ask, {"vector": a.fields["vector"] + bytes(8)}) if "vector" in a.fields else a
                for a in super().answer(asks)
            ]

    far.odd[0] = Long(far.host, 0, place(room / "clients", 0) / IDENTITY)
    far.run()
    assert counts(intact(room)) == [5, 5, 5]


class Prone:
    """A host whose clients fail at their training."""

    def __init__(self, host: Host, rounds: set[int]) -> None:
        self.host, self.rounds = host, rounds
        self.consent = host.clients.consent

    def work(self, asked):
        if asked.request.round in self.rounds:
            raise ValueError("loss is 4.25 on 'my own words'")
        return self.host.__dict__["made"].work(asked)


def test_a_client_whose_training_fails_is_counted_and_says_nothing(room):
    far = Rough(study(), room / "run", inbox=True)
    ill = Federation(far.setup, room / "ill")
    ill.host.__dict__["made"] = ill.host.clients
    shutil.copy(far.out / "registry.toml", ill.out / "registry.toml")
    ill.host.clients = Prone(ill.host, {2})
    far.odd[5] = Node(ill.host, 5, place(far.out / "clients", 5) / IDENTITY)
    far.run()
    record = intact(room / "run")
    assert counts(record) == [6, 5, 6]
    assert [body["failed"] for body in record.of("round")] == [0, 1, 0]
    said = b"".join(bytes(reply.content["fedcanary"]["parcel"]) for reply in far.grid.inbox)
    assert b"my own words" not in said
    assert far.clients.refused == {"failed": 1}


# --- too few


def test_too_few_nodes_is_said_and_nothing_is_recorded(room, calm):
    far = Rough(study(), room)
    far.grid.offline = {FIRST, FIRST + 1, FIRST + 2}
    with pytest.raises(Unreachable, match="3 of 6 clients are online and of this contract, 5 are needed") as error:
        far.run()
    assert "resume" in str(error.value)
    assert [entry.kind for entry in RunRecord.load(room).entries] == ["header"]
    with open_ledger(far.setup, room / "ledger.sqlite") as ledger:
        assert not ledger.rows()
    far.grid.offline = set()
    far.run()
    intact(room)
    assert kept(room) == calm


@pytest.mark.parametrize("kind", STEPS)
def test_all_nodes_gone_at_a_step_stops_the_run_and_it_goes_on_where_it_was(room, calm, kind):
    """The network is cut between two exchanges of the second round, and stays so for longer than there is patience."""
    cut = False

    def faults(message: Message) -> Fault | None:
        before = asks(message).get(STEPS[STEPS.index(kind) - 1]) if kind != KEYS else None
        nonlocal cut
        if before is not None and before.fields["round"] == 2:
            cut = True
        return None

    far = Rough(study(), room, faults=faults)
    nodes = far.grid.get_node_ids
    far.grid.get_node_ids = lambda: [] if cut else nodes()
    if kind == KEYS:

        def watch(progress):
            nonlocal cut
            cut = cut or progress.verdict is not None

        with pytest.raises(Unreachable):
            far.run(watch=watch)
    else:
        with pytest.raises(Unreachable, match="are needed"):
            far.run()
    assert RunRecord.load(room).rounds == (0 if kind == SHARE else 1)  # keys go with the round before
    cut = False
    far.run()
    intact(room)
    assert kept(room) == calm


def test_nodes_that_all_refuse_their_keys_end_in_a_clear_message(room):
    """Here because each has another list of keys than the server."""
    far = Rough(study(), room / "run")
    for client in range(6):
        far.odd[client] = Node(
            Federation(far.setup, room / "other").host, client, place(far.out / "clients", client) / IDENTITY
        )
    with pytest.raises(Unreachable, match="could not agree on keys"):
        far.run(patience=Patience(train=60.0, step=20.0, nodes=5.0))
    assert RunRecord.load(room / "run").rounds == 0


# --- many rounds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak_200_rounds_with_one_of_six_failing_every_third(room):
    """At random places, by random faults. The record is intact; memory grows with the record alone (and with the
    accountant's cache, which is bounded), the journals not at all."""
    drawn = random.Random(20)
    plan = {round: (drawn.randrange(6), drawn.choice(STEPS)) for round in range(3, 201, 3)}
    kinds = ["drop_request", "drop_reply", "kill", "kill_after", "duplicate", "error", "delay"]

    def faults(message: Message) -> Fault | None:
        for kind, ask in asks(message).items():
            if plan.get(int(ask.fields.get("round", 0))) == (client_of(message), kind):
                return Fault(kind=drawn.choice(kinds), polls=drawn.randrange(1, 40), code=drawn.choice([2, 5, 8]))
        return None

    far = Rough(study(rounds=200, privacy={"noise": "system"}), room, faults=faults)
    used, journals, objects = [], [], []
    before = live()
    without = [tracemalloc.Filter(False, f"*/{name}/*") for name in ("dp_accounting", "scipy")]

    def watch(progress) -> None:
        if progress.verdict is not None and progress.round % 20 == 0:
            objects.append(live() - before)  # and all garbage is collected
            if progress.round == 40:  # all is loaded
                tracemalloc.start()
            elif progress.round in (60, 200):
                snapshot = tracemalloc.take_snapshot().filter_traces(without)
                used.append(sum(trace.size for trace in snapshot.traces))
            journals.append(sum(file.stat().st_size for file in room.rglob("*.sqlite") if file.name != LEDGER))

    began = time.process_time()
    try:
        far.run(watch=watch)
    finally:
        tracemalloc.stop()
    released = counts(intact(room))
    print(f"{time.process_time() - began:.0f} CPU-s, {used=}, {journals=}, {objects=}, {dict(far.link.faults)}")
    assert min(released) >= 5
    assert np.mean(released) > 5.5
    assert sum(far.link.faults[word] for word in ("error_2", "error_5", "error_8", "silent", "late", "duplicate")) > 50
    assert (used[1] - used[0]) / 140 < 40_000  # bytes a round
    assert max(journals) <= 1.1 * journals[0]
    assert max(objects) <= 4
