"""The speed benchmark's own instruments: the checker, the meter, the arithmetic of the targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cells
import check
import numpy as np
import pytest
import tables
from job import Job, data

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"

CLIENTS = 400


def federation() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A start, and the change of each of 400 clients who mostly agree: the hardest case for who looks for one."""
    random = np.random.default_rng(3)
    start = {name: random.normal(size=shape).astype(np.float32) for name, shape in (("a", (8, 64)), ("b", (64, 8)))}
    common = random.normal(size=1024) * 2e-3
    return start, (common + 0.3e-3 * random.normal(size=(CLIENTS, 1024))).astype(np.float32)


def shared(start: dict[str, np.ndarray], change: np.ndarray, losses: list[float]) -> dict[str, np.ndarray]:
    a, b = np.split(change.astype(np.float32), 2)
    moved = {"adapter/a": start["a"] + a.reshape(8, 64), "adapter/b": start["b"] + b.reshape(64, 8)}
    return {**moved, "losses": np.array(losses), "net": np.array(1.0)}


def test_the_checker_lets_rounding_pass_and_no_planted_error():
    start, changes = federation()
    reference = shared(start, changes.mean(0), [2.0, 1.5])

    def judged(change: np.ndarray, losses: list[float]) -> bool:
        return check.distance(reference, shared(start, change, losses), start).same

    assert judged(changes[::-1].mean(0), [2.0, 1.5 * (1 + 1e-6)])  # another order of summation
    assert not judged(changes[1:].sum(0) / CLIENTS, [2.0, 1.5])  # one client's update dropped
    assert not judged(changes.mean(0) * 1.01, [2.0, 1.5])  # a learning rate 1% off
    assert not judged(changes.mean(0), [2.0, 1.5 * (1 + 1e-4)])
    assert not judged(changes.mean(0), [2.0])
    assert not judged(changes.mean(0) * np.nan, [2.0, 1.5])
    fewer = {name: array for name, array in reference.items() if name != "adapter/b"}
    assert not check.distance(reference, fewer, start).same
    nothing = shared(start, changes[0] * 0, [])
    assert check.distance(nothing, nothing, start).same
    assert not check.distance(nothing, {**reference, "losses": np.array([])}, start).same


def test_no_table_of_different_jobs():
    run = {"job": "j", "contender": "ours", "cpu": 1.0, "net": 1.0, "mib": 1.0}
    for off in ({"adapter": 1e-2, "loss": 0.0}, {"adapter": 0.0, "loss": float("nan")}):
        with pytest.raises(tables.DifferentJobs, match="ours on j"):
            tables.table([{**run, "off": off}], [])
    assert not tables.table([{**run, "job": cells.EVERY[0].name, "off": None}], cells.EVERY)  # never compared


BURNER = """\
import os, signal, sys, time
mark = sys.argv[1]
def burn():
    while time.process_time() < 0.6: pass
    kept = bytearray(60 << 20)
    open(mark, "w").write(str(os.getpid()))
"""
WAIT = "\nwhile not os.path.exists(mark): time.sleep(0.02)\ntime.sleep(0.3)\n"
DETACHED = (
    BURNER + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: burn()\n    os._exit(0)\nos.wait()" + WAIT
)
UNWAITED = BURNER + "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nif os.fork() == 0:\n    burn(); os._exit(0)" + WAIT
DAEMON = BURNER + "if os.fork() == 0:\n    os.setsid(); burn(); time.sleep(1000)" + WAIT


@pytest.mark.parametrize("program", [DETACHED, UNWAITED, DAEMON], ids=["detached", "unwaited", "daemon"])
def test_the_meter_counts_what_its_command_does_not_wait_for(tmp_path, program):
    out, mark = tmp_path / "usage.json", tmp_path / "mark"
    command = [sys.executable, "-I", "-S", "-c", program, str(mark)]
    began = time.monotonic()
    subprocess.run([sys.executable, str(SPEED / "meter.py"), str(out), "--", *command], check=True, timeout=60)
    usage = json.loads(out.read_text("utf-8"))
    assert usage["code"] == 0
    # A process that nobody waits for counts with its last sample, which may be 0.1 s old (more on a busy machine).
    assert 0.4 <= usage["cpu"] <= 1.5
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):  # what was left running is no more
        os.kill(int(mark.read_text("utf-8")), 0)


def made_up(ours: float) -> list[dict[str, object]]:
    """Runs of every cell; ours takes so many seconds where all others take 30."""
    same = {"adapter": 0.0, "loss": 0.0}
    runs: list[dict[str, object]] = []
    for job in cells.EVERY:
        for contender in filter(lambda c, job=job: cells.takes(c, job), cells.CONTENDERS):
            mine = contender == "ours"
            net = None if contender == "flower" else ours if mine else 30.0
            cost = {"cpu": (ours if mine else 30.0) + 5, "net": net, "mib": 300.0 if mine else 1200.0}
            runs.append({"job": job.name, "contender": contender, "off": same, **cost})
            if job.clients == 20:
                runs.append({"job": cells.start(job).name, "contender": contender, "off": same, **cost, "cpu": 5.0})
    return runs


def results(runs: list[dict[str, object]]) -> list[str]:
    found = tables.table(runs, cells.EVERY)
    return [target.judge(found, cells.EVERY) for target in tables.TARGET_LIST]


def test_a_target_is_met_only_by_every_cell():
    runs = made_up(ours=5.0)
    assert all(result.startswith("met in all") for result in results(runs))
    job = cells.cell("llama128", 100, 4, 32)
    slow = [{**r, "net": 16.0} if (r["job"], r["contender"]) == (job.name, "ours") else r for r in runs]
    assert results(slow)[0] == f"**not met** in 1 of 9 cells: {job.name} 1.88"
    assert [result.startswith("met") for result in results(slow)] == [False, *[True] * 3, False, *[True] * 4]
    missing = [r for r in runs if (r["job"], r["contender"]) != (job.name, "pfl")]
    assert results(missing)[-2:] == ["**not measured** in 1 of 54 cells"] * 2
    equal = results(made_up(ours=30.0))
    assert equal[2].startswith("met in all") and equal[7].startswith("**not met** in 54 of 54")  # ahead, not level
    large = [{**r, "mib": 401.0} if r["contender"] == "ours" else r for r in runs]
    assert results(large)[6].startswith("**not met** in 3 of 3 cells")


def test_clients_own_their_rows_whoever_else_takes_part():
    job = Job(model="minilm", clients=5, batch=2, tokens=4, steps=3, rounds=2)
    few, many = data(job, 100), data(replace(job, clients=9), 100)
    assert few["ids"].shape == (5, 6, 4) and few["labels"].shape == (5, 6)
    for name, array in few.items():
        np.testing.assert_array_equal(array, many[name][:5])
    batches = job.batches(1, 3)
    assert [len(b) for b in batches] == [2, 2, 2] and sorted(np.concatenate(batches)) == list(range(6))
