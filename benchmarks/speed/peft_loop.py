"""The plain loop: one peft model, its adapter overwritten for each client. python peft_loop.py JOB OUT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from job import finish, load, read
from peft_client import model, parameters, tensors, train


def main(folder: Path, out: Path) -> None:
    job, source = read(folder)
    data = tensors(load(folder / "data.npz"))
    wrapped = model(job, source)
    places = parameters(wrapped)
    trained = list(places.values())
    start = load(folder / "start.npz")
    shared = [torch.from_numpy(start[name]) for name in places]
    losses = []
    began = time.process_time()
    for round in range(job.rounds):
        total = [torch.zeros_like(tensor) for tensor in shared]
        loss = 0.0
        for client in range(job.clients):
            with torch.no_grad():
                for place, tensor in zip(trained, shared, strict=True):
                    place.copy_(tensor)
            loss += train(job, wrapped, trained, data, round, client)
            with torch.no_grad():
                for change, place, tensor in zip(total, trained, shared, strict=True):
                    change.add_(place).sub_(tensor)
        shared = [tensor + change / job.clients for tensor, change in zip(shared, total, strict=True)]
        losses.append(loss / job.clients)
    finish(
        out,
        losses,
        {name: tensor.numpy() for name, tensor in zip(places, shared, strict=True)},
        time.process_time() - began,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
