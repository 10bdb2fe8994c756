"""Flower apps in one process, without Ray and without a SuperLink: for tests and small simulations.

`InProcessGrid` is a `flwr.serverapp.Grid`, so a strategy, a `Link` and a ServerApp's main function run over it as they
are. As over a SuperLink: messages and replies pass as bytes, a node has a `Context` of its own for as long as it is up,
a reply can be pulled once (then error 3), a node that is offline answers nothing, not even what it had ready (error 5),
and what a handler raises becomes error 2 with the exception's text. Unlike there: a handler runs while its reply is
pulled, one message at a time, so nothing is in memory for nodes whose turn has not come.

What is private to flwr 1.41 is in the functions at the end of this file, and nowhere else in this package.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final, Literal

from fedcanary.errors import BadInput

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict, UserConfig
    from flwr.clientapp import ClientApp
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
else:
    Grid = object  # so that importing this does not load flwr; the first instance makes the class known to it as a Grid

RUN: Final = 1
SUPERLINK: Final = 1  # its node id
MADE_FOR: Final = "1.41"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to a message instead of what should.

    drop_request  the node never gets it, and nobody says so
    drop_reply    the node has done its work, and the reply is lost without a word
    duplicate     the node gets it twice, and both replies come: the second unasked for, with the next pull
    delay         the reply is there only after `polls` further pulls that ask for it
    error         an error reply with `code`; the node did nothing
    kill          the node dies before it has begun, and its Context with it; online again after `polls` calls of the
                  grid (pulls and looks at who is online), or when a test says so
    kill_after    the node dies with its work done and its reply unsent
    """

    kind: Literal["drop_request", "drop_reply", "duplicate", "delay", "error", "kill", "kill_after"]
    polls: int = 0
    code: int = 0


@dataclass(frozen=True, slots=True)
class _Reply:
    message: Message
    size: int = 0  # bytes of its content


@dataclass(slots=True)
class _Pending:
    """A message under way: its bytes, and its reply once there is one."""

    request: bytes
    node: int
    expires: float
    fault: Fault | None
    reply: _Reply | None = None
    waits: int = 0


