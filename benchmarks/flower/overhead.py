"""What watching an app that exists adds to it, in Flower's own simulation; prints two tables.

    OMP_NUM_THREADS=1 python benchmarks/flower/overhead.py [--repeats 3] [--only WORD]

The examples' apps as they are (`before/`) and with their diff, in turn, with more and more local training, and with
more and more virtual clients. Counted is everything with the SuperLink and Ray's workers: CPU seconds and peak memory
(sum of proportional set sizes) of the whole process tree, by speed/meter.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fedcanary.engines.flower.processes import program
from fedcanary.engines.flower.simulate import simulated

ROOT = Path(__file__).resolve().parents[2]
METER = ROOT / "benchmarks" / "speed" / "meter.py"
WORKERS, LIMIT = 2, 1800.0  # processes that play clients; seconds


@dataclass(frozen=True, slots=True)
class Cell:
    """An example at some size. A round's CPU time is the difference of two runs' that differ in their rounds."""

    example: str
    clients: int
    epochs: int
    rounds: tuple[int, int] = (1, 3)

    def __str__(self) -> str:
        return f"{self.example}, {self.clients} clients, {self.epochs} local epochs"


WORK = [
    *(Cell("attach-pytorch", 24, epochs) for epochs in (2, 40, 200)),
    *(Cell("attach-peft", 24, epochs) for epochs in (1, 8)),
]
SIZE = [Cell("attach-pytorch", clients, 2, (2, 2)) for clients in (24, 100, 200)]


def app(cell: Cell, folder: Path, attach: bool) -> Path:
    """The example's app, with its diff and a study of this many clients if it is to be attached."""
    example, here = ROOT / "examples" / cell.example, folder / "app"
    shutil.copytree(example / "before", here)
    if attach:
        subprocess.run(
            ["patch", "-p1", "--quiet", "-i", str(example / "attach.diff")], cwd=here, check=True, capture_output=True
        )
        text = (example / "study.toml").read_text("utf-8")
        for name, value in (("rounds", 50), ("clients", cell.clients)):
            text = re.sub(rf"^{name} = \d+", f"{name} = {value}", text, count=1, flags=re.MULTILINE)
        (here / "study.toml").write_text(text, "utf-8")
    return here


def once(cell: Cell, attach: bool, rounds: int) -> dict[str, float]:
    """One run under the meter, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fo") as name:  # short: Ray's sockets lie in it
        usage, log = Path(name) / "usage.json", Path(name) / "log"
        here = app(cell, Path(name), attach)
        command = [sys.executable, str(METER), str(usage), "--", sys.executable, __file__, "--play", str(here)]
        command += ["--clients", str(cell.clients), "--epochs", str(cell.epochs), "--rounds", str(rounds)]
        with log.open("w") as stream:
            subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT)
        found = json.loads(usage.read_text("utf-8"))
        if found["code"]:
            raise SystemExit(f"{cell}: {log.read_text('utf-8')[-3000:]}")
        return {"cpu": float(found["cpu"]), "mib": float(found["mib"])}


def play(here: Path, clients: int, rounds: int, epochs: int) -> None:
    """Run the app to its end, under the meter."""
    home = here.parent
    config = f"num-server-rounds={rounds} local-epochs={epochs}"
    until = time.monotonic() + LIMIT
    with simulated(here, clients, WORKERS, [program("flower-superlink")], config, home=home) as run:
        while "Final results" not in run.log.read_text("utf-8"):
            if time.monotonic() > until or run.process is None or run.process.poll() is not None:
                raise SystemExit(f"the run ended without a result:\n{run.log.read_text('utf-8')[-3000:]}")
            time.sleep(0.2)
    if (here / "study.toml").exists() and not list(home.rglob("record.jsonl")):
        raise SystemExit("the attached app left no record")


def measured(cell: Cell, repeats: int) -> Iterator[str]:
    """CPU seconds of the longer run, of one round, and peak memory: the app's, and with us."""
    found: dict[tuple[bool, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for attach in (False, True):
            for rounds in sorted(set(cell.rounds)):
                found.setdefault((attach, rounds), []).append(once(cell, attach, rounds))
    few, many = cell.rounds
    whole = {attach: median(run["cpu"] for run in found[attach, many]) for attach in (False, True)}
    spread = max(
        (max(cpus) - min(cpus)) / median(cpus) for runs in found.values() if (cpus := [run["cpu"] for run in runs])
    )
    yield f"{whole[False]:.1f}"
    yield f"{whole[True]:.1f}"
    if few != many:
        rounds = {a: (whole[a] - median(run["cpu"] for run in found[a, few])) / (many - few) for a in whole}
        yield f"{1000 * rounds[False] / cell.clients:.0f}"
        yield f"{1000 * rounds[True] / cell.clients:.0f}"
        yield f"{rounds[True] / rounds[False] - 1:+.0%}"
    else:
        yield from (f"{median(run['mib'] for run in found[a, many]):,.0f}" for a in (False, True))
    yield f"{spread:.0%}"


def table(cells: list[Cell], heads: list[str], repeats: int) -> None:
    """Print a table, row by row."""
    print("| " + " | ".join(["app", *heads]) + " |\n|" + " --- |" * (1 + len(heads)), flush=True)
    for cell in cells:
        print("| " + " | ".join([str(cell), *measured(cell, repeats)]) + " |", flush=True)


def main() -> None:
    """Print both tables, or play one app."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cells whose name has this word")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    for name in ("clients", "rounds", "epochs"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.play is not None:
        play(chosen.play, chosen.clients, chosen.rounds, chosen.epochs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work, size = ([cell for cell in cells if chosen.only in str(cell)] for cells in (WORK, SIZE))
    both = ["CPU-s, app", "CPU-s, with us"]
    table(work, [*both, "a client's round, ms", "with us, ms", "added", "spread"], chosen.repeats)
    print()
    table(size, [*both, "MiB, app", "MiB, with us", "spread"], chosen.repeats)


if __name__ == "__main__":
    main()
