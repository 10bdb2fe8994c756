from __future__ import annotations

import gc
import random
import tracemalloc

import pytest
from flwr.app import ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from hypothesis import given
from hypothesis import strategies as st

from fedcanary.engines.flower import exchange
from fedcanary.engines.flower.exchange import MARGIN, Link
from fedcanary.engines.flower.wire import Answer, Ask, data_of, decode_asks, encode, record

TYPE = "query.work"


class Clock:
    def __init__(self):
        self.now, self.slept = 1000.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds + 1e-6


class Scripted:
    """A grid whose nodes do what a script says: by node, for each message in turn, what comes back after how long.

    What comes back: "ok" (true answers), a number (an error of this code), bytes or a `RecordDict` (as the content), a
    function of the asks, a `BaseException` (the grid meets it while reading the reply), or a list (several replies).
    """

    def __init__(self, script, clock=None):
        self.clock = clock or Clock()
        self.script, self.online = script, set(script)
        self.returns: dict[int, float] = {}  # when a node is online again
        self.due: dict[str, tuple[float, list[Message | BaseException]]] = {}
        self.taken: set[str] = set()
        self.count = 0
        self.pushed: list[Message] = []
        self.pulls: list[tuple[float, list[str]]] = []
        self.extra: list[Message] = []  # replies that nobody asked for

    def get_node_ids(self):
        return iter([n for n in reversed(sorted(self.online)) if self.returns.get(n, 0) <= self.clock()])

    def push_messages(self, messages):
        assert isinstance(messages, list)  # flwr's own goes over it twice
        for message in messages:
            node, nth = message.metadata.dst_node_id, self.sent_to(message.metadata.dst_node_id)
            message.metadata.__dict__["_message_id"] = f"id-{self.count}"
            self.count += 1
            self.pushed.append(message)
            steps = self.script.get(node, [])
            if nth >= len(steps) or steps[nth] is None:
                continue
            delay, what = steps[nth]
            replies = [self.reply(message, one) for one in (what if isinstance(what, list) else [what])]
            self.due[message.metadata.message_id] = (self.clock() + delay, replies)
        return [message.metadata.message_id for message in messages]

    def sent_to(self, node):
        return sum(m.metadata.dst_node_id == node for m in self.pushed)

    def reply(self, message, what):
        if isinstance(what, BaseException):
            return what
        if isinstance(what, int):
            reply = Message(Error(what, "reason"), reply_to=message)
            if what in (3, 5):  # of SuperLink's making, and named as its
                reply.metadata.__dict__.update(_src_node_id=1, _dst_node_id=1)
            return reply
        asks = decode_asks(data_of(message.content), 1 << 20)
        if what == "ok":
            what = encode(true_answers(asks, message.metadata.dst_node_id))
        elif callable(what):
            what = encode(what(asks))
        return Message(record(what) if isinstance(what, bytes) else what, reply_to=message)

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        assert ids and len(ids) == len(set(ids))
        self.pulls.append((self.clock(), ids))
        found, self.extra = self.extra, []
        unreadable = None
        for id in ids:
            if id in self.taken:
                found.append(system_error(id))
            elif id in self.due and self.due[id][0] <= self.clock():
                self.taken.add(id)
                for reply in self.due.pop(id)[1]:
                    if isinstance(reply, BaseException):
                        unreadable = reply
                    else:
                        found.append(reply)
        if unreadable is not None:  # after SuperLink has forgotten all of them, as in flwr
            raise unreadable
        return found


def system_error(id):
    return make_message(Metadata(1, "", 1, 1, id, "", 0.0, 0.0, "system"), error=Error(3, "gone"))


def true_answers(asks, node):
    return [Answer(ask.id, {"node": node}) for ask in asks]


def asks(*numbers):
    return [Ask("work", {"n": n}) for n in numbers]


def play(script, timeout=60.0, *, parcels=None, link=None, poll=1.0, **options):
    """One exchange; what came, the link, its grid, and how long it took."""
    grid = link.grid if link else Scripted(script)
    if link:
        grid.script = script
        grid.pushed.clear()
    clock = grid.clock
    link = link or Link(grid, poll=poll, clock=clock, sleep=clock.sleep, **options)
    start = clock()
    came = list(link.exchange(parcels or {node: asks(node) for node in script}, TYPE, timeout, "3"))
    assert len({node for node, _ in came}) == len(came)
    return came, link, grid, clock() - start


