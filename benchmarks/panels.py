"""What a round of up to a million clients costs from their readings to the verdict; writes benchmarks/panels/README.md.

    OMP_NUM_THREADS=1 python benchmarks/panels.py [--quick]

Layout and tests are those of the bundled study: six modes and utility, 40 numbers sent. A made-up probe brings them to
64 or 256; 16 are three modes, utility and three made-up numbers. Readings are drawn from 20,000 clients made up as in
planner.py. Each figure comes from a process of its own. `--quick` does one small run of each and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedcanary.monitor import base as monitor
from fedcanary.monitor.verdict import judge
from fedcanary.privacy import noise, release, secagg
from fedcanary.privacy.accounting import gaussian_std
from fedcanary.privacy.release import Gate
from fedcanary.privacy.seal import Message, Terms, seal, seal_all
from fedcanary.rng import stream
from fedcanary.types import Coord, Mode

HERE = Path(__file__).parent
MILLION = 1_000_000
NUMBERS = 65_536  # of the clients whose readings are in memory together: 1,024 clients with 64 coordinates
POOL = 20_000
EPSILON, DELTA = 4.0, 1e-6
TRUSTS = ("none", "central", "local", "secure_aggregation")
THREE = ("utility", Mode.AMPLIFIED_BIAS, Mode.CONFIDENCE_MISCALIBRATION, Mode.FAIRNESS_COLLAPSE)
STAGES = ("seal", "gate", "close", "monitor")


@dataclass(frozen=True, kw_only=True)
class World:
    """A layout of some width, the tests over it, and (POOL, K_p) readings by probe."""

    layout: Mapping[str, tuple[Coord, ...]]
    plan: monitor.Plan
    pool: Mapping[str, np.ndarray]


def sent(layout: Mapping[str, Iterable[Coord]]) -> int:
    return sum(c.scale is not None for coords in layout.values() for c in coords)


def world() -> World:
    """The bundled study's, as wide as it is."""
    from planner import Federation

    from fedcanary import study as studies
    from fedcanary.cli_privacy import DEMONSTRATION
    from fedcanary.engines import privacy_terms
    from fedcanary.engines.local import LocalClients
    from fedcanary.engines.plan import plan_of
    from fedcanary.engines.setup import prepare
    from fedcanary.monitor.forecast import MEASURED

    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(studies.load(DEMONSTRATION), Path(folder) / "data")
        plan = plan_of(setup, LocalClients(setup, Path(folder) / "clients", None).base_answers)
    people, rng = Federation(MEASURED, seed=1), stream(1, "panels")
    pool = {probe.name: people._readings(rng, probe, None) for probe in setup.probes}
    return World(layout=privacy_terms.layout(setup), plan=plan, pool=pool)


def widened(bundled: World, width: int) -> World:
    """With made-up differences up to `width` numbers sent; of the three smallest modes alone where it has more."""
    kept = [name for name in bundled.layout if sent(bundled.layout) <= width or name in THREE]
    layout = {name: bundled.layout[name] for name in kept}
    one = Coord(name="", low=-0.25, high=0.25, purpose="width", scale=1.5)
    more = [replace(one, name=f"made up {k}") for k in range(width - sent(layout))]
    made_up = np.clip(stream(2, "panels").normal(0.0, 0.05, (POOL, len(more))), -0.25, 0.25)
    return World(
        layout={**layout, "made up": tuple(more)},
        plan=replace(bundled.plan, modes=tuple(m for m in bundled.plan.modes if m.mode in kept)),
        pool={**{name: bundled.pool[name] for name in kept}, "made up": made_up},
    )


def terms_of(trust: str, clients: int) -> Terms:
    if trust == "none":
        return Terms(trust="none")
    distance = 2.0 if trust == "local" else 1.0
    return Terms(
        trust=trust,
        noise_multiplier=gaussian_std(EPSILON, DELTA, distance),
        delta=DELTA,
        neighbours="substituted" if trust == "local" else "zeroed",
        floor=math.ceil(0.7 * clients),
        simulated=1,
    )


def unmasked(vectors: Mapping[int, np.ndarray], bits: int, *, before_unmasking: Callable[..., None], **_: Any) -> Any:
    """In the place of `secagg.aggregate`: the sum modulo 2^64, without the protocol around it."""
    before_unmasking(tuple(vectors))
    total = np.zeros(len(next(iter(vectors.values()))), dtype=np.uint64)
    for vector in vectors.values():
        total += vector.view(np.uint64)
    return SimpleNamespace(refused={}, survivors=tuple(vectors), signed=secagg.decode_signed(total, bits))


