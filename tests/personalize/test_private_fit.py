"""DP-SGD at a client: without noise the stacked fit; one example's influence bounded; each planted bug caught."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcanary.errors import BadInput
from fedcanary.models import adapters, base, stacked
from fedcanary.models.base import Rows
from fedcanary.personalize import METHODS, Held, method
from fedcanary.personalize import private_fit as module
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.personalize.private_fit import RecordLevel, fit_private
from oracles import peft_loop
from oracles.private_step import F64, Scaled, client, flat, gradients, level, no_order, step, without

# peft asks transformers for a name that transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
ARCHITECTURES = ("llama", "gpt2", "bert")  # grouped-query attention; Conv1D layers; a classifier with its head
OPEN = level()


# --- equal to what it replaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-6)])
def test_without_noise_and_bound_a_full_batch_is_the_stacked_fit(load, architecture, dtype, tolerance):
    model = load(architecture, dtype)
    lora, start, rows = client(model, dtype=dtype, even=True)
    for more in ({}, {"weight_decay": 0.1, "schedule": "linear"}):
        recipe = Recipe(optimizer="sgd", lr=0.05, epochs=3, batch=len(rows), clip=0.0, **more)
        one = fit(model, lora, start, [rows], recipe, no_order)
        two = fit_private(model, lora, start, [rows], recipe, level(steps=3))
        assert {n: (t.shape, t.dtype) for n, t in two.params.items()} == {
            n: (t.shape, t.dtype) for n, t in one.params.items()
        }
        assert np.abs(flat(one.params) - flat(start)).max() > 1e-3
        np.testing.assert_allclose(flat(two.params), flat(one.params), rtol=0, atol=tolerance)
        np.testing.assert_allclose(two.loss, one.loss, rtol=0, atol=10 * tolerance)
        assert two.failed.tolist() == [False]


@pytest.mark.parametrize("how", ["plain", "anchored", "beside", "only B"])
def test_the_same_with_adamw_and_everything_a_method_may_ask_for(load, how):
    for architecture in ("llama", "bert"):
        model = load(architecture)
        lora, start, rows = client(model, even=True)
        _, other, _ = client(model, seed=2)
        more = {
            "plain": {},
            "anchored": {"anchor": other, "mu": 0.7},
            "beside": {"beside": [(other, 0.3)], "weight": 0.6},
            "only B": {"trains": lambda name: not name.endswith(".lora_A")},
        }[how]
        recipe = Recipe(lr=0.01, epochs=3, batch=len(rows), clip=0.0, weight_decay=0.1, schedule="linear")
        one = fit(model, lora, start, [rows], recipe, no_order, **more)
        two = fit_private(model, lora, start, [rows], recipe, level(steps=3), **more)
        np.testing.assert_allclose(flat(two.params), flat(one.params), rtol=0, atol=1e-8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_the_sum_of_each_examples_own_clipped_gradient(load, architecture):
    model = load(architecture)
    lora, start, rows = client(model)
    assert model.task == "classify" or len({len(t) for t in rows.targets}) > 2
    alone = gradients(model, lora, start, rows)
    norms = np.linalg.norm(alone, axis=1)
    bound = float(np.median(norms))
    expected = (alone * np.minimum(1, bound / norms)[:, None]).sum(axis=0)
    moved = step(model, lora, start, rows, level(max_grad_norm=bound, noise_multiplier=0.0))
    np.testing.assert_allclose(moved, expected, rtol=0, atol=2e-6 * bound)  # Opacus divides by norm + 1e-6


def test_how_many_examples_go_through_the_model_at_once_does_not_matter(load):
    model = load("llama")
    lora, start, rows = client(model)
    privacy = level(max_grad_norm=0.5)
    whole = step(model, lora, start, rows, privacy)
    for batch in (1, 3):
        parts = fit_private(model, lora, start, [rows], Recipe(optimizer="sgd", lr=1.0, batch=batch), privacy).params
        np.testing.assert_allclose((flat(start) - flat(parts)) * len(rows), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ghost_clipping_equals_opacus_own_hooks_on_a_peft_model(load, architecture):
    """Another wrapper (peft), another mode (per-example gradients in full), Opacus's own optimizer."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = load(architecture)
    lora, start, rows = client(model)
    bound = float(np.median(np.linalg.norm(gradients(model, lora, start, rows), axis=1)))
    wrapped = peft_loop.wrapped(model, lora, stacked.unstack(start, 0))
    places = peft_loop.parameters(wrapped)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(any(parameter is p for p in places.values()))
        if parameter.requires_grad:
            wrapped.get_submodule(name.rpartition(".")[0]).train()  # only what Opacus is to watch
    watched = GradSampleModule(wrapped, loss_reduction="sum")
    inner = torch.optim.SGD(list(places.values()), lr=1.0)
    optimizer = DPOptimizer(
        inner, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=None, loss_reduction="sum"
    )
    laid = stacked.batch(model, [rows], [range(len(rows))])
    logits = torch.log_softmax(watched(input_ids=laid.ids, attention_mask=laid.mask).logits, dim=-1)
    read = logits[laid.row, laid.target] if model.task == "classify" else logits[laid.row, laid.position, laid.target]
    loss = sum(-read[laid.row == i].mean() for i in range(len(rows)))
    with warnings.catch_warnings():  # the first layers' inputs need no gradient; torch says so when Opacus hooks them
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        loss.backward()
    optimizer.step()
    theirs = flat(stacked.unstack(start, 0)) - flat(places_now(places))
    ours = step(model, lora, start, rows, level(max_grad_norm=bound, noise_multiplier=0.0))
    rounding = 1e-6 if architecture == "llama" else 1e-9  # its norms compute in float32, and clipping rescales
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding)