def answer_of(node):
    return (node, tuple(true_answers(asks(node), node)))


def test_everybody_answers():
    came, link, grid, took = play({1: [(3.0, "ok")], 2: [(0.5, "ok")], 3: [(0.0, "ok")]})
    assert came == [answer_of(3), answer_of(2), answer_of(1)] and took < 4.5
    assert link.exchanges == 1 and not link.faults
    assert link.sent == {TYPE: sum(len(encode(asks(n))) for n in (1, 2, 3))}
    assert link.received == {TYPE: sum(len(encode(true_answers(asks(n), n))) for n in (1, 2, 3))}
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 3]
    for message in grid.pushed:
        assert message.metadata.message_type == TYPE and message.metadata.ttl == pytest.approx(60 + MARGIN)
    assert link.nodes() == [1, 2, 3]


def test_several_asks_go_in_one_message_and_none_in_none():
    came, link, grid, _ = play({1: [(0, "ok")], 2: [(0, "ok")]}, parcels={1: asks(1, 2, 3), 2: []})
    assert came == [(1, tuple(true_answers(asks(1, 2, 3), 1)))] and len(grid.pushed) == 1 and not link.faults
    assert list(link.exchange({}, TYPE, 5.0, "x")) == []
    with pytest.raises(ValueError):
        next(link.exchange({1: asks(*range(17))}, TYPE, 5.0, "x"))


def test_the_same_parcel_for_many_nodes_is_one_object():
    grid = play({n: [(0, "ok")] for n in (1, 2, 3)}, parcels=dict.fromkeys([1, 2, 3], asks(7)))[2]
    assert len({id(message.content) for message in grid.pushed}) == 1


def test_pushes_are_batched_by_bytes(monkeypatch):
    monkeypatch.setattr(exchange, "BATCH", 100)
    grid = Scripted({n: [(0, "ok")] for n in range(5)})
    batches, push = [], grid.push_messages
    grid.push_messages = lambda messages: batches.append(len(messages)) or push(messages)
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    assert len(list(link.exchange({n: [Ask("a", {"x": bytes(60)})] for n in range(5)}, TYPE, 5.0, ""))) == 5
    assert batches == [2, 2, 1]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_an_error_is_asked_again_at_once(code):
    came, link, grid, took = play({1: [(2.0, code), (3.0, "ok")], 2: [(1.0, "ok")]})
    assert came == [answer_of(2), answer_of(1)]
    assert took < 7.5 and link.faults == {f"error_{code}": 1, "reasked": 1}
    first, second = (data_of(m.content) for m in grid.pushed if m.metadata.dst_node_id == 1)
    assert first == second  # a client knows it by its bytes


@pytest.mark.parametrize("code", [2, 3, 5, 8])
def test_an_error_twice_is_the_end_of_it_and_nobody_waits(code):
    came, link, grid, took = play({1: [(1.0, code), (1.0, code), (0, "ok")], 2: [(4.0, "ok")]})
    assert came == [answer_of(2)] and took < 6.0 and grid.sent_to(1) == 2
    assert link.faults == {f"error_{code}": 2, "reasked": 1}


def test_a_made_up_error_code_is_no_new_word():
    _, link, _, _ = play({n: [(0, 10 + n), (0, -n)] for n in range(1, 5)})
    assert link.faults == {"error_other": 8, "reasked": 4}


@pytest.mark.parametrize("code", [3, 5])
def test_a_node_that_is_offline_is_asked_again_when_it_is_back(code):
    grid = Scripted({1: [(1.0, code), (2.0, "ok")]})
    grid.returns[1] = grid.clock() + 20
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    start = grid.clock()
    assert list(link.exchange({1: asks(1)}, TYPE, 60.0, "")) == [answer_of(1)]
    assert 21 < grid.clock() - start < 26 and link.faults == {f"error_{code}": 1, "reasked": 1}


