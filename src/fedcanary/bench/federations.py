"""Real federations on the bundled model, and what every client of theirs read: the simulator's raw material.

Each federation is run once, without privacy, and every client's exact readings are kept (`pipeline.run`'s oracle tap).
What noise, panels and tests make of such clients is then simulated as often as needed (population.py, windows.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcanary import pipeline, study
from fedcanary.engines.setup import prepare
from fedcanary.types import Mode, Reading

NONE: Final = "none"
ROUNDS: Final = 10
METHODS: Final = ("fedavg", "fedprox", "ffa_lora", "fedsa_lora", "ditto", "dual", "local_only")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Federation:
    """One federation of generated clients: what was planted in it, how hard, and how its models are personalized."""

    plant: str = NONE
    strength: float = 1.0
    method: str = "fedavg"
    clients: int = 32
    rounds: int = ROUNDS
    seed: int = 401

    @property
    def name(self) -> str:
        """Short, for tables and keys."""
        return f"{self.method}/{self.plant}/{self.strength:g}/{self.seed}"

    def study(self) -> study.Study:
        """The same study for every federation but for what is named here."""
        plants = [] if self.plant == NONE else [{"mode": self.plant, "strength": self.strength}]
        return study.parse(
            {
                "title": f"SilentBench: {self.name}",
                "seed": self.seed,
                "rounds": self.rounds,
                "clients": {"count": self.clients, "plants": plants},
                "personalize": {"method": self.method, "lr": 5e-3, "save_personalized": 0},
                "privacy": {"trust": "none"},
                "engine": {"threads": 1},
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What the clients of a federation read. `values` is (rounds, clients, K), K over the probes' coordinates.

    NaN throughout for a client that failed in a round. `gaps` are the base's own contrasts of mode 1's groups.
    """

    federation: Federation
    layout: Mapping[str, tuple[str, ...]]  # coordinate names by probe, in the order of K
    gaps: Mapping[str, float]
    values: npt.NDArray[np.float32]

    def at(self, probe: str, coord: str) -> int:
        """Which of the K a coordinate is."""
        before = 0
        for name, coords in self.layout.items():
            if name == probe:
                return before + coords.index(coord)
            before += len(coords)
        raise KeyError(probe)


def everything(seeds: int = 1) -> list[Federation]:
    """The federations of the full benchmark: every plant at two strengths under FedAvg, at full strength elsewhere."""
    found = [Federation(seed=401 + s) for s in range(seeds + 1)]
    found += [Federation(plant=m, strength=x, seed=401 + s) for s in range(seeds) for m in Mode for x in (0.5, 1.0)]
    found += [Federation(plant=p, method=m, clients=16) for m in METHODS[1:] for p in (NONE, *Mode)]
    return found


def run(federation: Federation) -> Recording:
    """Run a federation (about 2 CPU-seconds for each ten clients' round) and keep what its clients read."""
    readings: dict[tuple[int, int], Mapping[str, Reading]] = {}

    def tap(round: int, client: int, said: Mapping[str, Reading]) -> None:
        readings[round - 1, client] = said

    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(federation.study(), Path(folder) / "cache")
        record = pipeline.run(setup, Path(folder) / "run", oracle_tap=tap)
        streams = record.header["plan"]["modes"][0]["streams"]
    layout = {p.name: tuple(c.name for c in p.coords) for p in setup.probes}
    shape = (federation.rounds, federation.clients, sum(map(len, layout.values())))
    values = np.full(shape, np.nan, dtype=np.float32)
    for at, said in readings.items():
        values[at] = np.concatenate([said[name].values for name in layout])
    # |r| + r + margin is a falling group's margin, |r| - r + margin a rising one's (monitor.plan)
    gaps = {
        up["coord"].partition(":")[2]: (up["margin"] - down["margin"]) / 2
        for up, down in zip(streams[::2], streams[1::2], strict=True)
    }
    return Recording(federation=federation, layout=layout, gaps=gaps, values=values)


def save(recordings: Iterable[Recording], path: Path) -> None:
    """Write recordings as one compressed file."""
    kept = sorted(recordings, key=lambda r: r.federation)
    about = [{"federation": asdict(r.federation), "layout": r.layout, "gaps": r.gaps} for r in kept]
    arrays: dict[str, Any] = {f"values{i}": np.round(r.values, 4) for i, r in enumerate(kept)}
    draft = path.with_suffix(".part.npz")
    np.savez_compressed(draft, about=np.array(json.dumps(about)), **arrays)
    draft.replace(path)


def load(path: Path) -> list[Recording]:
    """Read recordings back."""
    with np.load(path) as file:
        about: list[dict[str, Any]] = json.loads(str(file["about"]))
        return [
            Recording(
                federation=Federation(**each["federation"]),
                layout={name: tuple(coords) for name, coords in each["layout"].items()},
                gaps=each["gaps"],
                values=file[f"values{i}"],
            )
            for i, each in enumerate(about)
        ]
