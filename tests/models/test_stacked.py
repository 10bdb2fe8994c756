"""Stacked training and scoring against plain peft."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up import cast, items, random_adapter

from fedcanary.models import base, stacked
from fedcanary.models.adapters import find_targets
from fedcanary.models.stacked import attached
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import stream
from fedcanary.types import Item
from oracles import peft_loop
from oracles.tiny import ARCHITECTURES, CAUSAL

# peft asks transformers for a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# --- training ---------------------------------------------------------------------------------------------------

RECIPES = {
    "adamw": (Recipe(lr=0.02, epochs=7, batch=2, clip=0.0), 0.0),
    "everything": (
        Recipe(lr=0.02, epochs=7, batch=2, clip=2.0, weight_decay=0.3, schedule="linear"),
        0.7,
    ),
    "sgd": (Recipe(optimizer="sgd", lr=0.3, epochs=7, batch=2, clip=1.6, weight_decay=0.05), 0.0),
}


def compare(model: base.BaseModel, recipe: Recipe, mu: float, sizes: tuple[int, ...], trains=lambda name: True) -> None:
    lora = find_targets(model, r=3, alpha=5.0)
    data = [model.targets(items(model.task, n, seed=n)) for n in sizes]
    start = [random_adapter(model, lora, seed, 0.1) for seed in range(len(sizes))]
    anchor = [random_adapter(model, lora, 50 + seed, 0.1) for seed in range(len(sizes))]

    def order(k: int, epoch: int) -> np.random.Generator:
        return stream(1, "order", k, epoch)

    fitted = fit(
        model, lora, stacked.stack(start), data, recipe, order, trains=trains, anchor=stacked.stack(anchor), mu=mu
    )
    steps = [recipe.epochs * -(-n // recipe.batch) for n in sizes]
    assert max(steps) >= 20
    assert not fitted.failed.any()
    seen: list[float] = []
    for k in range(len(sizes)):
        expected, losses, norms = peft_loop.train(
            model, lora, start[k], data[k], recipe, lambda e, k=k: order(k, e), trains=trains, anchor=anchor[k], mu=mu
        )
        ours = stacked.unstack(fitted.params, k)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        seen += norms
        moved = [float((expected[n] - start[k][n]).abs().max()) for n in expected if trains(n)]
        assert min(moved) > 1e-4  # the comparison is not of two things that stood still
        last = losses[-(steps[k] // recipe.epochs) :]
        assert fitted.loss[k] == pytest.approx(np.mean(last), abs=1e-10)
    if recipe.clip > 0:
        assert min(seen) < recipe.clip < max(seen)  # it bites at some steps and not at others


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_ragged_clients_train_as_plain_peft_trains_each(load, architecture):
    compare(load(architecture), *RECIPES["adamw"], sizes=(3, 6, 5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clip_decay_proximal_term_and_linear_schedule_too(load, architecture):
    compare(load(architecture), *RECIPES["everything"], sizes=(6, 1, 4))


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_sgd_too(load, architecture):
    compare(load(architecture), *RECIPES["sgd"], sizes=(2, 6))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_one_client_too(load, architecture):
    compare(load(architecture), *RECIPES["adamw"], sizes=(5,))


def test_only_what_trains_moves(load):
    model = load("llama")
    compare(model, *RECIPES["everything"], sizes=(5, 6), trains=lambda name: name.endswith("lora_B"))


def test_a_client_trains_the_same_alone_and_among_others(load):
    model = load("llama")
    lora = find_targets(model, r=2)
    recipe = Recipe(lr=0.01, epochs=2, batch=3)
    data = [model.targets(items("causal", n, seed=n)) for n in (9, 2, 5)]
    start = [random_adapter(model, lora, seed) for seed in range(3)]
    together = fit(model, lora, stacked.stack(start), data, recipe, lambda k, e: stream(1, k, e))
    for k in range(3):
        alone = fit(model, lora, stacked.stack([start[k]]), [data[k]], recipe, lambda _, e, k=k: stream(1, k, e))
        for name, tensor in alone.params.items():
            torch.testing.assert_close(tensor[0], together.params[name][k], rtol=0, atol=1e-12)
        assert alone.loss[0] == pytest.approx(together.loss[k], abs=1e-12)


def test_a_client_without_rows_stays_where_it_was(load):
    model = load("llama")
    lora = find_targets(model, r=2)
    data = [model.targets([]), model.targets(items("causal", 4, seed=1))]
    start = stacked.stack([random_adapter(model, lora, seed) for seed in range(2)])
    fitted = fit(model, lora, start, data, Recipe(weight_decay=0.1), lambda k, e: stream(1, k, e))
    assert np.isnan(fitted.loss[0])
    assert not fitted.failed.any()
    assert all(torch.equal(fitted.params[n][0], start[n][0]) for n in start)
    assert any(not torch.equal(fitted.params[n][1], start[n][1]) for n in start)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_client_that_explodes_is_named_and_changes_no_other(load, optimizer, epochs):
    """Client 1 starts from NaN, client 2 from numbers too large for a loss; client 0 must not notice."""
    model = load("llama", torch.float32)
    lora = find_targets(model, r=2)
    data = [model.targets(items("causal", 4, seed=n)) for n in range(3)]
    start = [cast(random_adapter(model, lora, seed), torch.float32) for seed in range(3)]
    poisoned = [start[0], *({n: t * factor for n, t in start[1].items()} for factor in (float("nan"), 1e30))]
    recipe = Recipe(optimizer=optimizer, epochs=epochs, batch=4, lr=0.01)
    healthy = fit(model, lora, stacked.stack(start), data, recipe, lambda k, e: stream(1, k, e))
    ill = fit(model, lora, stacked.stack(poisoned), data, recipe, lambda k, e: stream(1, k, e))
    assert healthy.failed.tolist() == [False, False, False]
    assert ill.failed.tolist() == [False, True, True]
    for name, tensor in healthy.params.items():  # equal but for rounding: the failed clients' rows are gone
        torch.testing.assert_close(ill.params[name][0], tensor[0], rtol=0, atol=1e-6)
    assert ill.loss[0] == pytest.approx(healthy.loss[0], rel=1e-5)


def test_parameters_that_are_no_numbers_after_the_last_step_are_a_failure(load):
    """A single step, so no later loss can show that it went too far."""
    model = load("llama", torch.float32)
    lora = find_targets(model, r=2)
    rows = model.targets(items("causal", 2, seed=1))
    start = stacked.repeat(cast(random_adapter(model, lora, 1), torch.float32), 1)
    fitted = fit(model, lora, start, [rows], Recipe(lr=1e39, batch=8), lambda k, e: stream(1, k, e))
    assert fitted.failed.tolist() == [True]


# --- scoring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [4096, 7])
def test_stacked_scores_are_plain_scores(load, architecture, tokens):
    model = load(architecture)
    lora = find_targets(model, r=3, alpha=5.0)
    asked = [items(model.task, n, seed=n) for n in (7, 1, 4)]
    strange = Item(prompt="what", choices=("unheard of", "nor that"))  # for a classifier: not its labels
    asked[0].append(strange if model.task == "classify" else asked[1][0])
    rows = [model.rows(a) for a in asked]
    tuned = [random_adapter(model, lora, seed) for seed in range(3)]
    scores = stacked.score(model, lora, [stacked.stack(tuned)], rows, tokens=tokens)
    bare = stacked.score(model, lora, [], rows, tokens=tokens)
    for k in range(3):
        for ours, plain in (
            (scores[k], peft_loop.wrapped(model, lora, tuned[k])),
            (bare[k], model.model),
        ):
            logp, count = peft_loop.score(plain, model.task, rows[k])
            silent = (count == 0).all(axis=1)
            logp[silent] = np.nan
            np.testing.assert_allclose(ours.logp, logp, rtol=0, atol=1e-10)
            np.testing.assert_array_equal(ours.tokens, np.maximum(count, 1))
            probability = ours.choice_probability()
            assert np.isnan(probability[silent]).all()
            assert (probability[~silent] >= 0).all() and (probability[~silent] <= 1).all()
    if model.task == "classify":
        assert np.isnan(scores[0].logp[-1]).all()  # its choices are no labels of the model
    else:
        assert bare[0].logp.shape == (8, 3)


def test_after_scoring_the_base_is_the_base_again(load):
    model = load("llama")
    lora = find_targets(model, r=3)
    rows = [model.rows(items("causal", 3, seed=1))]
    before = stacked.score(model, lora, [], rows)[0].logp
    stacked.score(model, lora, [stacked.stack([random_adapter(model, lora, 1)])], rows)
    with pytest.raises(ZeroDivisionError), attached(model, lora, [], 1):
        raise ZeroDivisionError
    np.testing.assert_array_equal(stacked.score(model, lora, [], rows)[0].logp, before)
    assert not any(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("architecture", CAUSAL)
def test_two_mixed_adapters_equal_pefts_weighted_adapter(load, architecture):
    model = load(architecture)
    lora = find_targets(model, r=3, alpha=5.0)
    rows = model.rows(items("causal", 7, seed=2))
    one, two = (random_adapter(model, lora, seed) for seed in (1, 2))
    weight = 0.3
    shares = [np.full((1, 7), w) for w in (weight, 1 - weight)]
    mixed = stacked.score(model, lora, [stacked.repeat(a, 1) for a in (one, two)], [rows], weights=shares)[0]
    plain = peft_loop.wrapped(model, lora, one, name="one")
    plain.add_adapter("two", peft_loop.config(lora, "causal"))
    peft_loop.put(plain, two, "two")
    plain.add_weighted_adapter(["one", "two"], [weight, 1 - weight], "mixed", combination_type="cat")
    plain.set_adapter("mixed")
    logp, _ = peft_loop.score(plain, "causal", rows)
    np.testing.assert_allclose(mixed.logp, logp, rtol=0, atol=1e-10)


def test_a_mixture_may_weigh_every_item_differently(load):
    model = load("llama")
    lora = find_targets(model, r=3)
    rows = model.rows(items("causal", 6, seed=2))
    one, two = (stacked.repeat(random_adapter(model, lora, seed), 1) for seed in (1, 2))
    local = np.array([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    mixed = stacked.score(model, lora, [one, two], [rows], weights=[1 - local, local])[0].logp
    ends = [stacked.score(model, lora, [a], [rows])[0].logp for a in (one, two)]
    for i in range(6):
        np.testing.assert_allclose(mixed[i], ends[int(local[0, i])][i], rtol=0, atol=1e-10)


def test_a_classifiers_mixed_head_is_the_mean_of_both(load):
    model = load("bert")
    lora = find_targets(model, r=3)
    rows = model.rows(items("classify", 4, seed=2))
    one = random_adapter(model, lora, 1)
    two = {n: (t if ".lora_" in n else -t) for n, t in one.items()}
    half = [np.full((1, 4), 0.5)] * 2
    scores = stacked.score(model, lora, [stacked.repeat(a, 1) for a in (one, two)], [rows], weights=half)[0]
    np.testing.assert_allclose(scores.choice_probability(), np.full((4, 3), 1 / 3), atol=1e-12)