def test_nobody_waits_longer_than_half_for_a_node_that_is_offline():
    grid = Scripted({1: [(1.0, 5), (2.0, "ok")], 2: [(0.0, "ok")]})
    grid.returns[1] = grid.clock() + 40
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    start = grid.clock()
    assert list(link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, "")) == [answer_of(2)]
    assert 30 <= grid.clock() - start < 32 and link.faults == {"error_5": 1}


def test_a_message_that_vanished_is_asked_again_at_half_of_the_time():
    came, link, _, took = play({1: [None, (2.0, "ok")]})
    assert came == [answer_of(1)] and 32 < took < 34 and link.faults == {"reasked": 1}


def test_who_never_says_anything_is_silent_and_the_time_is_kept():
    came, link, grid, took = play({1: [None, None], 2: [(5.0, "ok")]})
    assert came == [answer_of(2)] and 60 <= took < 61 and link.faults == {"reasked": 1, "silent": 1}
    assert grid.sent_to(1) == 2


def test_who_said_something_is_not_silent():
    came, link, _, took = play({1: [(1.0, 8), None]})
    assert came == [] and 60 <= took < 61 and link.faults == {"error_8": 1, "reasked": 1}


def test_an_answer_at_the_end_of_the_time_counts_and_one_after_it_does_not():
    assert play({1: [(60.0, "ok")]})[0] == [answer_of(1)]
    came, link, _, took = play({1: [(60.5, "ok")]})
    assert came == [] and took < 60.1 and link.faults == {"reasked": 1, "silent": 1}


def test_a_slow_reader_does_not_cost_the_others_their_answers():
    grid = Scripted({1: [(0.0, "ok")], 2: [(5.0, "ok")], 3: [(90.0, "ok")], 4: [(500.0, "ok")]})
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    came = []
    for node, _ in link.exchange({n: asks(n) for n in (1, 2, 3, 4)}, TYPE, 60.0, ""):
        came.append(node)
        grid.clock.now += 100  # longer than all the time there is
    assert came == [1, 2, 3]


def test_a_late_answer_is_void_pulled_by_the_next_exchange_and_counted_once():
    came, link, grid, _ = play({1: [(70.0, "ok")], 2: [(0.0, "ok")]}, timeout=40.0)
    assert came == [answer_of(2)] and "late" not in link.faults
    grid.clock.now += 31
    came, *_ = play({2: [(0.0, "ok")]}, link=link)
    assert came == [answer_of(2)] and link.faults["late"] == 1
    play({2: [(0.0, "ok")]}, link=link)
    assert link.faults["late"] == 1
    # the second message that it was sent may be pulled all the time until its own end, and no longer
    grid.clock.now += 60
    before = len(grid.pulls)
    play({2: [(0.0, "ok")]}, link=link)
    assert all("id-2" not in ids for _, ids in grid.pulls[before:]) and link._closed.keys().isdisjoint({"id-0", "id-2"})


def test_a_late_answer_twice_is_late_and_a_duplicate():
    came, link, grid, _ = play({1: [(45.0, ["ok", "ok"])], 2: [(0.0, "ok")]}, timeout=40.0)
    grid.clock.now += 10
    play({2: [(0.0, "ok")]}, link=link)
    assert came == [answer_of(2)] and link.faults == {"reasked": 1, "silent": 1, "late": 1, "duplicate": 1}


def test_a_late_error_is_not_a_late_answer():
    _, link, grid, _ = play({1: [(45.0, 8)], 2: [(0.0, "ok")]}, timeout=40.0)
    grid.clock.now += 10
    play({2: [(0.0, "ok")]}, link=link)
    assert link.faults == {"reasked": 1, "silent": 1}


@pytest.mark.parametrize("where", ["same pull", "next pull", "next exchange"])
def test_a_reply_twice_counts_once(where):
    script = {1: [(0.0, ["ok", "ok"] if where == "same pull" else "ok")], 2: [(3.0, "ok")]}
    grid = Scripted(script)
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    came = []
    for node, answers in link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, ""):
        came.append((node, answers))
        if where == "next pull" and node == 1:
            grid.extra = [grid.reply(grid.pushed[0], "ok")]
    assert came == [answer_of(1), answer_of(2)]
    if where == "next exchange":
        grid.extra = [grid.reply(grid.pushed[0], "ok")]
        assert play(script | {1: [(0.0, "ok")]}, link=link)[0] == [answer_of(1), answer_of(2)]
    assert link.faults == {"duplicate": 1}


