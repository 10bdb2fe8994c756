"""The example, attached, in Flower's own simulation: SuperLink, Ray and all."""

from __future__ import annotations

import secrets
import time

import pytest
import tomli_w
from attached import copy, edit

from fedcanary.engines import verify
from fedcanary.engines.flower.processes import Group, Part, free_port, program
from fedcanary.engines.flower.programs import START, answers
from fedcanary.record import RunRecord


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_the_example_runs_in_flowers_simulation_and_sums_securely(tmp_path):
    app = copy("attach-pytorch", tmp_path, attach=True)
    edit(app / "study.toml", ("clients = 24", "clients = 4"), ("min_cohort = 12", "min_cohort = 3"))
    edit(app / "study.toml", ("rounds = 5", "rounds = 2"))
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    tables = {"superlink": {"default": "simulation", "simulation": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(tables), "utf-8")
    link = [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
    link += ["--port", str(port), "--database", str(home / "state.db"), "--disable-runtime-dependency-installation"]
    federation = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    submit = [program("flwr"), "run", str(app), "simulation", "--stream", "--federation-config", federation]
    submit += ["-c", "num-server-rounds=2 local-epochs=1"]
    with Group(secrets.token_hex(8)) as group:
        part = Part(id=group.id, name="superlink", home=home, command=lambda: link)
        group.add(part)
        group.wait(part, START, lambda: answers(f"http://127.0.0.1:{port}/health"))
        group.add(Part(id=group.id, name="run", home=home, command=lambda: submit))
        end = time.monotonic() + 240
        while time.monotonic() < end and "Final results" not in (log := (home / "run.log").read_text("utf-8")):
            time.sleep(1)
    assert "Final results" in log, log + part.log.read_text("utf-8")
    (out,) = (home / "fedcanary-runs").iterdir()
    record = RunRecord.load(out)
    assert record.ended
    assert [r["utility"].count for r in record.releases().values()] == [4, 4]
    assert verify.verify(out)["rounds"] == 2
