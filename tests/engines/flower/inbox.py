"""Everything that a server ever gets of its nodes, held against the table of what they may say (`node.py`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from rough import FIRST, Rough

from fedcanary.engines.flower.clients import QUERY
from fedcanary.engines.flower.node import AGREE, HELLO, KEYS, SHARE, TRAIN, UNMASK, WORDS
from fedcanary.engines.flower.wire import Answer, Ask, data_of, decode_answers, decode_asks, encode
from fedcanary.privacy import shamir
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.secagg.messages import Advert, Agreement, MaskedInput, Shares, Unmasking, decode
from fedcanary.privacy.secagg.server import SEALED

SAYS = {KEYS: Advert, SHARE: Shares, TRAIN: MaskedInput, AGREE: Agreement, UNMASK: Unmasking}
SIGNATURE = 64


class Inbox:
    """A run under secure aggregation, with all that was asked and all that came back.

    `wrong` lists, in words, what came and is not in the table; `random` are the bytes that must look it, by field.
    """

    def __init__(self, far: Rough) -> None:
        self.far, self.contract = far, far.host.facts
        self.asks: dict[str, Ask] = {}
        self.sent: Counter[tuple[int, str]] = Counter()  # bytes of asks, by round and kind
        self.got: Counter[tuple[int, str]] = Counter()
        self.random: dict[str, list[bytes]] = defaultdict(list)
        self.wrong: list[str] = []
        self.raw: list[bytes] = []
        far.grid._faults = self._asked
        far.grid.inbox = []

    def _asked(self, message: Message) -> None:
        for ask in decode_asks(data_of(message.content), 1 << 28):
            self.asks[ask.id] = ask
            self.sent[int(ask.fields.get("round", 0)), ask.kind] += len(encode([ask])) - 3

    def look(self) -> list[str]:
        """Go through all replies."""
        for reply in self.far.grid.inbox:
            self.wrong += self._reply(reply)
        return self.wrong

    def _reply(self, reply: Message) -> Iterator[str]:
        client = reply.metadata.src_node_id - FIRST
        if reply.metadata.message_type not in ("train", QUERY):
            yield f"a message of type {reply.metadata.message_type}"
        if reply.has_error():
            yield f"an error that says {reply.error.reason}"
            return
        content = reply.content
        if list(content) != ["fedcanary"] or not isinstance(content["fedcanary"], ConfigRecord):
            yield f"records {list(content)}"
            return
        if list(content["fedcanary"]) != ["parcel"]:
            yield f"entries {list(content['fedcanary'])}"
        data = data_of(content)
        self.raw.append(data)
        for answer in decode_answers(data, 1 << 28):
            ask = self.asks.get(answer.ask)
            if ask is None:
                yield "an answer to nothing"
                continue
            self.got[int(ask.fields.get("round", 0)), ask.kind] += len(encode([answer])) - 3
            yield from self._answer(client, ask, answer)

    def _answer(self, client: int, ask: Ask, answer: Answer) -> Iterator[str]:
        fields: dict[str, Any] = dict(answer.fields)
        if answer.refused:
            if answer.refused not in WORDS:
                yield f"the word {answer.refused}"
        elif ask.kind == HELLO:
            facts = self.contract
            known = {
                "client": client,
                "contract": facts.contract,
                "model": facts.model,
                "version": fields.get("version"),
            }
            if fields != known or type(fields["client"]) is not int or fields["version"] not in ("0.1.0", _version()):
                yield f"hello with {sorted(fields)}"
        elif set(fields) == {"reasons"}:
            if not set(str(fields["reasons"]).split(",")) <= {"", *(reason.value for reason in Reason)}:
                yield "reasons that are not words of the contract"
        elif set(fields) != {"message"}:
            yield f"fields {sorted(fields)} to {ask.kind}"
        else:
            yield from self._message(client, ask, decode(fields["message"]))

    def _message(self, client: int, ask: Ask, message: Any) -> Iterator[str]:
        """Its fields have one length each, and one value each but for those that are random."""
        if type(message) is not SAYS[ask.kind] or message.client != client:
            yield f"a message that is no answer to {ask.kind}"
            return
        others = range(len(self.far.setup.population))
        rows: Sequence[tuple[int, bytes]] = ()
        if isinstance(message, Advert):
            sizes = {"mask_key": 32, "seal_key": 32, "commitment": 32, "signature": SIGNATURE}
        elif isinstance(message, Shares):
            sizes, rows, size = {}, message.sealed, SEALED
        elif isinstance(message, MaskedInput):
            sizes, rows, size = {"values": 8 * self.contract.length}, message.acks, shamir.SEED
        elif isinstance(message, Agreement):
            sizes = {"signature": SIGNATURE}
        else:
            sizes, rows, size = {"seed": shamir.SEED}, message.shares, shamir.SEED
        for name, length in sizes.items():
            content = getattr(message, name)
            self.random[f"{ask.kind} {name}"].append(content)
            if len(content) != length:
                yield f"{ask.kind} {name} of {len(content)} bytes"
        for peer, content in rows:
            self.random[f"{ask.kind} rows"].append(content)
            if len(content) != size or peer not in others or peer == client:
                yield f"a row of {ask.kind} for {peer} of {len(content)} bytes"

    def chi_square(self) -> dict[str, float]:
        """For each kind of random field, the probability that uniform bytes are as uneven as these or more."""
        from scipy.stats import chi2

        found = {}
        for name, parts in self.random.items():
            # the same row may come twice, as the answer to both messages of one that was asked again
            counts = np.bincount(np.frombuffer(b"".join(dict.fromkeys(parts)), dtype=np.uint8), minlength=256)
            expected = counts.sum() / 256
            if expected >= 5:
                found[name] = float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 255))
        return found


def _version() -> str:
    from fedcanary import __version__

    return __version__
