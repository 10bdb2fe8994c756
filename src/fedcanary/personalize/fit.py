"""Local training of K clients at once: one optimizer over stacked parameters, clients never mixing.

Every client has its own data, its own order of examples, its own number of steps, its own gradient norm and its own
dropout; a client that has finished (or failed) stops moving while the others go on. What moves is one table, a row for
each client, so that a step of all of them is a few elementwise operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.models.stacked import Part, attached, batch, log_probabilities
from fedcanary.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a client trains. `clip` bounds the L2 norm of its gradient per step (0: no bound), `dropout` is the chance
    that an input of a LoRA layer is left out, and `early_stop` the number of epochs in a row without a lower mean loss
    after which a client stops (0: it never does).
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    epochs: int = 1
    batch: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Literal["constant", "linear"] = "constant"
    dropout: float = 0.0
    early_stop: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """K trained adapters, each client's mean loss over its last whole epoch (K,), NaN if there is none, and who failed
    (K,): loss not finite.
    """

    params: Adapter
    loss: Array
    failed: np.ndarray


def fit(
    base: BaseModel,
    lora: Lora,
    start: Mapping[str, Tensor],
    data: Sequence[Rows],
    recipe: Recipe,
    order: Callable[[int, int], np.random.Generator],
    *,
    trains: Callable[[str], bool] = lambda name: True,
    anchor: Mapping[str, Tensor] | None = None,
    mu: float = 0.0,
    beside: Sequence[tuple[Mapping[str, Tensor], float]] = (),
    weight: float | None = None,
    coins: Callable[[int], torch.Generator] | None = None,
) -> Fitted:
    """Train a stacked adapter on K clients' rows.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        start: stacked parameters to begin from; not changed.
        data: K row lists.
        recipe: optimizer and schedule.
        order: order(k, epoch) gives the generator that shuffles client k's rows in that epoch.
        trains: which parameters move.
        anchor: stacked parameters of the proximal term mu / 2 * |w - anchor|^2 over the parameters that move.
        mu: its weight.
        beside: other adapters that are attached, unmoved, each with a weight (a mixture).
        weight: weight of the trained adapter in that mixture.
        coins: coins(k) gives the generator of client k's dropout; needed if the recipe has dropout.
    """
    k, device = len(data), base.device
    epoch_steps = np.array([-(-len(rows) // recipe.batch) for rows in data], dtype=np.int64)
    steps = recipe.epochs * epoch_steps
    plan = [_plan(rows, recipe, order, j) for j, rows in enumerate(data)]
    start = {name: tensor.to(device) for name, tensor in start.items()}
    beside = [({name: tensor.to(device) for name, tensor in other.items()}, w) for other, w in beside]
    moving = _Moving.of({name: tensor for name, tensor in start.items() if trains(name)})
    pulled = None
    if anchor is not None and mu > 0:
        pulled = _Moving.of({name: anchor[name].to(device) for name in moving.shapes}).table
    optimizer = _Optimizer(moving.table, recipe)
    sources = [coins(j) for j in range(k)] if coins is not None and recipe.dropout > 0 else None
    failed, patience = np.zeros(k, dtype=bool), _Patience(k, recipe.early_stop)
    for step in range(int(steps.max(initial=0))):
        on = np.flatnonzero((steps > step) & ~failed & ~patience.over).tolist()
        if not on:
            break
        rows = torch.tensor(on, device=device)
        leaves = moving.leaves(rows)
        params = {name: leaves.get(name, tensor[rows]) for name, tensor in start.items()}
        laid = batch(base, [data[j] for j in on], [plan[j][step] for j in on])
        tall = laid.ids.shape[0]
        drop = None
        if sources is not None:
            sizes = [_size(data[j], plan[j][step]) for j in on]
            drop = partial(_dropped, recipe.dropout, [sources[j] for j in on], sizes)
        parts = [Part(params, None if weight is None else _full(tall, weight, params), drop)]
        for other, w in beside:
            parts.append(Part({name: tensor[rows] for name, tensor in other.items()}, _full(tall, w, params)))
        with attached(base, lora, parts, len(on)):
            nll = -log_probabilities(base, laid, lora)
        count = torch.bincount(laid.client, minlength=len(on)).clamp(min=1)
        loss = torch.zeros(len(on), dtype=nll.dtype, device=device).index_add_(0, laid.client, nll) / count
        gradient = moving.join(torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True), len(on))
        if pulled is not None:
            gradient.add_(moving.table[rows] - pulled[rows], alpha=mu)
        seen = loss.detach().double().cpu().numpy()  # each client's mean over its tokens
        good = np.isfinite(seen) & optimizer.step(rows, gradient, step + 1, _rate(recipe, step, steps[on]))
        failed[on] = ~good
        patience.note(on, seen, (step + 1) % epoch_steps[on] == 0)
    failed |= ~torch.isfinite(moving.table).all(dim=1).cpu().numpy()  # the last step has no later loss to show it
    trained = moving.split()
    return Fitted({n: trained.get(n, t).detach().clone().cpu() for n, t in start.items()}, patience.loss, failed)


class _Patience:
    """Mean loss of each client's epochs, and whose training is over because it no longer falls."""

    def __init__(self, k: int, epochs: int) -> None:
        self.over, self.loss = np.zeros(k, dtype=bool), np.full(k, np.nan)
        self._epochs, self._best, self._waited = epochs, np.full(k, np.inf), np.zeros(k, dtype=np.int64)
        self._sum, self._count = np.zeros(k), np.zeros(k)

    def note(self, on: Sequence[int], loss: Array, ends: np.ndarray) -> None:
        """Take in one step of the clients `on`: their losses, and for whom an epoch ends with it."""
        self._sum[on] += loss
        self._count[on] += 1
        done = np.asarray(on)[ends]
        self.loss[done] = self._sum[done] / self._count[done]
        self._sum[done] = self._count[done] = 0
        better = self.loss[done] < self._best[done]
        self._waited[done] = np.where(better, 0, self._waited[done] + 1)
        self._best[done] = np.minimum(self._best[done], self.loss[done])
        self.over[done] = (self._epochs > 0) & (self._waited[done] >= self._epochs)


