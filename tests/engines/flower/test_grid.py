from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import Fault, InProcessGrid
from fedcanary.engines.flower.wire import Answer, Ask, data_of, decode_asks, encode, record
from fedcanary.errors import BadInput

WORK = "query.work"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds + 1e-6


def an_app(seen=None):
    """Each node counts, in its Context, how often it was asked; an ask `raise` makes it raise after it has counted."""

    def mod(message, context, call):
        seen.append((context.node_id, message.metadata.message_type))
        return call(message, context)

    app = ClientApp(mods=[mod] if seen is not None else [])

    def answer(message, context):
        count = context.state.setdefault("count", ConfigRecord({"n": 0}))
        count["n"] += 1
        asks = decode_asks(data_of(message.content), 1 << 20)
        if any(ask.kind == "raise" for ask in asks):
            raise KeyError("a client's secret")
        fields = {"count": count["n"], "part": context.node_config["part"], "size": context.run_config["size"]}
        return Message(record(encode([Answer(ask.id, fields) for ask in asks])), reply_to=message)

    app.query("work")(answer)
    app.train()(answer)
    return app


def a_grid(nodes=3, faults=None, clock=None, **options):
    """`faults` are by node: what befalls each message to it in turn."""
    left = {node: list(those) for node, those in (faults or {}).items()}

    def fault(message):
        those = left.get(message.metadata.dst_node_id)
        return those.pop(0) if those else None

    configs = {10 + n: {"part": n} for n in range(nodes)}
    return InProcessGrid(
        configs,
        options.pop("app", None) or an_app(),
        {"size": 5},
        faults=fault,
        clock=clock or time.monotonic,
        **options,
    )


def asks(kind="work"):
    return [Ask(kind, {"round": 1})]


def a_message(node=10, kind="work", ttl=100.0, type_=WORK):
    return Message(record(encode(asks(kind))), node, type_, ttl=ttl, group_id="1")


def told(answers):
    return {node: tuple(answer.fields.values()) for node, answer in answers}


def play(faults=None, timeout=20.0, nodes=3, rounds=1):
    clock = Clock()
    grid = a_grid(nodes, faults, clock)
    link = Link(grid, clock=clock, sleep=clock.sleep)
    came = [
        {
            node: a.fields["count"]
            for node, (a,) in link.exchange(dict.fromkeys(range(10, 10 + nodes), asks()), WORK, timeout, "")
        }
        for _ in range(rounds)
    ]
    return came, link, grid, clock


def test_every_node_answers_from_its_own_context_and_config():
    grid = a_grid()
    assert isinstance(grid, Grid) and [n.node_id for n in grid.get_nodes()] == [10, 11, 12] == Link(grid).nodes()
    for round in (1, 2):
        came = dict(Link(grid).exchange(dict.fromkeys([10, 12], asks()), WORK, 5.0, ""))
        assert {n: dict(a.fields) for n, (a,) in came.items()} == {
            n: {"count": round, "part": n - 10, "size": 5} for n in (10, 12)
        }


def test_mods_see_train_and_query_messages():
    seen = []
    link = Link(a_grid(2, app=an_app(seen)))
    for type_ in (WORK, "train"):
        assert len(list(link.exchange(dict.fromkeys([10, 11], asks()), type_, 5.0, ""))) == 2
    assert seen == [(10, WORK), (11, WORK), (10, "train"), (11, "train")]


@pytest.mark.parametrize("message", [a_message, lambda: None], ids=["raises", "unregistered"])
def test_what_a_handler_raises_is_error_2_and_what_it_changed_stays(message):
    grid = a_grid()
    what = a_message(kind="raise") if message is a_message else a_message(type_="query.nothing")
    (reply,) = grid.send_and_receive([what])
    assert reply.error.code == 2 and reply.metadata.reply_to_message_id == what.metadata.message_id
    assert ("a client's secret" in reply.error.reason) == (message is a_message)  # Flower tells: so ours must not raise
    ((_, (answer,)),) = Link(grid).exchange({10: asks()}, WORK, 5.0, "")
    assert answer.fields["count"] == (2 if message is a_message else 1)


