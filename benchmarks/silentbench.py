"""What the simulator of SilentBench costs: windows of 50 rounds through noise, monitor, every rule and the oracle.

    python benchmarks/silentbench.py [--out benchmarks/silentbench]     two minutes

10,000 windows at N = 1,000 in under two minutes on two cores, and panels of 1,000,000 clients in under 4 GB, are what
is asked of it; growth with N and with the number of windows is shown beside. Processor time counts every process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CELLS = ((200, 1000), (1000, 1000), (10_000, 1000), (1000, 10_000), (1_000_000, 200))
MEGA = 1e6


def one(n: int, windows: int) -> dict[str, Any]:
    """Run a cell in this process and say what it took."""
    import resource

    from fedcanary.bench import grid, scenarios
    from fedcanary.bench.measure import Cell, measure

    started, cpu = time.perf_counter(), time.process_time()
    scenario = scenarios.worked("nothing", None, grid.HORIZON, seed=1)
    built = time.perf_counter() - started
    measure(Cell(scenario=scenario, n=n, paths=windows, change=0))
    return {
        "n": n,
        "windows": windows,
        "wall": time.perf_counter() - started,
        "built": built,
        "cpu": time.process_time() - cpu,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA,
    }


def main() -> None:
    """Each cell in a process of its own, so that memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "silentbench")
    parser.add_argument("--cell", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(one(*arguments.cell)))
        return
    lines = [
        "# What the simulator costs",
        "",
        f"`python benchmarks/silentbench.py` on {platform.machine()}, Python {platform.python_version()}, one process. "
        "Windows of 50 rounds, six modes, ε = 1, the monitor and six rules.",
        "",
        "| N | windows | wall s | CPU s | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    for n, windows in CELLS:
        told = subprocess.run(
            [sys.executable, __file__, "--cell", str(n), str(windows)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        row = json.loads(told.stdout)
        lines.append(f"| {n:,} | {windows:,} | {row['wall']:.1f} | {row['cpu']:.1f} | {row['memory']:.0f} |")
        print(lines[-1])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
