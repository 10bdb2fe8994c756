"""The cells: a base, clients with rows of their own, and one training pass over them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from job import ALPHA, LR, TARGETS, Job, R, data, load
from ours import rows as rows_of

from fedcanary.models import base as models
from fedcanary.models import stacked
from fedcanary.models.adapters import Adapter, Lora, find_targets
from fedcanary.models.base import BaseModel, Rows
from fedcanary.personalize.fit import Fitted, Recipe, fit
from fedcanary.probes import suites
from fedcanary.rng import stream
from fedcanary.types import Array, Item

PEOPLE = 32  # clients with rows of their own in a cell
READERS = 4  # clients in a reading pass
OF_A_READER = f"K = {READERS}; ms of a client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A base, the size of a client's batch, and how many clients go through the model together."""

    model: str
    batch: int
    tokens: int
    k: int

    @property
    def name(self) -> str:
        """As the table has it."""
        names = {"llama128": "hidden 128", "llama256": "hidden 256", "minilm": "MiniLM"}
        return f"{names[self.model]}, {self.batch}x{self.tokens}, K = {self.k}"


SMALL = Cell(model="llama128", batch=4, tokens=32, k=16)
MIDDLE = Cell(model="llama128", batch=8, tokens=32, k=8)
WIDE = Cell(model="llama256", batch=8, tokens=64, k=2)
ENCODER = Cell(model="minilm", batch=8, tokens=32, k=4)
CAUSAL = (SMALL, MIDDLE, WIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A cell's base, its clients' first adapter and their rows: one step for each epoch."""

    cell: Cell
    base: BaseModel
    lora: Lora
    start: Adapter
    rows: Sequence[Rows]
    recipe: Recipe

    def fit(self, k: int = 0) -> Fitted:
        """Train k clients (0: the cell's)."""
        k = k or self.cell.k
        mine = [self.rows[j % len(self.rows)] for j in range(k)]
        return fit(self.base, self.lora, stacked.repeat(self.start, k), mine, self.recipe, shuffled)

    def losses(self) -> Array:
        """Train, and say each client's loss (k,)."""
        return self.fit().loss

    def laid(self, k: int = 0) -> tuple[stacked.Batch, Adapter]:
        """A step's batch and the parameters that autograd is to see."""
        k = k or self.cell.k
        chosen = [list(range(self.cell.batch))] * k
        leaves = {name: tensor.requires_grad_() for name, tensor in stacked.repeat(self.start, k).items()}
        return stacked.batch(self.base, self.rows[:k], chosen), leaves


def shuffled(client: int, epoch: int) -> np.random.Generator:
    return stream(0, "attempts", client, epoch)


@functools.cache
def work(home: Path, cell: Cell) -> Work:
    """Everything for a cell; `home` is as prepare.py leaves it."""
    job = Job(model=cell.model, clients=PEOPLE, batch=cell.batch, tokens=cell.tokens, steps=1, rounds=1)
    base = models.load(str(home / cell.model), task=job.task)
    random = np.random.default_rng(0)
    start = {
        name: torch.from_numpy(array + 0.02 * random.standard_normal(array.shape).astype(np.float32))
        for name, array in load(home / cell.model / "start.npz").items()
    }
    content = data(job, base.model.config.vocab_size)
    return Work(
        cell=cell,
        base=base,
        lora=find_targets(base, r=R, alpha=ALPHA, targets=TARGETS[cell.model]),
        start=start,
        rows=[rows_of(job, content, client) for client in range(PEOPLE)],
        recipe=Recipe(lr=LR, batch=cell.batch),
    )


def asked() -> tuple[Item, ...]:
    """All packaged public items."""
    return tuple(item for name in suites.packaged() for item in suites.load(name).items)
