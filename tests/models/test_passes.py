"""What a pass can leave out and what not: shared prompts, layers below the first adapter, dropout, early stop."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import random_adapter
from peft.tuners.lora import LoraLayer
from torch import nn

from fedcanary.models import stacked
from fedcanary.models.adapters import find_targets
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import derive, stream
from fedcanary.types import Item
from oracles import peft_loop
from oracles.tiny import ARCHITECTURES, CAUSAL, LABELS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PROMPTS = ("the owl asks", "a red stew", "who goes there on a cold day", "not", "in the Größe of things")


def items(task: str, n: int, seed: int) -> list[Item]:
    draw = stream(seed, "passes")
    choices = LABELS if task == "classify" else (" red stew", " owl", " cold day out")
    return [
        Item(prompt=PROMPTS[int(draw.integers(len(PROMPTS)))], choices=choices, answer=int(draw.integers(3)))
        for _ in range(n)
    ]


def order(k: int, epoch: int) -> np.random.Generator:
    return stream(1, "order", k, epoch)


# --- choices that share their prompt ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CAUSAL)
def test_choices_share_the_prompts_pass_and_say_what_rows_of_their_own_say(load, architecture):
    model = load(architecture)
    asked = items("causal", 6, seed=1)
    shared = model.rows(asked)
    alone = replace(model)
    alone.__dict__["shares_prompts"] = False
    apart = alone.rows(asked)
    assert model.shares_prompts
    assert len(shared) == 6 and len(apart) == 18
    assert sum(map(len, shared.ids)) < 0.7 * sum(map(len, apart.ids))
    lora = find_targets(model, r=3, alpha=5.0)
    tuned = stacked.repeat(random_adapter(model, lora, 2, 0.1), 1)
    for adapters in ([tuned], []):
        one, other = (stacked.score(model, lora, adapters, [rows])[0] for rows in (shared, apart))
        np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_branch_that_sees_another_is_noticed(load, monkeypatch):
    """Without the mask a choice would read the one before it: the planted bug moves the scores."""
    model = load("llama")
    rows = model.rows(items("causal", 4, seed=2))
    right = stacked.score(model, find_targets(model), [], [rows])[0].logp
    original = stacked._branched

    def blind(*args):
        positions, seen = original(*args)
        return positions, torch.where(torch.ones(seen.shape[-2:]).tril().bool(), 0.0, seen)

    monkeypatch.setattr(stacked, "_branched", blind)
    wrong = stacked.score(model, find_targets(model), [], [rows])[0].logp
    assert np.abs(wrong - right)[:, 1:].max() > 1e-3
    np.testing.assert_allclose(wrong[:, 0], right[:, 0], rtol=0, atol=1e-10)


def test_a_model_that_cannot_share_prompts_gets_a_row_for_every_choice(load):
    model = copy.copy(load("llama"))
    whole = copy.deepcopy(model.model)
    whole.config.sliding_window = 8
    windowed = replace(model, model=whole)
    assert not windowed.shares_prompts
    assert len(windowed.rows(items("causal", 4, seed=2))) == 12

    class Deaf(nn.Module):
        """Ignores masks and positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = copy.deepcopy(model.model), model.model.config

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, attention_mask=None, position_ids=None, **rest):
            return self.inner(input_ids=input_ids, **rest)

    assert not replace(model, model=Deaf()).shares_prompts


# --- layers below the first adapter -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_without_adapters_are_asked_once_and_nothing_changes(load, architecture):
    model = load(architecture)
    lora = find_targets(model, r=3, alpha=5.0, layers=[1])
    data = [model.targets(items(model.task, n, seed=n)) for n in (3, 6, 5)]
    asked = [model.rows(items(model.task, n, seed=9 + n)) for n in (2, 4, 3)]
    start = stacked.stack([random_adapter(model, lora, seed, 0.1) for seed in range(3)])
    recipe = Recipe(lr=0.02, epochs=7, batch=2, clip=1.0)
    plain = fit(model, lora, start, data, recipe, order)
    scores = stacked.score(model, lora, [plain.params], asked, tokens=30)

    calls = []
    lowest = model.model.get_submodule(lora.targets[0].split(".1.")[0])[0]
    original = type(lowest).forward
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(type(lowest), "forward", lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1])
        known = [stacked.below(model, lora, rows, tokens=30) for rows in data]
        probed = [stacked.below(model, lora, rows, tokens=30) for rows in asked]
        before = sum(one is lowest for one in calls)
        again = fit(model, lora, start, known, recipe, order)
        said = stacked.score(model, lora, [again.params], probed, tokens=30)
        assert before > 0 and sum(one is lowest for one in calls) == before
    for name, tensor in plain.params.items():
        torch.testing.assert_close(again.params[name], tensor, rtol=0, atol=1e-10)
    for one, other in zip(said, scores, strict=True):
        np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=1e-10)
    assert "forward" not in vars(lowest)  # the layer is itself again


