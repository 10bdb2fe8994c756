"""Many rounds over real processes while nodes fail: 20, or as many as FEDCANARY_SOAK_ROUNDS says; `make soak`: 200."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from deployed import begun, counts, said, table, tell, up, word

from fedcanary.engines.flower.deploy import load_server
from fedcanary.engines.flower.processes import living
from fedcanary.engines.verify import verify
from fedcanary.pipeline import replay
from fedcanary.record import RunRecord

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(6 * 3600)]
NODES = 6
STEPS = ("train", "agree", "unmask")


def resident(id: str, part: str) -> float:
    """MiB of a part's own programs: what Flower starts for each message comes and goes."""
    sizes = []
    for pid in living(id, part):
        try:
            status = Path(f"/proc/{pid}/status").read_text("utf-8")
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "clientapp" not in name:
            sizes += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")]
    return sum(sizes)


def test_soak_of_real_processes_with_one_of_six_failing_every_third_round(tmp_path):
    """At random, one node is killed, or hangs for a while, at a random step of every third round. The record is intact,
    nothing is released below the floor, and no program grows by half a MiB a round.
    """
    rounds, drawn = int(os.environ.get("FEDCANARY_SOAK_ROUNDS", "20")), random.Random(20)
    plan = {
        t: (drawn.randrange(NODES), drawn.choice(STEPS), drawn.choice(["kill", "hang"])) for t in range(3, rounds, 3)
    }
    memory: dict[str, list[tuple[int, float]]] = defaultdict(list)
    journals: list[int] = []
    study = table(rounds=rounds, nodes=NODES, min_cohort="3", noise="system")
    with up(tmp_path / "d", {"train": 75, "step": 45}, study=study) as folder:
        id, out, began = load_server(folder / "server").id, folder / "server" / "run", time.monotonic()
        run, failed, asleep, seen = begun(folder), 0, dict[str, float](), 0
        while run.poll() is None:
            now = word(folder)
            round, step = now.get("round", 0), str(now.get("step", ""))
            if round in plan and step.startswith(plan[round][1]):
                client, _, how = plan.pop(round)
                name = f"node-{client:03d}"
                if name not in asleep and living(id, name):
                    tell(folder, name, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                    failed += 1
                    if how == "hang":
                        asleep[name] = time.monotonic() + drawn.uniform(10, 80)
            for name in [name for name, until in asleep.items() if time.monotonic() > until]:
                del asleep[name]
                if living(id, name):
                    tell(folder, name, signal.SIGCONT)
            if (done := now.get("decided", {}).get("round", 0)) > seen:
                seen = done
                for part in ("superlink", "superexec", *(f"node-{client:03d}" for client in range(NODES))):
                    memory[part].append((seen, resident(id, part)))
                journals.append(sum(file.stat().st_size for file in folder.rglob("journal.sqlite")))
                sizes = {part: f"{told[-1][1]:.0f}" for part, told in memory.items()}
                print(f"round {seen}, {time.monotonic() - began:.0f} s, MiB {sizes}", flush=True)
            time.sleep(0.1)
        assert run.returncode in (0, 3), said(folder)
        record, last = RunRecord.load(out), word(folder)
        assert verify(out)["rounds"] == rounds
        assert replay(record) == [(body["round"], body["evidence"]) for body in record.of("round")]
        released = counts(folder)
        charges = [body["id"] for body in record.of("charge")]
    growth = {part: grown(sizes) for part, sizes in memory.items()}
    print(
        json.dumps(
            {"rounds": rounds, "failed": failed, "MiB a round": growth, "released": np.bincount(released).tolist()}
        )
    )
    print(json.dumps({"faults": last["faults"], "refused": last["refused"], "exchanges": last["exchanges"]}))
    assert len(released) == rounds
    assert failed >= rounds // 3 - 2
    assert all(count == 0 or count >= 3 for count in released)
    assert np.mean(released) > 5
    assert len(charges) == len(set(charges))
    assert max(growth.values()) < 0.5
    assert max(journals) <= 1.5 * journals[len(journals) // 10]


def grown(sizes: list[tuple[int, float]]) -> float:
    """MiB a round, between the medians of a part's second tenth and of its last; not while it was down or starting."""
    usual = np.median([size for _, size in sizes])
    up = [(round, size) for round, size in sizes if size > 0.9 * usual]
    tenth = max(1, len(up) // 10)
    early, late = up[tenth : 2 * tenth], up[-tenth:]
    rise = np.median([size for _, size in late]) - np.median([size for _, size in early])
    return float(rise / max(1, late[0][0] - early[0][0]))