def test_a_handler_gets_and_gives_copies():
    kept = []
    app = ClientApp()

    @app.query()
    def keep(message, context):
        kept.append(message)
        message.content["mine"] = ConfigRecord({"x": 1})
        return Message(message.content, reply_to=message)

    grid = InProcessGrid({10: {}}, app)
    sent = Message(RecordDict({"a": MetricRecord({"x": 1.5})}), 10, "query")
    (reply,) = grid.send_and_receive([sent])
    assert set(sent.content) == {"a"} and set(reply.content) == {"a", "mine"}
    kept[0].content["mine"]["x"] = 2
    assert reply.content["mine"]["x"] == 1 and reply.metadata.src_node_id == 10


def test_a_reply_is_pulled_once_and_what_is_unknown_is_error_3():
    grid = a_grid(1)
    stranger = a_message(99)
    ids = grid.push_messages([a_message(), stranger])
    assert ids[1] == "" and stranger.metadata.message_id
    assert [r.has_content() for r in grid.pull_messages([ids[0]])] == [True]
    for id in (ids[0], stranger.metadata.message_id, "x"):
        (reply,) = grid.pull_messages([id])
        about = reply.metadata
        assert (reply.error.code, about.src_node_id, about.message_type) == (3, 1, "system")
        assert about.reply_to_message_id == id
    assert [r.error.code for r in grid.send_and_receive([a_message(99)])] == [3]


def test_a_node_that_is_offline_answers_nothing_not_even_what_was_ready():
    grid = a_grid(2, {10: [Fault(kind="delay", polls=1)]})
    ids = grid.push_messages([a_message(10), a_message(11)])
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids)] == [11]
    grid.offline.add(10)
    (reply,) = grid.pull_messages(ids[:1])
    assert (reply.error.code, reply.metadata.src_node_id, reply.metadata.message_type) == (5, 1, WORK)
    assert grid.get_node_ids() == [11] == [n.node_id for n in grid.get_nodes()]


def test_a_message_expires():
    clock = Clock()
    grid = a_grid(1, clock=clock)
    (id,) = grid.push_messages([a_message(ttl=10.0)])
    clock.now = 11.0
    assert [r.error.code for r in grid.pull_messages([id])] == [3]
    grid = a_grid(1, {10: [Fault(kind="drop_request")] * 50}, clock)
    for _ in range(50):
        grid.push_messages([a_message(ttl=10.0)])
        clock.now += 3
    assert len(grid._pending) <= 4  # nothing that was lost stays


def test_the_work_is_done_one_by_one_as_replies_are_taken():
    done = []
    app = ClientApp()
    app.query()(lambda message, context: done.append(context.node_id) or Message(RecordDict(), reply_to=message))
    grid = InProcessGrid({n: {} for n in (10, 11, 12)}, app)
    ids = grid.push_messages([Message(RecordDict(), n, "query") for n in (10, 11, 12)])
    pulled = iter(grid.pull_messages(ids))
    assert done == []
    next(pulled)
    assert done == [10]
    pulled.close()
    assert len(list(grid.pull_messages(ids[1:]))) == 2 and done == [10, 11, 12]


