"""Fixtures of the tests of private training."""

from __future__ import annotations

import pytest
import torch

from fedcanary.models import base
from oracles.private_step import F64


@pytest.fixture(scope="module")
def load(tiny):
    known = {}

    def get(architecture: str, dtype: torch.dtype = F64):
        if (architecture, dtype) not in known:
            task, labels = ("classify", ("no", "maybe", "yes")) if architecture == "bert" else ("causal", ())
            known[architecture, dtype] = base.load(
                str(tiny[architecture]), task=task, labels=labels, max_length=48, dtype=dtype
            )
        return known[architecture, dtype]

    return get
