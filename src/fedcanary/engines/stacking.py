"""How many clients go through the model in one pass, and on how many threads: found by a short measurement.

Stacking saves what every pass costs whatever its size, but a pass that no longer fits the processor's caches is slower
for each of its tokens, and needs more memory. Where that turns depends on model, batch and machine: about a thousand
tokens is a good guess, from which a few sizes around it, and one client at a time, are measured on the first clients'
own rows. The measurement may take a tenth of what is to be trained.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fedcanary.errors import BadInput
from fedcanary.models.adapters import Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.models.stacked import repeat
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import stream

REPEATS: Final = 2  # of which the faster counts: whatever disturbs a measurement makes it slower
GUESS: Final = 1024  # tokens in a pass
WORTH: Final = 0.1  # share of the training that may be spent on finding its pace
THREADS_PAY: Final = 0.8  # and several threads this share of one thread's wall time, or they would only burn
SCORED: Final = 4096  # tokens in a pass that only reads, if memory allows: more do not make a token cheaper


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Clients in a training pass, tokens in a reading pass, CPU threads."""

    stack: int
    tokens: int
    threads: int


def settle(file: Path, found: Callable[[], Pace]) -> Pace:
    """The pace that `file` holds, or a new one, which is then kept there: a resumed run goes on as it began."""
    if file.exists():
        try:
            pace = Pace(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise BadInput.of(str(file), f"is damaged ({error})", "restore it, or start in another --out") from error
    else:
        pace = found()
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(asdict(pace)) + "\n", encoding="utf-8")
        draft.replace(file)
    torch.set_num_threads(pace.threads)
    return pace


def measure(
    base: BaseModel,
    lora: Lora,
    start: Mapping[str, Tensor],
    data: Sequence[Rows],
    recipe: Recipe,
    *,
    stack: int | None = None,
    threads: int = 0,
    memory: int = 1024,
    clients: int = 1_000_000,
    steps: int = 1_000_000,
) -> Pace:
    """Find the pace for clients like these.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        start: one client's adapter.
        data: training rows of a few clients, repeated for larger stacks; at least one client.
        recipe: as they train; one step of it is measured.
        stack: clients in a pass, if it is not to be measured.
        threads: CPU threads, if that is not to be measured.
        memory: MiB that a pass may hold in activations.
        clients: how many there are to be stacked at most.
        steps: what they have to train in all, one step of one client each.
    """
    first = [_some(rows, recipe.batch) for rows in data if len(rows)]
    if not first:
        return Pace(stack=stack or 1, tokens=SCORED, threads=threads or torch.get_num_threads())
    step = replace(recipe, epochs=1, dropout=0.0)
    tall, wide = max(len(rows) for rows in first), max(len(ids) for rows in first for ids in rows.ids)

    def cost(k: int, clock: Callable[[], float]) -> float:
        mine = [first[j % len(first)] for j in range(k)]

        def once() -> float:
            began = clock()
            fit(base, lora, repeat(start, k), mine, step, lambda j, epoch: stream(0, "pace", j))  # ends on the CPU
            return (clock() - began) / k

        return min(once() for _ in range(REPEATS))

    each = saved_bytes(base, lora, start, first[0], step) / max(1, sum(len(ids) for ids in first[0].ids))
    room = int(memory * 2**20 / each)  # tokens in a pass
    most = max(1, min(clients, room // (tall * wide)))
    guess = max(1, min(most, GUESS // (tall * wide)))
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    if not threads and cores > 1:
        alone = cost(guess, time.perf_counter)
        torch.set_num_threads(cores)
        threads = cores if cost(guess, time.perf_counter) < THREADS_PAY * alone else 1
    torch.set_num_threads(threads or 1)
    if stack is None:
        # of a processor that others use too, its own time says more; a GPU's is none of the processor's
        clock = time.process_time if base.device.type == "cpu" else time.perf_counter
        stack = _search(lambda k: cost(k, clock), guess, most, WORTH * steps / REPEATS)
    return Pace(stack=min(stack, most), tokens=max(1, min(SCORED, room)), threads=threads or 1)


def _search(cost: Callable[[int], float], guess: int, most: int, worth: float) -> int:
    """The cheapest stack of 1, the guess, and its doubles and halves for as long as they are cheaper.

    `cost(k)` is that of a client among k, and measuring it costs k of `worth`.
    """
    found: dict[int, float] = {}

    def better(k: int, best: int) -> bool:
        nonlocal worth
        if k not in found and 1 <= k <= most and k <= worth:
            worth -= k
            found[k] = cost(k)
        return found.get(k, math.inf) < found.get(best, math.inf)

    better(guess, guess)
    if guess not in found:
        return guess  # there is too little to train to find out
    best = 1 if better(1, guess) else guess
    for factor in (2.0, 0.5):
        while better(k := int(best * factor), best) and k != best:
            best = k
    return best


def saved_bytes(base: BaseModel, lora: Lora, start: Mapping[str, Tensor], rows: Rows, recipe: Recipe) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one client's step."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    frozen = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fit(base, lora, repeat(start, 1), [rows], recipe, lambda j, epoch: stream(0, "pace", j))
    return max(1, sum(size for address, size in kept.items() if address not in frozen))


def keep_memory() -> None:
    """Have the C library keep what it freed, so that a large tensor need not be handed out page by page every time."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    library.mallopt(m_mmap_threshold, 1 << 30)
    library.mallopt(m_trim_threshold, (1 << 31) - 1)


def _some(rows: Rows, n: int) -> Rows:
    return Rows(rows.ids[:n], rows.targets[:n], rows.shape)
