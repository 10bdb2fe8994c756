"""Programs that are kept running, and none that outlives whoever started it. Shell commands stand for Flower's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcanary.engines.flower import processes
from fedcanary.engines.flower.processes import AGAIN, PATIENCE, Group, Part, end, environment, living
from fedcanary.errors import BadInput

DETACHES = "setsid sleep 60 & setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & sleep 60"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shell(id: str, script: str, home: Path, name: str = "node-001", **more) -> Part:
    return Part(id=id, name=name, home=home, command=lambda: ["/bin/sh", "-c", script], **more)


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def over(part: Part) -> None:
    assert part.process is not None
    part.process.wait(10)


def test_the_environment_is_the_deployments_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # would join a cluster of somebody else's
    found = environment("abc", "node-001", tmp_path)
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert (found["FLWR_HOME"], found["FLWR_TELEMETRY_ENABLED"]) == (str(tmp_path), "0")
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert "RAY_ADDRESS" not in found


def test_a_program_that_is_not_installed_says_what_to_install():
    with pytest.raises(BadInput, match=r"fedcanary\[flower\]"):
        processes.program("flower-nothing")


def test_a_part_is_started_again_with_growing_pauses_until_patience_is_over(tmp_path):
    clock = Clock()
    part = shell("t1", "echo once >> starts; exit 1", tmp_path, clock=clock)
    part.start()
    waits, first = [], clock.now
    while True:
        over(part)
        if part.poll() == "ended":
            break
        began = clock.now
        while part.poll() == "waiting":
            clock.now += 0.5
        waits.append(clock.now - began)
    assert waits[: len(AGAIN)] == list(AGAIN)
    assert set(waits[len(AGAIN) :]) == {AGAIN[-1]}
    assert PATIENCE < clock.now - first <= PATIENCE + AGAIN[-1] + 1  # longer than 2 heartbeats of 30 s
    assert len((tmp_path / "starts").read_text().split()) == len(waits) + 1
    assert part.poll() == "ended"


def test_a_part_that_was_well_for_a_while_is_forgiven_its_past(tmp_path):
    clock = Clock()
    part = shell("t2", "sleep 60", tmp_path, clock=clock)
    part.start()
    for _ in range(20):  # in all far longer than patience
        clock.now += processes.SETTLED
        assert part.poll() == "up"
        assert part.process is not None
        part.process.kill()
        over(part)
        assert part.poll() == "waiting"
        clock.now += AGAIN[0]
        assert part.poll() == "starting"
    end("t2")
    over(part)


def test_what_an_ended_part_left_running_is_ended_before_its_successor_starts(tmp_path):
    part = shell("t3", "setsid sleep 60 & exit 1", tmp_path)
    part.start()
    over(part)
    until(lambda: len(living("t3", "node-001")) == 1)
    assert part.poll() == "waiting"
    assert living("t3") == []


def test_a_part_is_up_when_its_log_says_so_since_the_last_start(tmp_path):
    (tmp_path / "node-001.log").write_text("SuperNode ID: 1\n")  # of an earlier start
    part = shell("t4", "while [ ! -e go ]; do sleep 0.05; done; echo SuperNode ID: 2; sleep 60", tmp_path, ready="ID:")
    with Group("t4") as group:
        group.add(part)
        assert part.poll() == "starting"
        (tmp_path / "go").touch()
        until(lambda: part.poll() == "up")
    assert living("t4") == []


def test_a_group_leaves_nothing_running_even_what_left_its_session_and_ignores_sigterm(tmp_path):
    with Group("t5.up", grace=0.5) as group:
        group.add(shell("t5.up", DETACHES, tmp_path))
        until(lambda: len(living("t5")) >= 4)
        others = group.add(shell("t5.up", "sleep 60", tmp_path, "node-0011"))
        assert living("t5", "node-001") and others.process is not None
        assert others.process.pid not in living("t5", "node-001")  # a name is matched whole
        assert others.process.pid in living("t5", "node-")
        assert living("t") == living("t5.upper") == []  # and so is an id
    assert living("t5") == []


def test_a_part_that_does_not_start_is_one_error_with_the_end_of_its_log(tmp_path):
    with Group("t6") as group:
        part = group.add(shell("t6", "echo the port is taken; exit 3", tmp_path))
        with pytest.raises(BadInput, match="the port is taken"):
            group.wait(part, 5, lambda: False)
    assert living("t6") == []


PARENT = """
import sys
from pathlib import Path
from fedcanary.engines.flower.processes import Group, Part
with Group("t7.up") as group:
    group.add(Part(id="t7.up", name="node-001", home=Path(sys.argv[1]), command=lambda: ["/bin/sh", "-c", sys.argv[2]]))
    print("up", flush=True)
    import time; time.sleep(60)
"""


def test_children_do_not_outlive_a_parent_that_was_killed(tmp_path):
    """The attack on clean-up: SIGKILL, of which no handler hears."""
    script = "setsid sleep 60 & sleep 60"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    until(lambda: len(living("t7")) == 3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until(lambda: living("t7") == [])
