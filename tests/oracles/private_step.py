"""One client of a tiny model that trains by DP-SGD: its rows, one step of it, and randomness with planted bugs."""

from __future__ import annotations

import numpy as np
import torch

from fedcanary.models import adapters, stacked
from fedcanary.models.base import Rows
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.personalize.private_fit import RecordLevel, fit_private
from fedcanary.types import Item

F64 = torch.float64
WORDS = ("red stew", "tall hedge", "an old map", "the cold owl sleeps here", "a river", "snow")


def level(**changes) -> RecordLevel:
    """Every example in every one of so many steps; no bound and no noise unless said."""
    return RecordLevel(**{"max_grad_norm": 1e6, "noise_multiplier": 0.0, "sample_rate": 1.0, "steps": 1, **changes})


def client(model, n: int = 8, seed: int = 1, dtype: torch.dtype = F64, even: bool = False):
    """A tiny model's adapter with nothing at zero, stacked for one client, and n rows of unequal length.

    `even`: every example has one target token. Otherwise, for a causal model, from one to several. n is a power of 2
    because the tiny Llama's norms compute in float32: then a mean's gradient is a sum's, bit for bit scaled.
    """
    lora = adapters.find_targets(model, r=3, alpha=6.0)
    generator = torch.Generator().manual_seed(seed)
    start = {
        name: (torch.randn(t.shape, generator=generator, dtype=F64) * 0.3).to(dtype)
        for name, t in adapters.initial(model, lora, 1, dtype).items()
    }
    items = []
    for i in range(n):
        long = ("no", "maybe", "yes") if model.task == "classify" else (" " + WORDS[i % 6] * (1 + i % 3),)
        items.append(Item(prompt=f"{WORDS[i % 6]} {i} {WORDS[(2 * i) % 6]}", choices=long, answer=i % len(long)))
    rows = model.targets(items)
    if even:
        rows = Rows(rows.ids, [targets[:1] for targets in rows.targets], rows.shape)
    return lora, stacked.repeat(start, 1), rows


def no_order(k: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng(epoch)


def flat(adapter) -> np.ndarray:
    return torch.cat([t.double().reshape(-1) for _, t in sorted(adapter.items())]).numpy()


def gradients(model, lora, start, rows: Rows) -> np.ndarray:
    """(n, D): each example's gradient: what one step of the stacked fit makes of a client that holds it alone."""
    n = len(rows)
    alone = [Rows([rows.ids[i]], [rows.targets[i]], rows.shape) for i in range(n)]
    many = {name: t.expand(n, *t.shape[1:]).clone() for name, t in start.items()}
    recipe = Recipe(optimizer="sgd", lr=1.0, batch=1, clip=0.0)
    after = fit(model, lora, many, alone, recipe, no_order).params
    return np.stack([flat(stacked.unstack(many, i)) - flat(stacked.unstack(after, i)) for i in range(n)])


def step(model, lora, start, rows: Rows, privacy: RecordLevel, sources=None, **recipe) -> np.ndarray:
    """(D,): what one full-batch step of SGD at rate 1 takes away, times the batch: the noised sum of gradients."""
    chosen = Recipe(**{"optimizer": "sgd", "lr": 1.0, "batch": len(rows), **recipe})
    after = fit_private(model, lora, start, [rows], chosen, privacy, sources).params
    return (flat(start) - flat(after)) * len(rows)


def without(rows: Rows, index: int) -> Rows:
    """The neighbour: one example replaced by an empty one."""
    return Rows(rows.ids, [[] if i == index else t for i, t in enumerate(rows.targets)], rows.shape)


class Scaled:
    """A planted bug: noise that is too small."""

    def __init__(self, source, factor: float) -> None:
        self.source, self.factor = source, factor

    def random(self, size):
        return self.source.random(size)

    def standard_normal(self, size):
        return self.source.standard_normal(size) * self.factor


class Nobody(Scaled):
    """No example ever joins."""

    def random(self, size):
        return np.ones(size)