def test_asked_twice_and_answered_twice_counts_once():
    came, link, grid, _ = play({1: [(31.0, "ok"), (0.9, "ok")]})
    assert came == [answer_of(1)]
    grid.clock.now += 10
    play({2: [(0.0, "ok")]}, link=link)
    assert link.faults == {"reasked": 1, "duplicate": 1}


def test_a_reply_to_an_unknown_id_is_counted():
    grid = Scripted({1: [(0.0, "ok")]})
    grid.extra = [system_error("id-77"), system_error("")]
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    assert list(link.exchange({1: asks(1)}, TYPE, 60.0, "")) == [answer_of(1)] and link.faults == {"unknown": 2}


def test_what_a_reply_says_of_its_sender_does_not_matter():
    grid = Scripted({1: [(0.0, "ok")], 2: [(0.0, "ok")]})
    reply = grid.reply
    grid.reply = lambda message, what: (
        (r := reply(message, what)).metadata.__dict__.update(_src_node_id=3 - message.metadata.dst_node_id) or r
    )
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    assert sorted(link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, "")) == [answer_of(1), answer_of(2)]


def test_no_node_can_answer_in_the_name_of_another():
    """What a node knows is its own message; another's differs in 64 random bits of what its id is a digest of."""
    scripts = {n: [(0.0, "ok")] for n in range(50)}
    grid = play(scripts, parcels=dict.fromkeys(scripts, asks(1)))[2]
    groups = [m.metadata.group_id for m in grid.pushed]
    assert len(set(groups)) == 50 and all(g.startswith("3.") and len(bytes.fromhex(g[2:])) == 8 for g in groups)
    one, two = grid.pushed[:2]
    ids = [one.object_id]
    forged = Message(two.content, one.metadata.dst_node_id, TYPE, ttl=one.metadata.ttl, group_id=two.metadata.group_id)
    forged.metadata.created_at = one.metadata.created_at
    assert forged.object_id not in ids  # all guessed right but the secret
    forged.metadata.group_id = one.metadata.group_id
    assert forged.object_id in ids  # with the secret it would have been


