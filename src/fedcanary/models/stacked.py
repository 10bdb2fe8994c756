"""K adapters over one frozen base in a single pass: x W + (alpha / r) bmm(bmm(x, A^T), B^T).

The rows of a batch are K groups of equal size, group k belonging to client k. Every linear layer that carries LoRA
adds its client's own low-rank term; everything else is the base, computed once for all. Clients never mix: the
gradient of client k's parameters depends on client k's rows alone.

Legend: K clients, B rows of each, T tokens, D width, V vocabulary or labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.types import Array, Scores


@dataclass(frozen=True, slots=True)
class Part:
    """One stacked adapter, with an optional weight for each of the batch's rows (a mixture of adapters)."""

    params: Mapping[str, Tensor]
    weight: Tensor | None = None  # (K * B,)


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """K adapters as one, with a leading K on every tensor that all of them have."""
    names = [name for name in adapters[0] if all(name in adapter for adapter in adapters)]
    return {name: torch.stack([adapter[name] for adapter in adapters]) for name in names}


def unstack(stacked: Mapping[str, Tensor], k: int) -> Adapter:
    """Client k's adapter out of a stack, as a copy."""
    return {name: tensor[k].detach().clone() for name, tensor in stacked.items()}


def repeat(adapter: Mapping[str, Tensor], k: int) -> Adapter:
    """The same adapter K times."""
    return {name: tensor.unsqueeze(0).expand(k, *tensor.shape).clone() for name, tensor in adapter.items()}


