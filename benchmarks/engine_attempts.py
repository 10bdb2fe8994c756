"""What was tried to train and ask stacked adapters faster, with each thing and without; see speed/engine_attempts.md.

    OMP_NUM_THREADS=1 python benchmarks/engine_attempts.py [--only compiled,lean_parts] [--out FILE]    11 CPU-minutes

Both ways of a thing take turns in one process, and what is judged are the ratios of neighbours: whatever else the
machine does then falls on both. `--only` prints some parts, named as their functions, and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import math
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "speed")]

import prepare  # noqa: E402
import speed  # noqa: E402
from job import ALPHA, LR, TARGETS, Job, R, data, load  # noqa: E402
from ours import rows as rows_of  # noqa: E402

from fedcanary.engines.stacking import keep_memory, measure  # noqa: E402
from fedcanary.models import base as models  # noqa: E402
from fedcanary.models import stacked  # noqa: E402
from fedcanary.models.adapters import Adapter, Lora, find_targets  # noqa: E402
from fedcanary.models.base import BaseModel, Rows  # noqa: E402
from fedcanary.personalize import fit as fits  # noqa: E402
from fedcanary.personalize.fit import Fitted, Recipe, fit  # noqa: E402
from fedcanary.probes import suites  # noqa: E402
from fedcanary.rng import stream  # noqa: E402
from fedcanary.types import Array, Item  # noqa: E402

REPEATS = 11
MISSED = 0.02  # chance that the interval of a gain misses the true median, at most
CHECKED = 1e-4  # relative difference that losses may have where both ways should say the same
PEOPLE = 32  # clients with rows of their own in a cell
READERS = 4  # clients in a reading pass
OF_A_READER = f"K = {READERS}; ms of a client"
Kinds = Mapping[str, Callable[[], Any]]


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


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gain:
    """Median of before / after over the repeats, and an interval around it; above 1 the second is cheaper."""

    low: float
    middle: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "within noise"


def gain(before: Array, after: Array) -> Gain:
    """Of neighbouring measurements (repeats,). The interval holds the median ratio's true value with probability
    1 - MISSED or more, whatever the distribution: it reaches from the (d+1)-th smallest ratio to the (d+1)-th largest,
    and misses with twice the probability of at most d heads in so many throws of a coin.
    """
    ratios, n = np.sort(before / after), len(before)
    below = np.cumsum([math.comb(n, d) for d in range(n)]) / 2**n
    d = int(np.sum(2 * below <= MISSED)) - 1
    if d < 0:
        raise ValueError(f"{n} repeats say nothing at a chance of {MISSED:g}: measure more often")
    return Gain(float(ratios[d]), float(np.median(ratios)), float(ratios[n - 1 - d]))


def race(kinds: Kinds, *, same: bool = False, clock: Callable[[], float] = time.process_time) -> dict[str, Array]:
    """Seconds of each kind, (repeats,), in turns that begin with another each time; the first call does not count.

    `same`: what the kinds return should be the same numbers, and is an error if it is not.
    """
    said = [run() for run in kinds.values()]
    for other in said[1:] if same else ():
        np.testing.assert_allclose(other, said[0], rtol=CHECKED, atol=CHECKED)
    names, times = list(kinds), {name: np.empty(REPEATS) for name in kinds}
    for repeat in range(REPEATS):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            kinds[name]()
            times[name][repeat] = clock() - began
    return times


@dataclass(frozen=True, slots=True)
class Thing:
    """What was tried, what came of it, and a reason that holds whatever is measured."""

    what: str
    use: Literal["in use", "not in use", "a setting", "measured"]
    why: str


INT8 = "int8"
THINGS = {
    "allocator": Thing(
        "freed memory is kept (`keep_memory`)", "in use", "no new pages for every tensor; the process keeps its peak"
    ),
    "stack": Thing("clients in a pass as `measure` chose", "measured", "found on the study's own first clients"),
    "lean": Thing("lean norms and rotary positions", "in use", "fewer passes over memory, forward and backward"),
    "mask": Thing("no attention mask for causal models", "in use", "padding is at the right, where no token looks"),
    "picked": Thing("`_Picked` in place of", "in use", "one table of logits between the passes, as log_softmax keeps"),
    "table": Thing(
        "our table in place of torch's AdamW",
        "in use",
        "a client has its own rate, norm, end and failure: see the remarks",
    ),
    "lower": Thing(
        "adapters in the upper half only, layers below asked once",
        "in use",
        "where `model.lora.layers` leaves lower layers without; kept for later rounds as memory allows",
    ),
    "branches": Thing(
        "four choices of 3 words as branches of one row, in place of a row each",
        "in use",
        "where the model heeds our mask and positions",
    ),
    "compile": Thing(
        "torch.compile of the backbone in place of lean parts, forward and backward",
        "not in use",
        "every shape is compiled anew, and a compiled graph does not see that other adapters are attached",
    ),
    "bfloat16": Thing(
        "frozen base in bfloat16 (`engine.precision`)", "a setting", "another model than in float32: see the remarks"
    ),
    INT8: Thing(
        "frozen linear layers in int8 (quantize_dynamic)",
        "not in use",
        "for reading only: see the remarks on training through it",
    ),
    "sdpa": Thing("attention: sdpa in place of eager", "in use", "the library's own default"),
    "threads": Thing(
        "two threads in place of one", "measured", "`measure` takes more only if wall time is a fifth shorter"
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A thing in one cell. Seconds before and after, (repeats,), of `per` units of work."""

    thing: str
    cell: str
    before: Array
    after: Array
    per: float
    detail: str = ""

    @property
    def gain(self) -> Gain:
        """After against before."""
        return gain(self.before, self.after)

    @property
    def what(self) -> str:
        """The thing, in words."""
        return THINGS[self.thing].what + self.detail

    def line(self) -> str:
        """Of the table."""
        columns = (self.before, self.after)
        times = [f"{np.median(t) / self.per * 1e3:.3g} ({t.min() / self.per * 1e3:.3g})" for t in columns]
        found, thing = self.gain, THINGS[self.thing]
        said = f"{found.middle:.2f} [{found.low:.2f}, {found.high:.2f}] | {found.verdict}"
        return f"| {self.what} | {self.cell} | {' | '.join(times)} | {said} | {thing.use}: {thing.why} |"

    @property
    def against(self) -> bool:
        """Whether the figure speaks against what is done."""
        return (THINGS[self.thing].use, self.gain.verdict) in (("in use", "slower"), ("not in use", "faster"))