def peak() -> float:
    """MiB this process has had in memory at most; not `ru_maxrss`, in which a child begins with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def played(here: World, trust: str, clients: int, protocol: bool = False) -> dict[str, float]:
    """One round, chunk after chunk: CPU seconds of each stage, peak memory before and after, what came of it."""
    if not protocol:
        release.secagg.aggregate = unmasked  # type: ignore[assignment]
    before, spent, charges = peak(), dict.fromkeys((*STAGES, "made up"), 0.0), []
    rng, at = stream(3, "panels"), time.process_time()

    def lap(stage: str) -> None:
        nonlocal at
        now = time.process_time()
        spent[stage] += now - at
        at = now

    terms, chunk = terms_of(trust, clients), NUMBERS // sent(here.layout)
    lap("close")
    gate = Gate(1, here.layout, terms, charges.append, cohort=set(range(clients)), run="panels")
    exact = 0.0
    for first in range(0, clients, chunk):
        lap("gate")
        ids = np.arange(first, min(first + chunk, clients))
        who = rng.integers(POOL, size=len(ids))
        readings = {name: values.take(who, axis=0) for name, values in here.pool.items()}
        exact += float(readings["utility"][:, 0].sum())
        said = Message(readings=readings, update=np.ones((len(ids), 1)))
        lap("made up")
        vectors = seal_all(said, here.layout, terms, 1, ids)
        lap("seal")
        assert all(gate.put_all(ids, vectors))
    lap("gate")
    releases = gate.close()
    lap("close")
    state, evidence = monitor.step(here.plan, monitor.start(here.plan), releases)
    verdict = judge(evidence, releases["utility"], "report")
    lap("monitor")
    utility = releases["utility"]
    assert {r.count for r in releases.values()} == {clients} and state.round == 1 and charges
    assert len(verdict.states) == len(here.plan.modes)
    where = utility.coords[0]  # what shrinking takes from it is less than what was lost
    assert abs(utility.sum(where) - exact) <= 6 * utility.noise(where) + abs(utility.lost) + 1e-9 * clients
    return {**spent, "before": before, "peak": peak(), "states": ", ".join(sorted(set(verdict.states.values())))}


def one_by_one(here: World, trust: str, clients: int) -> dict[str, float]:
    """CPU microseconds of sealing and putting each client's vector on its own."""
    terms = terms_of(trust, clients)
    gate = Gate(1, here.layout, terms, lambda charge: None, cohort=set(range(clients)))
    who = stream(3, "panels").integers(POOL, size=clients)
    said = [Message(readings={n: v[k] for n, v in here.pool.items()}, update=np.ones(1)) for k in who]
    began = time.process_time()
    for client, message in enumerate(said):
        assert gate.put(client, seal(message, here.layout, terms, 1, client))
    return {"each": 1e6 * (time.process_time() - began) / clients}


def draws(clients: int) -> dict[str, float]:
    """CPU microseconds of one number of noise: from the operating system, and from a seed, in lots of 65."""
    std = terms_of("local", clients).readings_std
    noise.gaussian_noise(std, 65)  # imports
    found = {}
    for name, draw in (
        ("system", lambda k: noise.gaussian_noise(std, 65)),
        ("simulated", lambda k: noise.simulated_gaussian(stream(1, "noise", "readings", 1, k), std, 65)),
    ):
        began = time.process_time()
        for k in range(clients):
            draw(k)
        found[name] = 1e6 * (time.process_time() - began) / clients / 65
    return found


def alone(work: Callable[..., dict[str, float]], *given: Any, times: int) -> list[dict[str, float]]:
    """What the work gives, each time in a new process."""
    found = []
    for _ in range(times):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(work, *given).result())
    return found


def spread(values: Iterable[float], digits: int = 2) -> str:
    found = sorted(values)
    return f"{median(found):.{digits}f} ({found[0]:.{digits}f} to {found[-1]:.{digits}f})"


def rows(lines: Iterable[Iterable[Any]]) -> list[str]:
    """A table: its first line is the head."""
    text = ["| " + " | ".join(str(item) for item in line) + " |" for line in lines]
    return [text[0], "|---" * (text[0].count("|") - 1) + "|", *text[1:], ""]


