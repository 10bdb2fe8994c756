"""Ours beside peft's plain loop, Flower's simulation and pfl on the same job; writes benchmarks/speed/README.md.

    python benchmarks/speed.py --cells quick      ours and peft at three cells, under three minutes; writes nothing
    python benchmarks/speed.py --cells targets    the cells of the targets at 100 clients, all contenders
    python benchmarks/speed.py --cells growth     ours by clients and by rounds
    python benchmarks/speed.py [--cells all]      54 cells and the growth, all contenders; about 100 minutes
    python benchmarks/speed.py --calibrate        how far apart two orders of summation in float32 are

Every run is a process of its own, one at a time, with one thread; CPU-seconds and memory are those of its whole
process tree (speed/meter.py). The runs are appended to speed/results.jsonl as they come, and a stopped benchmark goes
on where it was; `--fresh` begins anew. pfl and Flower run in venvs of their own, which are made in the user's cache
folder when they are absent (FEDCANARY_BENCH_PFL and FEDCANARY_BENCH_FLOWER name existing ones).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "speed"
sys.path.insert(0, str(HERE))

# scripts, not a package: their folder goes onto the path first
import cells  # noqa: E402
import check  # noqa: E402
import tables  # noqa: E402
from job import Job, load, write  # noqa: E402

SOURCE = HERE.parents[1] / "src" / "fedcanary"
MEASURED = ("models/*.py", "personalize/fit.py", "engines/stacking.py")  # what the job runs of ours
SCRIPTS = {"ours": "ours.py", "peft": "peft_loop.py", "pfl": "pfl_sim.py", "flower": "flower_sim.py"}
PACKAGES = ("torch", "transformers", "peft", "numpy")
VENVS = {"pfl": "pfl==0.6.0", "flower": "flwr[simulation]==1.41.0"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
Run = Mapping[str, Any]


def python(contender: str) -> str:
    """The interpreter of a contender's venv, which is made if it is absent."""
    if contender not in VENVS:
        return sys.executable
    named = os.environ.get(f"FEDCANARY_BENCH_{contender.upper()}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(named) if named else cache / "fedcanary" / f"bench-{contender}"
    binary = home / "bin" / "python"
    mine = versions(sys.executable)
    wanted = {name: mine[name] for name in PACKAGES}
    if not binary.exists() and not named:
        print(f"making {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(binary), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={wanted['torch'].partition('+')[0]}"], check=True)
        same = [f"{name}=={version}" for name, version in wanted.items() if name != "torch"]
        subprocess.run([*pip, VENVS[contender], *same], check=True)
    found = versions(str(binary))
    if differ := [f"{n} {found.get(n)}, not {v}" for n, v in wanted.items() if found.get(n) != v]:
        raise SystemExit(f"{home} has {'; '.join(differ)}: remove it, and it is made again")
    return str(binary)


def versions(interpreter: str) -> dict[str, str]:
    """Versions of the packages that matter, and of Python, as an interpreter's environment has them."""
    code = """
import json, platform, importlib.metadata as m
names = ("torch", "transformers", "peft", "numpy", "pfl", "flwr", "ray")
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version()} | {n: found[n] for n in names if n in found}))
"""
    return dict(json.loads(subprocess.run([interpreter, "-c", code], check=True, capture_output=True).stdout))


def machine() -> str:
    """Processor, cores and memory."""
    model = next((r.split(":")[1] for r in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in r), "")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model.strip() or platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB"


def digest() -> str:
    """Of all code that the measured processes run of this repository."""
    total = hashlib.blake2b(digest_size=8)
    files = [p for p in sorted(HERE.rglob("*.py")) if p.name not in ("tables.py", "cells.py", "check.py")]
    for path in files + [p for pattern in MEASURED for p in sorted(SOURCE.glob(pattern))]:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


