"""Quantile-adaptive clipping of updates: paid for inside the message, led by the recorded releases alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedcanary import pipeline, study
from fedcanary.engines import privacy_terms
from fedcanary.engines.clients import Work
from fedcanary.engines.consent import contract_of
from fedcanary.engines.local import LocalClients
from fedcanary.models import adapters
from fedcanary.privacy.contract import check
from fedcanary.privacy.encode import Encoding
from fedcanary.privacy.release import Gate
from fedcanary.privacy.seal import FIXED, Message, Terms, seal
from fedcanary.record import RunRecord
from oracles import silos
from oracles.silos import Silos

# peft asks transformers for a name that transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
LAYOUT = {privacy_terms.CLIPPING: (privacy_terms.WITHIN,)}


def make(model, rounds: int = 3, updates=None, **privacy):
    how = {"noise": "none", "clip": 1e-3, "quantile": 0.5, **(updates or {})}
    promise = {"epsilon": 30.0, "min_cohort": 2, "dropouts": 0.0, "panel": "same", "updates": how, **privacy}
    tree = {"rounds": rounds, "clients": {"count": 3}, "engine": {"threads": 1}, "privacy": promise}
    return silos.setup(model, study.parse({**tree, "personalize": {"lr": 0.01}}), Silos(count=3))


def clips(record: RunRecord, first: float, quantile: float) -> list[float]:
    found, past = [first], record.releases()
    for t in sorted(past):
        found.append(privacy_terms.next_clip(found[-1], quantile, past[t].get(privacy_terms.CLIPPING)))
    return found


def release_of(norms, clip: float, noise: float, seed: int = 1):
    """One round's release of whether clients with these norms were within the clip."""
    terms = Terms(trust="central", noise_multiplier=noise, delta=1e-6, simulated=seed)
    gate = Gate(1, LAYOUT, terms, lambda charge: None)
    for k, norm in enumerate(norms):
        said = Message(readings={privacy_terms.CLIPPING: np.array([float(norm <= clip)])}, update=np.ones(1))
        gate.put(k, seal(said, LAYOUT, terms, 1, k))
    return gate.close()[privacy_terms.CLIPPING]


# --- the rule ---------------------------------------------------------------------------------------------------


def test_the_update_is_geometric_and_a_round_without_a_release_changes_nothing():
    norms = [0.5, 1.0, 2.0, 4.0]
    exact = release_of(norms, 1.0, 1e-3)  # half of them within
    assert exact.mean("within") == pytest.approx(0.5, abs=1e-3)
    assert privacy_terms.next_clip(1.0, 0.5, exact) == pytest.approx(1.0, rel=1e-3)
    assert privacy_terms.next_clip(1.0, 0.9, exact) == pytest.approx(math.exp(0.2 * 0.4), rel=1e-3)
    assert privacy_terms.next_clip(0.7, 0.9, None) == 0.7


def test_noise_moves_the_clip_by_at_most_a_fifth_in_a_round():
    """The share is held to [0, 1], so even absurd noise moves the clip by exp(0.2) at most."""
    for seed in range(20):
        after = privacy_terms.next_clip(1.0, 0.5, release_of([1.0] * 5, 1.0, 100.0, seed))
        assert math.exp(-0.2 * 0.5) - 1e-12 <= after <= math.exp(0.2 * 0.5) + 1e-12


@pytest.mark.parametrize(("noise", "within"), [(1e-3, 0.05), (5.0, 0.25)])
def test_the_clip_finds_its_quantile(noise, within):
    """40 clients, 100 rounds from a start 30 times too small; with noise of 7.5 on a count of 40, within a quarter."""
    norms = np.exp(np.random.default_rng(3).normal(size=40))
    clip, last = 0.05, []
    for t in range(100):
        clip = privacy_terms.next_clip(clip, 0.7, release_of(norms, clip, noise, t))
        last.append(float((norms <= clip).mean()))
    assert np.mean(last[-20:]) == pytest.approx(0.7, abs=within)


# --- in a run ---------------------------------------------------------------------------------------------------


