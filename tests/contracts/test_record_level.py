"""Unit `example`: what pays, what leaves exactly and cites the payment, and how little one held-out example shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary import pipeline, study
from fedcanary.engines import privacy_terms, protection
from fedcanary.engines.clients import Work
from fedcanary.engines.consent import contract_of
from fedcanary.engines.local import LocalClients
from fedcanary.engines.setup import Setup
from fedcanary.engines.verify import verify
from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.personalize import METHODS
from fedcanary.privacy import accounting
from fedcanary.privacy.contract import check
from fedcanary.privacy.encode import UNIT, Encoding, shrink
from fedcanary.privacy.seal import Terms
from fedcanary.probes import Answers, ClientView, OwnProbe, probes
from fedcanary.record import RunRecord
from fedcanary.report.summary import schema, summarise
from fedcanary.report.text import terminal
from fedcanary.types import Item, Role
from oracles import silos
from oracles.silos import Silos, item, suites

# peft asks transformers for a name that transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
RECORD = {"noise": 1.1, "clip": 0.5, "sample_rate": 0.5, "min_held_out": 4}
EXACT = (
    *("amplified_bias", "confidence_miscalibration", "adaptation_misalignment"),
    *("out_of_domain_degradation", "alignment_erosion"),
)
OWN = ("utility", "fairness_collapse")


def checked(privacy=None, rounds: int = 2, record=None, **personalize) -> study.Study:
    table = {"method": "fedavg", "lr": 0.01, "optimizer": "sgd", **personalize}
    promise = {"unit": "example", "epsilon": 30.0, "min_cohort": 2, "dropouts": 0.0, "panel": "same"}
    return study.parse(
        {
            "rounds": rounds,
            "clients": {"count": 3},
            "engine": {"threads": 1, "stack": 2},
            "privacy": {**promise, "record": {**RECORD, **(record or {})}, **(privacy or {})},
            "personalize": table,
        }
    )


def make(model, clients: Silos | None = None, **how) -> Setup:
    return silos.setup(model, checked(**how), clients)


# --- a whole run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, pipeline.run(make(model), out)


def test_training_and_readings_are_charged_and_what_left_exactly_cites_the_training(finished):
    _, record = finished
    charges = {body["id"]: body for body in record.of("charge")}
    assert [(c["round"], c["purpose"]) for c in charges.values()] == [
        (t, purpose) for t in (1, 2) for purpose in ("training", "readings")
    ]
    event = {"kind": "poisson_gaussian", "count": 2, "noise_multiplier": 1.1, "sample_rate": 0.5}
    for body in record.of("release"):
        charge = charges[body["charge_id"]]
        exact = body["probe"] in EXACT
        assert charge["purpose"] == ("training" if exact else "readings"), body["probe"]
        assert body["event"] == charge["event"]
        assert (json.loads(body["event"]) == event) == exact
        assert (max(body["noise_std"]) == 0) == exact
        assert math.isfinite(charge["epsilon"])
    last = list(charges.values())[-1]["spent"]
    alone = accounting.dpsgd_epsilon(1.1, 0.5, 4, 1e-6, neighbours="zeroed")
    assert last["epsilon"] == pytest.approx(30.0, rel=1e-3)  # readings fill the budget; they do not add to the training
    assert alone < 30.0


def test_a_run_replays_verifies_and_repeats(model, finished, tmp_path):
    out, record = finished
    again = pipeline.replay(RunRecord.load(out))
    recorded = [body["evidence"] for body in record.of("round")]
    assert [json.dumps(e) for _, e in again] == [json.dumps(e) for e in recorded]
    assert verify(out)["rounds"] == 2
    assert pipeline.run(make(model), tmp_path).digest == record.digest


def test_the_summary_says_whose_epsilon_it_is_and_that_it_covers_the_updates(finished):
    _, record = finished
    summary = summarise(record)
    jsonschema.validate(summary, schema())
    privacy = summary["privacy"]
    assert (privacy["unit"], privacy["updates_private"]) == ("example", True)
    assert 0 < privacy["epsilon"] <= privacy["budget"]["epsilon"]
    assert "DP-SGD" in privacy["mechanism"] and "post-processing" in privacy["updates"]
    assert "example" in privacy["hides"]
    assert "does not cover" not in terminal(summary, colour=False)


def test_the_contract_of_a_run_is_sound_and_says_what_is_exact(model):
    contract = contract_of(make(model))
    assert check(contract) == []
    assert contract.unit == "example"
    assert contract.examples.exact == tuple(sorted(EXACT))
    assert contract.examples.steps == 2
    assert {n.probe for n in contract.numbers if n.scale is not None} == {*OWN, "message"}
    assert contract.reach == pytest.approx(privacy_terms.reach(make(model).study, make(model).probes))
    assert contract.epsilon_per_window == pytest.approx(30.0, rel=1e-3)
    cheap = contract.model_copy(update={"epsilon_per_window": 2.0, "epsilon_per_panel": 1.0})
    assert {p.where for p in check(cheap)} == {"contract: epsilon_per_window", "contract: epsilon_per_panel"}


@pytest.mark.parametrize("trust", ["central", "local"])
def test_every_protecting_trust_carries_it(model, trust, tmp_path):
    record = pipeline.run(
        make(model, rounds=1, privacy={"trust": trust, "panel": "rotating", "min_cohort": 3}), tmp_path
    )
    (round,) = record.of("round")
    assert round["aborted"] == ""
    assert {body["probe"] for body in record.of("release")} == {*EXACT, *OWN}


def test_a_tampered_exact_reading_is_out_of_bounds_under_central(model, tmp_path):
    setup = make(model, rounds=1, privacy={"trust": "central"})
    with protection.Protection(setup, RunRecord.open(tmp_path)) as protected:
        gate = protected.gate(1, protected.cohort(1))
        clients = LocalClients(setup, tmp_path / "clients")
        sent = [
            s
            for part in clients.work(Work(clients.consent.request(1, 3), [0, 1, 2], setup.shared, gate.terms))
            for s in part
        ]
        at = Encoding(gate.terms.bounded(setup.layout)).size
        sent[0].vector[at] += 1 << 40
        assert [gate.put(s.client, s.vector) for s in sent] == [False, True, True]
        assert gate.refused == {"out of bounds": 1}


def test_an_interrupted_run_goes_on_to_the_same_bytes(model, tmp_path):
    name = "fedsa_lora"  # which keeps a private part from round to round
    whole = pipeline.run(make(model, method=name), tmp_path / "whole")

    def stop(progress):
        if progress.verdict is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(make(model, method=name), tmp_path / "cut", watch=stop)
    assert pipeline.run(make(model, method=name), tmp_path / "cut").digest == whole.digest


def test_the_operating_systems_noise_drives_training_too(model, tmp_path):
    """No readings' noise is in an adapter, so two runs differ only if coins and noise of training do."""
    one, two = (
        pipeline.run(make(model, rounds=1, privacy={"noise": "system"}), tmp_path / name) for name in ("one", "two")
    )
    adapter = [next(iter(record.of("round")))["adapter"] for record in (one, two)]
    assert adapter[0] != adapter[1]


