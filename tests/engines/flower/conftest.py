"""Loads Flower once, before the suite's own warnings are errors: it still uses what its dependencies deprecate."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401
    from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Who this process is to Flower, which every message says; a ServerApp's process is told at its start."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
