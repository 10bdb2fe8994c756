"""fedcanary's own study over real processes, TLS and registered keys, with nodes and the server killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcanary import pipeline, study
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines.flower.deploy import load_server
from fedcanary.engines.flower.processes import living
from fedcanary.engines.setup import cache, prepare
from fedcanary.engines.verify import verify

pytestmark = [pytest.mark.services, pytest.mark.slow]
NODES, ROUNDS = 4, 4
STUDY = (
    *(
        f"rounds={ROUNDS}",
        f"clients.count={NODES}",
        "clients.examples=24",
        "clients.eval_examples=8",
        "personalize.epochs=1",
    ),
    *("privacy.panel=same", "privacy.min_cohort=3", "privacy.noise=simulated", "engine.stack=1", "engine.threads=1"),
)
STARTED: list[subprocess.Popen] = []
FEDCANARY = (sys.executable, "-m", "fedcanary")


def sets() -> list[str]:
    return [word for key in STUDY for word in ("--set", key)]


@pytest.fixture
def deployment(tmp_path):
    """A deployment that is up, and is taken down with nothing left."""
    folder = tmp_path / "d"
    subprocess.run([*FEDCANARY, "deploy", "init", str(folder), *sets()], check=True, timeout=120)
    with (tmp_path / "up.log").open("w") as log:
        up = subprocess.Popen([*FEDCANARY, "deploy", "up", str(folder)], stdout=log, stderr=log)
    try:
        yield folder
    finally:
        for run in STARTED:
            run.kill()
            run.wait()
        STARTED.clear()
        subprocess.run([*FEDCANARY, "deploy", "down", str(folder)], check=True, timeout=120)
        up.wait(timeout=60)
        assert not living(load_server(folder / "server").id)


def in_one_process(out: Path) -> bytes:
    """The record of the same study without Flower."""
    out.mkdir()
    (out / "engine.json").write_text('{"stack": 1, "tokens": 1024, "threads": 1}')
    record = pipeline.run(prepare(study.load(DEMONSTRATION, STUDY), cache()), out)
    return record.path.read_bytes()


def begun(folder: Path) -> subprocess.Popen:
    """`deploy run`, whose output goes to a file: a pipe that a failed test leaves open is another test's warning."""
    with (folder.parent / "run.log").open("a") as log:
        run = subprocess.Popen([*FEDCANARY, "deploy", "run", str(folder), "--json"], stdout=log, stderr=log)
    STARTED.append(run)
    return run


def said(folder: Path) -> str:
    return (folder.parent / "run.log").read_text()


def word(folder: Path) -> dict:
    try:
        return json.loads((folder / "server" / "run" / "live.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for(folder: Path, round: int, step: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = word(folder)
        assert "error" not in now, now
        if now.get("round") == round and str(now.get("step", "")).startswith(step):
            return
        time.sleep(0.05)
    raise AssertionError(f"round {round} never came to {step}: {word(folder)}")


def kill(folder: Path, part: str) -> None:
    found = living(load_server(folder / "server").id, part)
    assert found, f"no {part} to kill"
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def test_whatever_is_killed_the_record_is_that_of_one_process(deployment, tmp_path):
    run = begun(deployment)
    wait_for(deployment, 1, "train")
    kill(deployment, "node-002")
    wait_for(deployment, 2, "agree")
    kill(deployment, "node-001")
    wait_for(deployment, 2, "unmask")
    kill(deployment, "node-003")
    wait_for(deployment, 3, "agree")
    kill(deployment, "superexec")  # and with it the ServerApp
    assert run.wait(timeout=300) not in (0, 3), said(deployment)
    again = begun(deployment)
    assert again.wait(timeout=580) in (0, 3), said(deployment)
    out = deployment / "server" / "run"
    assert (out / "record.jsonl").read_bytes() == in_one_process(tmp_path / "here")
    assert verify(out)["rounds"] == ROUNDS