def test_where_the_first_layer_has_an_adapter_or_memory_is_short_nothing_is_kept(load):
    model = load("llama")
    rows = model.rows(items("causal", 3, seed=1))
    assert stacked.below(model, find_targets(model), rows) is rows
    upper = find_targets(model, layers=[1])
    size = 8 * 16 * sum(map(len, rows.ids))
    assert stacked.below(model, upper, rows, room=size - 1) is rows
    kept = stacked.below(model, upper, rows, room=size)
    assert kept.hidden is not None and [len(h) for h in kept.hidden] == [len(ids) for ids in rows.ids]
    assert stacked.below(model, upper, kept) is kept
    some = kept.only([True, False, True])
    assert some.hidden is not None and some.hidden[1] is kept.hidden[2] and some.branches.keys() == {0, 1}


def test_a_pass_holds_no_more_tokens_than_said(load, monkeypatch):
    model = load("llama")
    rows = [model.rows(items("causal", n, seed=n)) for n in (9, 2, 5)]
    seen = []
    original = stacked.batch
    monkeypatch.setattr(stacked, "batch", lambda *args: (seen.append(original(*args)), seen[-1])[1])
    stacked.score(model, find_targets(model), [], rows, tokens=120)
    assert len(seen) > 1 and max(laid.ids.numel() for laid in seen) <= 120
    assert seen[0].ids.shape[1] >= seen[-1].ids.shape[1]  # the longest come first
    stacked.score(model, find_targets(model), [], rows, tokens=1)  # one row of each client is the least
    assert max(laid.ids.shape[0] for laid in seen[-9:]) == 3


# --- dropout ------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """The dropout that is to be used next, in place of a random one."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_dropout_is_pefts_with_each_clients_own_coins(load, architecture, monkeypatch):
    model = load(architecture)
    lora = find_targets(model, r=3, alpha=5.0)
    data = [model.targets(items(model.task, n, seed=n)) for n in (6, 4)]
    start = [random_adapter(model, lora, seed, 0.1) for seed in range(2)]
    recipe = Recipe(lr=0.02, epochs=7, batch=2, clip=0.0, dropout=0.3)

    def coins(k: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(5, k))

    fitted = fit(model, lora, stacked.stack(start), data, recipe, order, coins=coins)
    wrapped = peft_loop.wrapped
    for k, rows in enumerate(data):
        source, steps, kept = coins(k), [], []
        for epoch in range(recipe.epochs):
            shuffled = order(k, epoch).permutation(len(rows))
            steps += [shuffled[i : i + 2] for i in range(0, len(rows), 2)]
        for batch in steps:  # a step draws for one layer after the other, for all rows of the step
            wide = max(len(rows.ids[i]) for i in batch)
            sizes = [start[k][f"{name}.lora_A"].shape[1] for name in lora.targets]
            masks = [(torch.rand((len(batch), wide, d), generator=source) >= 0.3) / 0.7 for d in sizes]
            kept += [[mask[at, : len(rows.ids[i])].double() for mask in masks] for at, i in enumerate(batch)]
        waiting = iter(kept)

        def with_given(*args, _waiting=waiting):
            plain = wrapped(*args)
            places = [m for m in plain.modules() if isinstance(m, LoraLayer)]
            for layer in places:
                layer.lora_dropout["default"] = Given()

            def deal(module, arguments):
                for layer, mask in zip(places, next(_waiting), strict=True):
                    layer.lora_dropout["default"].mask = mask

            plain.register_forward_pre_hook(deal)
            return plain

        monkeypatch.setattr(peft_loop, "wrapped", with_given)
        expected, _, _ = peft_loop.train(model, lora, start[k], rows, recipe, lambda e, k=k: order(k, e))
        assert next(waiting, None) is None
        for name, tensor in stacked.unstack(fitted.params, k).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)
    plain = fit(model, lora, stacked.stack(start), data, replace(recipe, dropout=0.0), order, coins=coins)
    assert any((plain.params[n] - t).abs().max() > 1e-3 for n, t in fitted.params.items())


# --- early stop ---------------------------------------------------------------------------------------------------


def test_a_client_whose_loss_no_longer_falls_stops_and_the_others_go_on(load):
    model = load("llama")
    lora = find_targets(model, r=3, alpha=5.0)
    data = [model.targets(items("causal", n, seed=n)) for n in (4, 3, 5)]
    start = stacked.repeat(random_adapter(model, lora, 1, 0.1), 3)
    recipe = Recipe(lr=0.3, epochs=8, batch=2, clip=0.0)  # far too high a rate: losses go up and down
    by_epochs = [fit(model, lora, start, data, replace(recipe, epochs=e), order) for e in range(1, 9)]
    patient = fit(model, lora, start, data, replace(recipe, early_stop=2), order)
    stops = []
    for k in range(3):
        best, waited, stop = np.inf, 0, 8
        for epoch, fitted in enumerate(by_epochs, start=1):
            waited = 0 if fitted.loss[k] < best else waited + 1
            best = min(best, fitted.loss[k])
            if waited == 2:
                stop = epoch
                break
        stops.append(stop)
        expected = by_epochs[stop - 1]
        assert patient.loss[k] == pytest.approx(expected.loss[k], abs=1e-10)
        for name, tensor in expected.params.items():
            torch.testing.assert_close(patient.params[name][k], tensor[k], rtol=0, atol=1e-10)
    assert min(stops) < max(stops), stops  # one stops while another goes on
