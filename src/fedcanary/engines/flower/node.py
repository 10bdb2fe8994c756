"""What a client does with what it is asked: the far end of the wire, without the transport.

    kind     fields of the ask                       fields of the answer
    hello                                            client, contract, model, version
    keys     round, sum, cohort                      message: Advert
    share    round, sum, message: Roster             message: Shares
    train    round, request, shared, line, clip?     vector; with sum and message (Delivery), message: MaskedInput
    agree    round, sum, message: Survivors          message: Agreement
    unmask   round, sum, message: Agreements         message: Unmasking

`sum` names one secure sum of one round and never comes twice. Instead of these fields a client that does not agree to a
request says `reasons`, words of its contract; whatever else goes wrong is one word of refusal, and never an exception's
text.

What a client measured in a round is sealed once, and leaves it once: masked in one secure sum, and in no other. So no
two sums of a round have a client in common, and their difference tells no more than they do. Were it enough not to
help twice with unmasking, half of a large cohort could open a sum with some client in it, and the other half the same
sum without. Rounds do not go back, so what is forgotten with a round is never needed to know that it is over.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcanary import __version__
from fedcanary.engines.flower.certificates import REGISTRY, load_identity, load_registry
from fedcanary.engines.flower.journal import Entry, Journal
from fedcanary.engines.flower.wire import LARGEST, Answer, Ask, Value, decode_answers, encode
from fedcanary.engines.places import place
from fedcanary.privacy import secagg
from fedcanary.privacy.contract import Reason, Request
from fedcanary.privacy.seal import Sealed, floor, masking
from fedcanary.privacy.secagg.messages import Agreements, Delivery, Message, Roster, Survivors, decode

if TYPE_CHECKING:
    from fedcanary.engines.local import LocalClients
    from fedcanary.engines.setup import Setup

HELLO, KEYS, SHARE, TRAIN, AGREE, UNMASK = "hello", "keys", "share", "train", "agree", "unmask"
JOURNAL, ERRORS = "journal.sqlite", "errors.log"
ANSWER, SESSION, BEGUN, SEALED = "answer", "session", "begun", "sealed"  # kinds of entries in it
GIVEN: Final = b"given"  # in place of a sealed vector that has left
FAILED, NO_JOURNAL = "failed", "no_journal"
# every word of refusal that a node of ours says, those of `secagg.Client` among them; a server repeats no others
WORDS: Final = frozenset(
    {
        *(FAILED, NO_JOURNAL, "malformed", "unknown_kind", "unknown_sum", "wrong_cohort", "wrong_round", "wrong_step"),
        *("bad_advert", "bad_key", "bad_roster", "bad_signature", "bad_state", "bad_survivors", "no_agreement"),
        *("overflow", "too_few_neighbours", "too_few_survivors", "already_answered"),
    }
)

Fields = Mapping[str, Value]
Said = tuple[Fields, list[Entry]]  # an answer, and what is kept with it
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Wrong(Exception):
    """An ask that cannot be answered; its one word of our own is all that is said of it, and what is kept with it."""

    def __init__(self, word: str, *kept: Entry) -> None:
        self.word, self.kept = word, kept
        super().__init__(word)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a study comes to for a client. Worked out once, as that takes a model and seconds."""

    contract: str
    model: str
    trust: str
    min_cohort: int
    dropouts: float
    rounds: int
    length: int  # of a sealed vector


class Host:
    """What the clients that one process plays have in common: the study, its parts, and a folder of their own."""

    def __init__(self, study: Path, folder: Path) -> None:
        self._study, self.folder = study, folder

    @cached_property
    def setup(self) -> Setup:
        """The study's parts."""
        from fedcanary import study
        from fedcanary.engines.setup import cache, prepare

        return prepare(study.load(self._study), cache())

    @cached_property
    def clients(self) -> LocalClients:
        """Those who train and answer, one at a time."""
        from fedcanary.engines.local import LocalClients
        from fedcanary.engines.stacking import Pace, Pacer

        Pacer.kept(self.folder / "engine.json", lambda: Pace(tokens=1024))
        return LocalClients(self.setup, self.folder / "clients")

    @cached_property
    def registry(self) -> secagg.Registry:
        """This side's own copy of the list of everybody's keys."""
        members = load_registry(self.folder / REGISTRY)
        return secagg.Registry(keys={client: member.key for client, member in members.items()})

    @cached_property
    def facts(self) -> Facts:
        """From the file where they were kept, if the study and this program are what they were."""
        from fedcanary.engines import privacy_terms
        from fedcanary.engines.consent import contract_of

        kind = " ".join([__version__, *(one.name for one in fields(Facts))])
        name = hashlib.blake2b(self._study.read_bytes() + kind.encode(), digest_size=8).hexdigest()
        file = self.folder / f"facts-{name}.json"
        if file.exists():
            return Facts(**json.loads(file.read_text("utf-8")))
        setup = self.setup
        contract = contract_of(setup)
        terms = privacy_terms.terms(setup.study, contract.min_cohort, setup.probes)
        shared = sum(tensor.numel() for tensor in setup.shared.values())
        facts = Facts(
            contract=contract.digest,
            model=contract.model,
            trust=contract.trust,
            min_cohort=contract.min_cohort,
            dropouts=contract.dropouts,
            rounds=contract.rounds,
            length=terms.length(privacy_terms.layout(setup), shared),
        )
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(asdict(facts)), "utf-8")
        draft.replace(file)
        return facts


