"""The command `bench`: SilentBench, or its quick version."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcanary.errors import EXIT_OK, BadInput

if TYPE_CHECKING:
    from fedcanary.bench.federations import Recording

RESULTS, TABLES, EVIDENCE, READINGS = "results.jsonl", "README.md", "evidence.json", "readings.npz"


def add(commands: Any) -> None:
    """The command and its options."""
    command = commands.add_parser("bench", help="SilentBench: how often the monitor errs, how soon it is right")
    command.add_argument("--quick", action="store_true", help="under five minutes: FedAvg at epsilon 1, fewer windows")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: silentbench/)")
    command.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)"
    )
    command.add_argument(
        "--record", action="store_true", help="first run the federations again whose readings are used (an hour)"
    )
    command.add_argument("--json", action="store_true", help="print the rows as one JSON document")
    command.set_defaults(action=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from fedcanary.bench import federations, grid
    from fedcanary.bench.evidence import evidence
    from fedcanary.bench.tables import page
    from fedcanary.record import environment, plain

    out = arguments.out or Path("silentbench")
    if arguments.jobs < 1:
        raise BadInput.of("--jobs", f"{arguments.jobs} is no number of processes", "say 1 or more")
    if out.exists() and not out.is_dir():
        raise BadInput.of(str(out), "is not a folder", "choose another --out")
    if (out / RESULTS).exists():
        raise BadInput.of(str(out), "already holds results", "choose another --out, or move them away")
    size = grid.QUICK if arguments.quick else grid.Size()
    started, draft = time.monotonic(), out / "part"
    draft.mkdir(parents=True, exist_ok=True)
    readings = grid.READINGS
    if arguments.record:
        readings = draft / READINGS
        federations.save(_recorded(size.wide), readings)
    recordings = federations.load(readings)
    todo = grid.tasks(size, recordings, readings)
    done = 0

    def watch(task: grid.Task) -> None:
        nonlocal done
        done += 1
        spent = time.monotonic() - started
        print(f"\r{done}/{len(todo)} {spent:5.0f} s  {task.kind}: {' '.join(task.key):60.60}", end="", file=sys.stderr)

    rows = list(grid.run(todo, arguments.jobs, watch))
    print(file=sys.stderr)
    command = f"fedcanary bench{' --quick' if arguments.quick else ''}{' --record' if arguments.record else ''}"
    made = environment()
    how = _made(command, made, recordings, time.monotonic() - started, arguments.jobs)
    found = {
        RESULTS: "".join(json.dumps(_short(plain(row))) + "\n" for row in rows),
        EVIDENCE: json.dumps(evidence(rows, command, made), indent=1) + "\n",
        TABLES: f"# SilentBench\n\n{how}\n\n{page(rows)}\n",
    }
    for name, text in found.items():
        (draft / name).write_text(text, encoding="utf-8")
    for path in sorted(draft.iterdir()):
        path.replace(out / path.name)
    shutil.rmtree(draft)
    if arguments.json:
        print(json.dumps([plain(row) for row in rows]))
    else:
        print(found[TABLES])
        print(f"written to {out}: {', '.join([*found, *([READINGS] if arguments.record else [])])}")
    return EXIT_OK


def _recorded(wide: bool) -> list[Recording]:
    from fedcanary.bench import federations

    todo, found = [f for f in federations.everything() if wide or f.method == "fedavg"], []
    for k, federation in enumerate(todo, start=1):
        print(f"\rfederation {k}/{len(todo)}: {federation.name:60.60}", end="", file=sys.stderr)
        found.append(federations.run(federation))
    print(file=sys.stderr)
    return found


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def _made(command: str, made: Any, recordings: list[Recording], seconds: float, jobs: int) -> str:
    federations = len({r.federation for r in recordings})
    return (
        f"`{command}` took {seconds / 60:.1f} minutes on {jobs} cores ({made['machine']}, Python {made['python']}). "
        f"Readings: {federations} federations that were run on the bundled model. Rounds of a window: 50; the change "
        "comes in round 10. Intervals are exact 95% ones (Clopper & Pearson)."
    )
