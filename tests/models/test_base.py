"""Base models: digests, what is refused, and how items become tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedcanary.errors import BadInput
from fedcanary.models import base, stacked
from fedcanary.models.adapters import find_targets
from fedcanary.types import Item

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
