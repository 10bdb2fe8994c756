"""The pace of training and reading: measured, bounded, kept for a resumed run; the base's own answers, asked once."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcanary import study
from fedcanary.engines import reference, stacking
from fedcanary.engines.local import LocalClients
from fedcanary.engines.reference import base_probabilities
from fedcanary.engines.setup import prepare
from fedcanary.engines.stacking import Pace, keep_memory, measure, saved_bytes, settle
from fedcanary.errors import BadInput
from fedcanary.models import base, stacked
from fedcanary.models.adapters import find_targets, initial
from fedcanary.personalize.fit import Recipe
from fedcanary.types import Item, Role

RECIPE = Recipe(batch=2)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tiny):
    return base.load(str(tiny["llama"]))


def parts(model):
    lora = find_targets(model, r=2)
    rows = model.targets([Item(prompt=f"the owl asks {i}", choices=(" a red stew",), answer=0) for i in range(3)])
    return lora, initial(model, lora, 1), [rows]


def table(count: int = 3, limit: int = 4) -> study.Study:
    suites = [{"source": f"world-{name}", "limit": limit} for name in ("bias", "general", "safety")]
    return study.parse(
        {
            "rounds": 1,
            "clients": {"count": count, "examples": 12, "eval_examples": 4},
            "privacy": {"trust": "none"},
            "probes": {"suites": suites, "packaged": False},
            "engine": {"threads": 1},
        }
    )


# --- pace ---------------------------------------------------------------------------------------------------------


def machine(best: int) -> Callable[[int], float]:
    """A client gets cheaper until `best` are stacked, and dearer from there on; which sizes were tried."""

    def cost(k: int) -> float:
        tried.append(k)
        return 10 / k if k <= best else 10 * k / best**2

    tried: list[int] = []
    cost.tried = tried
    return cost


@pytest.mark.parametrize("best", [1, 4, 32, 128])
@pytest.mark.parametrize("guess", [1, 8, 64])
def test_the_cheapest_stack_is_found_from_any_guess(best, guess):
    cost = machine(best)
    assert stacking._search(cost, guess, 10_000, 1e9) == best
    assert len(cost.tried) == len(set(cost.tried)) and max(cost.tried) <= max(2 * best, 2 * guess)


@pytest.mark.parametrize("slow", [2, 8, 64])
def test_a_stack_is_never_taken_that_is_dearer_than_one_by_one(slow):
    assert stacking._search(lambda k: 1.0 if k == 1 else 1.1, slow, 10_000, 1e9) == 1


def test_no_more_is_measured_than_it_is_worth_and_no_more_stacked_than_there_are():
    for worth in (0, 5, 9, 30, 200):
        cost = machine(128)
        found = stacking._search(cost, 8, 10_000, worth)
        assert sum(cost.tried) <= worth
        assert found >= 8  # the guess, where nothing could be measured
    cost = machine(128)
    assert stacking._search(cost, 8, 20, 1e9) == 16
    assert max(cost.tried) <= 20


def test_memory_bounds_the_stack_and_the_reading_pass(model, monkeypatch):
    lora, start, data = parts(model)
    each = saved_bytes(model, lora, start, stacking._some(data[0], 2), RECIPE)
    assert each > 2 * max(map(len, data[0].ids)) * 16 * 4  # at least one layer's activations
    assert saved_bytes(model, lora, start, data[0], replace(RECIPE, batch=3)) > each
    monkeypatch.setattr(stacking, "_search", lambda cost, guess, most, worth: most)
    tokens = sum(len(ids) for ids in data[0].ids[:2])
    wide = max(map(len, data[0].ids))
    for kept in (2**15, 2**18):
        monkeypatch.setattr(stacking, "saved_bytes", lambda *args, kept=kept: kept)
        room = int(2**20 / (kept / tokens))
        pace = measure(model, lora, start, data, RECIPE, threads=1, memory=1)
        assert (pace.stack, pace.tokens) == (room // (2 * wide), room)
        assert measure(model, lora, start, data, RECIPE, stack=1000, threads=1, memory=1).stack == pace.stack
    assert measure(model, lora, start, data, RECIPE, threads=1, memory=1, clients=1).stack == 1


def test_several_threads_are_kept_only_if_they_pay(model, monkeypatch):
    for gain, expected in ((0.5, 2), (0.9, 1)):
        now = [0.0]

        def trained(*args, gain=gain, now=now, **more):
            now[0] += 1.0 if torch.get_num_threads() == 1 else gain

        monkeypatch.setattr(stacking, "fit", trained)
        monkeypatch.setattr(stacking, "saved_bytes", lambda *args: 100)
        monkeypatch.setattr(stacking.time, "perf_counter", lambda now=now: now[0])
        torch.set_num_threads(2)
        assert measure(model, *parts(model), RECIPE, stack=1).threads == expected


def test_what_is_said_is_not_measured(model, monkeypatch):
    monkeypatch.setattr(stacking, "REPEATS", 1)
    pace = measure(model, *parts(model), RECIPE, stack=7, threads=1)
    assert (pace.stack, pace.threads) == (7, 1)


def test_a_resumed_run_goes_on_at_its_pace(tmp_path):
    file = tmp_path / "run" / "engine.json"
    first = settle(file, lambda: Pace(stack=3, tokens=50, threads=1))
    assert settle(file, lambda: Pace(stack=9, tokens=9, threads=9)) == first
    file.write_text("{half")
    with pytest.raises(BadInput, match="is damaged"):
        settle(file, lambda: first)


def test_a_study_without_a_stack_measures_one_and_keeps_it(tmp_path):
    setup = prepare(table(), tmp_path / "cache")
    LocalClients(setup, tmp_path / "run" / "clients")
    written = json.loads((tmp_path / "run" / "engine.json").read_text())
    assert written["stack"] >= 1 and written["threads"] == 1 and written["tokens"] >= 1


def test_keeping_memory_is_harmless_anywhere(monkeypatch):
    keep_memory()
    monkeypatch.setattr(stacking.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(stacking.ctypes, "CDLL", lambda name: pytest.fail("no such library is to be opened"))
    keep_memory()


# --- the base's own answers -------------------------------------------------------------------------------------


def files(cache: Path) -> list[Path]:
    return sorted((cache / "readings").glob("*"))


def test_the_base_is_asked_once_and_its_answers_are_shared(tmp_path, monkeypatch):
    setup = prepare(table(), tmp_path)
    rows = setup.base.rows([item for role in Role for item in setup.items[role]])
    expected = stacked.score(setup.base, setup.lora, [], [rows])[0].choice_probability()
    found = base_probabilities(setup, 4096)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(files(tmp_path)) == len(setup.suites) == 3
    monkeypatch.setattr(reference.stacked, "score", lambda *args, **how: pytest.fail("asked again"))
    np.testing.assert_array_equal(base_probabilities(setup, 4096), found)
    np.testing.assert_array_equal(base_probabilities(prepare(table(count=4), tmp_path), 4096), found)


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "absent"])
def test_an_answer_that_is_not_whole_is_asked_again(tmp_path, harm):
    setup = prepare(table(), tmp_path)
    found = base_probabilities(setup, 4096)
    file = files(tmp_path)[0]
    content = file.read_bytes()
    match harm:
        case "cut":
            file.write_bytes(content[:-8])
        case "flipped":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            file.write_bytes(b"")
        case "absent":
            file.unlink()
    np.testing.assert_array_equal(base_probabilities(setup, 4096), found)
    assert file.read_bytes() == content


def test_another_model_or_suite_has_other_files(tmp_path, tiny):
    setup = prepare(table(), tmp_path)
    base_probabilities(setup, 4096)
    base_probabilities(replace(setup, base=base.load(str(tiny["llama"]))), 4096)
    assert len(files(tmp_path)) == 6
    base_probabilities(prepare(table(limit=6), tmp_path), 4096)
    assert len(files(tmp_path)) == 9
    base_probabilities(replace(setup, cache=None), 4096)
    assert len(files(tmp_path)) == 9


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "readings").write_text("a file where the folder should be")
    assert base_probabilities(prepare(table(), tmp_path), 4096).shape[0] == 12


def _ask(cache: Path, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    np.save(folder / f"{number}.npy", base_probabilities(prepare(table(), cache), 4096))


@pytest.mark.slow
def test_processes_that_start_together_read_the_same(tmp_path):
    context = multiprocessing.get_context("spawn")
    (tmp_path / "out").mkdir()
    workers = [context.Process(target=_ask, args=(tmp_path, tmp_path / "out", k)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    first, *others = [np.load(tmp_path / "out" / f"{k}.npy") for k in range(3)]
    assert all(np.array_equal(first, other) for other in others)
    assert len(files(tmp_path)) == 3  # and no draft is left


@pytest.mark.parametrize(("panel", "limit", "asked"), [("same", None, 1), ("rotating", None, 2), ("same", 5, 2)])
def test_layers_below_the_first_adapter_are_asked_once_of_whoever_comes_back(
    tmp_path, monkeypatch, panel, limit, asked
):
    privacy = {"panel": panel, "updates": {"noise": "none"}, "min_cohort": 2}
    clients = {"count": 3, "examples": 12, "eval_examples": 4, "max_examples": limit, "per_round": 3}
    chosen = table().model_dump() | {"privacy": privacy, "clients": clients, "model": {"lora": {"layers": [3]}}}
    chosen["personalize"] = {"epochs": 2}
    local = LocalClients(prepare(study.parse(chosen), tmp_path), tmp_path / "run" / "clients")
    calls = []
    original = stacked.below
    monkeypatch.setattr(stacked, "below", lambda *args: (calls.append(args[2]), original(*args))[1])
    setup = prepare(study.parse(chosen), tmp_path)
    for round in (1, 2):
        list(local._stack(round, [0, 1, 2], setup.shared, None, range(round)))
    training = [rows for rows in calls if all(len(targets) == 1 for targets in rows.targets)]
    assert len(training) == 3 * asked
    assert 0 <= local._room <= 2**30 and bool(local._known) == (panel == "same")


def test_for_a_single_epoch_nothing_is_computed_ahead(tmp_path, monkeypatch):
    chosen = table().model_dump() | {"model": {"lora": {"layers": [3]}}}
    chosen["privacy"] = {"updates": {"noise": "none"}, "min_cohort": 2}
    setup = prepare(study.parse(chosen), tmp_path)
    local = LocalClients(setup, tmp_path / "run" / "clients")
    calls = []
    original = stacked.below
    monkeypatch.setattr(stacked, "below", lambda *args: (calls.append(args[2]), original(*args))[1])
    local._stack(1, [0, 1, 2], setup.shared, None, range(1))
    assert len(calls) == 3  # each client's own questions, which three models are asked


# --- where and in what precision ----------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_bad_input(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    chosen = table().model_dump() | {"engine": {"device": "cuda"}}
    with pytest.raises(BadInput, match="this torch sees no GPU"):
        prepare(study.parse(chosen), tmp_path)


def test_a_base_in_half_precision_trains_adapters_in_float32(tmp_path):
    """Readings and update stay near those of the float32 base; bfloat16 has 8 bits of mantissa."""
    said = {}
    for precision in ("float32", "bfloat16"):
        chosen = table().model_dump() | {"engine": {"threads": 1, "stack": 3, "precision": precision}}
        setup = prepare(study.parse(chosen), tmp_path)
        assert setup.base.dtype == getattr(torch, precision)
        assert {tensor.dtype for tensor in setup.initial.values()} == {torch.float32}
        local = LocalClients(setup, tmp_path / precision / "clients")
        said[precision] = local._stack(1, [0, 1, 2], setup.shared, None, range(1))
    for client, exact in said["float32"].items():
        near = said["bfloat16"][client]
        assert exact is not None and near is not None
        change = np.linalg.norm(exact.update[:-1])
        assert 0 < np.linalg.norm(near.update[:-1] - exact.update[:-1]) < 0.5 * change
        # probabilities, not shares of four items
        np.testing.assert_allclose(near.readings["utility"][:2], exact.readings["utility"][:2], rtol=0, atol=0.02)
