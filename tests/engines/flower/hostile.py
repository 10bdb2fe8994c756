"""fedcanary's apps over a SuperLink's grid that does to messages what it should not; a deployment runs this as its app.

By the order in which nodes are first written to:

    0  gets every message twice, and the server gets both replies
    1  gets the messages of earlier rounds again
    2  gets with every message one that is no message of ours
    3  is not heard: replies are cut, far too large, held back for a while, and once for longer than anybody waits

`hostile.jsonl` in the run's folder says what nodes replied to all this, as digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedcanary.engines.flower.wire import LARGEST, Ask, data_of, decode_answers, decode_asks, encode, record
from fedcanary.flower.apps import client_app
from fedcanary.flower.apps import server_app as calm

__all__ = ["client_app", "server_app"]

HUGE = 64 << 20
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The run, as it is, over the hostile grid."""
    calm(Hostile(grid, Path(str(context.run_config["out"])) / "hostile.jsonl"), context)


class Hostile:
    """What `Link` uses of a grid."""

    def __init__(self, grid: Grid, notes: Path) -> None:
        self._grid, self._notes = grid, notes
        self._place: dict[int, int] = {}
        self._sent: dict[str, tuple[str, int, tuple[Ask, ...]]] = {}  # by id: the attack, the place, what was asked
        self._before: list[Message] = []
        self._held: list[tuple[int, Message]] = []  # pulls until it is given
        self._done: set[str] = set()
        self._malformed = self._all_malformed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """With others beside them."""
        given = list(messages)
        ids = list(self._grid.push_messages(given))
        for message in given:
            place = self._place.setdefault(message.metadata.dst_node_id, len(self._place))
            asks = decode_asks(data_of(message.content), LARGEST)
            self._sent[message.metadata.message_id] = ("", place, asks)
            if place == 0:
                self._attack("duplicate", message, message.content, asks)
            elif place == 1:
                for old in [old for old in self._before if _round(old) < max(_round_of(ask) for ask in asks) - 1]:
                    self._before.remove(old)
                    self._attack("replay", message, old.content, decode_asks(data_of(old.content), LARGEST))
                self._before.append(message)
            elif place == 2:
                name, content = next(self._malformed)(data_of(message.content))
                kind = "query.nobody" if name == "another type" else message.metadata.message_type
                self._attack(name, message, content, (), kind)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Message]:
        """Without what was only noted; some of it changed, some later."""
        wanted = set(ids)
        self._held = [(left - 1, message) for left, message in self._held]
        for _, message in [held for held in self._held if held[0] <= 0]:
            yield message
        self._held = [held for held in self._held if held[0] > 0]
        attacks = {id for id, (attack, _, _) in self._sent.items() if attack}
        for reply in self._grid.pull_messages([*wanted, *attacks]):
            id = reply.metadata.reply_to_message_id
            attack, place, asks = self._sent.get(id, ("", -1, ()))
            self._note(attack, place, asks, reply)
            if attack:
                del self._sent[id]
                if attack == "duplicate":
                    yield reply  # to a message that the server never sent
            elif place == 3:
                yield from self._spoiled(asks, reply)
            else:
                yield reply

    def _attack(
        self, name: str, beside: Message, content: RecordDict, asks: tuple[Ask, ...], kind: str | None = None
    ) -> None:
        about = beside.metadata
        message = Message(content, about.dst_node_id, kind or about.message_type, ttl=about.ttl, group_id="x")
        self._grid.push_messages([message])
        self._sent[message.metadata.message_id] = (name, self._place[about.dst_node_id], asks)

    def _spoiled(self, asks: tuple[Ask, ...], reply: Message) -> Iterator[Message]:
        what = {("train", 1): "cut", ("train", 2): "huge", ("train", 3): "slow", ("unmask", 4): "late"}
        how = next((what[one] for ask in asks if (one := (ask.kind, _round_of(ask))) in what), "")
        if how == "late":  # whatever is asked again: `Link` waits a minute, and pulls once a second at most
            self._held.append((70, reply))
        elif how in self._done or not how:
            yield reply
        else:
            self._done.add(how)
            if how == "slow":
                self._held.append((4, reply))
                return
            data = data_of(reply.content)
            reply.content = record(data[:-1] if how == "cut" else bytes(LARGEST + 1))
            yield reply

    def _all_malformed(self) -> Iterator[Any]:
        while True:
            yield lambda data: ("garbage", record(hashlib.sha512(data).digest() * 4))
            yield lambda data: ("cut", record(data[:-1]))
            yield lambda data: ("with more", record(data + b"\0"))
            yield lambda data: ("another record", RecordDict({"other": ConfigRecord({"parcel": data})}))
            yield lambda data: ("another type", record(data))
            yield lambda data: ("huge garbage", record(b"\xff" * HUGE))
            yield lambda data: ("huge ask", record(encode([Ask("train", {"round": 1, "shared": bytes(HUGE)})])))
            yield lambda data: ("unknown ask", record(encode([Ask("everything", {"round": 1})])))

    def _note(self, attack: str, place: int, asks: tuple[Ask, ...], reply: Message) -> None:
        word: dict[str, Any] = {"attack": attack, "place": place, "asks": [[a.kind, _round_of(a)] for a in asks]}
        if reply.has_error():
            word |= {"code": reply.error.code, "error": reply.error.reason}
        else:
            answers = decode_answers(data_of(reply.content), LARGEST)
            word["answers"] = {a.ask: [a.refused, hashlib.sha256(encode([a])).hexdigest()] for a in answers}
            word["reasons"] = [reason for a in answers if (reason := a.fields.get("reasons"))]
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(word) + "\n")


def _round_of(ask: Ask) -> int:
    return int(ask.fields.get("round", 0))


def _round(message: Message) -> int:
    return max(_round_of(ask) for ask in decode_asks(data_of(message.content), LARGEST))
