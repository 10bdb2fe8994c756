"""Adapter files are peft's, and so are the targets; errors of both."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from made_up import F64, cast, random_adapter
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from fedcanary.errors import BadInput
from fedcanary.models import adapters, base, stacked
from fedcanary.models.adapters import find_targets, initial
from fedcanary.models.stacked import Part, attached
from oracles import peft_loop
from oracles.tiny import ARCHITECTURES

# peft asks transformers for a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# --- files ------------------------------------------------------------------------------------------------------


def logits_of(model: base.BaseModel, lora, adapter) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad(), attached(model, lora, [Part(stacked.repeat(adapter, 1))], 1):
        return model.model(input_ids=ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (F64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_a_saved_adapter_is_pefts_and_says_the_same(load, tmp_path, architecture, dtype, atol, targets):
    model = load(architecture, dtype)
    lora = find_targets(model, r=3, alpha=5.0, targets=targets)
    adapter = cast(random_adapter(model, lora, 4), dtype)
    adapters.save(tmp_path / "a", adapter, lora, model)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "adapter_config.json", "adapter_model.safetensors"]
    plain = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "a").eval()
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    assert expected.dtype == dtype
    ours = logits_of(model, lora, adapter)
    # float32 logits of these wide random models reach into the tens: the bound is relative to their size
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())) / 5)
    assert not torch.allclose(ours, model.model(input_ids=ids).logits, atol=1e-3)
    back = adapters.load(tmp_path / "a")
    assert adapters.digest(back) == adapters.digest(adapter)


def test_a_saved_adapter_with_layers_is_pefts_too(load, tmp_path):
    for architecture in ARCHITECTURES:
        model = load(architecture)
        lora = find_targets(model, r=2, layers=[1])
        adapter = random_adapter(model, lora, 4)
        adapters.save(tmp_path / architecture, adapter, lora, model)
        plain = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / architecture).eval()
        ids = torch.arange(24).reshape(2, 12) + 5
        with torch.no_grad():
            torch.testing.assert_close(logits_of(model, lora, adapter), plain(input_ids=ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_what_peft_saves_can_be_read(load, tmp_path, architecture):
    model = load(architecture)
    lora = find_targets(model, r=3)
    adapter = random_adapter(model, lora, 4)
    peft_loop.wrapped(model, lora, adapter).save_pretrained(tmp_path)
    back = adapters.load(tmp_path)
    assert back.keys() == adapter.keys()
    assert all(torch.equal(back[name], adapter[name]) for name in adapter)


def test_saving_again_replaces_whole(load, tmp_path):
    model = load("llama")
    lora = find_targets(model, r=2)
    one, two = (random_adapter(model, lora, seed) for seed in (1, 2))
    for adapter in (one, two, two):
        adapters.save(tmp_path / "a", adapter, lora, model)
    assert adapters.digest(adapters.load(tmp_path / "a")) == adapters.digest(two) != adapters.digest(one)
    assert not (tmp_path / "a.part").exists()


@pytest.mark.parametrize("kind", ["truncated", "garbage"])
def test_a_broken_adapter_file_is_bad_input(load, tmp_path, kind):
    model = load("llama")
    lora = find_targets(model, r=2)
    adapters.save(tmp_path / "a", random_adapter(model, lora, 1), lora, model)
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if kind == "truncated" else b"\x01" * 64)
    with pytest.raises(BadInput, match="adapter"):
        adapters.load(tmp_path / "a")


# --- targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layers", [None, (1,), (0, 1)])
@pytest.mark.parametrize("targets", ["auto", "all-linear", "some"])
def test_targets_are_those_of_peft(load, architecture, layers, targets):
    model = load(architecture)
    some = {"llama": ["o_proj", "up_proj"], "gpt2": ["c_proj"], "neox": ["dense", "dense_h_to_4h"]}
    some |= {"qwen2": ["k_proj"], "bert": ["dense"]}
    named = some[architecture] if targets == "some" else targets
    lora = find_targets(model, targets=named, layers=layers)
    if named == "all-linear" and layers is not None:  # peft takes layers only with a list of names
        named = list(lora.names)
    config = LoraConfig(
        target_modules=None if targets == "auto" else named,
        layers_to_transform=None if layers is None else list(layers),
        fan_in_fan_out=architecture == "gpt2",
        task_type=TaskType.SEQ_CLS if model.task == "classify" else TaskType.CAUSAL_LM,
    )
    plain = get_peft_model(copy.deepcopy(model.model), config)
    theirs = {n.removeprefix("base_model.model.") for n, m in plain.named_modules() if isinstance(m, LoraLayer)}
    assert set(lora.targets) == theirs
    assert lora.fan_in_fan_out == (architecture == "gpt2")


def test_targets_that_match_nothing_are_named_with_a_suggestion(load):
    with pytest.raises(BadInput, match=r"did you mean 'q_proj'\?") as caught:
        find_targets(load("llama"), targets=["q_prj"])
    assert "v_proj" in str(caught.value)
    with pytest.raises(BadInput, match=r"model\.lora\.targets"):
        find_targets(load("gpt2"), targets=["zzz"])


def test_layers_beyond_the_model_are_refused(load):
    for layers in ([2, 9], [0, 9], []):
        with pytest.raises(BadInput, match=r"model\.lora\.layers: no target lies in"):
            find_targets(load("llama"), layers=layers)


def test_an_architecture_without_default_says_what_there_is(load):
    model = replace(load("llama"), model=copy.deepcopy(load("llama").model))
    model.model.config.model_type = "unheard-of"
    with pytest.raises(BadInput, match="no default for architecture 'unheard-of'") as caught:
        find_targets(model)
    assert "q_proj" in str(caught.value)


def test_the_initial_adapter_changes_nothing_and_comes_from_the_seed(load):
    model = load("bert")
    lora = find_targets(model, r=3)
    one, same, other = initial(model, lora, 1, F64), initial(model, lora, 1, F64), initial(model, lora, 2, F64)
    assert adapters.digest(one) == adapters.digest(same) != adapters.digest(other)
    a = one["bert.encoder.layer.0.attention.self.query.lora_A"] * 4  # uniform in +-1 / sqrt(16)
    assert a.abs().max() <= 1 and abs(float(a.var()) - 1 / 3) < 0.15
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, lora, one), model.model(input_ids=ids).logits, rtol=0, atol=1e-12)
