"""K adapters over one frozen base in a single pass: x W + (alpha / r) bmm(bmm(x, A^T), B^T).

The rows of a batch are K groups of equal size, group k belonging to client k. Every linear layer that carries LoRA
adds its client's own low-rank term; everything else is the base, computed once for all. Clients never mix: the
gradient of client k's parameters depends on client k's rows alone. Layers below the first adapter say the same of a
row for everyone and for good, so they can be left out of a pass once `below` has been asked for their output.

Legend: K clients, B rows of each, T tokens, D width, V vocabulary or labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.models.lean import lean
from fedcanary.types import Array, Scores


@dataclass(frozen=True, slots=True)
class Part:
    """One stacked adapter, with an optional weight for each of the batch's rows (a mixture of adapters)."""

    params: Mapping[str, Tensor]
    weight: Tensor | None = None  # (K * B,)
    drop: Callable[[Tensor], Tensor] | None = None  # dropout of a LoRA layer's input


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
            pairs = [(p.params[f"{name}.lora_A"], p.params[f"{name}.lora_B"]) for p in parts]
            handles.append(base.model.get_submodule(name).register_forward_hook(_lora(parts, pairs, lora.scale, k)))
        for name in lora.heads:
            own = [(p.params[f"{name}.weight"], p.params.get(f"{name}.bias"), p.weight) for p in parts]
            handles.append(base.model.get_submodule(name).register_forward_hook(_head(own, k)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(x: Tensor, k: int) -> Tensor:
    return x.reshape(k, -1, x.shape[-1])  # (K, B * T, D)


def _weighted(delta: Tensor, weight: Tensor | None) -> Tensor:
    return delta if weight is None else (delta.view(len(weight), -1) * weight.unsqueeze(1)).view_as(delta)


def _lora(parts: Sequence[Part], pairs: Sequence[tuple[Tensor, Tensor]], scale: float, k: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        y = _groups(output, k)  # nobody else has seen the layer's output, so it is added to in place
        for part, (a, b) in zip(parts, pairs, strict=True):
            x = _groups(args[0] if part.drop is None else part.drop(args[0]), k)
            # in the base's own precision, which may be lower than the adapter's
            low = _weighted(torch.bmm(x, a.to(x.dtype).transpose(1, 2)), part.weight)  # (K, B * T, r)
            y = y.baddbmm_(low, b.to(x.dtype).transpose(1, 2), alpha=scale)
        return y.view_as(output)

    return hook


def _head(parts: list[tuple[Tensor, Tensor | None, Tensor | None]], k: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total: Tensor | None = None
        for w, bias, weight in parts:
            x = _groups(args[0], k).to(w.dtype)
            y = torch.bmm(x, w.transpose(1, 2))
            y = y if bias is None else y + bias.unsqueeze(1)
            y = _weighted(y, weight)
            total = y if total is None else total + y
        return output if total is None else total.view_as(output)

    return hook


@dataclass(frozen=True, slots=True)
class Batch:
    """K groups of B padded rows, (K * B, T), and the targets to read from them, each (targets,).

    `position_ids` (K * B, T) and the additive mask `seen` (K * B, 1, T, T) are there where rows have branches; `hidden`
    (K * B, T, D) where the rows know what the layers below the first adapter say.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    client: Tensor
    cell: Tensor
    position_ids: Tensor | None = None
    seen: Tensor | None = None
    hidden: Tensor | None = None


def batch(base: BaseModel, rows: Sequence[Rows], chosen: Sequence[Sequence[int]]) -> Batch:
    """Lay out the chosen rows of each client; clients with fewer rows than the others get empty ones."""
    height = max(1, *(len(indices) for indices in chosen))
    width = max((len(r.ids[i]) for r, indices in zip(rows, chosen, strict=True) for i in indices), default=1)
    ids = np.full((len(rows) * height, width), base.pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[:, 0] = 1  # a row without any visible token would make the attention undefined
    targets: list[tuple[int, int, int, int, int]] = []
    branches: dict[int, tuple[int, ...]] = {}
    known: dict[int, Tensor] = {}
    for k, (own, indices) in enumerate(zip(rows, chosen, strict=True)):
        for at, index in enumerate(indices, start=k * height):
            tokens = own.ids[index]
            ids[at, : len(tokens)] = tokens
            mask[at, : len(tokens)] = 1
            targets.extend((at, position, target, k, cell) for position, target, cell in own.targets[index])
            if index in own.branches:
                branches[at] = own.branches[index]
            if own.hidden:
                known[at] = own.hidden[index]
    names = ("row", "position", "target", "client", "cell")
    columns = torch.tensor(targets, dtype=torch.int64).reshape(-1, 5).to(base.device).unbind(1)
    hidden = None
    if known and len(known) == sum(len(indices) for indices in chosen):
        some = next(iter(known.values()))
        hidden = some.new_zeros(*ids.shape, some.shape[1])
        for at, states in known.items():
            hidden[at, : len(states)] = states
    position_ids, seen = _branched(base, ids.shape, branches) if branches else (None, None)
    return Batch(
        ids=torch.from_numpy(ids).to(base.device),
        mask=torch.from_numpy(mask).to(base.device),
        position_ids=position_ids,
        seen=seen,
        hidden=hidden,
        **dict(zip(names, columns, strict=True)),
    )


def _branched(
    base: BaseModel, shape: tuple[int, ...], branches: Mapping[int, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Position of every token, and what it sees: all before it, but none of the other branches."""
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    branch = np.zeros(shape, dtype=np.int64)  # 0: shared by all
    for at, starts in branches.items():
        for number, start in enumerate(starts, start=1):
            branch[at, start:] = number
            positions[at, start:] = starts[0] + np.arange(shape[1] - start)
    sees = np.tri(shape[1], dtype=bool) & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    additive = torch.zeros(shape[0], 1, shape[1], shape[1], dtype=base.dtype)
    additive.masked_fill_(torch.from_numpy(~sees).unsqueeze(1), torch.finfo(base.dtype).min)
    return torch.from_numpy(positions).to(base.device), additive.to(base.device)


def log_probabilities(base: BaseModel, batch: Batch, lora: Lora | None = None) -> Tensor:
    """Log-probability of every target of a batch, (targets,), under whatever adapters are attached.

    `lora` says which layers to leave out where the batch has `hidden`.
    """
    asked: dict[str, Any] = {"input_ids": batch.ids}
    if base.task == "classify":
        asked["attention_mask"] = batch.mask
    else:  # rows are padded at their right, where a causal model looks only for what nobody reads: it needs no mask
        asked |= {"attention_mask": batch.seen, "position_ids": batch.position_ids, "use_cache": False}
    with _resumed(base, lora, batch.hidden), lean(base.lean_parts):
        if base.task == "classify":
            return _picked(base.model(**asked).logits, batch.row, batch.target)
        if not base.plain_head:
            logits = base.model(**asked).logits[batch.row, batch.position]
            return _picked(logits, torch.arange(len(logits), device=logits.device), batch.target)
        hidden = base.backbone(**asked).last_hidden_state
    # Only the positions that are read pass through the (large) output layer.
    where, back = torch.unique(batch.row * hidden.shape[1] + batch.position, return_inverse=True)
    return _picked(base.head(hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)), back, batch.target)


def _picked(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact, dim=-1)[row, target]


# --- layers that no adapter changes -------------------------------------------------------------------------------


def _lower(base: BaseModel, lora: Lora | None) -> list[Any]:
    """The layers below the first that carries an adapter; none if a target is in no numbered layer."""
    found = [re.match(r"(.+)\.(\d+)\.", name) for name in lora.targets] if lora else []
    if not found or not all(found) or len({m[1] for m in found if m}) > 1:
        return []
    first = min(int(m[2]) for m in found if m)
    stack: Any = base.model.get_submodule(next(m[1] for m in found if m))
    return list(stack[:first]) if isinstance(stack, nn.ModuleList) else []


def below(base: BaseModel, lora: Lora, rows: Rows, tokens: int = 4096, room: float = math.inf) -> Rows:
    """The same rows with what the layers below the first adapter say of each, if there are any and `room` bytes do."""
    layers = _lower(base, lora)
    config: Any = base.model.config
    size = sum(map(len, rows.ids)) * int(config.hidden_size) * base.dtype.itemsize
    if not layers or rows.hidden is not None or not len(rows) or size > room:
        return rows
    hidden: list[Tensor] = [torch.empty(0)] * len(rows)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Caught

    if base.task == "causal":
        _ = base.plain_head  # as in `attached`
    handle = layers[-1].register_forward_hook(catch)
    try:
        for (indices,) in _passes([rows], tokens):
            laid = batch(base, [rows], [indices])
            try:
                with torch.no_grad():
                    log_probabilities(base, laid)
            except _Caught:
                states = caught.pop()
            for at, index in enumerate(indices):
                hidden[index] = states[at, : len(rows.ids[index])].clone()
    finally:
        handle.remove()
    return replace(rows, hidden=hidden)


class _Caught(Exception):
    """The rest of the pass is not wanted."""


@contextmanager
def _resumed(base: BaseModel, lora: Lora | None, hidden: Tensor | None) -> Iterator[None]:
    """While open, the layers below the first adapter hand on `hidden` instead of computing it."""
    layers = [] if hidden is None else _lower(base, lora)
    for layer in layers:
        layer.forward = _handing(hidden, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _handing(hidden: Tensor | None, forward: Any) -> Any:
    return lambda *args, **kwargs: hidden


def _passes(rows: Sequence[Rows], tokens: int) -> Iterator[list[list[int]]]:
    """Row numbers of K clients for one pass after the other: the longest first, so many that they hold the tokens."""
    k = len(rows)
    order = [sorted(range(len(r)), key=[-len(ids) for ids in r.ids].__getitem__) for r in rows]
    at, longest = 0, max(map(len, order), default=0)
    while at < longest:
        width = max(len(r.ids[o[at]]) for r, o in zip(rows, order, strict=True) if at < len(o))
        height = max(1, tokens // (k * width))
        yield [o[at : at + height] for o in order]
        at += height


def score(
    base: BaseModel,
    lora: Lora,
    adapters: Sequence[Adapter],
    rows: Sequence[Rows],
    *,
    weights: Sequence[Array] | None = None,
    tokens: int = 4096,
) -> list[Scores]:
    """What K clients' models say to K clients' questions.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        adapters: one stacked adapter, or several that are mixed; none scores the base itself.
        rows: K row lists, one for each client (the same object K times for a public suite).
        weights: for a mixture, one (K, n) array for each adapter: its weight on each item.
        tokens: bound on a pass, K * B * T, hence on memory (one row of each client is the least).

    Returns:
        K tables of scores; an item without any row is NaN.
    """
    k = len(rows)
    adapters = [{name: tensor.to(base.device) for name, tensor in adapter.items()} for adapter in adapters]
    owners = [r.items() for r in rows]
    tables = [(np.zeros(r.shape), np.zeros(r.shape)) for r in rows]
    for chosen in _passes(rows, tokens):
        laid = batch(base, rows, chosen)
        parts = [Part(adapter) for adapter in adapters]
        if weights is not None:
            tall = laid.ids.shape[0] // k
            parts = [
                Part(adapter, _row_weights(weight, owners, chosen, tall, base.dtype).to(base.device))
                for adapter, weight in zip(adapters, weights, strict=True)
            ]
        with torch.inference_mode(), attached(base, lora, parts, k):
            values = log_probabilities(base, laid, lora).double().cpu().numpy()
        clients, cells = laid.client.cpu().numpy(), laid.cell.cpu().numpy()
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


def embed(base: BaseModel, rows: Rows, tokens: int = 4096) -> Array:
    """(n, D): the base's last hidden state averaged over each item's first row; NaN where an item has none."""
    owners = rows.items()
    first = [i for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
    table: Array | None = None
    alone = Rows([rows.ids[i] for i in first], [[] for _ in first], rows.shape)
    for (indices,) in _passes([alone], tokens):
        laid = batch(base, [alone], [indices])
        with torch.inference_mode():
            hidden = base.backbone(input_ids=laid.ids, attention_mask=laid.mask).last_hidden_state
        mask = laid.mask.unsqueeze(-1)
        mean = ((hidden * mask).sum(1) / mask.sum(1)).double().cpu().numpy()
        table = np.full((rows.shape[0], mean.shape[1]), np.nan) if table is None else table
        table[[owners[first[i]] for i in indices]] = mean[: len(indices)]
    return table if table is not None else np.full((rows.shape[0], 1), np.nan)
