"""Loads Flower once, before the suite's own warnings are errors: it still uses what its dependencies deprecate."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401  # for what loading it does
    from federation import Federation
    from flwr.supercore.task_identity import TaskIdentity
    from rough import study
    from sums import memory


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Who this process is to Flower, which every message says; a ServerApp's process is told at its start."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def room():
    with memory() as folder:
        yield folder


@pytest.fixture
def far(room):
    """Four clients; three are enough."""
    return Federation(study(4), room / "run")
