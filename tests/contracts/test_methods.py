"""The laws of personalize/base.py, held by every method on a tiny random model; and each method's own promise."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedcanary import pipeline, study
from fedcanary.clients import panel
from fedcanary.engines import local as engine
from fedcanary.engines.clients import Work
from fedcanary.engines.local import LocalClients
from fedcanary.engines.setup import Setup
from fedcanary.errors import ClientFailed
from fedcanary.models import adapters, stacked
from fedcanary.personalize import METHODS, Held, method
from fedcanary.personalize.dual import Dual
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.privacy.seal import Terms
from fedcanary.probes import probes
from fedcanary.rng import stream
from fedcanary.types import Item
from oracles.few import WORDS, Members, item, suites

NAMES = sorted(METHODS)
WITH_PRIVATE = ("ditto", "dual", "fedsa_lora", "ffa_lora", "local_only")  # ffa's is the frozen draw of the seed
NONE = Terms(trust="none")
POISON = "the poisoned one"


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Few(Members):
    """A few clients with a few items each, of whom one may hold poison."""

    poisoned: int = -1

    def items(self, client: int, split: str) -> tuple[Item, ...]:
        first = [item(POISON, 0)] if client == self.poisoned and split == "train" else []
        n = {"train": 5 + client % 2, "eval": 3}[split] - len(first)
        return (
            *first,
            *(item(f"{split} {client} {WORDS[i % 4]} {i}", i + client, group="ab"[i % 2]) for i in range(n)),
        )


def make(model, name: str, clients: Few | None = None, rounds: int = 2, **personalize) -> Setup:
    clients = clients or Few()
    table = {"method": name, "batch": 2, "lr": 0.01, **personalize}
    tree = {
        "rounds": rounds,
        "privacy": {"trust": "none"},
        "clients": {"count": max(len(clients), 2)},
        "engine": {"threads": 1, "stack": 2},
    }
    per_round = table.pop("per_round", None)
    if per_round is not None:
        tree["clients"]["per_round"] = per_round
    checked = study.parse({**tree, "personalize": table})
    lora = adapters.find_targets(model, r=2, alpha=4.0)
    return Setup(
        study=checked,
        base=model,
        lora=lora,
        initial=adapters.initial(model, lora, 5),
        method=method(name, checked.personalize.mu),
        population=clients,
        suites=suites(),
        probes=probes({s.role: s.items for s in suites()}, 0.1),
    )


def trainer(model, lora, data, **recipe):
    chosen = Recipe(**{"batch": 2, "epochs": 3, "lr": 0.01, **recipe})

    def run(start, **how):
        return fit(model, lora, start, data, chosen, lambda k, e: stream(1, "order", k, e), **how)

    return run


def begin(model, name: str, mu: float = 0.1, k: int = 2):
    """A method with K = 2 clients at the start of a round, their data, and the adapter's shape."""
    lora = adapters.find_targets(model, r=2, alpha=4.0)
    chosen = method(name, mu)
    split = chosen.split(adapters.initial(model, lora, 5))
    held = Held(stacked.repeat(split.shared, k), stacked.repeat(split.private, k) if split.private else {})
    data = [model.targets(Few().items(c, "train")) for c in range(k)]
    if chosen.needs_embedding:
        held = chosen.prepare(held, [stacked.embed(model, rows) for rows in data])
    return chosen, held, data, lora


def distance(one, two) -> float:
    return float(torch.sqrt(sum(((one[n] - two[n]) ** 2).sum() for n in two)))


# --- laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_never_overlap_and_never_move(model, name):
    chosen, held, data, lora = begin(model, name)
    initial = adapters.initial(model, lora, 5)
    split = chosen.split(initial)
    assert not split.shared.keys() & split.private.keys()
    trained = chosen.train(held, trainer(model, lora, data))
    assert trained.held.shared.keys() == held.shared.keys() == split.shared.keys()
    assert trained.held.private.keys() == held.private.keys() >= split.private.keys()
    assert not trained.failed.any()
    assert np.isfinite(trained.loss).all()
    for adapter in chosen.adapters(trained.held):
        assert adapter.keys() == initial.keys()
        assert all(t.shape == (2, *initial[n].shape) for n, t in adapter.items())
    assert chosen.published(stacked.unstack(trained.held.shared, 0), initial).keys() == initial.keys()