def test_two_silos_are_enough(model, tmp_path):
    setup = make(model, Silos(count=2), rounds=1)
    record = pipeline.run(setup, tmp_path)
    assert {release.count for release in record.releases()[1].values()} == {2.0}


# --- what one example can change --------------------------------------------------------------------------------


def vectors(setup: Setup, folder) -> list[np.ndarray]:
    """What the clients seal in round 1, without the noise on readings."""
    clients = LocalClients(setup, folder)
    terms = replace(privacy_terms.terms(setup.study, 3, setup.probes), trust="central")  # the server adds that noise
    work = clients.work(Work(clients.consent.request(1, 3), [0, 1, 2], setup.shared, terms))
    return [s.vector for part in work for s in part]


def test_a_held_out_example_changes_its_own_bounded_message_alone_and_little(model, tmp_path):
    """The training, the update and the public readings are the same bytes; the bounded message moves within reach."""
    setup = make(model)
    one, two = (vectors(make(model, Silos(odd=odd)), tmp_path / f"x{odd}") for odd in ("", "eval"))
    size = Encoding(privacy_terms.terms(setup.study, 3, setup.probes).bounded(setup.layout)).size
    assert all(np.array_equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    assert np.array_equal(one[0][size:], two[0][size:])
    moved = float(np.linalg.norm((one[0] - two[0])[:size]))
    assert 0 < moved <= 2 * privacy_terms.reach(setup.study, setup.probes) * UNIT


def test_a_training_example_reaches_the_message_only_through_its_clients_noised_training(model, tmp_path):
    one, two = (vectors(make(model, Silos(odd=odd)), tmp_path / f"x{odd}") for odd in ("", "train"))
    assert not np.array_equal(one[0], two[0])
    assert all(np.array_equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))