class InProcessGrid(Grid):
    """Nodes of one ClientApp, in this process.

    Args:
        nodes: the `node_config` of each node, by node id (any but 0 and 1).
        app: what every node runs.
        run_config: what the run was given.
        faults: asked for each message that is sent.
        inbox: keep every reply that was pulled in `inbox`, for tests that look at what the server got.
        clock: seconds, increasing, by which messages expire.

    Attributes:
        offline: ids of nodes that are not there; a test may change it.
        sent: bytes of contents by message type, to nodes.
        received: the same, from nodes.
        inbox: replies, or None.

    Raises:
        BadInput: flwr is absent, or another minor version than the one whose private parts this knows.
    """

    def __init__(
        self,
        nodes: Mapping[int, UserConfig],
        app: ClientApp,
        run_config: UserConfig | None = None,
        *,
        faults: Callable[[Message], Fault | None] = lambda message: None,
        inbox: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = _begin(type(self))
        self._configs = {node: dict(config) for node, config in nodes.items()}
        self._app, self._run_config, self._faults, self._clock = app, dict(run_config or {}), faults, clock
        self.offline: set[int] = set()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.inbox: list[Message] | None = [] if inbox else None
        self._contexts: dict[int, Context] = {}
        self._pending: dict[str, _Pending] = {}
        self._unasked: list[_Reply] = []
        self._back: dict[int, int] = {}  # calls of the grid until a node that was killed is online again
        self._count = 0

    @property
    def run(self) -> Run:
        """The run that this is."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Be another run."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As `flwr.app.Message` does."""
        from flwr.app import Message

        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are online."""
        self._tick()
        return [node for node in self._configs if node not in self.offline]

    def get_nodes(self) -> list[NodeInfo]:
        """The nodes that are online."""
        from flwr.proto.node_pb2 import NodeInfo

        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; "" in place of the id of one for a node that there never was."""
        now, ids = self._clock(), []
        self._pending = {id: pending for id, pending in self._pending.items() if pending.expires >= now}
        for message in messages:
            id, about = self._named(message), message.metadata
            ids.append(id if about.dst_node_id in self._configs else "")
            if ids[-1]:
                data, size = _packed(message)
                self.sent[about.message_type] += size
                self._pending[id] = _Pending(data, about.dst_node_id, now + about.ttl, self._faults(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there; the work for one is done when its turn in the iteration comes."""
        self._tick()
        unasked, self._unasked = self._unasked, []
        for reply in unasked:
            yield self._given(reply)
        for id in dict.fromkeys(message_ids):
            found = self._reply(id)
            if found is not None:
                self._pending.pop(id, None)
                yield self._given(found)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies to messages. Whatever else would come by waiting is here already, so it never sleeps."""
        sent = list(messages)
        self.push_messages(sent)
        ids = [message.metadata.message_id for message in sent]
        begun = time.monotonic()
        replies: list[Message] = []
        while ids and (timeout is None or time.monotonic() < begun + timeout):
            replies += self.pull_messages(ids)
            waiting = [id for id in ids if id in self._pending]
            if not any(self._pending[id].waits for id in waiting):
                break  # what is still out was lost
            ids = waiting
        return replies

    def _tick(self) -> None:
        for node in [node for node, calls in self._back.items() if calls <= 0]:
            self.offline.discard(node)
            del self._back[node]
        self._back = {node: calls - 1 for node, calls in self._back.items()}

    def _given(self, reply: _Reply) -> Message:
        self.received[reply.message.metadata.message_type] += reply.size
        if self.inbox is not None:
            self.inbox.append(reply.message)
        return reply.message

    def _reply(self, id: str) -> _Reply | None:
        """What SuperLink would say of a message now; None if nothing."""
        pending = self._pending.get(id)
        if pending is None or pending.expires < self._clock():
            return _error(id, 3, "system", "message unavailable")
        fault, kind = pending.fault, pending.fault.kind if pending.fault else ""
        if kind == "kill":
            self._die(pending)
        if pending.node in self.offline:
            return _error(id, 5, _unpacked(pending.request).metadata.message_type, "node unavailable")
        if kind == "drop_request":
            return None
        if pending.reply is None:
            pending.reply = self._work(pending)
            pending.waits = fault.polls if fault and kind == "delay" else 0
            if kind == "duplicate":
                self._unasked.append(self._work(pending))
            if kind == "kill_after":
                self._die(pending)
                return self._reply(id)
        elif pending.waits:
            pending.waits -= 1
        return None if pending.waits or kind == "drop_reply" else pending.reply

    def _die(self, pending: _Pending) -> None:
        self.offline.add(pending.node)
        self._contexts.pop(pending.node, None)
        if pending.fault and pending.fault.polls:
            self._back[pending.node] = pending.fault.polls

    def _work(self, pending: _Pending) -> _Reply:
        """A node's turn: the request as it arrives there, and the reply as it arrives here."""
        from flwr.app import Context, Error, Message, RecordDict

        request, node = _unpacked(pending.request), pending.node
        if pending.fault and pending.fault.kind == "error":
            return _Reply(Message(Error(pending.fault.code, "a planted fault"), reply_to=request))
        if node not in self._contexts:
            self._contexts[node] = Context(RUN, node, dict(self._configs[node]), RecordDict(), dict(self._run_config))
        try:
            data, size = _packed(self._app(request, self._contexts[node]))
            reply = _unpacked(data)
        except Exception as error:  # as Flower does, text and all
            reply, size = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=request), 0
        self._named(reply)
        return _Reply(reply, size)

    def _named(self, message: Message) -> str:
        self._count += 1
        return _name(message, f"{self._count:064x}")


def _begin(kind: type) -> Run:
    """See that this is the flwr whose insides are used here, and tell it who this process is, once."""
    remedy = "pip install 'fedcanary[flower]', which holds flwr to the version that this was made for"
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise BadInput.of("flwr", "is not installed", remedy) from None
    if version.split(".")[:2] != MADE_FOR.split("."):
        raise BadInput.of(f"flwr {version}", f"is not {MADE_FOR}, whose inner parts the in-process grid uses", remedy)
    import flwr.serverapp
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    flwr.serverapp.Grid.register(kind)
    for name in ("_run_id", "_node_id", "_task_id"):
        if getattr(TaskIdentity, name) is None:  # every message says it; a ServerApp's own process is told at its start
            setattr(TaskIdentity, name, RUN)
    return Run.create_empty(RUN)


def _name(message: Message, id: str) -> str:
    """Give a message the id that SuperLink would."""
    message.metadata.__dict__["_message_id"] = id
    return id


def _packed(message: Message) -> tuple[bytes, int]:
    """A message's bytes, and how many of them are its content."""
    from flwr.common.serde import message_to_proto

    proto = message_to_proto(message)
    return proto.SerializeToString(), proto.content.ByteSize()


def _unpacked(data: bytes) -> Message:
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as Proto

    return message_from_proto(Proto.FromString(data))


def _error(id: str, code: int, message_type: str, reason: str) -> _Reply:
    """An error of SuperLink's own making, which names SuperLink as its source."""
    from flwr.app import Error, Metadata
    from flwr.app.message import make_message

    about = Metadata(RUN, "", SUPERLINK, SUPERLINK, id, "", time.time(), 0.0, message_type)
    return _Reply(make_message(about, error=Error(code, reason)))