Part = tuple[list[Row], list[str]]  # of the table, and remarks below it


# --- the work -----------------------------------------------------------------------------------------------------


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


def percent(x: float) -> str:
    return f"{float(f'{100 * x:.2g}'):g}%"


# --- what was tried -----------------------------------------------------------------------------------------------


def child(home: Path, cell: Cell) -> tuple[float, int]:
    """CPU-seconds and minor page faults of one training pass in this process."""
    one = work(home, cell)
    faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    one.fit()
    return time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def begin(keep: bool) -> None:
    """A child's start."""
    torch.set_num_threads(1)
    if keep:
        keep_memory()


def allocator(home: Path) -> Part:
    """The only thing that needs two processes: they wait for each other."""
    rows, faults = [], []
    pools = {keep: ProcessPoolExecutor(1, get_context("spawn"), begin, (keep,)) for keep in (False, True)}
    try:
        for cell in (SMALL, WIDE, ENCODER):
            found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
            for repeat in range(-1, REPEATS):
                for keep in (False, True) if repeat % 2 else (True, False):
                    said = pools[keep].submit(child, home, cell).result()
                    found[keep] += [said] if repeat >= 0 else []
            before, after = (np.array(found[keep]) for keep in (False, True))
            rows.append(Row("allocator", cell.name, before[:, 0], after[:, 0], cell.k))
            faults.append(f"{np.median(before[:, 1]):,.0f} and {np.median(after[:, 1]):,.0f} ({cell.name})")
    finally:
        for pool in pools.values():
            pool.shutdown()
    return rows, [f"Page faults of a training pass without and with `keep_memory`: {'; '.join(faults)}."]


