"""The leaner norms and rotary positions: the same numbers and gradients, and only where a check says so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from fedcanary.models import base, lean, stacked
from fedcanary.models.adapters import find_targets, initial
from fedcanary.models.lean import _RootMeanSquare, _Rotated, parts_of
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import stream
from fedcanary.types import Item

F64 = torch.float64


@pytest.fixture(scope="module")
def models(tiny):
    return {name: base.load(str(tiny[name])) for name in ("llama", "gpt2", "neox", "qwen2")}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_gradients_are_those_of_the_formulas():
    x, weight = numbers(2, 3, 6).requires_grad_(), numbers(6)
    assert torch.autograd.gradcheck(lambda x: _RootMeanSquare.apply(x, weight, 1e-3), x)
    torch.testing.assert_close(
        _RootMeanSquare.apply(x, weight, 1e-3), weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3)
    )
    cos, sin = numbers(2, 1, 3, 6), numbers(2, 1, 3, 6).flip(0)
    assert torch.autograd.gradcheck(lambda x: _Rotated.apply(x, cos, sin), numbers(2, 4, 3, 6).requires_grad_())


@pytest.mark.parametrize(
    ("name", "norms", "rotary"), [("llama", 5, 1), ("qwen2", 5, 1), ("gpt2", 0, 0), ("neox", 0, 1)]
)
def test_which_models_have_such_parts(models, name, norms, rotary):
    for asked in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):  # whoever asks first
        with asked:
            found = parts_of(models[name].model)
        assert (len(found[0]), len(found[1])) == (norms, rotary)


@pytest.mark.parametrize("name", ["llama", "qwen2", "neox"])
def test_training_is_what_it_was_and_the_model_is_itself_afterwards(models, name):
    model = models[name]
    plain = replace(model)
    plain.__dict__["lean_parts"] = ((), ())
    lora = find_targets(model, r=3)
    items = [Item(prompt="who goes" * (1 + i % 3), choices=(" there",), answer=0) for i in range(6)]
    start = stacked.repeat(initial(model, lora, 1), 2)
    results = [
        fit(
            one,
            lora,
            start,
            [one.targets(items[:4]), one.targets(items)],
            Recipe(batch=2),
            lambda k, e: stream(1, k, e),
        )
        for one in (model, plain)
    ]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    for key, tensor in results[1].params.items():
        torch.testing.assert_close(results[0].params[key], tensor, rtol=0, atol=2e-4)  # a tenth of one step of Adam
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_a_norm_or_rotation_of_another_kind_is_left_alone(models, monkeypatch):
    odd = copy.deepcopy(models["llama"].model)

    class OnePlusRMSNorm(type(odd.model.norm)):
        def forward(self, x):
            return super().forward(x) + x * 1e-2

    odd.model.norm.__class__ = OnePlusRMSNorm
    assert len(parts_of(odd)[0]) == 4
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: original(q, k, sin, cos))
    assert parts_of(odd)[1] == ()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k: (q, k))
    assert parts_of(odd)[1] == ()


def test_in_another_precision_nothing_is_replaced(tiny):
    assert parts_of(base.load(str(tiny["llama"]), dtype=F64).model) == ((), ())
    assert parts_of(nn.Module()) == ((), ())


def test_an_error_inside_leaves_the_model_itself(models):
    parts = models["llama"].lean_parts
    with pytest.raises(ZeroDivisionError), lean.lean(parts):
        assert "forward" in vars(parts[0][0])
        raise ZeroDivisionError
    assert "forward" not in vars(parts[0][0])
    assert parts[1][0].apply_rotary_pos_emb.__module__ == modeling_llama.__name__