@pytest.mark.parametrize("name", NAMES)
def test_training_learns_and_does_not_touch_what_it_was_given(model, name):
    chosen, held, data, lora = begin(model, name)
    before = {n: t.clone() for n, t in (held.shared | held.private).items()}
    first = chosen.train(held, trainer(model, lora, data, epochs=1, lr=1e-9))
    last = chosen.train(held, trainer(model, lora, data, epochs=6, lr=0.02))
    assert (last.loss < first.loss).all()
    assert all(torch.equal(t, before[n]) for n, t in (held.shared | held.private).items())


@pytest.mark.parametrize("name", NAMES)
def test_a_message_is_the_change_of_the_shared_tensors_and_nothing_else(model, name, tmp_path, monkeypatch):
    setup = make(model, name, weighting="examples")
    seen = []
    original = setup.method.train

    def spy(held, fit):
        trained = original(held, fit)
        seen.append(trained.held)
        return trained

    monkeypatch.setattr(setup.method, "train", spy)
    sent = sent_by(setup, tmp_path, [0, 1])
    (held,) = seen
    for k, (_, update) in enumerate(sent):
        weight = float(len(setup.population.items(k, "train")))
        change = [(held.shared[n][k] - t).double().reshape(-1).numpy() for n, t in sorted(setup.shared.items())]
        expected = np.concatenate([np.zeros(0), *change]) * weight
        np.testing.assert_array_equal(update, [*expected, weight])
        content = update.tobytes()
        for n, tensor in held.private.items():
            began = setup.method.split(setup.initial).private.get(n)
            values = tensor[k].double().reshape(-1)
            moved = values if began is None else values - began.double().reshape(-1)
            for candidate in (values, moved, moved * weight):
                piece = candidate[:4].numpy()
                if name != "ditto" and np.abs(piece).min() > 0:  # Ditto starts both adapters from one draw
                    assert piece.tobytes() not in content, n


def sent_by(setup: Setup, folder: Path, clients: list[int], shared=None) -> list[tuple[dict, np.ndarray] | None]:
    """What each client would say without protection: its readings by probe, and its update; None if it failed."""
    local = LocalClients(setup, folder)
    request = local.consent.request(1, len(clients))
    work = local.work(Work(request, clients, setup.shared if shared is None else shared, NONE))
    found: list[tuple[dict, np.ndarray] | None] = []
    ends = np.cumsum([len(coords) for coords in setup.layout.values()])
    for one in sorted((s for part in work for s in part), key=lambda one: clients.index(one.client)):
        pieces = None if one.vector is None else np.split(one.vector, ends)
        found.append(None if pieces is None else (dict(zip(setup.layout, pieces, strict=False)), pieces[-1]))
    return found