def stacks(home: Path) -> Part:
    """The curve that `measure` goes along."""
    rows, sizes = [], (1, 2, 4, 8, 16, 32)
    lines = [
        "CPU ms of a client-step by clients in a pass (medians), and what `measure` chose, on one thread:",
        "",
        f"| cell | {' | '.join(f'K = {k}' for k in sizes)} | it chose | its CPU-s | in client-steps of its choice |",
        "|---|" + "---|" * (len(sizes) + 3),
    ]
    for cell, most in ((SMALL, 32), (MIDDLE, 32), (WIDE, 8), (ENCODER, 4)):
        one = work(home, cell)
        times = race({str(k): functools.partial(one.fit, k) for k in sizes if k <= most})
        chosen, costs = [], []
        for _ in range(3 if cell is SMALL else 1):
            began = time.process_time()
            chosen.append(measure(one.base, one.lora, one.start, one.rows[:4], one.recipe, threads=1).stack)
            costs.append(time.process_time() - began)
        at = replace(cell, k=min(sorted(chosen)[len(chosen) // 2], most))
        each = np.median(times[str(at.k)]) / at.k
        cells = [f"{np.median(times[str(k)]) / k * 1e3:.3g}" if k <= most else "" for k in sizes]
        lines.append(
            f"| {replace(cell, k=0).name.removesuffix(', K = 0')} | {' | '.join(cells)} "
            f"| {', '.join(map(str, chosen))} | {np.median(costs):.1f} | {np.median(costs) / each:.0f} |"
        )
        rows.append(Row("stack", at.name, times["1"] * at.k, times[str(at.k)], at.k, f" ({at.k})"))
    return rows, [*lines, ""]


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


def log_softmax(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), 1)[row, target]


def cross_entropy(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits.float()[row], target, reduction="none")


def picked(home: Path) -> Part:
    """Log-probabilities of the targets, in a whole step and alone."""
    rows = []
    others = {"log_softmax and an index": log_softmax, "cross_entropy": cross_entropy}

    def add(cell: str, times: Mapping[str, Array], per: float) -> None:
        rows.extend(Row("picked", cell, times[name], times["ours"], per, f" {name}") for name in others)

    for cell in (SMALL, WIDE):
        one = work(home, cell)

        def patched(function: Any, one: Work = one) -> Array:
            with patch.object(stacked, "_picked", function):
                return one.losses()

        kinds: Kinds = {name: functools.partial(patched, function) for name, function in others.items()}
        add(cell.name, race({**kinds, "ours": one.losses}, same=True), cell.k)
    for width in (748, 8192):
        logits = torch.randn(2000, width, generator=torch.Generator().manual_seed(0))
        row, target = torch.arange(2000), torch.randint(width, (2000,), generator=torch.Generator().manual_seed(1))

        def alone(function: Any, logits: Tensor = logits, row: Tensor = row, target: Tensor = target) -> Array:
            leaf = logits.detach().requires_grad_()
            value = function(leaf, row, target)
            torch.autograd.grad(value.sum(), leaf)
            return value.detach().numpy()

        kinds = {name: functools.partial(alone, function) for name, function in others.items()}
        times = race({**kinds, "ours": functools.partial(alone, stacked._picked)}, same=True)
        add(f"alone, 2,000 x {width:,} logits", times, 1)
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


def lower_layers(home: Path) -> Part:
    """Adapters in the upper half only."""
    rows = []
    for cell in (SMALL, WIDE, ENCODER):
        full = work(home, cell)
        depth = full.base.model.config.num_hidden_layers
        lora = find_targets(full.base, r=R, alpha=ALPHA, targets=TARGETS[cell.model], layers=range(depth // 2, depth))
        start = {n: t for n, t in full.start.items() if n.rsplit(".", 1)[0] in (*lora.targets, *lora.heads)}
        one = replace(full, lora=lora, start=start, rows=full.rows[: cell.k])

        def known(one: Work) -> Work:
            return replace(one, rows=[stacked.below(one.base, one.lora, rows) for rows in one.rows])

        kept, kinds = known(one), {}
        for epochs in (1, 2, 5) if cell is SMALL else (1, 2):
            recipe = replace(one.recipe, epochs=epochs)
            kinds[f"plain {epochs}"] = lambda one=one, recipe=recipe: replace(one, recipe=recipe).losses()
            kinds[f"once {epochs}"] = lambda one=one, recipe=recipe: known(replace(one, recipe=recipe)).losses()
        np.testing.assert_allclose(kept.losses(), one.losses(), rtol=CHECKED)
        times = race({**kinds, "kept": kept.losses})
        found = [
            (f"plain {e}", f"once {e}", f", for {e} epoch{'s' * (e > 1)}") for e in (1, 2, 5) if f"once {e}" in kinds
        ]
        for before, after, detail in [*found, ("plain 1", "kept", " in an earlier round")]:
            count = cell.k * int(before.split()[1])
            rows.append(Row("lower", cell.name, times[before], times[after], count, detail))
        if cell is SMALL:
            public = one.base.rows(asked())
            tuned = stacked.repeat(start, READERS)
            below = stacked.below(one.base, lora, public)

            def read(rows: Rows, one: Work = one, tuned: Adapter = tuned) -> Array:
                scores = stacked.score(one.base, one.lora, [tuned], [rows] * READERS)
                return np.concatenate([s.logp[np.isfinite(s.logp)] for s in scores])

            times = race({"plain": lambda: read(public), "kept": lambda: read(below)}, same=True)  # noqa: B023
            where = f"hidden 128, {len(public)} items, {OF_A_READER}"
            rows.append(Row("lower", where, times["plain"], times["kept"], READERS, " in a run, public items"))
    return rows, []


def shared_prompts(home: Path) -> Part:
    """Choices of several tokens as branches of one row."""
    one, draw = work(home, SMALL), stream(0, "long prompts")
    general = suites.load("world-general").items
    names = sorted({choice for item in general for choice in item.choices})
    items = []
    for _ in range(24):
        prompts = [general[int(i)].prompt for i in draw.integers(len(general), size=6)]
        choices = tuple("".join(draw.choice(names, size=3)) for _ in range(4))
        items.append(Item(prompt="\n".join(prompts), choices=choices, answer=0))
    alone = replace(one.base)
    alone.__dict__["shares_prompts"] = False
    apart, together = alone.rows(items), one.base.rows(items)
    tuned = stacked.repeat(one.start, READERS)

    def read(rows: Rows) -> Array:
        return np.concatenate([s.logp for s in stacked.score(one.base, one.lora, [tuned], [rows] * READERS)])

    times = race({"apart": lambda: read(apart), "together": lambda: read(together)})
    off = float(np.abs(read(apart) - read(together)).max())
    where = f"hidden 128, {len(items)} made-up items, {OF_A_READER}"
    row = Row("branches", where, times["apart"], times["together"], READERS)
    many = [
        name
        for name in suites.packaged()
        for item in suites.load(name).items
        if any(len(ids) - start > 1 for ids, start in (one.base.encode(item.prompt, c) for c in item.choices))
    ]
    said = f"in {', '.join(sorted(set(many)))}" if many else "in no packaged suite"
    counts = [sum(map(len, rows.ids)) for rows in (apart, together)]
    return [row], [
        f"Shared prompts: {counts[0]:,} tokens in {len(apart)} rows become {counts[1]:,} in {len(together)}; largest "
        f"difference of a choice's log-probability {off:.1e}. The bundled tokenizer makes choices of several tokens "
        f"{said}; choices of one token always share their prompt's row."
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


def threads(home: Path) -> Part:
    """Two threads in place of one."""
    rows = []
    clocks: dict[str, Callable[[], float]] = {"CPU": time.process_time, "wall": time.perf_counter}
    for cell in (SMALL, WIDE, ENCODER):
        one = work(home, cell)

        def on(count: int, one: Work = one) -> Array:
            torch.set_num_threads(count)
            return one.losses()

        for name, clock in clocks.items():
            times = race({"1": functools.partial(on, 1), "2": functools.partial(on, 2)}, clock=clock)
            rows.append(Row("threads", cell.name, times["1"], times["2"], cell.k, f", {name} time"))
        torch.set_num_threads(1)
    return rows, []


PARTS: tuple[Callable[[Path], Part], ...] = (
    allocator,
    stacks,
    lean_parts,
    no_mask,
    picked,
    optimizer,
    lower_layers,
    shared_prompts,
    compiled,
    half,
    readings,
    attention,
    threads,
)


# --- the page -----------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row]) -> list[str]:
    """Of all attempts."""
    head = ["what", "cell", "without, ms", "with, ms", "gain", "verdict", "kept or not"]
    return [f"| {' | '.join(head)} |", "|---|---|--:|--:|---|---|---|", *(row.line() for row in rows)]


def page(rows: Sequence[Row], remarks: Sequence[str], load: tuple[float, float], spent: float) -> str:
    """engine_attempts.md."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in speed.PACKAGES)
    spread = np.array(
        [np.subtract(*np.quantile(t, [0.75, 0.25])) / np.median(t) for r in rows for t in (r.before, r.after)]
    )
    against = [
        f"- {row.what} ({row.cell}): {row.gain.verdict}; {THINGS[row.thing].use}: {THINGS[row.thing].why}."
        for row in rows
        if row.against
    ]
    typical, worst = percent(float(np.median(spread))), percent(float(spread.max()))
    kept = "\n".join(against) or "Nothing."
    listed = "\n".join(table(rows))
    below = "\n\n".join("\n".join(group) for group in grouped(remarks))
    return f"""# What was tried to make stacked training and reading faster

Written by `make bench-engine` (`python benchmarks/engine_attempts.py`) in {spent / 60:.0f} CPU-minutes on
{speed.machine()}; {packages}. Load, one of it ours: {load[0]:.1f} at the start, {load[1]:.1f} at the end.

One thread, CPU time of the process (`time.process_time`). Both ways of a thing take turns in one process, {REPEATS}
times after a call that does not count. Median (fastest), in ms of a client-step, which is one step of one client,
unless the cell says otherwise. Timed is `fit` as a whole, with clipping and the layout of the batch, unless a row says
what is. The gain is the median ratio of neighbours, above 1 where the thing helps, in an interval that holds the true
median with 98% or more; "within noise" if it holds 1. Of {len(rows)} rows about {MISSED * len(rows):.0f} would have the
wrong word by chance if nothing made a difference. The middle half of a column's repeats spans {typical} of its median
(median of all columns; at worst {worst}). Where both ways should give the same losses (lean parts, mask, `_Picked`,
lower layers, attention), the script stops if they do not.

{listed}

## Where a figure speaks against what is done

{kept}

## Remarks

{below}
"""


def grouped(lines: Sequence[str]) -> list[list[str]]:
    """Paragraphs; a table's lines stay together, with the line before it and an empty line between."""
    groups: list[list[str]] = []
    for line in lines:
        if groups and (not line or line.startswith("|")):
            groups[-1] += [line]
        else:
            groups.append([line])
    return [[*g[:-1]] if not g[-1] else g for g in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {','.join(part.__name__ for part in PARTS)}; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE / "speed" / "engine_attempts.md")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [part.__name__ for part in PARTS]
    if unknown := set(chosen) - {part.__name__ for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    keep_memory()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    remarks: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as home:
        prepare.main(Path(home))
        for part in PARTS:
            if part.__name__ in chosen:
                began = time.process_time()
                found, said = part(Path(home))
                rows += found
                remarks += said
                print("\n".join([*(row.line() for row in found), *said]), flush=True)
                print(f"{part.__name__}: {time.process_time() - began:.0f} CPU-s", file=sys.stderr, flush=True)
    if not options.only:
        used = sum(os.times()[:4])
        options.out.write_text(page(rows, remarks, (load, os.getloadavg()[0]), used), encoding="utf-8")


if __name__ == "__main__":
    main()
