"""What watching an app that exists adds to it, in Flower's own simulation; prints a table.

    OMP_NUM_THREADS=1 python benchmarks/flower/overhead.py [--repeats 3] [--only WORD]

The examples' apps as they are (`before/`) and with their diff, in turn, with more and more local training, and with
more and more virtual clients. Counted is everything with the SuperLink and Ray's workers: CPU seconds and peak memory
(sum of proportional set sizes) of the whole process tree, by speed/meter.py; a client's round without the first one,
in which processes start and load.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import meter  # a script, not a package

ROOT = Path(__file__).resolve().parents[2]
METER = ROOT / "benchmarks" / "speed" / "meter.py"
WORKERS, LIMIT, ROUNDS = 2, 1800.0, "rounds"  # processes that play clients; seconds; a file


@dataclass(frozen=True, slots=True)
class Cell:
    """An example at some size."""

    example: str
    clients: int
    epochs: int
    rounds: int = 5

    def __str__(self) -> str:
        return f"{self.example}, {self.clients} clients, {self.epochs} local epochs"


CELLS = [
    *(Cell("attach-pytorch", 24, epochs) for epochs in (2, 40, 200)),
    *(Cell("attach-peft", 24, epochs) for epochs in (1, 8)),
    *(Cell("attach-pytorch", clients, 2, 3) for clients in (100, 200)),
]


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


def once(cell: Cell, attach: bool) -> dict[str, float]:
    """One run under the meter, in a process of its own: CPU seconds, those of the rounds but the first, MiB."""
    with tempfile.TemporaryDirectory(prefix="fo") as name:  # short: Ray's sockets lie in it
        usage, log = Path(name) / "usage.json", Path(name) / "log"
        here = app(cell, Path(name), attach)
        command = [sys.executable, str(METER), str(usage), "--", sys.executable, __file__, "--play", str(here)]
        command += ["--clients", str(cell.clients), "--epochs", str(cell.epochs), "--rounds", str(cell.rounds)]
        with log.open("w") as stream:
            subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT)
        found = json.loads(usage.read_text("utf-8"))
        if found["code"]:
            raise SystemExit(f"{cell}: {log.read_text('utf-8')[-3000:]}")
        rounds = float((Path(name) / ROUNDS).read_text("utf-8"))
        return {"cpu": float(found["cpu"]), "rounds": rounds, "mib": float(found["mib"])}


def spent() -> float:
    """CPU seconds so far of all that the meter watches."""
    table = meter._table()
    return sum(sum(table[pid][2:]) for pid in meter._below(os.getppid(), table))


def play(here: Path, clients: int, rounds: int, epochs: int) -> None:
    """Run the app to its end, under the meter."""
    home, until, first = here.parent, time.monotonic() + LIMIT, 0.0
    config = f"num-server-rounds={rounds} local-epochs={epochs}"
    with simulated(here, clients, WORKERS, [program("flower-superlink")], config, home=home) as run:
        while "Strategy execution finished" not in (text := run.log.read_text("utf-8")):
            if not first and "[ROUND 2/" in text:
                first = spent()
            if time.monotonic() > until or run.process is None or run.process.poll() is not None:
                raise SystemExit(f"the run ended without a result:\n{text[-3000:]}")
            time.sleep(0.1)
        (home / ROUNDS).write_text(str(spent() - first), "utf-8")
    if (here / "study.toml").exists() and not list(home.rglob("record.jsonl")):
        raise SystemExit("the attached app left no record")


def measured(cell: Cell, repeats: int) -> Iterator[str]:
    """CPU seconds of the run, milliseconds of a client's round, and peak memory: the app's, and with us."""
    found = {attach: [once(cell, attach) for _ in range(repeats)] for attach in (False, True)}
    middle = {a: {key: median(run[key] for run in runs) for key in runs[0]} for a, runs in found.items()}
    yield from (f"{one['cpu']:.1f}" for one in middle.values())
    each = (cell.rounds - 1) * cell.clients / 1000
    yield from (f"{one['rounds'] / each:.0f}" for one in middle.values())
    yield f"{middle[True]['rounds'] / middle[False]['rounds'] - 1:+.0%}"
    yield from (f"{one['mib']:,.0f}" for one in middle.values())


def main() -> None:
    """Print the table, or play one app."""
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
    heads = ["app", "CPU-s, app", "CPU-s, with us", "a client's round, ms", "with us, ms", "added"]
    print("| " + " | ".join([*heads, "MiB, app", "MiB, with us"]) + " |\n|" + " --- |" * 8, flush=True)
    for cell in CELLS:
        if chosen.only in str(cell):
            print("| " + " | ".join([str(cell), *measured(cell, chosen.repeats)]) + " |", flush=True)


if __name__ == "__main__":
    main()