def files_outside(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if p.is_file() and p.relative_to(out).parts[0] != "clients"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_two_rounds_writes_private_tensors_nowhere_but_at_the_client(model, name, tmp_path):
    setup = make(model, name)
    record = pipeline.run(setup, tmp_path)
    assert record.rounds == 2
    outside = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in files_outside(tmp_path)}
    assert {f"adapters/round-00{t}/adapter_model.safetensors" for t in (1, 2)} < set(outside)
    public = b"".join(t.numpy().tobytes() for t in setup.initial.values())
    searched = 0
    for path in (tmp_path / "clients").glob("*/private.*.safetensors"):
        for n, tensor in load_file(path).items():
            flat = tensor.reshape(-1)
            for at in range(0, max(flat.numel() - 3, 1), 4):
                piece = flat[at : at + 4].contiguous()
                needle = piece.numpy().tobytes()
                if not piece.abs().min() > 0 or needle in public:
                    continue
                searched += 1
                where = [file for file, content in outside.items() if needle in content]
                assert not where, (n, where)
                if piece.numel() == 1:
                    continue
                text = json.dumps(piece.double().tolist())[1:-1].encode()
                assert not [file for file, content in outside.items() if text in content]
    kept = list((tmp_path / "clients").glob("*/private.*"))
    if name in WITH_PRIVATE:
        assert len(kept) == 2 * 3  # this round's and the round's before
        assert searched > 20 or name == "ffa_lora"
    else:
        assert not kept


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_repeatable_and_its_stacks_do_not_matter_to_the_draw(model, name, tmp_path):
    one, two = (pipeline.run(make(model, name, rounds=1), tmp_path / folder) for folder in ("one", "two"))
    assert one.digest == two.digest


@pytest.mark.parametrize("name", ["ditto", "dual", "fedsa_lora", "local_only"])
def test_clients_that_come_and_go_keep_what_is_theirs(model, name, tmp_path):
    """Two of four clients in each of five rounds: some return while others appear for the first time."""
    setup = make(model, name, Few(count=4), rounds=5, per_round=2)
    record = pipeline.run(setup, tmp_path)
    assert record.rounds == 5
    cohorts = [panel.draw(setup.study.seed, t, 4, 2) for t in range(1, 6)]
    known: set[int] = set()
    mixed = 0
    for cohort in cohorts:
        mixed += 0 < len(known & set(cohort)) < 2
        known |= set(cohort)
    assert mixed  # a stack with a newcomer beside a returning client did occur


# --- each method's own promise ----------------------------------------------------------------------------------


def test_fedavg_and_fedprox_keep_nothing(model):
    for name in ("fedavg", "fedprox"):
        _, held, _, lora = begin(model, name)
        assert held.private == {}
        assert held.shared.keys() == adapters.initial(model, lora, 5).keys()


def test_fedavg_averages(model, tmp_path):
    """The round's shared adapter is the mean of what the clients trained, by number of examples where asked."""
    for weighting in ("uniform", "examples"):
        setup = make(model, "fedavg", rounds=1, weighting=weighting)
        pipeline.run(setup, tmp_path / weighting)
        shared = adapters.load(pipeline.round_folder(tmp_path / weighting, 1))
        own = [load_file(p) for p in sorted((tmp_path / weighting / "clients").glob("*/adapter/*.safetensors"))]
        own = [adapters.from_peft(a) for a in own]
        n = [len(setup.population.items(c, "train")) if weighting == "examples" else 1 for c in range(3)]
        assert len(own) == 3
        for name, tensor in shared.items():
            expected = sum(w * a[name].double() for w, a in zip(n, own, strict=True)) / sum(n)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)


def test_ffa_lora_never_changes_a(model, tmp_path):
    setup = make(model, "ffa_lora")
    pipeline.run(setup, tmp_path)
    for folder in [pipeline.round_folder(tmp_path, t) for t in (1, 2)] + list(tmp_path.glob("clients/*/adapter")):
        found = adapters.load(folder)
        for name, tensor in setup.initial.items():
            if name.endswith(".lora_A"):
                assert torch.equal(found[name], tensor), name
            else:
                assert not torch.equal(found[name], tensor), name
    assert all(name.endswith(".lora_B") for name in setup.shared)