def test_a_client_with_too_few_held_out_examples_says_nothing_of_them(model, tmp_path):
    setup = make(model, Silos(held_out=(3, 4, 4)))
    said = {}
    LocalClients(setup, tmp_path, lambda round, client, readings: said.setdefault(client, readings))
    clients = LocalClients(setup, tmp_path, lambda round, client, readings: said.setdefault(client, readings))
    terms = privacy_terms.terms(setup.study, 3, setup.probes)
    list(clients.work(Work(clients.consent.request(1, 3), [0, 1, 2], setup.shared, terms)))
    for probe in setup.probes:
        if probe.own:
            names = [c.name for c in probe.coords]
            for client in range(3):
                missing = said[client][probe.name].values[names.index("missing")]
                assert missing == (1.0 if client == 0 else 0.0)


@pytest.mark.parametrize("domains", ["hidden", "public"])
def test_hidden_domains_choose_nothing_and_public_ones_do(model, domains, tmp_path):
    setup = make(model, record={"domains": domains})
    clients = LocalClients(setup, tmp_path)
    asked = {clients._asked(clients._domains(c)).shape for c in range(3)}
    assert {clients._domains(c) for c in range(3)} == (
        {frozenset()} if domains == "hidden" else {frozenset({"kitchen"}), frozenset({"garden"})}
    )
    assert asked


# --- the proofs, held to random views ---------------------------------------------------------------------------


