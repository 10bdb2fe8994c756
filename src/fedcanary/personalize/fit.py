"""Local training of K clients at once: one optimizer over stacked parameters, clients never mixing.

Every client has its own data, its own order of examples, its own number of steps and its own gradient norm; a client
that has finished (or failed) stops moving while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    """How a client trains. `clip` bounds the L2 norm of its gradient per step (0: no bound)."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    epochs: int = 1
    batch: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Literal["constant", "linear"] = "constant"


@dataclass(frozen=True, slots=True)
class Fitted:
    """K trained adapters, each client's mean loss over its last epoch (K,), and who failed (K,): loss not finite."""

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
    """
    k = len(data)
    params = {n: t.detach().clone().requires_grad_(trains(n)) for n, t in start.items()}
    moving = {n: t for n, t in params.items() if t.requires_grad}
    steps = np.array([recipe.epochs * -(-len(rows) // recipe.batch) for rows in data])
    plan = [_plan(rows, recipe, order, j) for j, rows in enumerate(data)]
    optimizer = _Optimizer(moving, recipe)
    failed = np.zeros(k, dtype=bool)
    loss_sum, loss_steps = np.zeros(k), np.zeros(k)
    for step in range(int(steps.max(initial=0))):
        active = (steps > step) & ~failed
        if not active.any():
            break
        chosen = [plan[j][step] if active[j] else [] for j in range(k)]
        laid = batch(base, data, chosen)
        tall = laid.ids.shape[0]
        parts = [Part(params, None if weight is None else torch.full((tall,), weight, dtype=_dtype(params)))]
        parts += [Part(other, torch.full((tall,), w, dtype=_dtype(params))) for other, w in beside]
        with attached(base, lora, parts, k):
            nll = -log_probabilities(base, laid)
        count = torch.bincount(laid.client, minlength=k).clamp(min=1)
        loss = torch.zeros(k, dtype=nll.dtype).index_add_(0, laid.client, nll) / count  # (K,) mean over tokens
        total = loss.sum()
        if anchor is not None and mu > 0:
            total = total + mu / 2 * sum(((t - anchor[n]) ** 2).sum() for n, t in moving.items())
        gradients = torch.autograd.grad(total, list(moving.values()), allow_unused=True)
        seen = loss.detach().double().numpy()
        failed |= active & ~np.isfinite(seen)
        failed |= active & ~_finite(gradients, k)
        last = active & (step >= steps - steps // max(recipe.epochs, 1))
        loss_sum[last] += seen[last]
        loss_steps[last] += 1
        rate = _rate(recipe, step, steps)
        optimizer.step(gradients, active & ~failed, rate)
    failed |= ~_finite(list(moving.values()), k)  # the last step has no later loss to show it
    mean = np.divide(loss_sum, loss_steps, out=np.full(k, np.nan), where=loss_steps > 0)
    return Fitted({n: t.detach() for n, t in params.items()}, mean, failed)


def _dtype(params: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(params.values())).dtype


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


def _finite(gradients: Sequence[Tensor | None], k: int) -> np.ndarray:
    good = np.ones(k, dtype=bool)
    for g in gradients:
        if g is not None:
            good &= torch.isfinite(g.reshape(k, -1)).all(dim=1).numpy()
    return good


class _Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) or SGD, elementwise over stacked parameters."""

    def __init__(self, params: Mapping[str, Tensor], recipe: Recipe) -> None:
        self.params = list(params.values())
        self.recipe = recipe
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.steps: np.ndarray | None = None

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], active: np.ndarray, rate: Array) -> None:
        """Move the active clients' parameters; `rate` is (K,)."""
        k = len(active)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients, strict=True)]
        dtype = self.params[0].dtype
        if self.recipe.clip > 0:
            norm = torch.stack([(g.reshape(k, -1).double() ** 2).sum(1) for g in grads]).sum(0).sqrt()  # (K,)
            factor = (self.recipe.clip / norm.clamp(min=1e-12)).clamp(max=1.0).to(dtype)
            grads = [g * _per_client(factor, g) for g in grads]
        self.steps = np.zeros(k) if self.steps is None else self.steps
        self.steps = self.steps + active
        count = np.maximum(self.steps, 1)
        on = torch.from_numpy(active)
        lr = torch.from_numpy(np.where(active, rate, 0.0)).to(dtype)
        for p, g, m, v in zip(self.params, grads, self.first, self.second, strict=True):
            moved = _per_client(on, p)
            g = torch.where(moved, g, torch.zeros_like(g))  # a failed client's NaN stays out of its state
            if self.recipe.weight_decay:
                p.mul_(1 - _per_client(lr, p) * self.recipe.weight_decay)
            if self.recipe.optimizer == "sgd":
                p.sub_(_per_client(lr, p) * g)
                continue
            m.copy_(torch.where(moved, 0.9 * m + 0.1 * g, m))
            v.copy_(torch.where(moved, 0.999 * v + 0.001 * g * g, v))
            scale1 = _per_client(torch.from_numpy(1 - 0.9**count).to(dtype), p)
            scale2 = _per_client(torch.from_numpy(1 - 0.999**count).to(dtype), p)
            p.sub_(_per_client(lr, p) * (m / scale1) / ((v / scale2).sqrt() + 1e-8))


def _per_client(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *([1] * (like.dim() - 1)))
