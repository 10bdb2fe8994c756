"""CPU time of secure aggregation, per client and at the server; writes benchmarks/secagg/README.md.

    OMP_NUM_THREADS=1 python benchmarks/secagg.py [--quick]

All figures are CPU time of one process on one core. `--quick` leaves out the rounds above 1,000 clients and writes
nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import cryptography
import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedcanary.privacy import secagg, shamir
from fedcanary.privacy.secagg import Client, Server, Step, Terms, crypto, messages
from fedcanary.privacy.secagg.session import Session, open_session

DEGREE = 30
TARGETS = {1_000: 2.0, 10_000: 4.0, 100_000: 30.0}  # milliseconds per client
SIZES = (100, 300, 1_000, 3_000, 10_000)
SMALL = 16  # coordinates where the number of clients is what is varied
MEASURED = 15  # clients whose time is taken
REPEATS = 3  # times that the server closes each step
CLOSE = dict(zip(Step, ("roster", "deliveries", "survivor_list", "agreements", "unmask"), strict=True))
NAMES = " | ".join(Step)
Times = dict[str, list[float]]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and its CPU time in milliseconds: no best of several, which would flatter it."""
    began = time.process_time()
    result = work()
    return result, 1000 * (time.process_time() - began)


def alone() -> None:
    """Forget what a client in a process of its own would not have seen."""
    crypto.verified.cache_clear()
    open_session.cache_clear()


def parties(n: int, length: int) -> tuple[Server, dict[int, Client]]:
    registry, identities = secagg.register(range(n))
    terms = Terms(round_id=f"{n}/{length}", contract=b"", registry=registry.digest, length=length, degree=DEGREE)
    return Server(terms, registry, range(n)), {i: Client(i, key, registry, terms) for i, key in identities.items()}


