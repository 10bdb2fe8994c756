"""Fixtures of the whole suite. Being here also lets every test import the slow honest versions under `oracles`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models by architecture; see `oracles.tiny`."""
    from oracles.tiny import save_all

    return save_all(tmp_path_factory.mktemp("tiny"))
