"""Deployments as real processes, and what tests do to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedcanary import pipeline
from fedcanary import study as studies
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines.flower import deploy
from fedcanary.engines.flower.deploy import load_server
from fedcanary.engines.flower.processes import living
from fedcanary.engines.setup import cache, prepare
from fedcanary.engines.verify import verify
from fedcanary.record import RunRecord

NODES, ROUNDS = 4, 4


def table(rounds: int = ROUNDS, nodes: int = NODES, **privacy: str) -> tuple[str, ...]:
    """A small study, as the words after `--set`."""
    agreed = {"panel": "same", "min_cohort": "3", "dropouts": "0.3", "noise": "simulated", **privacy}
    return (
        *(f"rounds={rounds}", f"clients.count={nodes}", "clients.examples=24", "clients.eval_examples=8"),
        *("personalize.epochs=1", "engine.stack=1", "engine.threads=1"),
        *(f"privacy.{name}={value}" for name, value in agreed.items()),
    )


STUDY = table()
STARTED: list[subprocess.Popen] = []
FEDCANARY = (sys.executable, "-m", "fedcanary")


def fedcanary(*words: str, **more) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*FEDCANARY, *words], check=True, timeout=120, **more)


def started(log: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A command that stays, whose output goes to a file: a pipe that a failed test leaves open is another's warning."""
    with log.open("a") as stream:
        found = subprocess.Popen([*before, *FEDCANARY, *words], stdout=stream, stderr=stream)
    STARTED.append(found)
    return found


@contextmanager
def written(folder: Path, *, app: Path | None = None, study: tuple[str, ...] = STUDY, **where) -> Iterator[Path]:
    """A deployment that is not up, and is taken down with nothing left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower builds an app with
        deploy.init(folder, DEMONSTRATION, study, app=app, **where)
    try:
        yield folder
    finally:
        fedcanary("deploy", "down", str(folder))
        for one in STARTED:
            one.kill()
            one.wait()
        STARTED.clear()
        assert not living(load_server(folder / "server").id)


@contextmanager
def up(folder: Path, patience: Mapping[str, int] = {}, **more) -> Iterator[Path]:
    """One whose programs run; the server waits for an exchange for a minute at most, or as long as is said."""
    with written(folder, **more) as made:
        impatient(made, **patience)
        started(made.parent / "up.log", "deploy", "up", str(made))
        yield made


def in_one_process(out: Path, study: tuple[str, ...] = STUDY) -> bytes:
    """The record of the same study without Flower."""
    out.mkdir()
    (out / "engine.json").write_text('{"tokens": 1024}')
    record = pipeline.run(prepare(studies.load(DEMONSTRATION, study), cache()), out)
    return record.path.read_bytes()


def begun(folder: Path) -> subprocess.Popen:
    """`deploy run`."""
    return started(folder.parent / "run.log", "deploy", "run", str(folder), "--json")


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


def tell(folder: Path, part: str, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to all processes of a part."""
    found = living(load_server(folder / "server").id, part)
    assert found, f"no {part} to signal"
    for pid in found:
        os.kill(pid, number)


def impatient(folder: Path, **seconds: int) -> None:
    """The server waits for an exchange for a minute at most, and for nodes as long as is said."""
    file = folder / "server" / "server.toml"
    text = file.read_text()
    for name, value in {"train": 60, "step": 60, **seconds}.items():
        text = re.sub(rf"^{name}_seconds = \d+", f"{name}_seconds = {value}", text, flags=re.MULTILINE)
    file.write_text(text)


def counts(folder: Path) -> list[int]:
    """How many clients are in each round's release, of a record that holds."""
    verify(folder / "server" / "run")
    return released(folder)


def released(folder: Path) -> list[int]:
    """The same of a run that goes on: nothing else is checked."""
    out = folder / "server" / "run"
    return [int(round["utility"].count) if round else 0 for round in RunRecord.load(out).releases().values()]


def until_listening(folder: Path) -> None:
    end = time.monotonic() + 60
    while not load_server(folder / "server").address:
        assert time.monotonic() < end
        time.sleep(0.2)


def address(folder: Path, node: Path) -> None:
    """Tell a node where the SuperLink is."""
    file = node / "node.toml"
    where = load_server(folder / "server").address
    file.write_text(re.sub(r'^superlink = ".*"', f'superlink = "{where}"', file.read_text(), flags=re.MULTILINE))