def client_times(n: int, length: int) -> Times:
    """Milliseconds of each part for the measured clients; their neighbours take part, the others only sign up."""
    server, clients = parties(n, length)
    assert all(server.collect(i, client.advertise()) for i, client in clients.items())
    rosters, session = server.roster(), server._session
    chosen = list(range(0, n, n // MEASURED))[:MEASURED]
    table: Times = {}
    shares = {}
    for i in sorted(set(chosen).union(*(session.neighbours(i) for i in chosen))):
        alone()
        shares[i], spent = timed(lambda i=i: clients[i].share(rosters[i]))
        if i in chosen:
            table.setdefault("share", []).append(spent)
    everybody = messages.pack_ids(range(n))
    statement = messages.statement(session.digest, everybody)
    committee = sorted(session.committee)[: session.quorum]
    signatures = tuple((i, clients[i]._identity.sign(statement)) for i in committee)
    agreements = messages.Agreements(session=session.digest, signatures=signatures)
    vector = np.arange(length, dtype=np.uint32)
    for i in chosen:
        alone()
        client, near = clients[i], session.neighbours(i)
        delivery = messages.Delivery(session=session.digest, sealed=tuple((j, dict(shares[j].sealed)[i]) for j in near))
        acks = tuple((j, client._channels[j].hear) for j in near)
        survivors = messages.Survivors(session=session.digest, ids=everybody, acks=acks)
        keys: list[tuple[bytes, int]] = []
        works: Mapping[str, Callable[[], Any]] = {
            "mask": lambda c=client, d=delivery: c.mask(d, vector),
            "agree": lambda c=client, s=survivors: c.agree(s),
            "unmask": lambda c=client: c.unmask(agreements),
            "advertise": lambda c=client: Client(c.client, c._identity, c._registry, c._terms).advertise(),
            "key agreement": lambda c=client: list(c._pads()),
            "streams": lambda k=keys: crypto.add_pads(vector.copy(), k),
            "share making": client._make_shares,
        }
        for name, work in works.items():
            result, spent = timed(work)
            table.setdefault(name, []).append(spent)
            if name == "key agreement":
                keys += result

    def added(names: Iterable[str]) -> list[float]:
        return [sum(values) for values in zip(*(table[name] for name in names), strict=True)]

    table["masking"] = added(("key agreement", "streams", "share making"))
    table["all steps"] = added(Step)
    return table


def closed(server: Server, step: Step, answers: Mapping[int, Any]) -> tuple[Server, Any, list[float]]:
    """The server after a step, what it answers, and the CPU seconds of each repetition from the same state."""
    times = []
    for _ in range(REPEATS):
        at = copy.copy(server)
        at._answers, at.refused = {}, Counter()
        if step is Step.UNMASK:
            at._total = at._total.copy()  # which the step changes
        crypto.verified.cache_clear()

        def work(at: Server = at) -> Any:
            assert all(at.collect(i, message) for i, message in answers.items())
            return getattr(at, CLOSE[step])()

        result, spent = timed(work)
        times.append(spent / 1000)
    return at, result, times


def server_times(n: int) -> dict[str, Times]:
    """CPU seconds of the server by step, for a round without dropouts and for one with them.

    Every client really takes part. Both rounds share the first two steps; a signature that the server has verified is
    not verified again by the clients, whose time is not taken here.
    """
    server, clients = parties(n, SMALL)
    common: Times = {}
    adverts = {i: client.advertise() for i, client in clients.items()}
    server, rosters, common["advertise"] = closed(server, Step.ADVERTISE, adverts)
    shares = {i: clients[i].share(roster) for i, roster in rosters.items()}
    server, deliveries, common["share"] = closed(server, Step.SHARE, shares)
    vector = np.arange(SMALL, dtype=np.uint32)
    inputs = {i: clients[i].mask(delivery, vector) for i, delivery in deliveries.items()}
    tables = {}
    for name, gone in (("nobody", 0), ("15% before masking, 15% before unmasking", (15 * n) // 100)):
        table = dict(common)
        mine = {i: copy.copy(client) for i, client in clients.items()}
        left = {i: message for i, message in inputs.items() if (7 * i) % n >= gone}
        at, survivors, table["mask"] = closed(server, Step.MASK, left)
        signed = {i: mine[i].agree(message) for i, message in survivors.items()}
        at, agreements, table["agree"] = closed(at, Step.AGREE, signed)
        last = {i: mine[i].unmask(agreements[i]) for i in agreements if not gone <= (7 * i) % n < 2 * gone}
        at, total, table["unmask"] = closed(at, Step.UNMASK, last)
        assert np.array_equal(total, vector * len(left))
        table["all steps"] = [sum(values) for values in zip(*table.values(), strict=True)]
        tables[name] = table
    return tables


def ways(runs: int = 50) -> list[tuple[str, float]]:
    """Milliseconds of what was tried to make a client cheaper: medians."""
    seed, pad, content = bytes(16), bytearray(400_015), bytes(150)
    zeros = bytes(400_000)
    signer, key = Ed25519PrivateKey.generate(), crypto.mask_secret(bytes(16), b"")
    public, peer, signature = (
        signer.public_key().public_bytes_raw(),
        crypto.PROBE.public_key().public_bytes_raw(),
        signer.sign(content),
    )

    def stream(cipher: Any) -> Callable[[], Any]:
        return lambda: [Cipher(*cipher()).encryptor().update_into(zeros, pad) for _ in range(31)]

    works: dict[str, Callable[[], Any]] = {
        "shares: two splits by pycryptodome, 7 of 30": lambda: [Shamir.split(7, 30, seed) for _ in range(2)],
        "shares: the same polynomials on integers (taken)": lambda: [shamir.share(seed, 7, 30) for _ in range(2)],
        "streams: 31 of ChaCha20, 10^5 coordinates": stream(lambda: (algorithms.ChaCha20(bytes(32), bytes(16)), None)),
        "streams: 31 of AES-256-CTR (taken)": stream(lambda: (algorithms.AES(bytes(32)), crypto.modes.CTR(bytes(16)))),
        "adverts: 30 signatures verified (taken)": lambda: [
            crypto.verified.__wrapped__(public, signature, content) for _ in range(30)
        ],
        "adverts: 30 exchanges with registered X25519 keys instead": lambda: [
            crypto.exchange(key, peer) for _ in range(30)
        ],
        "survivors: 71 signatures of the committee verified (taken)": lambda: [
            crypto.verified.__wrapped__(public, signature, content) for _ in range(71)
        ],
    }
    return [(name, median(timed(work)[1] for _ in range(runs))) for name, work in works.items()]


def session_of(n: int, degree: int, tolerated: float) -> Session:
    terms = Terms(round_id="", contract=b"", registry=b"", length=1, degree=degree, tolerated=tolerated)
    return open_session(terms, messages.pack_ids(range(n)))


def cell(values: list[float], digits: int = 2) -> str:
    low, high = np.quantile(values, [0.1, 0.9])
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rows(lines: Iterable[Iterable[Any]]) -> list[str]:
    """A table: its first line is the head."""
    text = ["| " + " | ".join(str(item) for item in line) + " |" for line in lines]
    return [text[0], "|---" * (text[0].count("|") - 1) + "|", *text[1:], ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    began = time.monotonic()
    sizes = [n for n in SIZES if n <= 1_000 or not quick]
    lengths = {(n, length): client_times(n, length) for n in (100, 1_000) for length in TARGETS}
    growth = {n: client_times(n, SMALL) for n in sizes}
    servers = {n: server_times(n) for n in sizes}
    parts = ("key agreement", "streams", "share making")

    def verdict(values: list[float], length: int) -> str:
        return f"{TARGETS[length]:.0f}: {'met' if median(values) <= TARGETS[length] else 'missed'}"

    fits = []
    for name in servers[sizes[0]]:
        seconds = [median(servers[n][name]["all steps"]) for n in sizes]
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        fits.append(f"- {name}: seconds grow with clients to the power {slope:.2f} (least squares on logarithms)")
    sessions = [
        (n, degree, share, session_of(n, degree, share))
        for n in (64, 100, 1_000, 10_000)
        for degree, share in ((30, 0.3), (30, 0.1), (60, 0.3), (100, 0.3))
        if degree < (n - 1) // 2 * 2 and (n > 64 or degree == 30)
    ]
    page = "\n".join(
        [
            "# Secure aggregation: CPU time",
            "",
            f"Written by `benchmarks/secagg.py` on {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, cryptography {cryptography.__version__}. CPU time of one process; 32-bit "
            f"entries; {DEGREE} neighbours. Per client: median (10th to 90th percentile) of {MEASURED} clients.",
            "",
            "## One client: what masking costs",
            "",
            "Milliseconds. Key agreement is 30 X25519 and 31 HKDF; streams are 31 pads of AES-256-CTR added in place;",
            "share making is two Shamir splits. The target is held against the median of the sum.",
            "",
            *rows(
                [("clients", "coordinates", *parts, "**masking**", "target")]
                + [
                    (
                        *(f"{n:,}", f"{m:,}", *(cell(t[p]) for p in parts)),
                        *(f"**{cell(t['masking'])}**", verdict(t["masking"], m)),
                    )
                    for (n, m), t in lengths.items()
                ]
            ),
            "## One client: all of the protocol",
            "",
            f"Milliseconds. `share` verifies {DEGREE} signed adverts and agrees on {DEGREE} sealing keys, `unmask`",
            "verifies the committee's signatures, so that no server can invent clients or show them different",
            "survivors; nothing is cached between clients here.",
            "",
            *rows(
                [("clients", "coordinates", NAMES, "all steps", "against the target")]
                + [
                    (f"{n:,}", f"{m:,}", *(cell(t[s]) for s in (*Step, "all steps")), verdict(t["all steps"], m))
                    for (n, m), t in lengths.items()
                ]
            ),
            "## What was tried",
            "",
            "Milliseconds of CPU, medians of 50 runs.",
            "",
            *rows([("way", "ms"), *((name, f"{value:.2f}") for name, value in ways())]),
            "Registered X25519 keys would let neighbours authenticate each other without signatures, but leave nothing",
            "that the server could check, so that anybody could end a round. A committee of 64 would halve its part,",
            "but 30% dropouts would then leave no quorum above one half, and two sets of survivors could both get one.",
            "",
            "## One client as the round grows",
            "",
            f"Milliseconds at {SMALL} coordinates. Each client works out the whole graph's order, which grows with the",
            "round. Only the measured clients and their neighbours take part in all steps.",
            "",
            *rows(
                [("clients", "masking", NAMES, "all steps")]
                + [(f"{n:,}", *(cell(t[s]) for s in ("masking", *Step, "all steps"))) for n, t in growth.items()]
            ),
            "## The server",
            "",
            f"Seconds at {SMALL} coordinates; every client really takes part. Each step is closed {REPEATS} times from",
            "the same state; median, and for all steps the 10th to 90th percentile. Messages are passed without",
            "serialization.",
            "",
            *rows(
                [("clients", "dropouts", NAMES, "all steps", "ms per client")]
                + [
                    (
                        *(f"{n:,}", name, *(f"{median(t[s]):.3f}" for s in Step)),
                        *(cell(t["all steps"], 3), f"{1000 * median(t['all steps']) / n:.2f}"),
                    )
                    for n, tables in servers.items()
                    for name, t in tables.items()
                ]
            ),
            *fits,
            "",
            "## Thresholds, and how many clients may collude with the server",
            "",
            "Calculated, not measured. The last column holds for whichever colluding clients and whichever roster the",
            "server picks: one fewer than recover a secret, and too few to sign two sets of survivors.",
            "",
            *rows(
                [
                    (
                        *("clients", "neighbours", "tolerated dropouts", "shares needed"),
                        *("neighbours that must be left", "signatures needed", "colluding clients withstood"),
                    )
                ]
                + [
                    (
                        *(f"{n:,}", len(s.offsets), f"{share:.0%}", s.threshold, s.near),
                        *(f"{s.quorum} of {len(s.committee)}",),
                        min(s.threshold - 1, 2 * s.quorum - len(s.committee) - 1),
                    )
                    for n, degree, share, s in sessions
                ]
            ),
        ]
    )
    print(page)
    print(f"{time.monotonic() - began:.0f} s of wall time, {time.process_time():.0f} s of CPU time")
    if not quick:
        folder = Path(__file__).parent / "secagg"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
