"""Fixtures of the whole suite. Being here also lets every test import the slow honest versions under `oracles`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fedcanary.models.base import BaseModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models by architecture; see `oracles.tiny`."""
    from oracles.tiny import save_all

    return save_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Everything in a module on one thread of torch, so that sums are added in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tiny: dict[str, Path]) -> BaseModel:
    """The tiny random Llama, ready to train on."""
    from fedcanary.models import base

    return base.load(str(tiny["llama"]), max_length=48)
