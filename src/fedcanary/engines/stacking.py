"""How many clients go through the model in one pass, and on how many threads: found on a run's first passes.

Stacking saves what every pass costs whatever its size, but a pass that no longer fits the processor's caches is slower
for each of its tokens, and needs more memory. Where that turns depends on model, batch and machine. So the first passes
of a run are made at a few sizes, each of them timed: some five hundred tokens, half as many, from there on doubles or
halves as it pays, and one client. They are the training itself; nothing is trained only to be timed. A client's result
depends on the size of its pass in the last bits of its floats, so what was tried is kept on disk, and a run that is cut
off and resumed makes the same passes again.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from fedcanary.errors import BadInput
from fedcanary.models.adapters import Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.models.stacked import repeat
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import stream

REPEATS: Final = 2  # passes of a size, of which the faster counts: whatever disturbs one makes it slower
REJECTED: Final = 1.25  # but a size is not tried again if its first pass costs so many times the cheapest so far
GUESS: Final = 512  # tokens in a pass
CACHED: Final = 1024  # and at most, on a processor: where it was measured, more no longer fitted its caches
DOUBLE_PAYS: Final = 0.95  # twice the clients, who need twice the memory, must cost each this share of the time
THREADS_PAY: Final = 0.8  # and several threads this share of one thread's wall time, or they would only burn
SCORED: Final = 4096  # tokens in a pass that only reads, if memory allows: more do not make a token cheaper


class Pass(NamedTuple):
    """A training pass of the search: the clients it was to take and those it took, its threads, and what a token of
    theirs cost, in seconds.
    """

    round: int
    asked: int
    took: int
    threads: int
    cpu: float
    wall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Where the search begins, how far it may go, and what it has seen: by default a single client on one thread.

    A reading pass takes `tokens`. A training pass takes `guess` clients at first, and from `least` to `most`; `cores`
    are the numbers of threads to be tried, and `clock` says what makes a size cheap. `passes` were made so far.
    """

    tokens: int
    least: int = 1
    guess: int = 1
    most: int = 1
    cores: Sequence[int] = (1,)
    clock: Literal["cpu", "wall"] = "cpu"
    passes: Sequence[Pass] = ()

    def next(self) -> tuple[int, int, bool]:
        """Clients and threads of the next pass, and whether the search is over and has found these."""

        def cost(stack: int, threads: int, clock: str) -> float:
            alike = [one for one in self.passes if one.threads == threads]
            times = [getattr(one, clock) if one.took == stack else math.inf for one in alike if one.asked == stack]
            # a stack that there were never enough clients for is not worth having
            found = min(times, default=math.inf)
            cheapest = min((getattr(one, clock) for one in alike if one.took == one.asked), default=math.inf)
            if len(times) < REPEATS and not REJECTED * cheapest < found < math.inf:
                raise _Untried(stack, threads)
            return found

        try:
            threads, *more = self.cores
            for many in more:
                if cost(self.guess, many, "wall") < THREADS_PAY * cost(self.guess, threads, "wall"):
                    threads = many
            stack = _cheapest(lambda k: cost(k, threads, self.clock), self.guess, self.least, self.most)
        except _Untried as wanted:
            return wanted.stack, wanted.threads, False
        return stack, threads, True


class _Untried(Exception):  # no error: what the search asks for
    def __init__(self, stack: int, threads: int) -> None:
        super().__init__(stack, threads)
        self.stack, self.threads = stack, threads


