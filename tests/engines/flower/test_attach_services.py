"""The example, attached, in Flower's own simulation: SuperLink, Ray and all."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from attached import copy, edit

from fedcanary.engines import verify
from fedcanary.engines.flower.processes import program
from fedcanary.engines.flower.simulate import simulated
from fedcanary.record import RunRecord


@pytest.fixture
def home():
    """Whose path is short: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="fl") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_the_example_runs_in_flowers_simulation_and_sums_securely(home):
    app = copy("attach-pytorch", home, attach=True)
    edit(app / "study.toml", ("clients = 24", "clients = 4"), ("min_cohort = 12", "min_cohort = 3"))
    edit(app / "study.toml", ("rounds = 5", "rounds = 2"))
    link = [program("flower-superlink")]
    with simulated(app, 4, 2, link, "num-server-rounds=2 local-epochs=1", home=home) as streamed:
        end = time.monotonic() + 240
        while time.monotonic() < end and "Final results" not in (log := streamed.log.read_text("utf-8")):
            time.sleep(1)
    assert "Final results" in log
    (out,) = (home / "fedcanary-runs").iterdir()
    record = RunRecord.load(out)
    assert record.ended
    assert [r["utility"].count for r in record.releases().values()] == [4, 4]
    assert verify.verify(out)["rounds"] == 2