def places_now(places):
    return {name: p.detach() for name, p in places.items()}


# --- one example's influence ------------------------------------------------------------------------------------


def influence(model, lora, start, rows: Rows, index: int, bound: float) -> float:
    """How far one example moves the sum of a step, in units of the bound."""
    privacy = level(max_grad_norm=bound, noise_multiplier=0.0)
    both = [step(model, lora, start, r, privacy) for r in (rows, without(rows, index))]
    return float(np.linalg.norm(both[0] - both[1])) / bound


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "rounding"), [(F64, 1e-6), (torch.float32, 1e-4)])
def test_one_example_moves_a_step_by_at_most_rate_times_bound_over_batch(
    load, architecture, dtype, rounding, monkeypatch
):
    model = load(architecture, dtype)
    lora, start, rows = client(model, dtype=dtype)
    start = {name: t.double() for name, t in start.items()}  # so that what comes back is not rounded
    norms = np.linalg.norm(gradients(load(architecture), lora, start, rows), axis=1)
    worst = int(norms.argmax())
    for index in range(len(rows)) if dtype == F64 else [worst]:
        assert influence(model, lora, start, rows, index, float(norms.max()) / 50) <= 1 + rounding
    assert influence(model, lora, start, rows, worst, float(norms.max()) * 2) == pytest.approx(0.5, rel=1e-3)

    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Watched

    # Planted: clipping off.
    monkeypatch.setattr(Watched, "get_clipping_coef", lambda self: torch.ones_like(self.get_norm_sample()))
    assert influence(model, lora, start, rows, worst, float(norms.max()) / 50) > 49


def test_a_ghost_norm_is_computed_in_float64_because_in_float32_it_can_vanish(load):
    from opacus.grad_sample.linear import compute_linear_norm_sample

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 32, 64, generator=generator, dtype=F64)
    g = torch.randn(1, 32, 4, generator=generator, dtype=F64) * 1e4
    x[:, 1::2], g[:, 1::2] = x[:, 0::2], -g[:, 0::2]  # tokens in pairs that cancel
    g[:, 0] += 1  # and a little that does not
    true = float((g[0].T @ x[0]).norm())

    def ghost(dtype: torch.dtype) -> float:
        layer = torch.nn.Linear(64, 4, bias=False, dtype=dtype)
        return float(compute_linear_norm_sample(layer, [x.to(dtype)], g.to(dtype))[layer.weight])

    assert ghost(F64) == pytest.approx(true, rel=1e-3)
    assert ghost(torch.float32) < true / 2  # such an example would keep twice its share and more
    model = load("llama", torch.float32)
    lora, start, _ = client(model, dtype=torch.float32)
    watched = module._Adapted(model, lora, stacked.unstack(start, 0), lambda name: True, [], None)
    assert {p.dtype for p in watched.parameters()} == {F64}


def test_an_example_whose_gradient_is_not_finite_adds_nothing(load):
    model = load("llama")
    lora, start, rows = client(model)
    broken = replace(model, model=copy.deepcopy(model.model))
    poison = next(t for t in range(5, 1000) if not any(t in ids for ids in rows.ids))
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[poison] = math.nan
    poisoned = Rows([[*rows.ids[0][:-1], poison], *rows.ids[1:]], rows.targets, rows.shape)
    privacy = level(max_grad_norm=0.5, noise_multiplier=0.0)
    moved = step(broken, lora, start, poisoned, privacy)
    np.testing.assert_allclose(moved, step(model, lora, start, without(rows, 0), privacy), rtol=0, atol=1e-10)
    alone = Rows(poisoned.ids[:1], poisoned.targets[:1], rows.shape)
    only = fit_private(broken, lora, start, [alone], Recipe(), privacy)
    assert np.array_equal(flat(only.params), flat(start))
    assert np.isnan(only.loss[0])
    assert not only.failed[0]


def test_a_client_whose_tensors_are_not_finite_has_failed(load):
    model = load("llama")
    lora, start, rows = client(model)
    privacy, recipe = level(max_grad_norm=1.0, noise_multiplier=9.0), Recipe(optimizer="sgd", lr=1e308)
    two = {name: t.repeat(2, *[1] * (t.dim() - 1)) for name, t in start.items()}
    sources = [np.random.default_rng(1), Scaled(np.random.default_rng(1), 1e-300)]
    done = fit_private(model, lora, two, [rows, Rows(rows.ids, [[]] * 8, rows.shape)], recipe, privacy, sources)
    assert done.failed.tolist() == [True, False]