BAD = {
    "noise": (b"\x07 noise", "malformed"),
    "asks": (encode(asks(1)), "malformed"),
    "nothing": (b"", "malformed"),
    "no record": (RecordDict(), "malformed"),
    "a number": (RecordDict({"fedcanary": MetricRecord({"parcel": 1.0})}), "malformed"),
    "text": (RecordDict({"fedcanary": ConfigRecord({"parcel": "x"})}), "malformed"),
    "an extra record": (RecordDict({**record(encode([])), "more": MetricRecord({"x": 1})}), "malformed"),
    "too much": (lambda asked: [Answer(asked[0].id, {"x": bytes(2000)})], "oversized"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_cannot_be_read_is_counted_and_asked_again_once(name):
    what, word = BAD[name]
    came, link, _, took = play({1: [(0.0, what), (0.0, "ok")], 2: [(0.0, "ok")]}, limit=1000)
    assert sorted(came) == [answer_of(1), answer_of(2)] and link.faults == {word: 1, "reasked": 1}
    came, link, _, took = play({1: [(0.0, what), (0.0, what), (0.0, "ok")], 2: [(0.0, "ok")]}, limit=1000)
    assert came == [answer_of(2)] and link.faults == {word: 2, "reasked": 1} and took < 2


def test_a_message_that_is_not_even_one():
    grid = Scripted({1: [(0.0, "ok"), (0.0, "ok")]})
    broken = make_message(Metadata(1, "", 1, 1, "id-0", "", 0.0, 0.0, TYPE), RecordDict())
    broken.__dict__["_content"] = None  # neither content nor error
    reply, replies = grid.reply, [broken]
    grid.reply = lambda message, what: replies.pop() if replies else reply(message, what)
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    assert list(link.exchange({1: asks(1)}, TYPE, 60.0, "")) == [answer_of(1)]
    assert link.faults == {"malformed": 1, "reasked": 1}


def test_an_answer_to_what_was_not_asked_is_left_out():
    def more(asked):
        return [Answer("ab" * 16, {"x": 1}), *true_answers(asked, 1), Answer(asks(2)[0].id, {}, "no")]

    came, link, *_ = play({1: [(0.0, more)], 2: [(0.0, "ok")]})
    assert sorted(came) == [answer_of(1), answer_of(2)] and link.faults == {"unasked": 2}


def test_an_ask_without_an_answer_is_counted_and_the_others_are_used():
    came, link, *_ = play({1: [(0.0, lambda a: true_answers(a[:1], 1))]}, parcels={1: asks(1, 2)})
    assert came == [answer_of(1)] and link.faults == {"unanswered": 1}


def test_a_client_that_could_not_read_its_parcel_is_asked_again():
    came, link, *_ = play({1: [(0.0, lambda a: []), (0.0, "ok")]})
    assert came == [answer_of(1)] and link.faults == {"unanswered": 1, "reasked": 1}


def test_a_reply_that_breaks_the_grid_costs_only_its_node(monkeypatch):
    """SuperLink has forgotten all replies of the pull that broke: the others are asked again, and then pulled alone."""
    script = {n: [(0.0, "ok"), (1.0, "ok")] for n in range(1, 6)} | {3: [(0.0, KeyError("type")), (1.0, ValueError())]}
    came, link, grid, took = play(script)
    assert sorted(came) == [answer_of(n) for n in (1, 2, 4, 5)] and took < 10
    assert link.faults == {"error_3": 5, "reasked": 5, "malformed": 1}
    assert all(len(ids) == 1 for _, ids in grid.pulls[1:])
    came, *_ = play({1: [(0.0, "ok")], 2: [(0.0, "ok")], 3: [(0.0, RecursionError()), (0.0, "ok")]}, link=link)
    assert sorted(came) == [
        answer_of(n) for n in (1, 2, 3)
    ]  # and in later exchanges the others are not even asked again


def test_what_was_read_before_the_grid_broke_is_not_pulled_again():
    grid = Scripted({n: [(0.0, "ok")] for n in (1, 2, 3)})
    pull = grid.pull_messages

    def half_way(ids):
        for place, reply in enumerate(pull(ids[:1]) + (pull(ids[1:]) if ids[1:] else [])):
            if place == 1:
                grid.due["id-1"] = (0.0, [reply])  # this grid has not forgotten it
                grid.taken.discard("id-1")
                raise ValueError
            yield reply

    grid.pull_messages = half_way
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    came = list(link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, ""))
    assert came == [answer_of(1), answer_of(2)] and [ids for _, ids in grid.pulls] == [["id-0"], ["id-1"], ["id-1"]]
    assert not link.faults


def test_what_superlink_refuses_is_raised():
    import httpx

    for error in (httpx.ConnectError("certificate"), ConnectionError()):
        with pytest.raises(type(error)):
            play({1: [(0.0, error)]})


@pytest.mark.parametrize("how", ["empty", "left out"])
def test_a_message_that_superlink_does_not_take(how):
    grid = Scripted({1: [(0.0, "ok")], 2: [(0.0, "ok")]})
    grid.online = {1}  # 2 has left for good
    push = grid.push_messages

    def refuse(messages):
        ids = push(messages)
        taken = [m.metadata.dst_node_id == 1 for m in messages]
        if how == "empty":
            return [id if ok else "" for id, ok in zip(ids, taken, strict=True)]
        return [id for id, ok in zip(ids, taken, strict=True) if ok]

    grid.push_messages = refuse
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    start = grid.clock()
    assert list(link.exchange({n: asks(n) for n in (2, 1)}, TYPE, 60.0, "")) == [answer_of(1)]
    assert link.faults == {"unsent": 1} and grid.clock() - start < 32


def test_polls_grow_from_short_to_the_longest_and_ask_only_for_what_is_out():
    _, _, grid, _ = play({1: [(0.5, "ok")], 2: [(9.0, "ok")]}, poll=2.0)
    assert grid.clock.slept[:7] == pytest.approx([0.2, 0.3, 0.45, 0.675, 1.0125, 1.51875, 2.0])
    assert max(grid.clock.slept) == 2.0
    assert [ids for _, ids in grid.pulls[:4]] == [["id-0", "id-1"]] * 3 + [["id-1"]]
    _, _, grid, _ = play({1: [(1.0, "ok")]}, poll=0.1)
    assert set(grid.clock.slept) == {0.1}


def test_replies_are_pulled_a_few_at_a_time():
    grid = play({n: [(0.0, "ok")] for n in range(70)})[2]
    assert [len(ids) for _, ids in grid.pulls] == [32, 32, 6]


def test_who_stops_early_has_closed_the_exchange():
    grid = Scripted({1: [(0.0, "ok"), (0.0, "ok")], 2: [(5.0, "ok"), (0.0, "ok")]})
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    running = link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, "")
    assert next(running) == answer_of(1)
    running.close()
    grid.clock.now += 10
    assert sorted(link.exchange({n: asks(n) for n in (1, 2)}, TYPE, 60.0, "")) == [answer_of(1), answer_of(2)]
    assert link.faults == {"late": 1, "silent": 1}


