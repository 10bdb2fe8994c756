"""Bytes of a round's messages on Flower under secure aggregation, by step; prints a table.

    OMP_NUM_THREADS=1 python benchmarks/flower/messages.py [--clients 10 64 200] [--length N --shared N]

One round of made-up clients through the protocol itself, with vectors as long as the demonstration's (which takes its
model, and seconds) or `--length` entries, `--shared` of them trained. Counted are parcels as `wire.py` spells them;
what Flower and TLS add is not.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import median

import numpy as np
import torch
from safetensors.torch import save

from fedcanary import study
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines import privacy_terms
from fedcanary.engines.flower.node import AGREE, KEYS, SHARE, TRAIN, UNMASK
from fedcanary.engines.flower.wire import Answer, Ask, Value, encode
from fedcanary.engines.setup import cache, prepare
from fedcanary.privacy import secagg
from fedcanary.privacy.contract import Request
from fedcanary.privacy.seal import BITS, floor, masking
from fedcanary.privacy.secagg.messages import Message

STEPS = {
    KEYS: "keys, with agree of the round before",
    SHARE: "shares, with unmask of the round before",
    TRAIN: "training, masked input",
    AGREE: "survivors, agreement",
    UNMASK: "signatures, unmasking",
}
NAME = f"{'0' * 32} 1 {'0' * 16}"  # a sum's, as long as any
Sizes = dict[str, list[tuple[int, int]]]  # bytes down and up, of each client, by step


def demonstration() -> tuple[int, int]:
    """Entries of a sealed vector, and how many of them are trained."""
    setup = prepare(study.load(DEMONSTRATION, []), cache())
    shared = sum(tensor.numel() for tensor in setup.shared.values())
    terms = privacy_terms.terms(setup.study, privacy_terms.panel_size(setup.study, len(setup.population)), setup.probes)
    return terms.length(privacy_terms.layout(setup), shared), shared


def one_round(count: int, length: int, shared: int) -> Sizes:
    """A round of so many clients, all of whom answer."""
    registry, identities = secagg.register(range(count))
    terms = masking(NAME, contract="0" * 64, registry=registry, length=length, floor=floor(4, 0.3, count), dropouts=0.3)
    server = secagg.Server(terms, registry, range(count))
    clients = {c: secagg.Client(c, key, registry, terms) for c, key in identities.items()}
    vector = secagg.encode(np.zeros(length, dtype=np.int64), BITS)
    request = Request(contract="0" * 64, round=1, probes=("drift", "fit", "fairness"), update=True, cohort=count)
    training: dict[str, Value] = {
        "request": request.model_dump_json(),
        "shared": save({"shared": torch.zeros(shared)}),
        "line": "0",
    }
    sizes: Sizes = defaultdict(list)

    def step(kind: str, client: int, down: Message | None, up: Message, **more: Value) -> None:
        fields: dict[str, Value] = {"round": 1, "sum": NAME, **more}
        ask = Ask(kind, fields if down is None else {**fields, "message": down.to_bytes()})
        answer = Answer(ask.id, {"message": up.to_bytes()})
        sizes[kind].append((len(encode([ask])), len(encode([answer]))))
        if not server.collect(client, up):
            raise SystemExit(f"client {client} was refused at {kind}")

    for c, client in clients.items():
        step(KEYS, c, None, client.advertise(), cohort=count)
    for c, roster in server.roster().items():
        step(SHARE, c, roster, clients[c].share(roster))
    for c, delivery in server.deliveries().items():
        step(TRAIN, c, delivery, clients[c].mask(delivery, vector), **training)
    for c, survivors in server.survivor_list().items():
        step(AGREE, c, survivors, clients[c].agree(survivors))
    for c, agreements in server.agreements().items():
        step(UNMASK, c, agreements, clients[c].unmask(agreements))
    if server.unmask().any():
        raise SystemExit("the sum of zeros is not zero")
    return sizes


def table(count: int, sizes: Sizes) -> str:
    """Per client, the median; at the server, the sum over all."""
    lines = []
    for kind, words in STEPS.items():
        down, up = (np.array(column) for column in zip(*sizes[kind], strict=True))
        lines.append(f"| {count} | {words} | {median(down):,.0f} | {median(up):,.0f} | {down.sum() + up.sum():,} |")
    every = [np.array(sizes[kind]) for kind in STEPS]
    down, up = np.median([sum(e[k] for e in every) for k in range(count)], axis=0)
    lines.append(f"| {count} | **a round** | **{down:,.0f}** | **{up:,.0f}** | **{sum(e.sum() for e in every):,}** |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 64, 200])
    parser.add_argument("--length", type=int)
    parser.add_argument("--shared", type=int)
    chosen = parser.parse_args()
    given = chosen.length is not None and chosen.shared is not None
    length, shared = (chosen.length, chosen.shared) if given else demonstration()
    print(f"{length:,} entries of 8 bytes in a sealed vector, {shared:,} of them trained\n")
    print("| clients | step | to a client, bytes | from it, bytes | all, both ways |\n| --: | :-- | --: | --: | --: |")
    for count in chosen.clients:
        print(table(count, one_round(count, length, shared)))


if __name__ == "__main__":
    main()
