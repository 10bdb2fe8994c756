"""One client at a time, one row at a time, with plain peft and plain torch: what stacked training must equal.

Nothing is padded, nothing is stacked, and the optimizer is torch's own. Only the base's token rows are shared with
the code under test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from fedcanary.models.adapters import Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.personalize.fit import Recipe

Adapter = dict[str, Tensor]


def config(lora: Lora, task: str, **more: Any) -> LoraConfig:
    """The same adapter in peft's own words."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.names),
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        fan_in_fan_out=lora.fan_in_fan_out,
        task_type=TaskType.CAUSAL_LM if task == "causal" else TaskType.SEQ_CLS,
        **more,
    )


def wrapped(base: BaseModel, lora: Lora, adapter: Mapping[str, Tensor], name: str = "default") -> Any:
    """A peft model of its own around a copy of the base, holding `adapter`."""
    model = get_peft_model(copy.deepcopy(base.model), config(lora, base.task), adapter_name=name)
    put(model, adapter, name)
    return model.eval()


def put(model: Any, adapter: Mapping[str, Tensor], name: str = "default") -> None:
    """Write our tensors into peft's parameters."""
    places = parameters(model, name)
    assert places.keys() == adapter.keys()
    with torch.no_grad():
        for key, place in places.items():
            assert place.shape == adapter[key].shape, key
            place.copy_(adapter[key])


def parameters(model: Any, name: str = "default") -> dict[str, nn.Parameter]:
    """peft's own parameters under our names."""
    found = {}
    for path, parameter in model.named_parameters():
        short = path.removeprefix("base_model.model.")
        if f".lora_A.{name}." in path or f".lora_B.{name}." in path:
            found[short.replace(f".{name}.weight", "")] = parameter
        elif f".modules_to_save.{name}." in path:
            found[short.replace(f"modules_to_save.{name}.", "")] = parameter
    return found


def log_probabilities(model: Any, task: str, rows: Rows, index: int) -> list[tuple[Tensor, int]]:
    """(log-probability, cell) of every target of one row, forwarded alone; a row with branches as a row for each."""
    found = []
    for ids, targets in _unshared(rows, index):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        logits = torch.log_softmax(logits, dim=-1)
        found += [((logits[t] if task == "classify" else logits[at, t]), cell) for at, t, cell in targets]
    return found


def _unshared(rows: Rows, index: int) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    ids, targets = rows.ids[index], rows.targets[index]
    starts = rows.branches.get(index)
    if not starts:
        return [(ids, targets)]
    first, found = starts[0], []
    for start, stop in zip(starts, (*starts[1:], len(ids)), strict=True):
        own = [(first + at - start, token, cell) for at, token, cell in targets if start <= at < stop]
        found.append((ids[:first] + ids[start:stop], own))
    return [(ids[:first], [target for target in targets if target[0] < first]), *found]


def train(
    base: BaseModel,
    lora: Lora,
    start: Adapter,
    rows: Rows,
    recipe: Recipe,
    order: Callable[[int], np.random.Generator],
    *,
    trains: Callable[[str], bool] = lambda name: True,
    anchor: Adapter | None = None,
    mu: float = 0.0,
) -> tuple[Adapter, list[float], list[float]]:
    """One client's adapter after its training; the loss and the gradient's norm of every step."""
    model = wrapped(base, lora, start)
    places = parameters(model)
    moving = {}
    for name, place in places.items():
        place.requires_grad_(trains(name))
        if trains(name):
            moving[name] = place
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(list(moving.values()), lr=recipe.lr, weight_decay=recipe.weight_decay)
    batches = []
    for epoch in range(recipe.epochs):
        shuffled = order(epoch).permutation(len(rows))
        batches += [shuffled[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
    losses, norms = [], []
    for step, batch in enumerate(batches):
        tokens = [value for i in batch for value, _ in log_probabilities(model, base.task, rows, int(i))]
        loss = -torch.stack(tokens).mean()
        losses.append(float(loss.detach()))
        if anchor is not None:
            loss = loss + mu / 2 * sum(((p - anchor[n]) ** 2).sum() for n, p in moving.items())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.sqrt(sum((p.grad**2).sum() for p in moving.values()))))
        if 0 < recipe.clip < norms[-1]:
            for p in moving.values():
                p.grad *= recipe.clip / norms[-1]
        if recipe.schedule == "linear":
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 - step / len(batches))
        optimizer.step()
    return {name: place.detach().clone() for name, place in places.items()}, losses, norms


def score(model: Any, task: str, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(n, C) summed log-probabilities and token counts; -inf and 0 where a cell has no target."""
    logp, count = np.zeros(rows.shape), np.zeros(rows.shape)
    with torch.no_grad():
        for i in range(len(rows)):
            for value, cell in log_probabilities(model, task, rows, i):
                logp.flat[cell] += float(value)
                count.flat[cell] += 1
    logp[count == 0] = -np.inf
    return logp, count
