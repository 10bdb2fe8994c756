"""The server of a run on Flower: the loop of `pipeline.py`, and what it tells whoever watches it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcanary import pipeline, study
from fedcanary.engines import consent
from fedcanary.engines.flower import certificates, enrol, live
from fedcanary.engines.flower.clients import FlowerClients, Patience
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.programs import clients_of_nodes
from fedcanary.engines.setup import cache, prepare
from fedcanary.errors import EXIT_ALARM, EXIT_BUG, EXIT_OK, FedcanaryError
from fedcanary.pipeline import Progress
from fedcanary.privacy.secagg import Registry

if TYPE_CHECKING:
    from flwr.serverapp import Grid


def serve(grid: Grid, config: Mapping[str, Any], link: Link | None = None) -> int:
    """Run the study that the run config names, or go on with the run in its folder; returns the exit code.

    Whatever happens, `live.json` says it: the code as `ended`, and an error's text, which is about the server's side.
    """
    out = Path(str(config["out"]))
    out.mkdir(parents=True, exist_ok=True)
    told = _Live(out / live.NAME)
    try:
        code = _run(link or Link(grid), config, out, told)
    except FedcanaryError as error:
        told(ended=error.exit_code, error=str(error))
        raise
    except BaseException as error:
        told(ended=EXIT_BUG, error=f"{type(error).__name__}: {error}")
        raise
    told(ended=code)
    return code


def _run(link: Link, config: Mapping[str, Any], out: Path, told: _Live) -> int:
    file = Path(str(config["study"]))
    told(step="loading")
    setup = prepare(study.load(file), cache())
    consent.check(setup)
    told(rounds=setup.study.rounds)
    if state := config.get("state"):
        enrol.everybody(Path(str(state)), len(setup.population))
    registry = None
    if setup.study.privacy.trust == "secure_aggregation":
        members = certificates.load_registry(
            (Path(str(state)).parent if state else file.parent) / certificates.REGISTRY
        )
        registry = Registry(keys={client: member.key for client, member in members.items()})
    given = {
        name: float(config[f"{name}_seconds"]) for name in ("train", "step", "nodes") if f"{name}_seconds" in config
    }
    nodes = None if state else clients_of_nodes(file.parent)
    clients = FlowerClients(setup, out, link, registry, nodes=nodes, patience=Patience(**given), note=told.step)
    (out / "study.toml").write_text(setup.study.toml(), encoding="utf-8")
    alarmed = False

    def watch(p: Progress) -> None:
        nonlocal alarmed
        word: dict[str, Any] = {"round": p.round}
        if p.verdict is not None:
            alarmed = alarmed or "alarm" in p.verdict.states.values()
            word["decided"] = {"round": p.round, "states": dict(p.verdict.states), "action": p.verdict.action}
            word |= {"exchanges": link.exchanges, "faults": dict(link.faults), "refused": dict(clients.refused)}
        told(**word)

    record = pipeline.run(setup, out, watch=watch, clients=clients)
    states = [state for body in record.of("round") for state in body["verdict"]["states"].values()]
    return EXIT_ALARM if alarmed or "alarm" in states else EXIT_OK


class _Live:
    """Writes `live.json`: what was said last of each thing."""

    def __init__(self, file: Path) -> None:
        self._file, self._word = file, dict[str, Any]()

    def __call__(self, **said: Any) -> None:
        self._word |= said
        draft = self._file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(self._word), "utf-8")
        draft.replace(self._file)

    def step(self, name: str, done: int, clients: int, round: int) -> None:
        """What an exchange is about, and how many have answered."""
        self(step=name, done=done, clients=clients, round=round)
