"""fedcanary's own study over real processes, TLS and registered keys, with nodes and the server killed on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcanary import pipeline, study
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines.flower.deploy import load_server
from fedcanary.engines.flower.processes import free_port, living
from fedcanary.engines.setup import cache, prepare
from fedcanary.engines.verify import verify
from fedcanary.record import RunRecord

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
    *(
        "privacy.panel=same",
        "privacy.min_cohort=3",
        "privacy.dropouts=0.3",
        "privacy.noise=simulated",
        "engine.stack=1",
        "engine.threads=1",
    ),
)
STARTED: list[subprocess.Popen] = []
FEDCANARY = (sys.executable, "-m", "fedcanary")


def sets() -> list[str]:
    return [word for key in STUDY for word in ("--set", key)]


def fedcanary(*words: str, **more) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*FEDCANARY, *words], check=True, timeout=120, **more)


def started(log: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A command that stays, whose output goes to a file: a pipe that a failed test leaves open is another's warning."""
    with log.open("a") as stream:
        found = subprocess.Popen([*before, *FEDCANARY, *words], stdout=stream, stderr=stream)
    STARTED.append(found)
    return found


@contextmanager
def written(folder: Path, *words: str) -> Iterator[Path]:
    """A deployment that is not up, and is taken down with nothing left."""
    fedcanary("deploy", "init", str(folder), *words, *sets())
    try:
        yield folder
    finally:
        fedcanary("deploy", "down", str(folder))
        for one in STARTED:
            one.kill()
            one.wait()
        STARTED.clear()
        assert not living(load_server(folder / "server").id)


@pytest.fixture
def made(tmp_path):
    with written(tmp_path / "d") as folder:
        yield folder


@pytest.fixture
def deployment(made):
    """One that is up."""
    started(made.parent / "up.log", "deploy", "up", str(made))
    return made


def in_one_process(out: Path) -> bytes:
    """The record of the same study without Flower."""
    out.mkdir()
    (out / "engine.json").write_text('{"stack": 1, "tokens": 1024, "threads": 1}')
    record = pipeline.run(prepare(study.load(DEMONSTRATION, STUDY), cache()), out)
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
    out = folder / "server" / "run"
    verify(out)
    return [int(round["utility"].count) if round else 0 for round in RunRecord.load(out).releases().values()]


def test_whatever_is_killed_the_record_is_that_of_one_process(deployment, tmp_path):
    run = begun(deployment)
    wait_for(deployment, 1, "train")
    tell(deployment, "node-002")
    wait_for(deployment, 2, "agree")
    tell(deployment, "node-001")
    wait_for(deployment, 2, "unmask")
    tell(deployment, "node-003")
    wait_for(deployment, 3, "agree")
    tell(deployment, "superexec")  # and with it the ServerApp
    assert run.wait(timeout=300) not in (0, 3), said(deployment)
    again = begun(deployment)
    assert again.wait(timeout=580) in (0, 3), said(deployment)
    out = deployment / "server" / "run"
    assert (out / "record.jsonl").read_bytes() == in_one_process(tmp_path / "here")
    assert verify(out)["rounds"] == ROUNDS


@pytest.mark.timeout(900)
def test_a_node_that_hangs_is_left_out_until_it_goes_on_and_a_superlink_that_dies_is_started_again(made):
    impatient(made)
    started(made.parent / "up.log", "deploy", "up", str(made))
    run = begun(made)
    wait_for(made, 1, "train")
    tell(made, "node-002", signal.SIGSTOP)  # it neither answers nor signs off
    wait_for(made, 2, "train")
    tell(made, "node-002", signal.SIGCONT)
    wait_for(made, 3, "agree")
    tell(made, "superlink")
    assert run.wait(timeout=500) in (0, 3), said(made)
    found = counts(made)
    assert len(found) == ROUNDS
    assert found[0] == NODES - 1
    assert min(found) >= NODES - 1


@pytest.mark.timeout(900)
def test_a_wrong_key_and_another_contract_take_no_part_and_the_run_says_so(made):
    """One of four has a key that nobody registered, one another contract: too few are left, until that is mended."""
    impatient(made, nodes=90)
    fedcanary("deploy", "rekey", str(made / "nodes" / "003"), stdout=subprocess.DEVNULL)
    study = made / "nodes" / "002" / "study.toml"
    right = study.read_text()
    study.write_text(re.sub(r"^epsilon = .*", "epsilon = 7.0", right, flags=re.MULTILINE))
    assert study.read_text() != right
    started(made.parent / "server.log", "deploy", "server", str(made / "server"))
    until_listening(made)
    for client in range(NODES):
        node = made / "nodes" / f"{client:03d}"
        address(made, node)
        started(made.parent / f"node-{client}.log", "deploy", "node", str(node))
    run = begun(made)
    assert run.wait(timeout=400) not in (0, 3), said(made)
    assert "2 of 4 clients are online and of this contract, 3 are needed" in said(made)
    assert "other_contract" in said(made)
    assert not (made / "server" / "run" / "record.jsonl").exists() or counts(made) == []
    study.write_text(right)
    tell(made, "node-002")  # it is started again, and reads its study anew
    again = begun(made)
    assert again.wait(timeout=500) in (0, 3), said(made)
    assert counts(made) == [NODES - 1] * ROUNDS


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


NAMESPACE, THERE, HERE = "fedcanary-test", ("fcv0", "10.77.77.1"), ("fcv1", "10.77.77.2")


@pytest.fixture
def wire():
    """A network of one wire between this machine's and another namespace."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("cutting a network needs root and iproute2")

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if not ip("netns", "add", NAMESPACE):
        pytest.skip("no network namespaces here")
    try:
        assert ip("link", "add", THERE[0], "type", "veth", "peer", "name", HERE[0], "netns", NAMESPACE)
        assert ip("addr", "add", f"{THERE[1]}/24", "dev", THERE[0])
        assert ip("link", "set", THERE[0], "up")
        for words in (("addr", "add", f"{HERE[1]}/24", "dev", HERE[0]), ("link", "set", HERE[0], "up")):
            assert ip("-n", NAMESPACE, *words)
        assert ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield lambda state: ip("link", "set", THERE[0], state)
    finally:
        ip("link", "del", THERE[0])
        ip("netns", "del", NAMESPACE)


@pytest.mark.timeout(900)
def test_a_network_that_is_cut_and_healed_costs_no_round(wire, tmp_path):
    """The nodes are in one namespace, the server in another; the wire between them is cut in the midst of two steps."""
    port = str(free_port())
    with written(tmp_path / "d", "--host", THERE[1], "--port", port) as folder:
        started(tmp_path / "server.log", "deploy", "server", str(folder / "server"))
        until_listening(folder)
        for client in range(NODES):
            node = folder / "nodes" / f"{client:03d}"
            log = tmp_path / f"node-{client}.log"
            started(log, "deploy", "node", str(node), before=("ip", "netns", "exec", NAMESPACE))
        run = begun(folder)
        for round, step in ((1, "train"), (2, "unmask")):
            wait_for(folder, round, step)
            assert wire("down")
            time.sleep(25)
            assert run.poll() is None
            assert wire("up")
        assert run.wait(timeout=500) in (0, 3), said(folder)
        found = counts(folder)
        assert len(found) == ROUNDS
        assert min(found) >= NODES - 1
