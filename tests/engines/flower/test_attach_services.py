"""The example, attached, in Flower's own simulation, and over a SuperLink and SuperNodes that know nothing of us."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tomli_w
from attached import copy, edit

from fedcanary.engines import verify
from fedcanary.engines.flower.processes import Group, Part, free_port, living, program
from fedcanary.engines.flower.programs import START, answers
from fedcanary.engines.flower.simulate import simulated
from fedcanary.record import RunRecord

CLIENTS = 4
CONFIG = "num-server-rounds=2 local-epochs=1"
FEDCANARY = [sys.executable, "-m", "fedcanary"]


@pytest.fixture
def home():
    """Whose path is short: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="fl") as folder:
        yield Path(folder)


def small(home: Path) -> Path:
    """The attached app, for a few clients and rounds."""
    app = copy("attach-pytorch", home, attach=True)
    edit(app / "study.toml", ("clients = 24", f"clients = {CLIENTS}"), ("min_cohort = 12", "min_cohort = 3"))
    edit(app / "study.toml", ("rounds = 5", "rounds = 2"))
    return app


def until_over(streamed: Part, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and "Final results" not in (log := streamed.log.read_text("utf-8")):
        time.sleep(1)
    assert "Final results" in log, log


def assert_watched(home: Path) -> None:
    """A record of two rounds that holds, and everybody in both."""
    (out,) = (home / "fedcanary-runs").iterdir()
    record = RunRecord.load(out)
    assert record.ended
    assert [r["utility"].count for r in record.releases().values()] == [CLIENTS, CLIENTS]
    assert verify.verify(out)["rounds"] == 2


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_the_example_runs_in_flowers_simulation_and_sums_securely(home):
    link = [program("flower-superlink")]
    with simulated(small(home), CLIENTS, 2, link, CONFIG, home=home) as streamed:
        until_over(streamed)
    assert_watched(home)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_the_example_runs_over_nodes_that_each_have_a_key_and_a_folder_of_their_own(home):
    """Flower's programs as its own documentation calls them; the registry is what every node printed of its key."""
    app = small(home)
    edit(app / "study.toml", ("[attach]\n", '[attach]\nregistry = "registry.toml"\n'))
    made = [[*FEDCANARY, "deploy", "keys", str(home / f"node-{c}"), "--client", str(c)] for c in range(CLIENTS)]
    registry = "".join(subprocess.run(words, check=True, capture_output=True, text=True).stdout for words in made)
    (app / "registry.toml").write_text(registry)
    port = free_port()
    tables = {"superlink": {"default": "own", "own": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(tables))
    with Group(secrets.token_hex(8)) as group:

        def part(name: str, *words: str) -> Part:
            return group.add(Part(id=group.id, name=name, home=home, command=lambda: [program(words[0]), *words[1:]]))

        link = part("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        group.wait(link, START, lambda: answers(f"http://127.0.0.1:{port}/health"))
        for client in range(CLIENTS):
            folder = home / f"node-{client}"
            (folder / "registry.toml").write_text(registry)
            # who is whose partition is the app's matter: our numbers run the other way
            config = f"partition-id={CLIENTS - 1 - client} num-partitions={CLIENTS} fedcanary-client={client}"
            config += f' fedcanary-folder="{folder}"'
            node = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--node-config", config)
            part(f"node-{client}", *node, "--port", str(free_port()))
        until_over(part("run", "flwr", "run", str(app), "own", "--stream", "-c", CONFIG), seconds=400)
    assert not living(group.id)
    assert_watched(home)
    for client in range(CLIENTS):
        own = home / f"node-{client}"
        assert [path.name for path in (own / "clients").iterdir()] == [f"{client:06d}"]
        assert (own / "clients" / f"{client:06d}" / "ledger.sqlite").exists()
        assert not list(own.rglob("errors.log"))
