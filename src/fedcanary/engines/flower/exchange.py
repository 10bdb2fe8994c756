"""One exchange: parcels out, answers in, whatever the nodes and the network do.

What the rules are for (flwr 1.41, found by running it and in its source):

    matched by message id  an error reply names SuperLink as its source, and what a reply says of itself is its node's
                           word; the id is a digest of a message with 64 random bits in its group, so no other node
                           can guess it and answer in this one's name
    asked again, once      a message can vanish without an error (a node restarted between two polls): again when half
                           of the time has passed. An error reply says that it is lost: again as soon as the node is
                           online. Harmless, because a client gives the same answer to the same ask
    given up               whoever is lost again, or lost and offline at half of the time: nobody waits for it any more
    late is void           what comes after an exchange was closed is pulled by the next, counted and not looked into
    one by one             SuperLink forgets all replies of a pull, so one that cannot be read would take the others
                           with it: from the first such one on, each reply is pulled alone

By all this a node can make itself silent, and do nothing else. An exception is the grid's: SuperLink refused us.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedcanary.engines.flower.wire import LARGEST, Answer, Ask, Malformed, data_of, decode_answers, encode, record

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

FIRST: Final = 0.2  # seconds until the second poll; each wait is half longer than the one before, up to `poll`
MARGIN: Final = 60.0  # seconds that a message outlives its exchange: for a node whose clock goes ahead
BATCH: Final = 1 << 25  # bytes that are pushed at once
PULL: Final = 32  # replies that are in memory at once
OURS: Final = ("httpx", "httpcore", "grpc")  # whose exceptions are about the way to SuperLink, not about a reply


@dataclass(slots=True)
class _Node:
    """What one node was asked in this exchange."""

    parcel: tuple[Ask, ...]
    waiting: set[str] = field(default_factory=set)  # ids of its messages that may still be answered
    again: bool = False
    failed: bool = False  # an error or something unreadable came from it


@dataclass(slots=True)
class _Closed:
    """A message that nobody waits for."""

    expires: float
    word: str  # what a reply to it is: late, or a duplicate
    pulled: bool


class Link:
    """The server's side of every exchange with nodes, over any Flower `Grid`; one exchange at a time.

    Args:
        grid: a ServerApp's, or `InProcessGrid`.
        poll: the longest wait between two polls, in seconds.
        limit: bytes of a parcel above which a reply is not read.
        clock: seconds, increasing.
        sleep: waits for seconds.

    Attributes:
        exchanges: how many were begun.
        sent: bytes of parcels by message type.
        received: bytes of parcels by message type, those of answers that were looked into.
        faults: how often what went wrong: error_<code> (error_other above 9), silent (never any reply), unsent (not
            taken by SuperLink), reasked, late, duplicate, unknown, malformed, oversized, unasked (an answer to what
            the node was not asked), unanswered (an ask without its answer).
    """

    def __init__(
        self,
        grid: Grid,
        *,
        poll: float = 1.0,
        limit: int = LARGEST,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.grid, self.poll, self.limit, self.clock, self.sleep = grid, poll, limit, clock, sleep
        self.exchanges = 0
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._closed: dict[str, _Closed] = {}
        self._pull_at_once = PULL

    def nodes(self) -> list[int]:
        """Ids of the nodes that are online, in order."""
        return sorted(set(self.grid.get_node_ids()))

    def exchange(
        self, parcels: Mapping[int, Sequence[Ask]], message_type: str, timeout: float, group: str
    ) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """Ask nodes, and yield each one's answers as they arrive, in the order of arrival; at most once a node.

        Nothing is sent before the first answer is asked for. What the caller does between two answers takes from the
        time; what had arrived by the last poll, at the end of the time, is yielded in any case. A caller that stops
        early closes the exchange.

        Args:
            parcels: what each node is asked, by node id; no more than 16 asks each. None for a node leaves it out.
            message_type: `query.<name>` or `train`, say.
            timeout: seconds until the exchange is closed.
            group: what the messages' group begins with: the round, say.
        """
        self.exchanges += 1
        start = self.clock()
        open_ = {node: _Node(tuple(parcel)) for node, parcel in sorted(parcels.items()) if parcel}
        owner: dict[str, int] = {}
        end, expires = start + timeout, start + timeout + MARGIN
        self._closed = {id: closed for id, closed in self._closed.items() if closed.expires > start}
        stale = [id for id, closed in self._closed.items() if not closed.pulled]

        def send(which: Iterable[int]) -> None:
            ttl = max(end - self.clock(), 0.0) + MARGIN
            owner.update(self._push({node: open_[node] for node in which}, message_type, ttl, group))

        try:
            send(open_)
            wait = min(FIRST, self.poll)
            while open_:
                begun = self.clock()
                for id, reply in self._pull([*owner, *stale]):
                    if id not in owner:
                        self._stray(id, reply)
                        continue
                    node = owner.pop(id)
                    asked = open_[node]
                    asked.waiting.remove(id)
                    self._closed[id] = _Closed(expires, "duplicate", pulled=True)
                    answers = self._read(reply, asked.parcel, message_type)
                    if answers:
                        del open_[node]
                        for other in asked.waiting:  # asked twice, answered once
                            del owner[other]
                            self._closed[other] = _Closed(expires, "duplicate", pulled=False)
                        yield node, answers
                    else:
                        asked.failed = True
                stale = []
                if begun >= end:  # so the last poll is at the end of the time, however long the caller took before
                    return
                if (now := self.clock()) < end:
                    send(self._again(open_, half=now >= start + timeout / 2))
                if open_:
                    self.sleep(min(wait, max(end - now, 0.0)))
                    wait = min(1.5 * wait, self.poll)
        finally:
            for id in owner:
                self._closed[id] = _Closed(expires, "late", pulled=False)
            self._count("silent", sum(not asked.failed for asked in open_.values()))

    def _push(self, nodes: Mapping[int, _Node], message_type: str, ttl: float, group: str) -> Iterator[tuple[str, int]]:
        """Send; yields the ids of what SuperLink has taken, each with its node."""
        from flwr.app import Message

        batch: list[Message] = []
        size, last, content, data = 0, None, None, b""
        for node, asked in nodes.items():
            if content is None or last != asked.parcel:  # the same parcel for all is one object, and is uploaded once
                last, data = asked.parcel, encode(asked.parcel)
                content = record(data)
            secret = f"{group}.{secrets.token_hex(8)}"
            batch.append(Message(content, node, message_type, ttl=ttl, group_id=secret))
            self.sent[message_type] += len(data)
            size += len(data)
            if size >= BATCH:
                yield from self._taken(batch, nodes)
                batch, size = [], 0
        yield from self._taken(batch, nodes)

    def _taken(self, batch: list[Message], nodes: Mapping[int, _Node]) -> Iterator[tuple[str, int]]:
        taken = set(self.grid.push_messages(batch)) if batch else set()
        for message in batch:
            # by the message's own id: one grid leaves out what SuperLink refused, the other says "" in its place
            id, node = message.metadata.message_id, message.metadata.dst_node_id
            if id and id in taken:
                nodes[node].waiting.add(id)
                yield id, node
            else:
                self._count("unsent")
                nodes[node].failed = True

    def _again(self, open_: dict[int, _Node], *, half: bool) -> list[int]:
        """Whom to ask once more; whom to wait for no longer is taken out."""
        lost = {node for node, asked in open_.items() if not asked.waiting}
        online = set(self.grid.get_node_ids()) if any(not open_[node].again for node in lost) else set()
        which = [
            node for node, asked in open_.items() if not asked.again and (node in online if node in lost else half)
        ]
        for node in lost.difference(which):
            if half or open_[node].again:
                del open_[node]
        for node in which:
            open_[node].again = True
        self._count("reasked", len(which))
        return which

    def _pull(self, ids: Collection[str]) -> Iterator[tuple[str, Message | None]]:
        """Replies by the id of what they answer; None for one that the grid cannot make a message of."""
        left = list(ids)
        while left:
            some, left = left[: self._pull_at_once], left[self._pull_at_once :]
            got = set()
            try:
                for reply in self.grid.pull_messages(some):
                    got.add(reply.metadata.reply_to_message_id)
                    yield reply.metadata.reply_to_message_id, reply
            except Exception as error:
                if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in OURS:
                    raise
                if len(some) == 1:
                    self._count("malformed")
                    yield some[0], None
                else:  # whose it was cannot be told: pull each alone; what SuperLink has forgotten is asked again
                    self._pull_at_once = 1
                    left = [id for id in some if id not in got] + left

    def _read(self, reply: Message | None, parcel: tuple[Ask, ...], message_type: str) -> tuple[Answer, ...]:
        """The answers to what was asked; none if the reply is of no use."""
        if reply is None:
            return ()
        try:
            if reply.has_error():
                code = reply.error.code
                self._count(f"error_{code}" if 0 <= code <= 9 else "error_other")
                return ()
            data = data_of(reply.content)
            self.received[message_type] += len(data)
            answers = decode_answers(data, self.limit)
        except Malformed as error:
            self._count("oversized" if error.reason == "oversized" else "malformed")
            return ()
        except Exception:  # whatever a node made of a Flower message, it is not the server that fails
            self._count("malformed")
            return ()
        asked = {ask.id for ask in parcel}
        known = tuple(answer for answer in answers if answer.ask in asked)
        self._count("unasked", len(answers) - len(known))
        self._count("unanswered", len(asked) - len(known))
        return known

    def _stray(self, id: str, reply: Message | None) -> None:
        """A reply that nobody waits for; an error that says so of a closed message is nothing new."""
        closed = self._closed.get(id)
        if closed is None:
            self._count("unknown")
            return
        if reply is not None and not reply.has_error():
            self._count(closed.word)
        closed.word, closed.pulled = "duplicate", True

    def _count(self, word: str, times: int = 1) -> None:
        if times:  # no zeros among the faults
            self.faults[word] += times