@contextmanager
def attached(base: BaseModel, lora: Lora | None, parts: Sequence[Part], k: int) -> Iterator[None]:
    """While open, the base computes with the given adapters; afterwards it is the base again."""
    if lora is None or not parts:
        yield
        return
    handles = []
    if base.task == "causal":
        _ = base.plain_head  # a fact about the bare base, found out before there are hooks
    try:
        for name in lora.targets:
            triples = [(p.params[f"{name}.lora_A"], p.params[f"{name}.lora_B"], p.weight) for p in parts]
            handles.append(base.model.get_submodule(name).register_forward_hook(_lora(triples, lora.scale, k)))
        for name in lora.heads:
            pairs = [(p.params[f"{name}.weight"], p.params.get(f"{name}.bias"), p.weight) for p in parts]
            handles.append(base.model.get_submodule(name).register_forward_hook(_head(pairs, k)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(x: Tensor, k: int) -> Tensor:
    return x.reshape(k, -1, x.shape[-1])  # (K, B * T, D)


def _weighted(delta: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    delta = delta.reshape(like.shape)
    return delta if weight is None else delta * weight.view(-1, *([1] * (like.dim() - 1)))


def _lora(parts: list[tuple[Tensor, Tensor, Tensor | None]], scale: float, k: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _groups(args[0], k)
        for a, b, weight in parts:
            low = torch.bmm(x, a.transpose(1, 2))  # (K, B * T, r)
            output = output + _weighted(scale * torch.bmm(low, b.transpose(1, 2)), weight, output)
        return output

    return hook


def _head(parts: list[tuple[Tensor, Tensor | None, Tensor | None]], k: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _groups(args[0], k)
        total: Tensor | None = None
        for w, bias, weight in parts:
            y = torch.bmm(x, w.transpose(1, 2))
            y = y if bias is None else y + bias.unsqueeze(1)
            y = _weighted(y, weight, output)
            total = y if total is None else total + y
        return output if total is None else total

    return hook


@dataclass(frozen=True, slots=True)
class Batch:
    """K groups of B padded rows, (K * B, T), and the targets to read from them, each (targets,)."""

    ids: Tensor
    mask: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    client: Tensor
    cell: Tensor


def batch(base: BaseModel, rows: Sequence[Rows], chosen: Sequence[Sequence[int]]) -> Batch:
    """Lay out the chosen rows of each client; clients with fewer rows than the others get empty ones."""
    height = max(1, *(len(indices) for indices in chosen))
    width = max((len(r.ids[i]) for r, indices in zip(rows, chosen, strict=True) for i in indices), default=1)
    ids = np.full((len(rows) * height, width), base.pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[:, 0] = 1  # a row without any visible token would make the attention undefined
    targets: list[tuple[int, int, int, int, int]] = []
    for k, (own, indices) in enumerate(zip(rows, chosen, strict=True)):
        for at, index in enumerate(indices, start=k * height):
            tokens = own.ids[index]
            ids[at, : len(tokens)] = tokens
            mask[at, : len(tokens)] = 1
            targets.extend((at, position, target, k, cell) for position, target, cell in own.targets[index])
    columns = torch.tensor(targets, dtype=torch.int64).reshape(-1, 5).unbind(1)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), *columns)


def log_probabilities(base: BaseModel, batch: Batch) -> Tensor:
    """Log-probability of every target of a batch, (targets,), under whatever adapters are attached."""
    if base.task == "classify":
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits  # (K * B, V)
        return torch.log_softmax(logits, dim=-1)[batch.row, batch.target]
    if not base.plain_head:
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits  # (K * B, T, V)
        return torch.log_softmax(logits[batch.row, batch.position], dim=-1)[
            torch.arange(len(batch.target)), batch.target
        ]
    hidden = base.backbone(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    # Only the positions that are read pass through the (large) output layer.
    where, back = torch.unique(batch.row * hidden.shape[1] + batch.position, return_inverse=True)
    logits = base.head(hidden.reshape(-1, hidden.shape[-1])[where])
    return torch.log_softmax(logits, dim=-1)[back, batch.target]


def score(
    base: BaseModel,
    lora: Lora,
    adapters: Sequence[Adapter],
    rows: Sequence[Rows],
    *,
    weights: Sequence[Array] | None = None,
    rows_per_pass: int = 256,
) -> list[Scores]:
    """What K clients' models say to K clients' questions.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        adapters: one stacked adapter, or several that are mixed; none scores the base itself.
        rows: K row lists, one for each client (the same object K times for a public suite).
        weights: for a mixture, one (K, n) array for each adapter: its weight on each item.
        rows_per_pass: bound on K * B, hence on memory.

    Returns:
        K tables of scores; an item without any row is NaN.
    """
    k = len(rows)
    height = max(1, rows_per_pass // k)
    order = [sorted(range(len(r)), key=[len(ids) for ids in r.ids].__getitem__) for r in rows]
    owners = [r.items() for r in rows]
    tables = [(np.zeros(r.shape), np.zeros(r.shape)) for r in rows]
    for first in range(0, max(len(o) for o in order), height):
        chosen = [o[first : first + height] for o in order]
        laid = batch(base, rows, chosen)
        parts = [Part(adapter) for adapter in adapters]
        if weights is not None:
            tall = laid.ids.shape[0] // k
            parts = [
                Part(adapter, _row_weights(weight, owners, chosen, tall, next(iter(adapter.values())).dtype))
                for adapter, weight in zip(adapters, weights, strict=True)
            ]
        with torch.inference_mode(), attached(base, lora, parts, k):
            values = log_probabilities(base, laid).double().numpy()
        clients, cells = laid.client.numpy(), laid.cell.numpy()
        for j in range(k):
            mine = clients == j
            np.add.at(tables[j][0].reshape(-1), cells[mine], values[mine])
            np.add.at(tables[j][1].reshape(-1), cells[mine], 1.0)
    return [_scores(logp, count) for logp, count in tables]


def _row_weights(
    weight: Array, owners: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], tall: int, dtype: torch.dtype
) -> Tensor:
    table = np.zeros((len(chosen), tall))
    for k, indices in enumerate(chosen):
        table[k, : len(indices)] = [weight[k, owners[k][i]] for i in indices]
    return torch.from_numpy(table).reshape(-1).to(dtype)


def _scores(logp: Array, count: Array) -> Scores:
    empty = count == 0
    logp[empty] = -np.inf
    logp[empty.all(axis=1)] = np.nan
    return Scores(logp=logp, tokens=np.maximum(count, 1.0))


def embed(base: BaseModel, rows: Rows, rows_per_pass: int = 256) -> Array:
    """(n, D): the base's last hidden state averaged over each item's first row; NaN where an item has none."""
    owners = rows.items()
    first = [i for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
    table: Array | None = None
    for at in range(0, len(first), rows_per_pass):
        indices = first[at : at + rows_per_pass]
        laid = batch(base, [rows], [indices])
        with torch.inference_mode():
            hidden = base.backbone(input_ids=laid.ids, attention_mask=laid.mask).last_hidden_state
        mask = laid.mask.unsqueeze(-1)
        mean = ((hidden * mask).sum(1) / mask.sum(1)).double().numpy()
        table = np.full((rows.shape[0], mean.shape[1]), np.nan) if table is None else table
        table[[owners[i] for i in indices]] = mean[: len(indices)]
    return table if table is not None else np.full((rows.shape[0], 1), np.nan)