def line(runs: list[dict[str, float]], clients: int) -> list[str]:
    """A run's cells: each stage, all of them, microseconds a client, memory."""
    totals = [sum(run[stage] for stage in STAGES) for run in runs]
    return [
        *(f"{median(run[stage] for run in runs):.2f}" for stage in STAGES),
        f"**{spread(totals)}**",
        f"{1e6 * median(totals) / clients:.2f}",
        f"{median(run['before'] for run in runs):.0f}",
        f"**{median(run['peak'] for run in runs):.0f}**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    most, times, few = (20_000, 1, 200) if quick else (MILLION, 3, 2000)
    began = time.monotonic()
    bundled = world()
    worlds = {width: widened(bundled, width) for width in (16, 64, 256)}
    head = (*STAGES, "all", "µs a client", "MiB before", "MiB at most")
    by_trust, growth, width_of = [("trust", *head)], [("clients", *head)], [("coordinates", *head)]
    for trust in TRUSTS:
        runs = alone(played, worlds[64], trust, most, times=times)
        by_trust.append((trust, *line(runs, most)))
        print(*by_trust[-1], runs[0]["states"], f"made up {runs[0]['made up']:.2f}", flush=True)
        if trust == "central":
            central = runs
    for clients in (most // 100, most // 10, most):
        runs = central if clients == most else alone(played, worlds[64], "central", clients, times=times)
        growth.append((f"{clients:,}", *line(runs, clients)))
        print(*growth[-1], flush=True)
    for width, here in worlds.items():
        runs = central if width == 64 else alone(played, here, "central", most, times=times)
        width_of.append((f"{width}", *line(runs, most)))
        print(*width_of[-1], flush=True)
    singles = [("trust", "µs a client")]
    singles += [(t, spread((r["each"] for r in alone(one_by_one, worlds[64], t, few, times=times)), 0)) for t in TRUSTS]
    drawn = alone(draws, few // 4, times=times)
    masked = alone(played, worlds[64], "secure_aggregation", few // 10, True, times=times)
    protocol = [1e3 * sum(run[stage] for stage in STAGES if stage != "monitor") / (few // 10) for run in masked]
    page = f"""# Panels at scale

`make bench-panels` (`OMP_NUM_THREADS=1 python benchmarks/panels.py`) on {platform.machine()}, {os.cpu_count()} cores,
Python {platform.python_version()}, numpy {np.__version__}. CPU seconds and peak memory (MiB) of {times} runs, each a
process of its own: medians, with the least and the most for the sum.

A round from readings in arrays to the verdict, in chunks of {NUMBERS:,} numbers: `seal` (each client's checks, its
bounded message, its noise where it adds some), `gate` (cohort, second message, shape, bounds, the sum), `close` (the
noise that epsilon asks for and the charge, with the accountant's import; the server's noise; the releases), `monitor`
(a step of all tests, the verdict). Not in it: making the readings up. Epsilon {EPSILON:g}, delta {DELTA:g}, noise
from a seed. The bundled study's layout sends {sent(bundled.layout)} numbers for its six modes and utility; a made-up
probe brings them to 64 and 256; 16 are three modes (bias, calibration, fairness), utility and three made-up numbers.
`MiB before` is the process with its imports and the {POOL:,} clients whose readings are drawn.

## {most:,} clients, 64 coordinates

"""
    page += "\n".join(rows(by_trust))
    page += f"""
The target was 60 s and 4 GB. `secure_aggregation` is **without the protocol**: each client's message and share of the
noise, their sum modulo 2^64, and what follows. In a simulation the gate stands in for the clients and holds every
vector (8 bytes a number) until it is masked; no server does. With the protocol, this process playing all parties,
sealing to release takes {spread(protocol, 1)} ms a client ({few // 10} clients), so a million would take hours. What a
client and what the server has to do of it is in [secagg](../secagg/README.md).

## Growth with clients (trust `central`, 64 coordinates)

"""
    page += "\n".join(rows(growth))
    page += f"""
What grows in memory are two sets of clients' numbers: who may answer, and who did. Nothing a client said stays.

## Growth with coordinates (trust `central`, {most:,} clients)

"""
    page += "\n".join(rows(width_of))
    page += """
## One client at a time

The same functions with one row: `seal` and `Gate.put`, 64 coordinates.

"""
    page += "\n".join(rows(singles))
    page += """
## Noise at each client

"""
    costs = [("source", "µs a number, in lots of 65", "65 numbers for each of a million clients")]
    for name, what in (("simulated", "from a seed (`simulated_gaussian`)"), ("system", "OpenDP, from the system")):
        cost = [run[name] for run in drawn]
        costs.append((what, spread(cost), f"{65 * median(cost):.0f} s"))
    page += "\n".join(rows(costs))
    page += """
Both are discrete Gaussians by rejection from discrete Laplace. Each client has a stream of its own, so that its noise
does not depend on the company it comes in: opening the streams is a part of what the seeded draws cost. OpenDP's draws
are what each client of a deployment pays once; to simulate a million clients with `noise = "system"` is to pay all.
"""
    print(page, f"{time.monotonic() - began:.0f} s", sep="\n")
    if not quick:
        (HERE / "panels").mkdir(exist_ok=True)
        (HERE / "panels" / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
