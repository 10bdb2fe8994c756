"""What a training step cannot go below: its matrix products, and nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine_attempts.measuring import percent, race
from engine_attempts.page import Part
from engine_attempts.work import ENCODER, MIDDLE, SMALL, WIDE, work

aten = torch.ops.aten
PRODUCTS: Mapping[Any, int] = {  # by where their first factor is
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
    aten.baddbmm_.default: 1,
}


Lie = tuple[tuple[int, ...], tuple[int, ...]]  # a tensor's shape and strides


class Recorded(TorchDispatchMode):
    """While open, notes every matrix product: of which kind, and how its tensors lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Lie, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, tuple((tuple(a.shape), a.stride()) for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        """Multiplications and additions of all."""
        total = 0
        for func, tensors in self.calls:
            (first, _), (second, _) = tensors[PRODUCTS[func] :][:2]
            total += 2 * math.prod(first) * second[-1]
        return total

    def again(self) -> Callable[[], None]:
        """The same products of random numbers. Products that are alike take the same tensors, so these are in the
        cache more often than a step's: what it takes is too little rather than too much.
        """
        made = {call: [torch.empty_strided(*lie).normal_(std=1e-3) for lie in call[1]] for call in set(self.calls)}

        def run() -> None:
            with torch.no_grad():
                for call in self.calls:
                    call[0](*made[call])

        return run


def products(home: Path) -> Part:
    """A step beside its products alone, and beside as many steps of one client each."""
    lines = [
        "A step's matrix products alone (those of attention are not among them), taken from a step and made again with "
        "random numbers, which no engine on this machine and these libraries can do without; medians of a client-step:",
        "",
        "| cell | million operations | one client in a pass, ms | a step, ms | its products alone, ms | of a step "
        "| 10⁹ operations a second |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in (SMALL, MIDDLE, WIDE, ENCODER):
        one = work(home, cell)
        with Recorded() as recorded:
            one.fit()
        times = race({"step": one.fit, "alone": recorded.again(), "single": functools.partial(one.fit, 1)})
        step, alone = (float(np.median(times[name])) / cell.k for name in ("step", "alone"))
        each = recorded.operations / cell.k
        lines.append(
            f"| {cell.name} | {each / 1e6:,.0f} | {np.median(times['single']) * 1e3:.3g} | {step * 1e3:.3g} "
            f"| {alone * 1e3:.3g} | {percent(alone / step)} | {each / alone / 1e9:.0f} |"
        )
    return [], [*lines, ""]
