"""Which cells there are, how long each is, and how often it is measured."""

from __future__ import annotations

from dataclasses import replace

from job import TARGETS, Job

CLIENTS, BATCHES, TOKENS = (20, 100, 400), (1, 4, 8), (32, 64)
CONTENDERS = ("peft", "ours", "pfl", "flower")
SMALL = 6.0  # CPU-seconds of peft's loop below which a cell is measured three times
# What one client-step costs peft's loop here, roughly: milliseconds, and milliseconds per token
COST = {"llama128": (10.0, 0.09), "llama256": (14.0, 0.23), "minilm": (25.0, 0.68)}
# (local steps, rounds) by clients: fewer where there are more clients, for the whole table's sake
LENGTH = {
    "llama128": {20: (4, 3), 100: (2, 2), 400: (2, 1)},
    "llama256": {20: (4, 2), 100: (2, 1), 400: (1, 1)},
    "minilm": {20: (2, 1), 100: (1, 1), 400: (1, 1)},
}


def cell(model: str, clients: int, batch: int, tokens: int) -> Job:
    """A cell's job."""
    steps, rounds = LENGTH[model][clients]
    return Job(model=model, clients=clients, batch=batch, tokens=tokens, steps=steps, rounds=rounds)


EVERY = [cell(model, c, b, t) for model in TARGETS for c in CLIENTS for t in TOKENS for b in BATCHES]
CHOICES = {
    "quick": [cell("llama128", 20, 1, 32), cell("llama128", 100, 4, 32), cell("llama128", 20, 8, 32)],
    "targets": [
        *(cell("llama128", 100, b, t) for t in TOKENS for b in BATCHES),
        *(cell(model, 100, 4, 32) for model in ("llama256", "minilm")),
    ],
    "all": EVERY,
}
GROWTH = [
    *(Job(model="llama128", clients=c, batch=4, tokens=32, steps=2, rounds=1) for c in (25, 50, 100, 200, 400, 800)),
    *(Job(model="llama128", clients=20, batch=4, tokens=32, steps=2, rounds=r) for r in (1, 2, 4, 8, 16)),
]


def start(job: Job) -> Job:
    """The job that only starts and ends; its cost is taken off the others' of the same model."""
    return replace(job, clients=20, batch=1, tokens=32, steps=1, rounds=0)


def takes(contender: str, job: Job) -> bool:
    """Flower is measured at one size of batch."""
    return contender != "flower" or job.rounds == 0 or (job.batch, job.tokens) == (4, 32)


def seconds(job: Job) -> float:
    """Roughly what the job costs peft's loop, without its start."""
    fixed, each = COST[job.model]
    return job.client_steps * (fixed + each * job.batch * job.tokens) / 1000


def repeats(job: Job, most: int) -> int:
    """How often a job is measured: the machine's noise is some 15%, and the cells of the targets are to be judged."""
    return most if seconds(job) < SMALL or job in CHOICES["targets"] else 1