@st.composite
def tables(draw, least: int = 0) -> Answers:
    n = draw(st.integers(least, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blank, sharp = draw(st.sampled_from([0.0, 0.3])), draw(st.sampled_from([1.0, 40.0]))
    return random_answers(rng, n, blank, sharp)


def random_answers(rng, n: int, blank: float, sharp: float) -> Answers:
    logits = sharp * rng.normal(size=(3, n, 2))
    table = np.exp(logits - logits.max(axis=2, keepdims=True))
    table /= table.sum(axis=2, keepdims=True)
    alone = rng.random(n) < 0.3
    table[:, alone, 0], table[:, alone, 1] = rng.random((3, int(alone.sum()))), 0.0
    table[:, rng.random(n) < blank] = np.nan
    items = tuple(
        Item(
            prompt=str(i),
            choices=("x",) if alone[i] else ("x", "y"),
            answer=0 if alone[i] else None if rng.random() < 0.1 else int(rng.integers(2)),
            group=str(rng.choice(["a", "b"])),
            positive=0,
            domain=str(rng.choice(["kitchen", "garden"])),
        )
        for i in range(n)
    )
    return Answers(items=items, base=table[0], received=table[1], personalized=table[2])


ALL = probes({s.role: s.items for s in suites()}, 0.1)


def test_every_probe_says_whether_it_is_about_the_clients_own_items():
    assert tuple(p.name for p in ALL if p.own) == OWN
    assert tuple(p.name for p in ALL if not p.own) == EXACT
    assert all(isinstance(p, OwnProbe) == p.own for p in ALL)
    for probe in ALL:
        if isinstance(probe, OwnProbe):
            assert set(probe.reach) == {c.name for c in probe.coords if c.scale is not None}


@settings(max_examples=100, deadline=None)
@given(tables(), tables(), st.dictionaries(st.sampled_from(list(Role)), tables(1)))
def test_the_clients_own_items_change_nothing_in_a_public_reading(mine, other, suites):
    for probe in ALL:
        if not probe.own:
            one, two = (probe.read(ClientView(local=local, suites=suites).public()) for local in (mine, other))
            assert one.values.tobytes() == two.values.tobytes(), probe.name
            assert (one.scored, one.unscoreable) == (two.scored, two.unscoreable)
            if Role.CALIBRATION in suites:  # what a study always has; without it mode 2 falls back on own items
                sent = [c.scale is not None for c in probe.coords]
                full = probe.read(ClientView(local=mine, suites=suites)).values
                assert np.array_equal(full[sent], one.values[sent]), probe.name


@settings(max_examples=300, deadline=None)
@given(tables(1), st.integers(0, 2**32), st.booleans(), st.sampled_from([0.05, 0.1, 0.5]))
def test_one_item_moves_a_message_within_its_reach(local, seed, drop, tail):
    """Adversarially far where it can: the item is replaced by a random one, or by one that cannot be scored."""
    instruments = [p for p in probes({s.role: s.items for s in suites()}, tail) if isinstance(p, OwnProbe)]
    encoding = Encoding({p.name: p.coords for p in instruments})
    rng = np.random.default_rng(seed)
    one = random_answers(rng, 1, 1.0 if drop else 0.0, 40.0)
    at = int(rng.integers(len(local)))
    other = Answers(
        items=(*local.items[:at], *one.items, *local.items[at + 1 :]),
        **{
            which: np.concatenate([table[:at], getattr(one, which), table[at + 1 :]])
            for which in ("base", "received", "personalized")
            for table in [getattr(local, which)]
        },
    )
    said = []
    for answers in (local, other):
        readings = {p.name: p.read_by_item(ClientView(local=answers, suites={})) for p in instruments}
        for p in instruments:
            low, high = np.array([[c.low, c.high] for c in p.coords]).T
            assert np.all((readings[p.name].values >= low) & (readings[p.name].values <= high))
        said.append(encoding.message({name: reading.values for name, reading in readings.items()}))
    reach = encoding.reach(len(local), {p.name: p.reach for p in instruments})
    moves = 1 if drop and not np.isnan(local.right("base")[at]) else 2
    assert np.linalg.norm(said[0] - said[1]) <= min(2.0, moves * reach) * UNIT


def test_the_bound_is_not_idle_and_the_ordinary_reading_would_break_it():
    """One item of 100 goes from right to wrong, which carries the client's mean loss beyond tau = 0.1."""
    n, own = 100, [p for p in ALL if isinstance(p, OwnProbe)]
    items = tuple(item(str(i), 0) for i in range(n))
    encoding = Encoding({p.name: p.coords for p in own})
    reach = encoding.reach(n, {p.name: p.reach for p in own})

    def view(wrong: int) -> ClientView:
        table = np.tile([1.0, 0.0], (n, 1))
        after = table.copy()
        after[:wrong] = [0.0, 1.0]
        return ClientView(local=Answers(items=items, base=table, received=after, personalized=after), suites={})

    def moved(read) -> float:
        one, two = (encoding.message({p.name: read(p)(view(wrong)).values for p in own}) for wrong in (10, 11))
        return float(np.linalg.norm(one - two)) / UNIT

    assert 0.4 * reach < moved(lambda p: p.read_by_item) <= 2 * reach
    assert moved(lambda p: p.read) > 8 * reach  # planted: a bit that jumps with a single item


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 30), st.floats(1e-3, 3))
def test_shrinking_never_moves_two_messages_apart(seed, size, step):
    rng = np.random.default_rng(seed)
    one = rng.normal(size=5) * size / 2
    two = one + rng.normal(size=5) * step
    assert np.linalg.norm(shrink(one) - shrink(two)) <= np.linalg.norm(one - two) * (1 + 1e-12)


# --- the budget, and what is refused ----------------------------------------------------------------------------


