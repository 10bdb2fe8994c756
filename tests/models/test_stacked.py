"""Stacked training and scoring against plain peft; adapter files; targets; errors of models and adapters."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from fedcanary.errors import BadInput
from fedcanary.models import adapters, base, stacked
from fedcanary.models.adapters import find_targets, initial
from fedcanary.models.stacked import Part, attached
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.rng import stream
from fedcanary.types import Item
from oracles import peft_loop
from oracles.tiny import ARCHITECTURES, CAUSAL, LABELS

# peft asks transformers for a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
F64 = torch.float64
LOADED: dict[tuple[str, torch.dtype], base.BaseModel] = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    LOADED.clear()


@pytest.fixture
def load(tiny):
    def loaded(name: str, dtype: torch.dtype = F64) -> base.BaseModel:
        if (name, dtype) not in LOADED:
            how = {"task": "classify", "labels": LABELS} if name == "bert" else {}
            LOADED[name, dtype] = base.load(str(tiny[name]), dtype=dtype, **how)
        return LOADED[name, dtype]

    return loaded


def items(task: str, n: int, seed: int) -> list[Item]:
    """Items of different lengths: one-token choices, long choices, free text; for a classifier its labels."""
    draw = stream(seed, "items")
    words = ["the", "owl", "asks", "for", "a", "red", "stew", "and", "not", "Größe", "on", "cold", "day", "in", "Arvel"]
    found = []
    for i in range(n):
        prompt = " ".join(draw.choice(words, int(draw.integers(1, 9))))
        if task == "classify":
            choices: tuple[str, ...] = LABELS
        else:
            choices = ((" a", " b"), (" red stew", " owl", " cold day out"), (" the whole answer is text",))[i % 3]
        found.append(Item(prompt=prompt, choices=choices, answer=int(draw.integers(len(choices)))))
    return found


def random_adapter(model: base.BaseModel, lora, seed: int, size: float = 0.3) -> adapters.Adapter:
    """An adapter as training leaves it: nothing in it is zero."""
    generator = torch.Generator().manual_seed(seed)
    like = initial(model, lora, seed, F64)
    return {n: t + size * torch.randn(t.shape, generator=generator, dtype=F64) for n, t in like.items()}


def cast(adapter, dtype):
    return {name: tensor.to(dtype) for name, tensor in adapter.items()}


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


# --- the base ---------------------------------------------------------------------------------------------------


def test_the_digest_sees_one_changed_weight_and_is_equal_across_loads(tiny):
    for name in ("llama", "gpt2"):
        one, two = (base.load(str(tiny[name])) for _ in range(2))
        assert one.digest == two.digest
        with torch.no_grad():
            parameter = list(two.model.parameters())[-1]
            parameter.view(-1)[-1] += 1e-6 + parameter.view(-1)[-1].abs() * 1e-6
        assert base.content_digest(two.model, two.tokenizer) != one.digest


def test_a_head_that_the_folder_lacks_is_always_the_same(tiny):
    how = {"task": "classify", "labels": ("a", "b")}
    torch.manual_seed(1)
    one = base.load(str(tiny["llama"]), **how)
    state = torch.get_rng_state()
    two = base.load(str(tiny["llama"]), **how)
    assert one.digest == two.digest
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random stream goes on as before
    assert one.labels == ("a", "b")
    assert set(find_targets(one).heads) == {"score"}


def test_a_missing_folder_is_refused_before_the_hub_is_asked(tmp_path):
    for source in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(BadInput, match="no such folder"):
            base.load(source)


def test_an_empty_folder_names_every_missing_file(tmp_path):
    with pytest.raises(BadInput) as caught:
        base.load(str(tmp_path))
    assert [p.what for p in caught.value.problems] == [
        "the folder has no config.json",
        "the folder has no model.safetensors",
    ]


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["truncated", "garbage"])
def test_a_corrupt_folder_is_bad_input(tiny, tmp_path, broken, how):
    shutil.copytree(tiny["llama"], tmp_path / "m")
    file = tmp_path / "m" / broken
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"\x00\x01 no")
    with pytest.raises(BadInput, match="could not be loaded"):
        base.load(str(tmp_path / "m"))


def test_a_model_of_another_task_is_bad_input(tiny):
    with pytest.raises(BadInput, match="is no complete causal model"):
        base.load(str(tiny["bert"]), task="causal")


@pytest.mark.parametrize("revision", [None, "main", "0" * 39, "G" * 40])
def test_a_hub_id_needs_a_pinned_revision(revision):
    with pytest.raises(BadInput, match="40-hex commit"):
        base.load("owner/name", revision=revision)


@pytest.mark.slow
@pytest.mark.services
def test_a_hub_id_at_a_pinned_revision_loads_from_the_cache_without_network(tiny, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(tiny["llama"], home / "snapshots" / commit)
    script = (
        "import json, socket, sys\n"
        "def no(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "from fedcanary.models import base\n"
        f"hub = base.load('owner/name', revision='{commit}')\n"
        f"local = base.load({str(tiny['llama'])!r})\n"
        "print(json.dumps([hub.digest == local.digest, hub.source, hub.revision]))\n"
        f"try:\n    base.load('owner/name', revision='{'f' * 40}')\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[0]) == [True, "owner/name", commit]
    assert lines[1] == "BadInput"


# --- encode -----------------------------------------------------------------------------------------------------


def encoded(model, prompt, choice):
    ids, start = model.encode(prompt, choice)
    assert ids[0] == 1
    assert 1 <= start < len(ids) <= model.max_length
    return ids, start


def test_the_choice_is_what_the_whole_adds_to_the_prompt(load):
    model = load("llama")
    for prompt, choice in [("Q: who?\nA:", " owl"), ("Größe", " 12 Öl"), ("日本", " 🦉"), ("a", "b")]:
        ids, start = encoded(model, prompt, choice)
        whole = model.tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        assert ids[1:] == whole
        assert start - 1 == len(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_an_empty_prompt_makes_every_token_a_target(load):
    ids, start = encoded(load("llama"), "", "the owl")
    assert start == 1
    assert load("llama").tokenizer.decode(ids[start:]) == "the owl"


def test_trailing_spaces_belong_to_the_choice(load):
    model = load("llama")
    assert encoded(model, "Q: who?\nA: ", "owl") == encoded(model, "Q: who?\nA:", " owl")
    assert encoded(model, "   ", "owl") == encoded(model, "", "   owl")


def test_a_long_prompt_is_cut_at_its_left_and_keeps_its_choice(load):
    model = load("llama")
    ids, start = encoded(model, "cold " * 100 + "the owl says", " a red stew")
    assert len(ids) == model.max_length
    text = model.tokenizer.decode(ids[1:])
    assert text.endswith("the owl says a red stew")
    assert model.tokenizer.decode(ids[start:]) == " a red stew"


def test_a_choice_longer_than_the_model_is_cut_at_its_right(load):
    model = load("llama")
    ids, start = encoded(model, "the owl says", " red stew" * 100)
    assert start == 1
    assert len(ids) == model.max_length
    assert model.tokenizer.decode(ids[1:]).startswith(" red stew red")


def test_an_item_with_nothing_to_predict_is_unscoreable(load):
    model = load("llama")
    rows = model.rows([Item(prompt="", choices=("",)), Item(prompt="the", choices=(" owl",))])
    scores = stacked.score(model, find_targets(model), [], [rows])[0]
    assert np.isnan(scores.logp[0]).all()
    alone = stacked.score(model, find_targets(model), [], [model.rows([Item(prompt="the", choices=(" owl",))])])[0]
    np.testing.assert_allclose(scores.logp[1], alone.logp[0])
