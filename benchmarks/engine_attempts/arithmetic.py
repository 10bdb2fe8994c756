"""How a pass is computed: norms, masks, log-probabilities, attention, the optimizer, torch.compile."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from job import LR
from torch import Tensor, nn

from engine_attempts.measuring import Kinds, percent, race
from engine_attempts.page import Part, Row
from engine_attempts.work import CAUSAL, ENCODER, SMALL, WIDE, Work, work
from fedcanary.models import base as models
from fedcanary.models import stacked
from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.personalize import fit as fits
from fedcanary.types import Array


def lean_parts(home: Path) -> Part:
    """Norms and rotary positions."""
    rows = []
    for cell in CAUSAL:
        one = work(home, cell)
        plain = replace(one, base=replace(one.base))
        plain.base.__dict__["lean_parts"] = ((), ())
        times = race({"library": plain.losses, "ours": one.losses}, same=True)
        rows.append(Row("lean", cell.name, times["library"], times["ours"], cell.k))
    return rows, []


def masked(base: BaseModel, batch: stacked.Batch, lora: Lora | None = None) -> Tensor:
    """As `log_probabilities`, with the padding mask."""
    return stacked.log_probabilities(base, replace(batch, seen=batch.mask), lora)


def no_mask(home: Path) -> Part:
    """Causal models without a mask."""
    rows = []
    for cell in CAUSAL:
        full = work(home, cell)
        cut = [[ids[: len(ids) * (j + 4) // (cell.batch + 3)] for j, ids in enumerate(r.ids)] for r in full.rows]
        targets = [
            [[t for t in targets if t[0] < len(ids) - 1] for ids, targets in zip(shorter, r.targets, strict=True)]
            for shorter, r in zip(cut, full.rows, strict=True)
        ]
        ragged = [Rows(i, t, r.shape) for i, t, r in zip(cut, targets, full.rows, strict=True)]
        for one, name in ((full, "full rows"), (replace(full, rows=ragged), "ragged rows")):

            def passed(one: Work = one) -> Array:
                with patch.object(fits, "log_probabilities", masked):
                    return one.losses()

            times = race({"mask": passed, "none": one.losses}, same=True)
            rows.append(Row("mask", cell.name, times["mask"], times["none"], cell.k, f", {name}"))
    return rows, []


class OneTable(torch.autograd.Function):
    """Log softmax(logits)[row, target] of logits (n, V) in one table of that size, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        shifted = logits - logits.amax(dim=1, keepdim=True)
        value = shifted[row, target]
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=1)
        ctx.save_for_backward(exponentials, total, row, target)
        return value - total.log()[row]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        exponentials, total, row, target = ctx.saved_tensors
        each = torch.zeros_like(total).index_add_(0, row, gradients[0])
        change = exponentials * (-each / total).unsqueeze(1)
        return change.index_put_((row, target), gradients[0], accumulate=True), None, None


