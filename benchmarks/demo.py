"""Wall time, CPU time and memory of the bundled demonstration; writes docs/benchmarks.md.

    python benchmarks/demo.py [--runs 3]

Each run is a process of its own. CPU time and peak memory are the operating system's own account of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def one(out: Path) -> dict[str, float]:
    """Run the demonstration once."""
    command = [sys.executable, "-m", "fedcanary", "run", "--out", str(out), "--quiet", "--json"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        raise SystemExit(f"the demonstration ended with {process.returncode}")
    return {
        "wall": time.monotonic() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        measured = [one(Path(folder) / str(i)) for i in range(runs)]
        summary = json.loads((Path(folder) / "0" / "summary.json").read_text())
        report = (Path(folder) / "0" / "report.html").stat().st_size
    import torch

    rows = "\n".join(
        f"| {name} | {min(m[key] for m in measured):.0f} | {median(m[key] for m in measured):.0f} | "
        f"{max(m[key] for m in measured):.0f} | {limit} |"
        for name, key, limit in (
            ("wall time, s", "wall", "120"),
            ("CPU time, s", "cpu", ""),
            ("peak memory, MiB", "memory", "2048"),
        )
    )
    page = f"""# Benchmarks

`make bench-demo` (`python benchmarks/demo.py --runs {runs}`) on {platform.machine()}, {os.cpu_count()} cores, Python
{platform.python_version()}, torch {torch.__version__}: the bundled demonstration, start of the process to its end,
{summary["rounds"]} rounds, {summary["clients"]["asked"][0]} of {summary["clients"]["population"]} clients in each,
all six modes read at every client, under secure aggregation with epsilon {summary["privacy"]["epsilon"]:.3g}. Each
run is a process of its own; the machine is shared, so the spread matters.

| {runs} runs | least | median | most | limit |
|---|---|---|---|---|
{rows}

The report is {report / 1024:.0f} KiB (limit 1,536).

Pages of their own: the [140 planted federations](../benchmarks/plants/README.md),
[secure aggregation](../benchmarks/secagg/README.md) (cost of a client, growth of the server's),
[the planner's predictions](../benchmarks/planner/README.md), and [SilentBench](silentbench.md).
"""
    (ROOT / "docs" / "benchmarks.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
