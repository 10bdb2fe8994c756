"""fedcanary's own study over real processes, TLS and registered keys, with nodes and the server killed on the way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from deployed import (
    NODES,
    ROUNDS,
    address,
    begun,
    counts,
    fedcanary,
    impatient,
    in_one_process,
    said,
    started,
    tell,
    until_listening,
    wait_for,
    written,
)

from fedcanary.engines.flower.processes import free_port
from fedcanary.engines.verify import verify

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
def made(tmp_path):
    with written(tmp_path / "d") as folder:
        yield folder


@pytest.fixture
def deployment(made):
    """One that is up."""
    started(made.parent / "up.log", "deploy", "up", str(made))
    return made


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
    with written(tmp_path / "d", host=THERE[1], port=free_port()) as folder:
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