def test_the_clip_follows_the_norms_and_bounds_what_is_sent(model, tmp_path):
    setup = make(model)
    record = pipeline.run(setup, tmp_path)
    found = clips(record, 1e-3, 0.5)
    assert len(set(found)) == 4  # it moved in every round
    assert [b["probe"] for b in record.of("release") if b["round"] == 1][-1] == privacy_terms.CLIPPING
    shared = [setup.shared, *(adapters.load(pipeline.round_folder(tmp_path, t)) for t in (1, 2, 3))]
    for t in range(3):
        moved = math.sqrt(sum(float(((shared[t + 1][n] - shared[t][n]).double() ** 2).sum()) for n in setup.shared))
        assert 0 < moved <= found[t] * (1 + 1e-3)
    assert found[1] != found[0]
    charges = [b["purpose"] for b in record.of("charge")]
    assert charges == ["readings", "update"] * 3  # no charge of its own: it is a coordinate of the paid message


def test_an_interrupted_run_goes_on_to_the_same_bytes(model, tmp_path):
    whole = pipeline.run(make(model), tmp_path / "whole")
    seen = 0

    def stop(progress):
        nonlocal seen
        seen += progress.verdict is not None
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(make(model), tmp_path / "cut", watch=stop)
    assert RunRecord.load(tmp_path / "cut").rounds == 2
    assert pipeline.run(make(model), tmp_path / "cut").digest == whole.digest


def test_noised_updates_take_their_noise_from_the_rounds_own_clip(model, tmp_path):
    setup = make(model, updates={"noise": 5.0}, epsilon=50.0)
    record = pipeline.run(setup, tmp_path)
    found = clips(record, 1e-3, 0.5)
    events = [json.loads(b["event"]) for b in record.of("charge") if b["purpose"] == "update"]
    for clip, event in zip(found, events, strict=False):
        assert event["sensitivity"] == pytest.approx(clip * FIXED)
        assert event["share_std"] * math.sqrt(event["shares"]) == pytest.approx(5.0 * clip * FIXED, rel=1e-3)
    costs = {round(b["epsilon"], 6) for b in record.of("charge") if b["purpose"] == "update"}
    assert len(costs) == 1  # whatever the clip


def test_a_client_says_whether_its_own_norm_was_within(model, tmp_path):
    setup = make(model)
    for clip, expected in ((1e-6, 0.0), (1e6, 1.0)):
        terms = privacy_terms.terms(setup.study, 3, setup.probes, clip)
        clients = LocalClients(setup, tmp_path / str(clip))
        whole = clients._whole
        said = []
        clients._whole = lambda *args, whole=whole, said=said: said.append(whole(*args)) or said[-1]
        list(clients.work(Work(clients.consent.request(1, 3), [0, 1, 2], setup.shared, terms)))
        assert [m.readings[privacy_terms.CLIPPING].tolist() for m in said] == [[expected]] * 3


def test_the_message_keeps_its_norm(model):
    """The bit is one more coordinate under the same cap; between its two values a message moves by 2 / 3 of it."""
    layout = privacy_terms.layout(make(model))
    assert layout[privacy_terms.CLIPPING] == (privacy_terms.WITHIN,)
    encoding = Encoding(LAYOUT)
    one, two = (encoding.message({privacy_terms.CLIPPING: np.array([bit])}).astype(float) for bit in (0.0, 1.0))
    assert np.linalg.norm(one - two) == pytest.approx(2**16 / 1.5, rel=1e-3)


def test_the_contract_lists_the_bit_and_the_quantile(model):
    contract = contract_of(make(model))
    assert check(contract) == []
    assert contract.updates.quantile == 0.5
    assert "clipping/within" in {n.key for n in contract.numbers}


def test_where_examples_are_the_unit_the_bit_is_post_processing(model, tmp_path):
    record = {"noise": 1.1, "clip": 0.5, "sample_rate": 0.5, "min_held_out": 4}
    setup = make(model, unit="example", record=record)
    assert check(contract_of(setup)) == []
    done = pipeline.run(setup, tmp_path)
    training = {b["id"] for b in done.of("charge") if b["purpose"] == "training"}
    bits = [b for b in done.of("release") if b["probe"] == privacy_terms.CLIPPING]
    assert len(bits) == 3
    assert all(b["charge_id"] in training and b["noise_std"] == [0.0] for b in bits)
