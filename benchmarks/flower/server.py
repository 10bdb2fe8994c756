"""What a client's round costs the server's own code, by how many there are; prints two tables.

    OMP_NUM_THREADS=1 python benchmarks/flower/server.py [--clients 100 300 1000 3000]

The whole of `pipeline.run` over messages, of the demonstration's study under secure aggregation: wire, journal, the
secure sum, noise, ledger, tests, record. Its clients speak the real protocol, measure nothing, and keep their state in
memory; their own CPU time is taken off. A round's time is the later ones', with all that a first one loads done.

The second table puts the pieces together for 10,000 and 1,000,000 clients: this one's, and what benchmarks/flower/
superlink.py and messages.py measured (their figures are this program's options).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedcanary import __version__, pipeline, study
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines import privacy_terms
from fedcanary.engines.clients import Clients
from fedcanary.engines.consent import Consent
from fedcanary.engines.flower.clients import JOURNAL, FlowerClients
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import InProcessGrid
from fedcanary.engines.flower.node import AGREE, HELLO, KEYS, SHARE, TRAIN, UNMASK
from fedcanary.engines.flower.wire import Answer, Ask, Value, data_of, decode_asks, encode, record
from fedcanary.engines.setup import Setup, cache, prepare
from fedcanary.privacy import secagg
from fedcanary.privacy.contract import Request
from fedcanary.privacy.seal import BITS, floor, masking, seal
from fedcanary.privacy.seal import Message as Said
from fedcanary.privacy.secagg.messages import Agreements, Delivery, Roster, Survivors, decode

ROUNDS = 3
FIRST = 100  # node ids are client numbers and this
LARGEST = 1 << 28
CORE_HOUR = 3600


class Crowd:
    """Every client of a study, in one process and in memory."""

    def __init__(self, setup: Setup) -> None:
        self.count, self._setup = len(setup.population), setup
        self.registry, self._keys = secagg.register(range(self.count))
        self._consent = Consent(setup, lambda client: Path())
        terms = privacy_terms.terms(setup.study, privacy_terms.panel_size(setup.study, self.count), setup.probes)
        shared = sum(tensor.numel() for tensor in setup.shared.values())
        layout = privacy_terms.layout(setup)
        readings = {probe: np.array([(c.low + c.high) / 2 for c in coords]) for probe, coords in layout.items()}
        said = seal(Said(readings=readings, update=np.append(np.zeros(shared), 1.0)), layout, terms, 1, 0)
        self._length, self._vector = len(said), secagg.encode(said, BITS)
        self._sums: dict[tuple[int, str], secagg.Client] = {}
        self.spent = 0.0
        self.app = ClientApp()
        self.app.train()(self._heard)
        self.app.query("fedcanary")(self._heard)

    def _heard(self, message: Message, context: Context) -> Message:
        began, client = time.process_time(), int(context.node_config["client"])
        asks = decode_asks(data_of(message.content), LARGEST)
        parcel = record(encode([Answer(ask.id, self._said(client, ask)) for ask in asks]))
        self.spent += time.process_time() - began
        return Message(parcel, reply_to=message)

    def _said(self, client: int, ask: Ask) -> dict[str, Value]:
        if ask.kind == HELLO:
            contract = self._consent.contract
            facts = {"contract": contract.digest, "model": contract.model, "version": __version__}
            return {"client": client, **facts}
        name, body = str(ask.fields["sum"]), ask.fields.get("message", b"")
        if ask.kind == KEYS:
            terms = self._terms(name, int(ask.fields["cohort"]))  # type: ignore[arg-type]  # our own server's
            self._sums[client, name] = secagg.Client(client, self._keys[client], self.registry, terms)
            return {"message": self._sums[client, name].advertise().to_bytes()}
        one, heard = self._sums[client, name], decode(body)  # type: ignore[arg-type]  # as above
        if ask.kind == SHARE and isinstance(heard, Roster):
            return {"message": one.share(heard).to_bytes()}
        if ask.kind == TRAIN and isinstance(heard, Delivery):
            Request.model_validate_json(str(ask.fields["request"]))
            return {"message": one.mask(heard, self._vector).to_bytes()}
        if ask.kind == AGREE and isinstance(heard, Survivors):
            return {"message": one.agree(heard).to_bytes()}
        assert ask.kind == UNMASK and isinstance(heard, Agreements)
        return {"message": self._sums.pop((client, name)).unmask(heard).to_bytes()}

    def _terms(self, name: str, cohort: int) -> secagg.Terms:
        privacy = self._setup.study.privacy
        return masking(
            name,
            contract=self._consent.contract.digest,
            registry=self.registry,
            length=self._length,
            floor=floor(privacy.min_cohort, privacy.dropouts, cohort),
            dropouts=privacy.dropouts,
        )


def measure(count: int) -> tuple[float, float, float, int]:
    """CPU ms of the server for a client's round, the client's own, KiB of journal a client, exchanges a round."""
    words = [f"clients.count={count}", f"rounds={ROUNDS}", "privacy.panel=same", "privacy.min_cohort=4"]
    setup = prepare(study.load(DEMONSTRATION, words), cache())
    crowd = Crowd(setup)
    grid = InProcessGrid({FIRST + client: {"client": client} for client in range(count)}, crowd.app)
    times: list[tuple[float, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        link = Link(grid, poll=0.0)
        clients: Clients = FlowerClients(setup, Path(folder), link, crowd.registry)

        def watch(progress: pipeline.Progress) -> None:
            if progress.verdict is not None:
                times.append((time.process_time(), crowd.spent, link.exchanges))

        released = pipeline.run(setup, Path(folder), clients=clients, watch=watch).releases()
        kib = sum(file.stat().st_size for file in Path(folder).glob(f"{JOURNAL}*")) / 1024
    if [round["utility"].count for round in released.values()] != [count] * ROUNDS:
        raise SystemExit("somebody was left out")
    rounds = np.diff(np.array(times), axis=0)
    spent = median(whole - theirs for whole, theirs, _ in rounds)
    return 1000 * spent / count, 1000 * median(rounds[:, 1]) / count, kib / count, int(max(rounds[:, 2]))


def pieces(server: float, kib: float, link: float, app: float, poll: float, down: int, up: int) -> None:
    """What a round comes to for many clients, if all grows as measured."""
    print("| of a round with | 10,000 clients | 1,000,000 clients |\n| :-- | --: | --: |")
    each = {
        "server's own code, core hours": server / 1000 / CORE_HOUR,
        "ServerApp's messages, core hours": 3 * app / 1000 / CORE_HOUR,
        "SuperLink's messages, core hours": 3 * link / 1000 / CORE_HOUR,
    }
    for name, cost in each.items():
        print(f"| {name} | {1e4 * cost:,.1f} | {1e6 * cost:,.0f} |")
    print(f"| SuperLink, cores that only answer polls | {1e4 * poll / 3000:,.0f} | {1e6 * poll / 3000:,.0f} |")
    print(f"| server's journal, GB | {1e4 * kib / 1e6:,.1f} | {1e6 * kib / 1e6:,.0f} |")
    print(f"| traffic, GB | {1e4 * (down + up) / 1e9:,.1f} | {1e6 * (down + up) / 1e9:,.0f} |")


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 300, 1000, 3000])
    for name, what in (("link", "SuperLink, ms a message"), ("app", "ServerApp, ms a message"), ("poll", "ms a poll")):
        parser.add_argument(f"--{name}", type=float, help=what)
    for name in ("down", "up"):
        parser.add_argument(f"--{name}", type=int, help="bytes to or from a client in a round")
    chosen = parser.parse_args(given)
    print("| clients | server, ms a client | a client, ms | journal, KiB a client | exchanges a round |")
    print("| --: | --: | --: | --: | --: |")
    for count in chosen.clients:
        server, client, kib, exchanges = measure(count)
        print(f"| {count:,} | {server:.1f} | {client:.1f} | {kib:.0f} | {exchanges} |", flush=True)
    rest = (chosen.link, chosen.app, chosen.poll, chosen.down, chosen.up)
    if None not in rest:
        print()
        pieces(server, kib, *rest)


if __name__ == "__main__":
    main()
