"""The pace of training and reading: measured, bounded, kept for a resumed run; the base's own answers, asked once."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
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
from fedcanary.engines.stacking import REPEATS, Pace, Pacer, Pass, keep_memory, limits, saved_bytes
from fedcanary.errors import BadInput
from fedcanary.models import base, stacked
from fedcanary.models.adapters import find_targets, initial
from fedcanary.models.base import Rows
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
    """What a client costs: less until `best` are stacked, and more from there on."""
    return lambda k: 10 / k if k <= best else 10 * k / best**2


def searched(
    pace: Pace, cost: Callable[[int], float], wall: Callable[[int], float] = float, there: int = 10**6
) -> Pace:
    """The whole search on a machine with these costs, of stacks and of threads, with so many clients there."""
    while not (found := pace.next())[2]:
        stack, threads, _ = found
        took = min(stack, there)
        pace = replace(pace, passes=(*pace.passes, Pass(1, stack, took, threads, cost(took), wall(threads))))
    return pace


def search(guess: int, **more) -> Pace:
    return Pace(tokens=1, **{"guess": guess, "most": 10_000} | more)


@pytest.mark.parametrize("best", [1, 4, 32, 128])
@pytest.mark.parametrize("guess", [1, 8, 64])
def test_the_cheapest_stack_is_found_from_any_guess(best, guess):
    pace = searched(search(guess), machine(best))
    assert pace.next() == (best, 1, True)
    tried = [made.asked for made in pace.passes]
    assert tried[0] == max(2, guess)
    assert tried.count(best) == REPEATS and max(map(tried.count, tried)) == REPEATS
    assert max(tried) <= max(2 * best, guess)


@pytest.mark.parametrize("slow", [2, 8, 64])
def test_a_stack_is_never_taken_that_is_dearer_than_one_by_one(slow):
    assert searched(search(slow), lambda k: 1.0 if k == 1 else 1.1).next()[0] == 1


def test_twice_the_memory_has_to_pay():
    assert searched(search(8), lambda k: 1.0 if k <= 2 else 0.97).next()[0] == 1  # 3%, for four times as much
    assert searched(search(8), lambda k: 1 + 0.5 / k).next()[0] == 8  # 5.6% from 4 to 8, 2.9% from 8 to 16
    flat = [made.asked for made in searched(search(8), lambda k: 1.0).passes]
    assert max(flat) == 8  # where nothing is gained, nothing larger is even tried


def test_a_size_far_off_is_tried_once():
    tried = [made.asked for made in searched(search(8), machine(8)).passes]
    assert {k: tried.count(k) for k in tried} == {8: 2, 4: 1, 16: 1, 1: 1}


def test_the_faster_of_two_passes_counts():
    times = iter([9.0, 1.0])  # the guess's first pass warms up
    pace = searched(search(8, most=8), lambda k: next(times) if k == 8 else 2.0)
    assert pace.next()[0] == 8


def test_no_stack_is_sought_beyond_the_limits_or_that_cannot_be_filled():
    assert max(made.asked for made in searched(search(8, most=20), machine(128)).passes) == 16
    assert searched(search(8, least=4), machine(1)).next()[0] == 4
    assert searched(search(8, least=8, most=8), machine(1)).passes == ()  # said, not sought
    few = searched(search(8), machine(128), there=11)
    assert few.next()[0] == 8 and [made.asked for made in few.passes] == [8, 8, 4, 16, 16, 1]  # 16 in vain


def test_several_threads_are_kept_only_if_they_pay():
    for gain, expected in ((0.5, 2), (0.9, 1)):
        pace = searched(search(4, cores=(1, 2)), machine(4), lambda n, gain=gain: gain if n == 2 else 1.0)
        assert pace.next() == (4, expected, True)


def test_memory_bounds_the_stack_and_the_reading_pass(model, monkeypatch):
    lora, start, data = parts(model)
    wide = max(map(len, data[0].ids))
    for kept in (2**15, 2**18):
        monkeypatch.setattr(stacking, "saved_bytes", lambda *args, kept=kept: kept)
        room = 2**20 * wide // kept  # of one row's tokens
        pace = limits(model, lora, start, data, RECIPE, threads=1, memory=1)
        assert (pace.least, pace.most, pace.tokens) == (1, max(1, room // (2 * wide)), room)
        said = limits(model, lora, start, data, RECIPE, stack=1000, threads=1, memory=1)
        assert (said.least, said.guess, said.most) == (pace.most,) * 3
    few = limits(model, lora, start, data, RECIPE, threads=1, memory=1000, clients=1)
    assert few.next() == (1, 1, True)


def test_one_row_tells_what_a_pass_keeps(model):
    lora, start, data = parts(model)
    one, three = (
        saved_bytes(
            model, lora, start, Rows(data[0].ids[:n], data[0].targets[:n], data[0].shape), replace(RECIPE, batch=3)
        )
        for n in (1, 3)
    )
    assert one > 2 * min(map(len, data[0].ids)) * 16 * 4  # at least one layer's activations
    assert one < three < 3 * one  # it says rather too much: the adapters are kept once


def test_what_is_said_is_not_sought(model):
    torch.set_num_threads(1)
    assert limits(model, *parts(model), RECIPE, stack=7, threads=2).next() == (7, 2, True)
    assert limits(model, *parts(model), RECIPE).cores == (1,)
    assert limits(model, parts(model)[0], parts(model)[1], [], RECIPE, stack=5).next()[0] == 5
    torch.set_num_threads(2)
    assert limits(model, *parts(model), RECIPE).cores == (1, 2)


def passes(pacer: Pacer, rounds: Sequence[int], clients: int = 20, stop: int = 10**6) -> list[tuple[int, int]]:
    """Round and clients of each pass, until the process is killed in the midst of the one numbered `stop`."""
    made = []
    for round in rounds:
        left = clients
        while left:
            took = min(pacer.next(round), left)
            made.append((round, took))
            if len(made) > stop:
                return made[:-1]
            with pacer.timed(took, 1):
                left -= took
    return made


@pytest.mark.parametrize("stop", range(0, 24, 3))
def test_a_run_that_is_cut_off_anywhere_makes_the_same_passes_again(tmp_path, monkeypatch, stop):
    """Last bits depend on the size of a pass: what was written of a round must come out the same again."""
    file, seed = tmp_path / "run" / "engine.json", np.random.default_rng(stop)
    monkeypatch.setattr(stacking.time, "process_time", lambda: float(seed.random()))  # no two timings agree
    begin = search(4, most=16)
    first = passes(Pacer.kept(file, lambda: begin), [1, 2, 3], stop=stop)
    at = first[-1][0] if first else 1  # rounds before are whole
    again = passes(Pacer.kept(file, lambda: pytest.fail("it is kept")), range(at, 4))
    assert [one for one in first if one[0] == at] == again[: len([one for one in first if one[0] == at])]
    content = file.read_text()
    assert passes(Pacer.kept(file, lambda: begin), range(at, 4)) == again and file.read_text() == content


def test_a_damaged_pace_is_bad_input(tmp_path):
    file = tmp_path / "engine.json"
    for damage in ("{half", "[]", "{}", '{"tokens": 1, "stack": 2}', '{"tokens": 1, "passes": [[1]]}'):
        file.write_text(damage)
        with pytest.raises(BadInput, match="is damaged"):
            Pacer.kept(file, lambda: Pace(tokens=1))


def test_a_study_without_a_stack_finds_one_on_its_first_passes(tmp_path):
    """Every pass of the search is one of the training, and all that clients say is what single clients say."""
    setup = prepare(table(count=12), tmp_path / "cache")
    local = LocalClients(setup, tmp_path / "run" / "clients")
    cohort, said = list(range(12)), {}
    for clients in local._stacks(cohort, 1):
        said |= local._stack(1, clients, setup.shared, None, range(1))
    written = json.loads((tmp_path / "run" / "engine.json").read_text())
    assert sorted(said) == cohort and written["passes"] and written["most"] <= 12
    assert sum(made[2] for made in written["passes"]) <= 12
    alone = LocalClients(prepare(table(count=12), tmp_path / "cache"), tmp_path / "alone" / "clients")
    for client in cohort:
        expected, found = alone._stack(1, [client], setup.shared, None, range(1))[client], said[client]
        np.testing.assert_allclose(found.update, expected.update, rtol=0, atol=1e-4)


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
        pytest.skip("this is about a machine without a GPU, and here is one")
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
