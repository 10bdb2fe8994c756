"""Ours: stacks of clients through `fit`. python ours.py JOB OUT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from job import ALPHA, LR, TARGETS, Job, R, finish, load, read

from fedcanary.engines.stacking import Pacer, keep_memory, limits
from fedcanary.models import stacked
from fedcanary.models.adapters import Adapter, find_targets
from fedcanary.models.base import Rows
from fedcanary.models.base import load as load_base
from fedcanary.personalize.fit import Recipe, fit


def rows(job: Job, data: dict[str, np.ndarray], client: int) -> Rows:
    """A client's rows as the library lays them out."""
    ids = data["ids"][client].tolist()
    if job.task == "classify":
        targets = [[(0, label, i)] for i, label in enumerate(data["labels"][client].tolist())]
    else:
        targets = [[(at, token, i) for at, token in enumerate(row[1:])] for i, row in enumerate(ids)]
    return Rows(ids, targets, (len(ids), 1))


def main(folder: Path, out: Path) -> None:
    job, source = read(folder)
    data = load(folder / "data.npz")
    base = load_base(source, task=job.task)
    lora = find_targets(base, r=R, alpha=ALPHA, targets=TARGETS[job.model])
    shared: Adapter = {name: torch.from_numpy(array) for name, array in load(folder / "start.npz").items()}
    recipe = Recipe(lr=LR, batch=job.batch, clip=0.0)
    losses: list[float] = []
    keep_memory()
    began = time.process_time()
    first = [rows(job, data, client) for client in range(min(4, job.clients))]
    threads = torch.get_num_threads()
    pacer = Pacer(limits(base, lora, shared, first, recipe, threads=threads, clients=job.clients))
    for round in range(job.rounds):
        total = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        loss, left = 0.0, range(job.clients)
        while left:
            size = pacer.next(round)
            clients, left = left[:size], left[size:]
            with pacer.timed(len(clients), len(clients) * job.rows * job.tokens):
                fitted = fit(
                    base,
                    lora,
                    stacked.repeat(shared, len(clients)),
                    [rows(job, data, client) for client in clients],
                    recipe,
                    lambda k, _epoch, round=round, clients=clients: job.order(round, clients[k]),
                )
            for name, tensor in fitted.params.items():
                total[name] += (tensor - shared[name]).sum(0)
            loss += float(fitted.loss.sum())
        shared = {name: tensor + total[name] / job.clients for name, tensor in shared.items()}
        losses.append(loss / job.clients)
    finish(out, losses, {name: tensor.numpy() for name, tensor in shared.items()}, time.process_time() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