@lru_cache(maxsize=2)
def host(study: Path, folder: Path) -> Host:
    """The host of a study and a folder; a process that plays many clients has one."""
    folder.mkdir(parents=True, exist_ok=True)
    return Host(study, folder)


class Node:
    """One client, with its identity's file. `answer` whatever comes, in any order and any number of times."""

    def __init__(self, host: Host, client: int, identity: Path) -> None:
        self._host, self._client, self._key = host, client, identity
        self._place = place(host.folder / "clients", client)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer to each; each is on the disk before it is returned, and is the same when the ask comes again."""
        try:
            with Journal(self._place / JOURNAL) as journal, journal.alone():
                return [self._answer(journal, ask) for ask in asks]
        except Exception:  # without a journal nothing is answered; what had been is there when it is asked again
            self._note()
            return [Answer(ask.id, {}, NO_JOURNAL) for ask in asks]

    def _answer(self, journal: Journal, ask: Ask) -> Answer:
        if known := journal.get(ANSWER, ask.id):
            return decode_answers(known, LARGEST)[0]
        try:
            if ask.kind == HELLO:
                return Answer(ask.id, self._hello())
            if ask.kind not in STEPS:
                raise Wrong("unknown_kind")
            round = _field(ask, "round", int)
            if not max(1, journal.latest() - 1) <= round <= self._host.facts.rounds:
                raise Wrong("wrong_round")  # agree of a round comes with keys of the next
            said, entries = STEPS[ask.kind](self, journal, ask, round)
            return self._kept(journal, Answer(ask.id, said), round, entries)
        except Wrong as wrong:
            answer = Answer(ask.id, {}, wrong.word)
            return self._kept(journal, answer, wrong.kept[0].round, wrong.kept) if wrong.kept else answer
        except secagg.Refusal as refusal:
            return Answer(ask.id, {}, refusal.reason)
        except sqlite3.Error:
            raise
        except Exception:  # whatever it says may hold what the client has: that stays here
            self._note()
            return Answer(ask.id, {}, FAILED)

    def _kept(self, journal: Journal, answer: Answer, round: int, entries: Sequence[Entry]) -> Answer:
        journal.put(*entries, Entry(ANSWER, answer.ask, round, encode([answer])))
        journal.forget(round - 1)
        return answer

    def _hello(self) -> dict[str, Value]:
        facts = self._host.facts
        return {"client": self._client, "contract": facts.contract, "model": facts.model, "version": __version__}

    def _identity(self) -> Ed25519PrivateKey:
        return load_identity(self._key)

    def _terms(self, sum: str, cohort: int) -> secagg.Terms:
        facts = self._host.facts
        return masking(
            sum,
            contract=facts.contract,
            registry=self._host.registry,
            length=facts.length,
            floor=floor(facts.min_cohort, facts.dropouts, cohort),
            dropouts=facts.dropouts,
        )

    def _note(self) -> None:
        """What went wrong, for who runs this client."""
        text = traceback.format_exc()
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            with open(self._place / ERRORS, "a", encoding="utf-8", opener=_private) as file:
                file.write(text)
        except OSError:
            print(text, file=sys.stderr)

    def _keys(self, journal: Journal, ask: Ask, round: int) -> Said:
        sum, cohort = _field(ask, "sum", str), _field(ask, "cohort", int)
        if journal.get(SESSION, sum) is not None:
            raise Wrong("wrong_step")
        one = secagg.Client(self._client, self._identity(), self._host.registry, self._terms(sum, cohort))
        return self._said(one, one.advertise, sum, round, cohort)

    def _share(self, journal: Journal, ask: Ask, round: int) -> Said:
        sum, one, cohort = self._session(journal, ask, round)
        return self._said(one, partial(one.share, _message(ask, Roster)), sum, round, cohort)

    def _agree(self, journal: Journal, ask: Ask, round: int) -> Said:
        sum, one, cohort = self._session(journal, ask, round)
        return self._said(one, partial(one.agree, _message(ask, Survivors)), sum, round, cohort)

    def _unmask(self, journal: Journal, ask: Ask, round: int) -> Said:
        sum, one, cohort = self._session(journal, ask, round)
        return self._said(one, partial(one.unmask, _message(ask, Agreements)), sum, round, cohort)

    def _train(self, journal: Journal, ask: Ask, round: int) -> Said:
        try:
            request = Request.model_validate_json(_field(ask, "request", str))
        except ValueError:
            raise Wrong("malformed") from None
        if request.round != round:
            raise Wrong("wrong_round")
        if not request.probes and self._host.facts.trust == "secure_aggregation":
            # Its zeros would come without noise, and no other client sees who was told to say nothing: a server that
            # tells all but one has that one's readings, with one share of the noise.
            return {"reasons": Reason.APART.value}, []
        asked = {name: value for name, value in ask.fields.items() if name not in ("sum", "message")}
        about = Ask(TRAIN, asked).id.encode()  # what is measured, whatever sum it goes into
        kept = journal.get(SEALED, str(round))
        if kept is not None and (kept[:32] != about or kept[32:] == GIVEN):
            return {"reasons": Reason.ANSWERED.value}, []
        given = Entry(SEALED, str(round), round, about + GIVEN)
        if kept is None:
            # Cut off in the middle, the ledger has paid and nothing has left: a journal that is lost cannot say so.
            self._host.clients.consent.silent = journal.get(BEGUN, str(round)) is not None
            journal.put(Entry(BEGUN, str(round), round, b""))
            vector, reasons = self._measured(request, ask)
            if vector is None:
                return {"reasons": ",".join(reasons)}, []
        else:
            vector = np.frombuffer(kept[32:], dtype=np.int64)
        if self._host.facts.trust != "secure_aggregation":
            return {"vector": vector.tobytes()}, [given]
        # a sum that ends before it is masked must not cost the client its round
        journal.put(Entry(SEALED, str(round), round, about + vector.tobytes()))
        sum, one, cohort = self._session(journal, ask, round)
        if cohort != request.cohort:
            raise Wrong("wrong_cohort")
        mask = partial(one.mask, _message(ask, Delivery), secagg.encode(vector, 64))
        said, entries = self._said(one, mask, sum, round, cohort)
        return said, [*entries, given]

    def _measured(self, request: Request, ask: Ask) -> tuple[Sealed | None, Sequence[str]]:
        """What the client seals for this request; or the reasons why it says nothing. Its ledger is charged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from fedcanary.engines import privacy_terms
        from fedcanary.engines.clients import Work

        clients, setup = self._host.clients, self._host.setup
        clip = _field(ask, "clip", float) if "clip" in ask.fields else None
        terms = privacy_terms.terms(setup.study, request.cohort, setup.probes, clip)
        try:
            line = [int(word) for word in _field(ask, "line", str).split(",") if word]
            shared = load(_field(ask, "shared", bytes))
        except (ValueError, SafetensorError):
            raise Wrong("malformed") from None
        asked = Work(request, [self._client], shared, terms, line)
        (sent,) = (sent for part in clients.work(asked) for sent in part)
        return sent.vector, sent.refused

    def _session(self, journal: Journal, ask: Ask, round: int) -> tuple[str, secagg.Client, int]:
        sum = _field(ask, "sum", str)
        kept = journal.get(SESSION, sum)
        if kept is None:
            raise Wrong("unknown_sum")
        cohort, begun = struct.unpack_from("<QQ", kept)
        if begun != round:
            raise Wrong("wrong_round")
        one = secagg.Client.from_bytes(kept[16:], self._identity(), self._host.registry, self._terms(sum, cohort))
        return sum, one, cohort

    def _said(self, one: secagg.Client, step: Callable[[], Message], sum: str, round: int, cohort: int) -> Said:
        """A step's answer, and the state that is kept with it; after a refusal too, for then none may follow."""

        def state() -> Entry:
            return Entry(SESSION, sum, round, struct.pack("<QQ", cohort, round) + one.to_bytes())

        try:
            return {"message": step().to_bytes()}, [state()]
        except secagg.Refusal as refusal:
            raise Wrong(refusal.reason, state()) from None


STEPS: Final[Mapping[str, Callable[[Node, Journal, Ask, int], Said]]] = {
    KEYS: Node._keys,
    SHARE: Node._share,
    TRAIN: Node._train,
    AGREE: Node._agree,
    UNMASK: Node._unmask,
}


def _field(ask: Ask, name: str, kind: type[T]) -> T:
    value = ask.fields.get(name)
    if type(value) is not kind:
        raise Wrong("malformed")
    return value


def _message(ask: Ask, kind: type[M]) -> M:
    message = decode(_field(ask, "message", bytes))
    if not isinstance(message, kind):
        raise Wrong("wrong_step")
    return message


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