def one_table(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    return OneTable.apply(logits.float(), row, target)


def cross_entropy(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits.float()[row], target, reduction="none")


def picked(home: Path) -> Part:
    """Log-probabilities of the targets, in a whole step and alone; ours is log_softmax and an index."""
    rows: list[Row] = []
    others = {"one_table": one_table, "cross_entropy": cross_entropy}

    def add(cell: str, times: Mapping[str, Array], per: float) -> None:
        rows.extend(Row(name, cell, times["ours"], times[name], per) for name in others)

    for cell in (SMALL, WIDE):
        one = work(home, cell)

        def patched(function: Any, one: Work = one) -> Array:
            with patch.object(stacked, "_picked", function):
                return one.losses()

        kinds: Kinds = {name: functools.partial(patched, function) for name, function in others.items()}
        add(cell.name, race({"ours": one.losses, **kinds}, same=True), cell.k)
    for width in (748, 8192):
        logits = torch.randn(2000, width, generator=torch.Generator().manual_seed(0))
        row, target = torch.arange(2000), torch.randint(width, (2000,), generator=torch.Generator().manual_seed(1))

        def alone(function: Any, logits: Tensor = logits, row: Tensor = row, target: Tensor = target) -> Array:
            leaf = logits.detach().requires_grad_()
            value = function(leaf, row, target)
            torch.autograd.grad(value.sum(), leaf)
            return value.detach().numpy()

        kinds = {name: functools.partial(alone, function) for name, function in others.items()}
        times = race({"ours": functools.partial(alone, stacked._picked), **kinds}, same=True)
        add(f"alone, 2,000 x {width:,} logits", times, 1)
    return rows, []


def attention(home: Path) -> Part:
    """Fused attention or the plain one."""
    rows = []
    for cell in (SMALL, replace(SMALL, tokens=64, k=8), WIDE, ENCODER):
        one = work(home, cell)
        eager = replace(one, base=models.load(str(home / cell.model), task=one.base.task))
        eager.base.model.set_attn_implementation("eager")
        times = race({"eager": eager.losses, "sdpa": one.losses}, same=True)
        rows.append(Row("sdpa", cell.name, times["eager"], times["sdpa"], cell.k))
    return rows, []


def optimizer(home: Path) -> Part:
    """One step over the stacked parameters, gradients given; ours with all that it needs to be one table."""
    rows, shares, often = [], [], 10
    for cell in (SMALL, WIDE, ENCODER):
        one = work(home, cell)
        begun = stacked.repeat(one.start, cell.k)
        gradients = [torch.full_like(tensor, 1e-3) for tensor in begun.values()]
        moving = fits._Moving.of(begun)
        ours = fits._Optimizer(moving.table, replace(one.recipe, clip=0.0))
        clients, rate = torch.arange(cell.k), np.full(cell.k, LR)

        def table(
            moving: Any = moving, ours: Any = ours, g: Any = gradients, who: Any = clients, r: Any = rate
        ) -> None:
            for count in range(1, often + 1):
                moving.leaves(who)
                ours.step(who, moving.join(g, len(who)), count, r)

        kinds: dict[str, Callable[[], None]] = {"ours": table}
        for name, how in (("for-loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
            tensors = [tensor.clone().requires_grad_() for tensor in begun.values()]
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone()
            theirs = torch.optim.AdamW(tensors, lr=LR, weight_decay=0.0, **how)
            kinds[name] = lambda theirs=theirs: [theirs.step() for _ in range(often)]
        times = race({**kinds, "step": one.fit})
        shares.append(f"{percent(float(np.median(times['ours'] / often / times['step'])))} ({cell.name})")
        rows += [
            Row("table", cell.name, times[name], times["ours"], often * cell.k, f" ({name})")
            for name in ("for-loop", "foreach", "fused")
        ]
    return rows, [
        "The optimizer alone: ours with what it takes to gather the clients that still train, join their gradients and "
        f"see whose are finite; torch's with gradients in place. Ours is {', '.join(shares)} of the time of a step."
    ]


def compiled(home: Path) -> Part:
    """torch.compile of the backbone at one shape. Adapters keep their tensors, whose numbers change in place."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return [], ["torch.compile: not measured, for there is no C++ compiler here."]
    rows, remarks = [], []
    inductor.compile_threads = 1
    for cell in (SMALL, WIDE):
        one = work(home, cell)
        laid, leaves = one.laid()
        torch._dynamo.reset()
        backbone = torch.compile(one.base.backbone, dynamic=False)
        other = replace(one.base)
        other.__dict__.update(lean_parts=((), ()), plain_head=True)

        def step(base: BaseModel, one: Work = one, laid: Any = laid, leaves: Adapter = leaves) -> Array:
            nll = -stacked.log_probabilities(base, laid, one.lora)
            found = torch.autograd.grad(nll.sum(), list(leaves.values()))
            return torch.cat([g.flatten() for g in found]).numpy()

        def fast(step: Any = step, other: BaseModel = other, backbone: Any = backbone) -> Array:
            with patch.object(BaseModel, "backbone", backbone):
                return step(other)

        part = stacked.Part(leaves)
        with tempfile.TemporaryDirectory() as cache, stacked.attached(one.base, one.lora, [part], cell.k):
            began, used = time.perf_counter(), sum(os.times()[:4])
            try:
                with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
                    fast()
            except Exception as error:  # a compiler, its headers or the model: each fails in its own way
                remarks.append(f"torch.compile: not measured, {cell.name} failed ({type(error).__name__}).")
                continue
            wall, cpu = time.perf_counter() - began, sum(os.times()[:4]) - used
            for leaf in leaves.values():
                leaf.data.mul_(1.1)
            plain, quick = step(one.base), fast()
            off = float(np.linalg.norm(plain - quick) / np.linalg.norm(plain))
            times = race({"plain": lambda: step(one.base), "compiled": fast})  # noqa: B023
        row = Row("compile", cell.name, times["plain"], times["compiled"], cell.k)
        saved = float(np.median(row.before - row.after)) / cell.k
        pays = f"after {cpu / saved:,.0f} client-steps of that shape" if row.gain.verdict == "faster" else "never"
        rows.append(row)
        remarks.append(
            f"torch.compile, {cell.name}: {cpu:.0f} CPU-s ({wall:.0f} s) to compile one shape, which pays {pays}; "
            f"gradients {off:.0e} from ours. After {dynamo.recompile_limit} shapes it gives up and runs uncompiled."
        )
    return rows, remarks