def _size(rows: Rows, chosen: Sequence[int]) -> tuple[int, int]:
    return len(chosen), max(len(rows.ids[i]) for i in chosen)


def _dropped(chance: float, sources: Sequence[torch.Generator], sizes: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
    """LoRA's input (K * B, T, ...) with each client's own dropout, which knows nothing of the others or of padding."""
    k = len(sources)
    kept = torch.ones(x.shape)
    each = kept.view(k, -1, *x.shape[1:])
    for j, (source, (height, width)) in enumerate(zip(sources, sizes, strict=True)):
        shape = (height, min(width, x.shape[1]), x.shape[2]) if x.dim() == 3 else (height, x.shape[1])
        own = each[j, :height, : shape[1]]
        own.copy_((torch.rand(shape, generator=source) >= chance) / (1 - chance))
    return x * kept.to(x)


def _full(tall: int, weight: float, like: Mapping[str, Tensor]) -> Tensor:
    some = next(iter(like.values()))
    return torch.full((tall,), weight, dtype=some.dtype, device=some.device)


def _plan(rows: Rows, recipe: Recipe, order: Callable[[int, int], np.random.Generator], k: int) -> list[list[int]]:
    chunks = []
    for epoch in range(recipe.epochs):
        shuffled = order(k, epoch).permutation(len(rows)).tolist()
        chunks += [shuffled[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
    return chunks


def _rate(recipe: Recipe, step: int, steps: np.ndarray) -> Array:
    if recipe.schedule == "constant":
        return np.full(len(steps), recipe.lr)
    return np.asarray(recipe.lr * np.clip(1 - step / np.maximum(steps, 1), 0, 1))


@dataclass(frozen=True, slots=True)
class _Moving:
    """The parameters that move as one table (K, P), and which of its columns are which tensor."""

    table: Tensor
    shapes: Mapping[str, torch.Size]  # of one client

    @classmethod
    def of(cls, stacked: Mapping[str, Tensor]) -> _Moving:
        table = torch.cat([t.detach().reshape(len(t), -1) for t in stacked.values()], dim=1)  # a copy
        return cls(table, {name: t.shape[1:] for name, t in stacked.items()})

    def leaves(self, rows: Tensor) -> Adapter:
        """The tensors of some clients, for one pass of autograd."""
        return {name: t.detach().requires_grad_() for name, t in self.split(self.table[rows]).items()}

    def split(self, table: Tensor | None = None) -> Adapter:
        """Views of a table, by name."""
        table = self.table if table is None else table
        parts = torch.split(table, [shape.numel() for shape in self.shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, gradients: Sequence[Tensor | None], k: int) -> Tensor:
        """(k, P) of one gradient for each tensor; None is zero."""
        found = [
            self.table.new_zeros(k, shape.numel()) if g is None else g.reshape(k, -1)
            for g, shape in zip(gradients, self.shapes.values(), strict=True)
        ]
        return torch.cat(found, dim=1)


class _Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) or SGD, elementwise over the table."""

    def __init__(self, table: Tensor, recipe: Recipe) -> None:
        self.table, self.recipe = table, recipe
        self.first, self.second = torch.zeros_like(table), torch.zeros_like(table)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor, count: int, rate: Array) -> np.ndarray:
        """Move some clients' rows, `count` steps into their training, at rates (k,).

        Returns which of them moved, (k,): those whose gradient is finite. The gradient (k, P) is overwritten.
        """
        norm = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        good = torch.isfinite(norm)
        if not good.all():
            rows, gradient, norm, rate = rows[good], gradient[good], norm[good], rate[good.cpu().numpy()]
        if self.recipe.clip > 0:
            gradient.mul_((self.recipe.clip / norm.clamp(min=1e-12)).clamp(max=1.0).to(gradient.dtype).unsqueeze(1))
        lr = torch.from_numpy(rate).to(gradient).unsqueeze(1)
        table = self.table[rows]
        if self.recipe.weight_decay:
            table.mul_(1 - lr * self.recipe.weight_decay)
        if self.recipe.optimizer == "adamw":
            first = self.first[rows].lerp_(gradient, 0.1)
            second = self.second[rows].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            self.first[rows], self.second[rows] = first, second
            root = second.sqrt_().div_(math.sqrt(1 - 0.999**count)).add_(1e-8)
            gradient = first.div_(root).div_(1 - 0.9**count)
        self.table[rows] = table.sub_(gradient.mul_(lr))
        return good.cpu().numpy()
