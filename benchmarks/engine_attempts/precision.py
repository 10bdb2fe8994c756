"""A frozen base in fewer bits: bfloat16 and int8."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine_attempts.measuring import percent, race
from engine_attempts.page import INT8, Part, Row
from engine_attempts.work import CAUSAL, ENCODER, SMALL, WIDE, Work, asked, work
from fedcanary.models import base as models
from fedcanary.models import stacked
from fedcanary.models.adapters import Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.types import Array


def drift(one: Work, other: Work, steps: int) -> str:
    """How far two trainings on the same batch are from each other after so many steps."""
    recipe = replace(one.recipe, epochs=steps)
    here, there = (replace(w, recipe=recipe).fit() for w in (one, other))
    start = stacked.repeat(one.start, one.cell.k)
    squares = np.zeros((2, one.cell.k))
    for name, tensor in here.params.items():
        for at, change in enumerate((tensor - there.params[name], tensor - start[name])):
            squares[at] += change.double().pow(2).flatten(1).sum(1).numpy()
    moved = np.sqrt(squares[0] / squares[1])
    lost = np.abs(here.loss - there.loss) / np.abs(here.loss)
    loss, adapter = (f"{percent(x.mean())} ({percent(x.max())})" for x in (lost, moved))
    return f"loss {loss}, adapter {adapter}"


def half(home: Path) -> Part:
    """A frozen base in bfloat16, adapters in float32."""
    rows, said, steps = [], [], 20
    for cell in (*CAUSAL, ENCODER):
        one = work(home, cell)
        low = replace(one, base=models.load(str(home / cell.model), task=one.base.task, dtype=torch.bfloat16))
        times = race({"float32": one.losses, "bfloat16": low.losses})
        rows.append(Row("bfloat16", cell.name, times["float32"], times["bfloat16"], cell.k))
        said.append(f"{cell.name}: {drift(one, low, steps)}")
    one = work(home, SMALL)
    plain = replace(one, base=replace(one.base))
    plain.base.__dict__["lean_parts"] = ((), ())
    return rows, [
        f"bfloat16 against float32 after {steps} steps on one batch, mean (largest) of the clients: loss of the last "
        f"step, and L2 distance of the adapters over that of the adapter's change. {'; '.join(said)}. For comparison, "
        f"two orders of summation in float32 (lean parts or the library's), {SMALL.name}: {drift(one, plain, steps)}."
    ]


def quantized(base: BaseModel) -> BaseModel:
    """The same model with the backbone's linear layers in int8, quantized as they are used."""
    whole: Any = copy.deepcopy(base.model)
    low = torch.ao.quantization.quantize_dynamic(whole.base_model, {nn.Linear}, dtype=torch.qint8)
    setattr(whole, whole.base_model_prefix, low)
    return replace(base, model=whole, _encoded={})


def trained_through(one: Work, base: BaseModel) -> str:
    """What autograd makes of a base in int8."""
    laid, leaves = one.laid()

    def gradients(base: BaseModel) -> Sequence[Tensor | None]:
        with stacked.attached(base, one.lora, [stacked.Part(leaves)], one.cell.k):
            nll = -stacked.log_probabilities(base, laid, one.lora)
        return torch.autograd.grad(nll.sum(), list(leaves.values()), allow_unused=True)

    right = gradients(one.base)
    try:
        found = gradients(base)
    except RuntimeError as error:
        return f"an error ({str(error).splitlines()[0][:100]})"
    pairs = [(g, r) for g, r in zip(found, right, strict=True) if r is not None]
    off = [1.0 if g is None else float((g - r).norm() / r.norm()) for g, r in pairs]
    wrong, none = sum(o > 0.5 for o in off), sum(g is None for g in found)
    return f"no error; the gradients of {wrong} of {len(off)} tensors are more than half off, {none} have none at all"


def readings(home: Path) -> Part:
    """Reading with int8 or bfloat16, forward only."""
    rows, remarks = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to leave torch; torchao is its heir
        for cell in (SMALL, WIDE):
            one = work(home, cell)
            public = one.base.rows(asked())
            short = models.load(str(home / cell.model), dtype=torch.bfloat16)
            low = {INT8: quantized(one.base), "bfloat16": short}

            def read(base: BaseModel, public: Rows = public, lora: Lora = one.lora) -> Array:
                return stacked.score(base, lora, [], [public])[0].choice_probability()

            times = race({"": lambda: read(one.base)} | {n: functools.partial(read, b) for n, b in low.items()})  # noqa: B023
            where = f"{cell.name.split(',')[0]}, {len(public)} packaged items; ms of all"
            rows += [Row(name, where, times[""], times[name], 1, ", reading without adapters") for name in low]
            if cell is SMALL:  # the other has random weights, whose readings say nothing
                plain = read(one.base)
                for name, base in low.items():
                    off = np.abs(read(base) - plain)
                    off = off[np.isfinite(off)]
                    moved = f"{off.max():.3f} at most, {off.mean():.4f} on average"
                    remarks.append(f"Choice probabilities of the packaged items move with {name} by {moved}.")
                remarks.append(f"Training through int8: {trained_through(one, low[INT8])}.")
    return rows, remarks