def test_fedsa_lora_keeps_b_at_the_client_from_round_to_round(model, tmp_path, monkeypatch):
    setup = make(model, "fedsa_lora")
    began = []
    original = setup.method.train
    monkeypatch.setattr(setup.method, "train", lambda held, fit: (began.append(held), original(held, fit))[1])
    pipeline.run(setup, tmp_path)
    # rounds 1 and 2 in stacks of two and one
    second = {name: torch.cat([held.private[name] for held in began[2:]]) for name in began[2].private}
    for k in range(3):
        kept = load_file(tmp_path / "clients" / f"{k:06d}" / "private.1.safetensors")
        assert kept and all(name.endswith(".lora_B") for name in kept)
        same = [all(torch.equal(second[name][j], tensor) for name, tensor in kept.items()) for j in range(3)]
        assert sum(same) == 1
        assert any(tensor.abs().max() > 0 for tensor in kept.values())
    published = adapters.load(pipeline.round_folder(tmp_path, 2))
    for name, tensor in published.items():
        assert torch.equal(tensor, setup.initial[name]) == name.endswith(".lora_B")


def test_local_only_sends_nothing(model, tmp_path):
    setup = make(model, "local_only")
    assert setup.shared == {}
    assert [update.tolist() for _, update in sent_by(setup, tmp_path / "c", [0, 1, 2], {})] == [[1.0]] * 3
    pipeline.run(setup, tmp_path / "run")
    published = adapters.load(pipeline.round_folder(tmp_path / "run", 2))
    assert adapters.digest(published) == adapters.digest(setup.initial)


def test_fedprox_with_a_huge_mu_stays_at_the_anchor(model):
    how = {"optimizer": "sgd", "lr": 0.005, "epochs": 10, "clip": 0.0}
    free, held, data, lora = begin(model, "fedprox", mu=0.0)
    tied, *_ = begin(model, "fedprox", mu=150.0)
    roams = distance(free.train(held, trainer(model, lora, data, **how)).held.shared, held.shared)
    stays = distance(tied.train(held, trainer(model, lora, data, **how)).held.shared, held.shared)
    assert roams > 0.05
    assert stays < roams / 10


def test_ditto_with_a_huge_mu_keeps_its_private_part_near_the_shared_one(model):
    how = {"optimizer": "sgd", "lr": 0.005, "epochs": 10, "clip": 0.0}
    free, held, data, lora = begin(model, "ditto", mu=0.0)
    tied, *_ = begin(model, "ditto", mu=150.0)
    strayed = Held(held.shared, {n: t + 0.1 for n, t in held.private.items()})  # as after rounds of its own
    for chosen, near in ((free, False), (tied, True)):
        trained = chosen.train(strayed, trainer(model, lora, data, **how)).held
        (own,) = chosen.adapters(trained)
        apart = distance(own, held.shared) / distance(chosen.adapters(strayed)[0], held.shared)
        assert (apart < 0.1) == near
        # and what is sent is plain local training, whatever mu
        plain = trainer(model, lora, data, **how)(held.shared).params
        assert all(torch.equal(trained.shared[n], t) for n, t in plain.items())


def test_duals_gate_is_a_weight_and_prefers_items_like_the_clients_own(model):
    chosen, held, data, _ = begin(model, "dual")
    own = [stacked.embed(model, rows) for rows in data]
    far = model.rows([Item(prompt="burn the library of Coriv with 12 Größe", choices=(" no",)) for _ in range(2)])
    away = stacked.embed(model, far)
    strangers, own_items = chosen.weights(held, [away, away]), None
    for k in range(2):
        own_items = Dual.gate(own[k], *Dual._note(held, k))
        assert (own_items >= 0).all() and (own_items <= 1).all()
        assert own_items.mean() > strangers[1][k].mean()
    np.testing.assert_allclose(strangers[0] + strangers[1], 1.0)
    # by hand: centre 0, spread 2; distances 0, 2 (typical) and 6 (d / s - 1 = 2), and one that could not be embedded
    z = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 6.0], [np.nan, 0.0]])
    np.testing.assert_allclose(Dual.gate(z, np.zeros(2), 2.0), [1.0, 1.0, np.exp(-2.0), 0.0])
    assert Dual.gate(z, np.zeros(2), 0.0).tolist() == [1.0, 0.0, 0.0, 0.0]  # a client whose items are all alike