def test_nothing_is_sent_before_the_first_answer_is_asked_for():
    grid = Scripted({1: [(0.0, "ok")]})
    Link(grid).exchange({1: asks(1)}, TYPE, 60.0, "")
    assert not grid.pushed


what_comes = st.one_of(
    *(st.just("ok"), st.integers(-1, 12), st.binary(max_size=20), st.just(RecordDict()), st.just(ValueError("x"))),
    *(st.just(lambda a: []), st.just(lambda a: [Answer(a[0].id, {}, "no"), Answer("ab" * 16, {})])),
)
steps = st.none() | st.tuples(st.floats(0, 40), what_comes | st.lists(what_comes, max_size=2))


@given(st.lists(st.dictionaries(st.integers(1, 4), st.lists(steps, max_size=3), min_size=1), min_size=1, max_size=3))
def test_whatever_nodes_do_an_exchange_ends_in_time_with_true_answers_only(scripts):
    grid = Scripted({})
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    for script in scripts:
        grid.online = set(script)
        came, _, _, took = play(script, timeout=20.0, link=link)
        assert took < 20.1
        for node, answers in came:
            assert [a.ask for a in answers] == [asks(node)[0].id]
            assert answers == answer_of(node)[1] or answers[0].refused == "no"
    assert all(count > 0 for count in link.faults.values())


def test_two_hundred_exchanges_with_faults_do_not_grow():
    """Six nodes; in every third exchange one of them fails somehow. What is kept ends with the messages' time."""
    draw = random.Random(5)
    grid = Scripted({})
    link = Link(grid, clock=grid.clock, sleep=grid.clock.sleep)
    kept, memory = [], []
    tracemalloc.start()
    for round in range(200):
        script = {n: [(draw.uniform(0, 3), "ok")] * 2 for n in range(6)}
        if round % 3 == 0:
            script[draw.randrange(6)] = draw.choice(
                [[None, None], [(35.0, "ok"), None], [(1.0, 5), (1.0, 8)], [(0.0, b"x"), None], [(0.0, KeyError())] * 2]
            )
        grid.online = set(script)
        came, *_ = play(script, timeout=30.0, link=link)
        assert len(came) >= 5
        grid.pulls.clear()
        grid.taken.clear()
        grid.clock.slept.clear()
        grid.due = {id: due for id, due in grid.due.items() if due[0] > grid.clock() - 90}
        grid.script = {}
        kept.append(len(link._closed))
        if round % 50 == 49:
            grid.pushed.clear()
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(link.faults) >= 4 and link.faults["late"] > 2
    assert max(kept) < 6 * 2 * (30 + MARGIN) and max(kept[100:]) <= 1.5 * max(kept[:100])
    assert memory[-1] < memory[0] + 50_000