class Bench:
    """Runs contenders one at a time and records what they cost."""

    def __init__(self, work: Path, contenders: Sequence[str], record: Path | None) -> None:
        self.work, self.record = work, record
        self.interpreters = {name: python(name) for name in contenders}
        subprocess.run(
            [sys.executable, str(HERE / "prepare.py"), str(work)],
            check=True,
            env=os.environ | ENVIRONMENT,
            stderr=subprocess.DEVNULL,
        )
        self.runs: list[Run] = []

    def head(self) -> dict[str, Any]:
        """What must be the same in all of a benchmark's runs."""
        kinds = {name: versions(interpreter) for name, interpreter in sorted(self.interpreters.items())}
        return {"machine": machine(), "versions": kinds, "code": digest()}

    def resume(self, fresh: bool) -> None:
        """Take up the recorded runs, if they are of the same code on the same machine."""
        assert self.record is not None
        head = self.head()
        if self.record.exists() and not fresh:
            before, *runs = [json.loads(line) for line in self.record.read_text("utf-8").splitlines()]
            others = {n: v for n, v in before["versions"].items() if n not in head["versions"]}
            if before != head | {"versions": head["versions"] | others}:
                raise SystemExit(f"{self.record} is of another machine, version or code: --fresh begins anew")
            self.runs = runs
            return
        self.record.write_text(json.dumps(head) + "\n", "utf-8")

    def once(self, job: Job, contender: str, environment: Mapping[str, str] = {}) -> tuple[Run, Path]:
        """One run, as a process of its own, and where its result is."""
        folder = self.work / "jobs" / job.name
        if not folder.exists():
            write(folder, job, self.work / job.model)
        out, usage = folder / f"{contender}.npz", folder / "usage.json"
        out.unlink(missing_ok=True)
        log = folder / f"{contender}.log"
        command = [self.interpreters[contender], str(HERE / SCRIPTS[contender]), str(folder), str(out)]
        with log.open("w", encoding="utf-8") as stream:
            subprocess.run(
                [sys.executable, str(HERE / "meter.py"), str(usage), "--", *command],
                check=True,
                env=os.environ | ENVIRONMENT | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        measured = json.loads(usage.read_text("utf-8"))
        if measured.pop("code") != 0 or not out.exists():
            raise SystemExit(f"{contender} failed on {job.name}:\n{log.read_text('utf-8')[-3000:]}")
        return {"job": job.name, "contender": contender, **measured}, out

    def measure(self, job: Job, contenders: Iterable[str], repeats: int) -> None:
        """All contenders in turn, again and again, until each has been measured so often.

        peft is the reference; without it nothing is compared, and such runs are told apart (`off` is None).
        """
        taking = [name for name in contenders if cells.takes(name, job)]
        compared = "peft" in taking
        same = [r["contender"] for r in self.runs if r["job"] == job.name and (r["off"] is not None) == compared]
        done = {name: same.count(name) for name in taking}
        reference: dict[str, Any] | None = None
        for repeat in range(repeats):
            for contender in [name for name in taking if done[name] <= repeat]:
                if contender != "peft" and compared and reference is None:
                    reference = load(self.once(job, "peft")[1])  # the benchmark was stopped after peft's runs
                run, out = self.once(job, contender)
                result, start = load(out), load(out.with_name("start.npz"))
                reference = result if reference is None else reference
                off = asdict(check.distance(reference, result, start)) if compared else None
                net = float(result["net"])
                self.runs.append({**run, "net": None if math.isnan(net) else net, "off": off})
                print(
                    f"{job.name} {contender} {run['cpu']:.1f} ({net:.1f}) CPU-s, {run['mib']:.0f} MiB", file=sys.stderr
                )
                if self.record is not None:
                    with self.record.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(self.runs[-1]) + "\n")


def calibrate(bench: Bench) -> str:
    """Measure peft against itself, with the rows of each batch in reverse."""
    lines = ["| job | adapter | loss |", "|---|---|---|"]
    for model in cells.LENGTH:
        for clients, batch, tokens in ((20, 4, 32), (20, 8, 64), (100, 4, 32)):
            job = cells.cell(model, clients, batch, tokens)
            one = load(bench.once(job, "peft")[1])
            other, out = bench.once(job, "peft", {"FEDCANARY_BENCH_REVERSE": "1"})
            off = check.distance(one, load(out), load(out.with_name("start.npz")))
            lines.append(f"| {other['job']} | {off.adapter:.1e} | {off.loss:.1e} |")
    return "\n".join(lines)