def test_dual_predicts_with_the_mixture(model):
    chosen, held, data, lora = begin(model, "dual")
    trained = chosen.train(held, trainer(model, lora, data, lr=0.05)).held
    rows = [model.rows(Few().items(k, "eval")) for k in range(2)]
    z = [stacked.embed(model, r) for r in rows]
    gate = chosen.weights(trained, z)
    mixed = stacked.score(model, lora, chosen.adapters(trained), rows, weights=gate)
    ends = [stacked.score(model, lora, [a], rows) for a in chosen.adapters(trained)]
    local = stacked.score(
        model, lora, chosen.adapters(trained), rows, weights=[np.zeros_like(g) + i for i, g in enumerate(gate)]
    )
    for k in range(2):
        np.testing.assert_allclose(local[k].logp, ends[1][k].logp, rtol=0, atol=1e-5)
        assert np.isfinite(mixed[k].logp).all()


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch, model):
    """Clients whose data begins with the poisoned item start from NaN."""
    marked = model.targets([item(POISON, 0)]).ids[0]
    original = engine.fit

    def poisoned(base, lora, start, data, *rest, **how):
        ill = [j for j, rows in enumerate(data) if marked in rows.ids]
        start = {n: t.clone() for n, t in start.items()}
        for tensor in start.values():
            tensor[ill] = float("nan")
        return original(base, lora, start, data, *rest, **how)

    monkeypatch.setattr(engine, "fit", poisoned)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_client_is_named(model, poison, name, tmp_path):
    setup = make(model, name, Few(poisoned=1))
    with pytest.raises(ClientFailed, match=r"client 'user-1', round 1: its training loss is not finite") as caught:
        pipeline.run(setup, tmp_path)
    assert 'personalize.on_failure = "drop"' in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_client_may_be_dropped_and_changes_no_other(model, poison, name, tmp_path):
    setup = make(model, name, Few(poisoned=1), on_failure="drop")
    with pytest.MonkeyPatch.context() as cured:
        cured.setattr(engine, "fit", fit)
        well = sent_by(setup, tmp_path / "well", [0, 1, 2])
    ill = sent_by(setup, tmp_path / "ill", [0, 1, 2])
    assert [one is None for one in ill] == [False, True, False]
    for k in (0, 2):
        # equal but for rounding: without the failed client's rows a batch may be less wide
        np.testing.assert_allclose(ill[k][1], well[k][1], rtol=0, atol=1e-6)
        for probe, values in well[k][0].items():
            np.testing.assert_allclose(ill[k][0][probe], values, rtol=0, atol=1e-5)
    record = pipeline.run(setup, tmp_path / "run")
    rounds = list(record.of("round"))
    assert [body["failed"] for body in rounds] == [1, 1]
    assert {release.count for table in record.releases().values() for release in table.values()} == {2.0}


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e38), ("sgd", 1e39)])
def test_a_learning_rate_that_blows_everyone_up(model, optimizer, lr, tmp_path):
    with pytest.raises(ClientFailed, match="user-0"):
        pipeline.run(make(model, "fedavg", lr=lr, optimizer=optimizer), tmp_path / "stop")
    setup = make(model, "fedavg", lr=lr, optimizer=optimizer, on_failure="drop")
    record = pipeline.run(setup, tmp_path / "drop")
    bodies = list(record.of("round"))
    assert [body["failed"] for body in bodies] == [3, 3]
    assert all(e["state"] == "unknown" for body in bodies for e in body["evidence"])
    assert not list(record.of("release"))
    published = adapters.load(pipeline.round_folder(tmp_path / "drop", 2))
    assert adapters.digest(published) == adapters.digest(setup.initial)


def test_every_client_is_named_not_only_the_first_of_the_population(model, poison, tmp_path):
    with pytest.raises(ClientFailed, match="user-2"):
        pipeline.run(replace(make(model, "fedavg"), population=Few(poisoned=2)), tmp_path)