@pytest.mark.parametrize(
    ("fault", "count", "faults"),
    [
        (Fault(kind="drop_request"), 1, {"reasked": 1}),
        (Fault(kind="drop_reply"), 2, {"reasked": 1}),  # the work was done twice: what the journal is for
        (Fault(kind="duplicate"), 1, {}),
        (Fault(kind="delay", polls=3), 1, {}),
        (Fault(kind="error", code=8), 1, {"error_8": 1, "reasked": 1}),
        (Fault(kind="kill", polls=3), 1, {"error_5": 1, "reasked": 1}),
        (Fault(kind="kill_after", polls=3), 1, {"error_5": 1, "reasked": 1}),  # its Context died with it
        (Fault(kind="kill"), None, {"error_5": 1}),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_each_fault_as_the_link_sees_it(fault, count, faults):
    came, link, grid, clock = play({11: [fault]})
    assert came == [{10: 1, 12: 1} | ({11: count} if count else {})] and link.faults == faults
    assert clock.now < 12.1  # half, a poll, and a poll
    assert (11 in grid.offline) == (count is None)


def test_the_second_reply_of_a_duplicate_comes_unasked():
    came, link, _, _ = play({11: [Fault(kind="duplicate")]}, rounds=2)
    assert came == [{10: 1, 11: 1, 12: 1}, {10: 2, 11: 3, 12: 2}] and link.faults == {"duplicate": 1}


def test_a_reply_that_is_delayed_beyond_the_end_is_late():
    slow = Fault(kind="delay", polls=9)
    came, link, _, _ = play({11: [slow, slow]}, timeout=2.0, rounds=3)
    assert all(set(round) >= {10, 12} for round in came) and 11 not in came[0]
    came, link, _, _ = play({11: [slow, Fault(kind="drop_request")]}, timeout=1.0, rounds=12)
    assert link.faults == {"reasked": 1, "silent": 1, "late": 1}


def test_traffic_and_inbox():
    grid = a_grid(2, inbox=True)
    link = Link(grid)
    replies = list(link.exchange(dict.fromkeys([10, 11], asks()), WORK, 5.0, ""))
    assert grid.sent[WORK] > link.sent[WORK] > 0 and grid.received[WORK] > link.received[WORK] > 0
    assert grid.sent[WORK] < link.sent[WORK] + 2 * 60  # what Flower adds to a parcel
    assert [m.metadata.src_node_id for m in grid.inbox] == [10, 11] and len(replies) == 2
    assert a_grid().inbox is None


def test_send_and_receive_never_sleeps(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("slept"))
    faults = {10: [Fault(kind="drop_reply")], 11: [Fault(kind="delay", polls=4)], 12: [Fault(kind="kill")]}
    grid = a_grid(4, faults)
    replies = grid.send_and_receive([a_message(10 + n) for n in range(4)])
    assert sorted(r.metadata.src_node_id for r in replies) == [1, 11, 13]
    assert grid.send_and_receive([]) == []
    assert grid.send_and_receive([a_message(13)], timeout=0.0) == []


def test_a_flower_strategy_runs_over_it():
    """FedAvg of two clients whose models move to 1 and 3 by rows 1 and 3: (1 * 1 + 3 * 3) / 4."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        value = context.node_config["value"]
        assert message.content["arrays"]["w"].numpy().shape == (2,)
        arrays = ArrayRecord({"w": Array(np.full(2, value, dtype=np.float64))})
        metrics = MetricRecord({"num-examples": int(value), "loss": 0.5})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        mean = float(message.content["arrays"]["w"].numpy().mean())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "mean": mean})}), reply_to=message)

    grid = InProcessGrid({10: {"value": 1.0}, 11: {"value": 3.0}}, app)
    result = FedAvg().start(grid, ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=2)
    assert result.arrays["w"].numpy() == pytest.approx([2.5, 2.5])
    assert result.evaluate_metrics_clientapp[2]["mean"] == 2.5


def test_the_grid_says_who_this_process_is_only_if_nobody_has(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", 77)
    monkeypatch.setattr(TaskIdentity, "_task_id", None)
    a_grid()
    assert (TaskIdentity.run_id, TaskIdentity.task_id) == (77, 1)


@pytest.mark.parametrize("version", ["1.42.0", "2.41.0", "1.4.1", None])
def test_another_flwr_is_refused_with_a_remedy(monkeypatch, version):
    def other(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", other)
    with pytest.raises(BadInput, match="flwr") as caught:
        a_grid()
    (problem,) = caught.value.problems
    assert "fedcanary[flower]" in problem.remedy and (version or "not installed") in str(problem)


def test_what_the_server_and_the_nodes_import_does_not_load_flwr():
    code = (
        "import sys, fedcanary.engines.flower.wire, fedcanary.engines.flower.exchange, fedcanary.engines.flower.grid;"
        "from fedcanary.engines.flower.wire import *; decode_asks(encode([Ask('a', {'x': 1})]), 99);"
        "print([name for name in ('flwr', 'ray', 'torch', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