def test_training_that_does_not_fit_says_what_noise_would(model, tmp_path):
    setup = make(model, privacy={"epsilon": 2.0})
    with pytest.raises(BadInput) as caught:
        pipeline.run(setup, tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == "privacy.record.noise"
    assert "4 steps at sample_rate 0.5" in problem.what
    noise = float(problem.remedy.split()[1])
    assert 0.92 * 2 < accounting.dpsgd_epsilon(noise, 0.5, 4, 1e-6, neighbours="zeroed") <= 2.0
    privacy_terms.check_training(checked(privacy={"epsilon": 2.0}, record={"noise": noise}))
    with pytest.raises(BadInput, match="far more than epsilon 50"):
        privacy_terms.check_training(checked(rounds=1000, record={"noise": 0.3}, privacy={"epsilon": 2.0}))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dual"}))
def test_a_method_pays_for_each_training_of_a_round(name):
    mechanism = privacy_terms.training_mechanism(checked(method=name, epochs=3))
    assert (mechanism.count, mechanism.sample_rate) == (6 * METHODS[name].fits, 0.5)
    assert METHODS["ditto"].fits == 2


def test_everything_that_does_not_fit_together_is_said_at_once():
    wrong = {
        "privacy": {"unit": "example", "trust": "none"},
        "personalize": {"method": "dual"},
    }
    with pytest.raises(BadInput) as caught:
        study.parse(wrong)
    assert [p.where for p in caught.value.problems] == [
        "study: privacy.record",
        "study: privacy.trust",
        "study: personalize.method",
    ]
    for privacy, where in (
        ({"record": RECORD, "updates": {"noise": "none"}}, "study: privacy.record"),
        ({"unit": "example", "record": RECORD, "updates": {"noise": 2.0, "clip": 1.0}}, "study: privacy.updates.noise"),
        ({"unit": "example", "record": {**RECORD, "sample_rate": 1.5}}, "study: privacy.record.sample_rate"),
        ({"updates": {"noise": "none", "quantile": 0.5}}, "study: privacy.updates.clip"),
        ({"updates": {"noise": "none", "clip": 1.0, "quantile": 1.0}}, "study: privacy.updates.quantile"),
    ):
        with pytest.raises(BadInput) as caught:
            study.parse({"privacy": privacy})
        assert [p.where for p in caught.value.problems] == [where]


def test_nothing_leaves_exactly_where_training_did_not_pay():
    with pytest.raises(FedcanaryError, match="unless training"):
        Terms(trust="central", noise_multiplier=1.0, exact=("utility",))


def test_more_held_out_examples_need_less_noise():
    found = probes({s.role: s.items for s in suites()}, 0.05)
    noise = {
        n: privacy_terms.terms(checked(record={"min_held_out": n}), 3, found).noise_multiplier for n in (1, 100, 1000)
    }
    assert noise[1] > 5 * noise[100] > 40 * noise[1000]
    assert privacy_terms.terms(checked(), 3).reach == 2.0  # not told which probes there are: the worst


def test_a_window_costs_the_dearer_of_training_and_readings_and_runs_add_up(tmp_path):
    from fedcanary.privacy.ledger import Charge

    def charge(run: str, purpose: str, mechanism) -> Charge:
        whose = "trained" if purpose == "training" else "held-out"
        return Charge(
            id=f"{run} {purpose}",
            window=1,
            panel=f"{run} all {whose}",
            round=1,
            mechanism=json.loads(mechanism.to_json()),
            purpose=purpose,
            epsilon=1.0,
            delta=1e-6,
        )

    training = accounting.Mechanism(kind="poisson_gaussian", noise_multiplier=1.1, sample_rate=0.5, count=4)
    readings = accounting.Mechanism(kind="gaussian", noise_multiplier=2.0)
    rule = protection.spent_by("zeroed")

    def cost(*mechanisms) -> float:
        return accounting.compose(mechanisms, 1e-6, neighbours="zeroed")

    one = [charge("a", "training", training), charge("a", "readings", readings)]
    assert rule(one)[0] == pytest.approx(max(cost(training), cost(readings)))
    two = [*one, charge("b", "training", training), charge("b", "readings", readings)]
    every = [cost(x, y) for x in (training, readings) for y in (training, readings)]
    assert rule(two)[0] == pytest.approx(max(every))


def test_a_ledger_of_clients_is_not_one_of_examples(model, tmp_path):
    ledger = str(tmp_path / "ledger.sqlite")
    pipeline.run(make(model, rounds=1, privacy={"ledger": ledger}), tmp_path)
    client = study.parse(
        {"privacy": {"epsilon": 30.0, "min_cohort": 2, "ledger": ledger, "updates": {"noise": "none"}, "panel": "same"}}
    )
    with pytest.raises(BadInput, match="was paid for unit example"):
        protection.Protection(replace(make(model), study=client), RunRecord.open(tmp_path))