# --- in its place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_with_it_and_keeps_what_it_keeps(load, name):
    model = load("llama", torch.float32)
    lora = adapters.find_targets(model, r=2, alpha=4.0)
    chosen = method(name)
    split = chosen.split(adapters.initial(model, lora, 5))
    _, _, rows = client(model, n=4)
    held = Held(stacked.repeat(split.shared, 2), stacked.repeat(split.private, 2) if split.private else {})
    if chosen.needs_embedding:
        held = chosen.prepare(held, [stacked.embed(model, rows)] * 2)
    copies = copy.deepcopy(held)
    sources, calls = [np.random.default_rng(j) for j in range(2)], []
    privacy = level(max_grad_norm=1.0, noise_multiplier=0.5, sample_rate=0.5, steps=2)

    def run(start, **how):
        calls.append(how)
        return fit_private(model, lora, start, [rows, rows], Recipe(), privacy, sources, **how)

    digest = base.content_digest(model.model, model.tokenizer)
    trained = chosen.train(held, run)
    assert base.content_digest(model.model, model.tokenizer) == digest
    assert not any(m._forward_hooks for m in model.model.modules())
    assert not any(p.requires_grad for p in model.model.parameters())
    for before, same, after in (
        (copies.shared, held.shared, trained.held.shared),
        (copies.private, held.private, trained.held.private),
    ):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], same[n]) for n in before)  # what came in is as it was
        assert all((before[n].shape, before[n].dtype) == (after[n].shape, after[n].dtype) for n in before)
    kept = {n for n, t in trained.held.private.items() if torch.equal(t, copies.private[n])}
    frozen = {"ffa_lora": lambda n: n.endswith(".lora_A"), "dual": lambda n: n.startswith("gate.")}
    assert kept == {n for n in trained.held.private if frozen.get(name, lambda n: False)(n)}
    assert not trained.failed.any()
    assert trained.loss.shape == (2,)
    assert len(calls) == chosen.fits  # each is paid for


def test_a_client_without_rows_stays_but_for_noise(load):
    model = load("llama")
    lora, start, _ = client(model)
    done = fit_private(model, lora, start, [Rows([], [], (0, 1))], Recipe(), OPEN)
    assert np.array_equal(flat(done.params), flat(start))
    noised = fit_private(model, lora, start, [Rows([], [], (0, 1))], Recipe(), level(noise_multiplier=1.0))
    assert np.isfinite(flat(noised.params)).all()
    assert not np.array_equal(flat(noised.params), flat(start))


# --- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
def test_every_unusable_number_is_named(number):
    with pytest.raises(BadInput) as caught:
        RecordLevel(max_grad_norm=number, noise_multiplier=-0.1, sample_rate=number, steps=0)
    assert [p.where for p in caught.value.problems] == ["max_grad_norm", "noise_multiplier", "sample_rate", "steps"]


def test_an_example_of_several_rows_is_refused(load):
    model = load("llama")
    lora, start, _ = client(model)
    rows = Rows([[1, 5], [1, 6]], [[(1, 7, 0)], [(1, 8, 0)]], (1, 1))
    with pytest.raises(BadInput, match="several rows"):
        fit_private(model, lora, start, [rows], Recipe(), OPEN)


@pytest.mark.parametrize("how", ["shared", "flattened", "unused"])
def test_a_target_whose_examples_cannot_be_told_apart_is_refused_by_name(load, how):
    model = replace(load("llama"), model=copy.deepcopy(load("llama").model))
    lora, start, rows = client(model)
    name = lora.targets[0]
    layer = model.model.get_submodule(name)
    if how == "shared":  # as in ALBERT, where one layer is run several times
        model.model.model.layers[1] = model.model.model.layers[0]
        lora = replace(lora, targets=tuple(t for t in lora.targets if ".0." in t))
    elif how == "flattened":  # as in a mixture of experts, where a layer sees tokens and not examples
        layer.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, 1),))
        assert model.plain_head  # asked before the layer is spoilt
        layer.register_forward_hook(lambda m, args, out: out.reshape(2, 3, -1))
    else:
        name = "extra"
        model.model.extra = torch.nn.Linear(4, 4)
        lora = replace(lora, targets=(*lora.targets, name))
        start |= {"extra.lora_A": torch.ones(1, 3, 4), "extra.lora_B": torch.ones(1, 4, 3)}
    with pytest.raises(BadInput, match=f"target '{name}'") as caught:
        fit_private(model, lora, start, [rows], Recipe(), OPEN)
    assert "privacy unit" in str(caught.value)
    assert len(layer._forward_hooks) == (how == "flattened")  # the refusal leaves no hook of its own behind
