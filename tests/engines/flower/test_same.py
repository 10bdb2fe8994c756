"""A run on Flower is the run in one process: the same record and the same adapters, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from federation import Federation

from fedcanary import pipeline
from fedcanary.engines.flower.clients import FlowerClients
from fedcanary.errors import BadInput
from fedcanary.privacy.contract import Reason
from oracles.few import MadeUp, bare


def kept(out: Path) -> dict[str, bytes]:
    """The record and the adapters of a run."""
    files = [out / "record.jsonl", *sorted((out / "adapters").rglob("*.safetensors"))]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def study(count: int = 6, **tables):
    privacy = {"min_cohort": 3, "panel": "same", "noise": "simulated", **tables.pop("privacy", {})}
    return bare(count, {"rounds": 3, "seed": 5, "privacy": privacy, **tables})


STUDIES = {
    "secure aggregation": {},
    "rotating panels": {"clients": {"count": 12}, "privacy": {"panel": "rotating"}},
    "some a round": {"clients": {"per_round": 4}},
    "local, some only train": {"clients": {"per_round": 4, "also_train": 1}, "privacy": {"trust": "local"}},
    "central": {"privacy": {"trust": "central"}},
}


def test_nobody_only_trains_in_a_secure_sum_over_messages(tmp_path):
    """Attack: a server tells all but one client that they only train, and has that one's readings alone in a sum."""
    setup = study(6)
    far = Federation(setup, tmp_path)
    with pytest.raises(BadInput, match="no client could see"):
        Federation(study(6, clients={"per_round": 4, "also_train": 1}), tmp_path / "said").run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowerClients, "work", all_but_one(FlowerClients.work))
        record = far.run()
    refused = [body["refused"] for body in record.of("round")]
    assert refused == [{Reason.APART.value: 5}] * 3
    assert not any(record.releases().values())


def all_but_one(work):
    """`work` of a server that asks client 0 for everything, and of all others their update alone."""

    def lying(self, asked):
        return work(self, replace(asked, cohort=asked.cohort[:1], trainers=asked.cohort[1:]))

    return lying


@pytest.mark.parametrize("tables", STUDIES.values(), ids=STUDIES)
def test_a_run_on_flower_writes_the_same_bytes(tmp_path, tables):
    clients = tables.get("clients", {}).get("count", 6)
    setup = study(clients, **tables)
    pipeline.run(setup, tmp_path / "here", clients=MadeUp(setup, tmp_path / "here" / "clients"))
    far = Federation(setup, tmp_path / "flower")
    far.run()
    assert kept(tmp_path / "flower") == kept(tmp_path / "here")
    assert not far.link.faults
    secure = setup.study.privacy.trust == "secure_aggregation"
    assert far.link.exchanges == 1 + (2 + 3 * 3 if secure else 3)  # who are you; keys and shares; three rounds