def page(bench: Bench) -> str:
    """README.md."""
    head = bench.head() if bench.record is None else json.loads(bench.record.read_text("utf-8").splitlines()[0])
    found = tables.table(bench.runs, cells.EVERY)
    packages = "; ".join(
        f"{name}: " + ", ".join(f"{package} {version}" for package, version in kinds.items())
        for name, kinds in head["versions"].items()
    )
    measured = sum((job.name, "ours") in found for job in cells.EVERY)
    calibration = HERE / "calibration.md"
    return f"""# Speed: many personalized models at once

Written by `make bench-speed` (`python benchmarks/speed.py`) on {head["machine"]}. {packages}. {measured} of
{len(cells.EVERY)} cells. Every run is a process of its own with one thread (Flower: two workers of one thread each),
one after the other; CPU-seconds and peak memory (sum of proportional set sizes) are those of the whole process tree.
A page of a file that other programs have mapped too counts in part: memory is exact on a quiet machine.

The job: federated averaging of LoRA adapters (r = 8, alpha = 16, float32) over a frozen base. In every round each
client starts from the shared adapter and takes so many AdamW steps on its own rows; the shared adapter moves by the
mean change. Ours: stacks of clients. peft: a loop over one peft model whose adapter is overwritten. pfl: its simulated
FederatedAveraging. Flower: `flwr run`, local simulation on Ray, FedAvg. All three train the same peft model, with fused
AdamW. What is compared was checked to be the same: see "Same job" below.

Ratios are of medians over the runs; above 1 ours is cheaper. `net` leaves out the start and is per client-step: the
CPU time of the process between the start of its first round and the end of its last (Flower: less a run of no
rounds, in which its workers load the model).
A cell that costs peft's loop less than about {cells.SMALL:.0f} s, or that a target is about at 100 clients, is measured
several times (`runs`), the others once.
Batches of one cell are `rows x tokens`.

## Targets

How long a job is, is arbitrary, and with it the share of the start: the targets against peft and pfl are judged net of
it, and 1.0x and Flower's also with it.

{tables.target_table(found)}

## Cells

{tables.cell_tables(found, cells.EVERY)}

## Start

{tables.start_table(bench.runs)}

## Growth: ours, hidden 128, 4x32

{tables.growth_table(bench.runs, cells.GROWTH)}

## Same job

Largest distance from peft's result over all runs: L2 norm of the adapters' difference over that of the adapter's whole
change; largest relative difference of a round's mean loss.

{tables.distance_table(bench.runs)}

What float32 leaves open, by which the allowed distance was chosen: peft against itself with each batch's rows in
reverse (`--calibrate`).

{calibration.read_text("utf-8").strip() if calibration.exists() else "Not calibrated."}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", choices=["quick", "targets", "growth", "all"], default="all")
    parser.add_argument("--contenders", help=f"some of {','.join(cells.CONTENDERS)}; peft is the reference")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a small cell (default 3; quick: 1)")
    parser.add_argument("--fresh", action="store_true", help="forget the recorded runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="README.md is written beside it")
    parser.add_argument("--calibrate", action="store_true", help="write speed/calibration.md and end")
    options = parser.parse_args()
    quick = options.cells == "quick"
    if options.contenders:
        contenders = options.contenders.split(",")
    else:
        contenders = ["peft", "ours"] if quick or options.calibrate else list(cells.CONTENDERS)
    if unknown := set(contenders) - set(cells.CONTENDERS):
        parser.error(f"no contender {', '.join(sorted(unknown))}")
    if "peft" not in contenders:
        parser.error("peft is the reference of all checks: name it too")
    contenders.sort(key=cells.CONTENDERS.index)
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as work:
        bench = Bench(Path(work), contenders, None if quick or options.calibrate else options.results)
        if options.calibrate:
            (HERE / "calibration.md").write_text(calibrate(bench) + "\n", "utf-8")
            return
        if not quick:
            bench.resume(options.fresh)
        jobs = cells.CHOICES.get(options.cells, [])
        for job in () if quick else dict.fromkeys(map(cells.start, jobs)):
            bench.measure(job, contenders, options.repeats)
        for job in jobs:
            bench.measure(job, contenders, 1 if quick else cells.repeats(job, options.repeats))
        if options.cells in ("growth", "all"):
            for job in cells.GROWTH:
                bench.measure(job, ["ours"], cells.repeats(job, options.repeats))
    try:
        if quick:
            print(tables.quick(bench.runs, jobs))
            return
        text = page(bench)
    except tables.DifferentJobs as error:
        raise SystemExit(f"no table: {error}") from None
    options.results.with_name("README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