def _cheapest(cost: Callable[[int], float], guess: int, least: int, most: int) -> int:
    """From the guess on the smallest stack whose doubling does not pay; or the least one, if that is cheaper.

    A larger one is tried only where the doubling before it paid: a pass that was only tried leaves its peak of memory
    behind, and what a doubling saves falls with each, for it is a share of what a pass costs whatever its size.
    """

    def pays(stack: int) -> bool:
        return cost(stack) <= DOUBLE_PAYS * cost(max(least, stack // 2))  # the larger first: the first pass warms up

    best = guess
    if best > least and not pays(best):
        while best > least and not pays(best):
            best = max(least, best // 2)
    else:
        while 2 * best <= most and pays(2 * best):
            best *= 2
    return best if best == least or cost(best) < cost(least) else least


def limits(
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
) -> Pace:
    """Where the search for clients like these begins, and how far it may go.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        start: one client's adapter.
        data: training rows of a few clients.
        recipe: as they train; a step on their longest row shows what a pass keeps in memory.
        stack: clients in a pass, if that is not to be found.
        threads: CPU threads, if that is not to be found.
        memory: MiB that a pass may hold in activations.
        clients: how many there are to be stacked at most.
    """
    available = torch.get_num_threads()
    cores = (threads,) if threads else (1, available) if available > 1 else (1,)
    # of a processor that others use too, its own time says more; a GPU's is none of the processor's
    clock: Literal["cpu", "wall"] = "cpu" if base.device.type == "cpu" else "wall"
    room, most, guess = SCORED, max(1, clients), 1
    if some := [rows for rows in data if len(rows)]:
        # one row of it is enough: activations grow with the tokens
        row = max((_row(rows, at) for rows in some for at in range(len(rows))), key=lambda row: len(row.ids[0]))
        width, step = len(row.ids[0]), replace(recipe, epochs=1, dropout=0.0)
        room = max(1, memory * 2**20 * width // saved_bytes(base, lora, start, row, step))
        tokens = width * max(min(len(rows), recipe.batch) for rows in some)  # of one client's step
        fitting = room if stack is not None or clock == "wall" else min(room, CACHED)
        most = max(1, min(clients, fitting // tokens))
        guess = max(1, min(most, GUESS // tokens))
    least = 1
    if stack is not None:
        least = guess = most = min(stack, most) if some else stack
    return Pace(tokens=min(SCORED, room), least=least, guess=guess, most=most, cores=cores, clock=clock)


class Pacer:
    """Says how many clients the next pass takes, and learns from what it cost."""

    def __init__(self, pace: Pace, file: Path | None = None) -> None:
        self.pace, self._file = pace, file
        self._round, self._made = 0, 0
        self._timing: tuple[int, int] | None = None  # clients and threads of the pass that is to be timed
        torch.set_num_threads(pace.next()[1])

    @classmethod
    def kept(cls, file: Path, begin: Callable[[], Pace]) -> Pacer:
        """The one of the run whose file this is: a resumed run goes on as it began.

        Raises:
            BadInput: the file is damaged.
        """
        if not file.exists():
            pacer = cls(begin(), file)
            pacer._keep()
            return pacer
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content["passes"] = [Pass(*values) for values in content.get("passes", ())]
            return cls(Pace(**content), file)
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInput.of(str(file), f"is damaged ({error})", "restore it, or start in another --out") from error

    def next(self, round: int) -> int:
        """How many clients the next pass of a round takes at most; sets the threads."""
        if round != self._round:
            self._round, self._made = round, 0
        before = [one for one in self.pace.passes if one.round == round]
        if again := self._made < len(before):  # the round was begun before and is made again
            stack, threads = before[self._made].asked, before[self._made].threads
        else:
            stack, threads, again = self.pace.next()
        self._timing = None if again else (stack, threads)
        self._made += 1
        torch.set_num_threads(threads)
        return stack

    @contextmanager
    def timed(self, clients: int, tokens: int) -> Iterator[None]:
        """Around the training of the pass that `next` announced: how many clients it took, with so many tokens."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if self._timing is None:
            return
        asked, threads = self._timing
        made = Pass(self._round, asked, clients, threads, cpu / max(1, tokens), wall / max(1, tokens))
        self.pace, self._timing = replace(self.pace, passes=(*self.pace.passes, made)), None
        self._keep()

    def _keep(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".part")
        draft.write_text(json.dumps(asdict(self.pace)) + "\n", encoding="utf-8")
        draft.replace(self._file)


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


def _row(rows: Rows, at: int) -> Rows:
    return Rows([rows.ids[at]], [rows.targets[at]], rows.shape)
