"""The job that all contenders do, and the bytes they read; needs only numpy, for it runs in every contender's venv.

Federated averaging of LoRA adapters over a frozen base: in each round every client starts from the shared adapter,
takes `steps` AdamW steps of `batch` rows of `tokens` tokens, and the shared adapter moves by the mean of the clients'
changes. A job's folder holds job.json, data.npz (what the clients own) and start.npz (the first shared adapter).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

SEED = 5
R, ALPHA, LR = 8, 16.0, 2e-3
TARGETS = {"llama128": ("q_proj", "v_proj"), "llama256": ("q_proj", "v_proj"), "minilm": ("query", "value")}
LABELS = 2
REVERSE = "FEDCANARY_BENCH_REVERSE" in os.environ  # sums the same terms in another order: see check.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One cell of the table. `rounds=0` only starts and ends."""

    model: str  # a key of TARGETS
    clients: int
    batch: int
    tokens: int
    steps: int  # local steps of a client in a round
    rounds: int

    @property
    def name(self) -> str:
        """One string for all its fields."""
        return f"{self.model}-{self.clients}c-{self.batch}x{self.tokens}-{self.steps}s-{self.rounds}r"

    @property
    def task(self) -> Literal["causal", "classify"]:
        """What the base is."""
        return "classify" if self.model == "minilm" else "causal"

    @property
    def rows(self) -> int:
        """Rows that a client owns; a round passes over them once."""
        return self.steps * self.batch

    @property
    def client_steps(self) -> int:
        """Optimizer steps of all clients in all rounds."""
        return self.clients * self.steps * self.rounds

    def order(self, round: int, client: int) -> np.random.Generator:
        """Shuffles a client's rows in a round; the batches are the slices of its `permutation(rows)`."""
        return np.random.default_rng([SEED, 1, round, client])

    def batches(self, round: int, client: int) -> list[np.ndarray]:
        """The row numbers of each step, (steps, batch)."""
        chosen = self.order(round, client).permutation(self.rows).reshape(self.steps, self.batch)
        return list(chosen[:, ::-1].copy() if REVERSE else chosen)


def data(job: Job, vocabulary: int) -> dict[str, np.ndarray]:
    """Token ids (clients, rows, tokens), and for a classifier labels (clients, rows); a seeded stream per client."""
    streams = [np.random.default_rng([SEED, 0, client]) for client in range(job.clients)]
    ids = np.stack([s.integers(5, vocabulary, (job.rows, job.tokens)) for s in streams])
    labels = np.stack([s.integers(0, LABELS, job.rows) for s in streams])
    return {"ids": ids, "labels": labels} if job.task == "classify" else {"ids": ids}


def write(folder: Path, job: Job, base: Path) -> None:
    """Lay out a job's folder; `base` is a model's folder as prepare.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((base / "config.json").read_text("utf-8"))["vocab_size"]
    np.savez(folder / "data.npz", **data(job, vocabulary))
    np.savez(folder / "start.npz", **load(base / "start.npz"))
    (folder / "job.json").write_text(json.dumps({"base": str(base), **asdict(job)}), "utf-8")


def read(folder: Path) -> tuple[Job, str]:
    """A job and its base's folder."""
    content = json.loads((folder / "job.json").read_text("utf-8"))
    base = content.pop("base")
    return Job(**content), base


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def finish(path: Path, losses: list[float], adapter: Mapping[str, np.ndarray], net: float = float("nan")) -> None:
    """Write a contender's result: the mean loss of each round (rounds,), and the shared adapter after the last.

    `net` are the CPU-seconds of the rounds alone, where one process does it all (`time.process_time`).
    """
    arrays = {f"adapter/{name}": array for name, array in adapter.items()}
    np.savez(path, losses=np.asarray(losses, dtype=np.float64), net=np.asarray(net), **arrays)
