"""What goes through the model at all: pages of memory, clients, threads, layers and prompts asked once."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from job import ALPHA, TARGETS, R

from engine_attempts.measuring import CHECKED, REPEATS, race
from engine_attempts.page import Part, Row
from engine_attempts.work import ENCODER, MIDDLE, OF_A_READER, READERS, SMALL, WIDE, Cell, Work, asked, work
from fedcanary.engines.stacking import Pace, Pacer, keep_memory, limits
from fedcanary.models import stacked
from fedcanary.models.adapters import Adapter, find_targets
from fedcanary.models.base import Rows
from fedcanary.probes import suites
from fedcanary.rng import stream
from fedcanary.types import Array, Item


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


def searched(one: Work) -> Pace:
    """A whole search, with passes of one step."""
    pacer = Pacer(limits(one.base, one.lora, one.start, one.rows[:4], one.recipe, threads=1))
    while not pacer.pace.next()[2]:
        stack = pacer.next(1)
        with pacer.timed(stack, stack * one.cell.batch * one.cell.tokens):
            one.fit(stack)
    return pacer.pace


def stacks(home: Path) -> Part:
    """The curve that the search goes along."""
    rows, sizes = [], (1, 2, 4, 8, 16, 32)
    lines = [
        "CPU ms of a client-step by clients in a pass (medians), what a search on the first passes chose, on one "
        "thread, how many client-steps it took, and how many steps of its choice it lost by the other sizes:",
        "",
        f"| cell | {' | '.join(f'K = {k}' for k in sizes)} | it chose | client-steps | lost |",
        "|---|" + "---|" * (len(sizes) + 3),
    ]
    for cell, most in ((SMALL, 32), (MIDDLE, 32), (WIDE, 8), (ENCODER, 4)):
        one = work(home, cell)
        times = race({str(k): functools.partial(one.fit, k) for k in sizes if k <= most})
        chosen, steps, lost = [], [], []
        for _ in range(3):
            pace = searched(one)
            chosen.append(pace.next()[0])
            steps.append(sum(made.took for made in pace.passes))
            cheapest = min(made.cpu for made in pace.passes if made.took == chosen[-1])
            lost.append(sum(made.took * (made.cpu / cheapest - 1) for made in pace.passes))
        at = replace(cell, k=min(sorted(chosen)[len(chosen) // 2], most))
        cells = [f"{np.median(times[str(k)]) / k * 1e3:.3g}" if k <= most else "" for k in sizes]
        lines.append(
            f"| {replace(cell, k=0).name.removesuffix(', K = 0')} | {' | '.join(cells)} "
            f"| {', '.join(map(str, chosen))} | {np.median(steps):.0f} | {np.median(lost):.1f} |"
        )
        rows.append(Row("stack", at.name, times["1"] * at.k, times[str(at.k)], at.k, f" ({at.k})"))
    return rows, [*lines, ""]


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
