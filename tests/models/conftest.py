"""The tiny models, each loaded once for a file."""

from __future__ import annotations

import pytest
import torch
from made_up import F64

from fedcanary.models import base
from oracles.tiny import LABELS

LOADED: dict[tuple[str, torch.dtype], base.BaseModel] = {}


@pytest.fixture(scope="module", autouse=True)
def a_file(one_thread):
    """Everything on one thread, and nothing loaded is left."""
    yield
    LOADED.clear()


@pytest.fixture
def load(tiny):
    def loaded(name: str, dtype: torch.dtype = F64) -> base.BaseModel:
        if (name, dtype) not in LOADED:
            how = {"task": "classify", "labels": LABELS} if name == "bert" else {}
            LOADED[name, dtype] = base.load(str(tiny[name]), dtype=dtype, **how)
        return LOADED[name, dtype]

    return loaded
