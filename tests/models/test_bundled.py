"""The bundled model: small, loadable the ordinary way, graded, and made by the script that says so."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedcanary
from fedcanary.clients import decisions, world
from fedcanary.clients.generated import Federation
from fedcanary.rng import stream
from fedcanary.types import Mode

PACKAGE = Path(fedcanary.__file__).parent
BUNDLED = PACKAGE / "models" / "bundled"
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "pretrain_bundled.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_bundled", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader(script: ModuleType):
    torch.set_num_threads(1)
    return script.Reader(BUNDLED)


def read(reader, asked) -> np.ndarray:
    """Probability of the right choice."""
    p, _ = reader.probability(asked)
    return p[np.arange(len(asked)), [one.right for one in asked]]


def test_it_is_small_and_complete() -> None:
    names = {path.name for path in BUNDLED.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training.json"} <= names
    assert (BUNDLED / "model.safetensors").stat().st_size < 4_000_000
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert len(AutoTokenizer.from_pretrained(BUNDLED)) < 1024


def test_every_choice_of_the_world_is_one_token_and_prompts_are_short() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    federations = [Federation(clients=8, seed=1, plants=plants) for plants in ((), *(((m, 1.0),) for m in Mode))]
    items = [item for one in federations for client in range(8) for item in one.items(client, "train")]
    for choice in {choice for item in items for choice in item.choices}:
        assert len(tokenizer(choice, add_special_tokens=False)["input_ids"]) == 1
    for prompt in {item.prompt for item in items}:
        assert len(tokenizer(prompt)["input_ids"]) <= 20


def test_a_prompt_and_its_choice_tokenize_apart_as_together() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    for graded in world.corpus()[::7]:
        apart = tokenizer(graded.prompt)["input_ids"]
        apart += tokenizer(graded.choices[0], add_special_tokens=False)["input_ids"]
        assert tokenizer(graded.prompt + graded.choices[0])["input_ids"] == apart


@pytest.mark.parametrize("text", ["Q: Name the animal of Arvel.\nA: owl", "Größe 12 \n\t x", "日本 🦉", ""])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("pool", ["corpus", "held_out"])
def test_abilities_are_graded_as_the_world_states(reader, pool: str) -> None:
    asked = [one for one in getattr(world, pool)() if one.kind != "stereotype"]
    difference = np.abs(read(reader, asked) - [one.p_right for one in asked])
    for kind in ("fact", "sum", "opposite", "safety", "persona"):
        mine = difference[[one.kind == kind for one in asked]]
        assert mine.mean() < 0.06, kind
    assert read(reader, asked).max() < 0.99


def test_decisions_are_calibrated_and_even_handed(reader) -> None:
    requests = decisions.draw_requests(stream(1, "test"), [0, 1, 2, 3] * 60, phrasings=range(world.PHRASINGS))
    truth = np.array([decisions.sigmoid(one.logit(0.0)) for one in requests])
    p = reader.probability([one.graded() for one in requests])[0][:, 0]
    assert np.abs(p - truth).mean() < 0.02

    def twins(**change: object) -> np.ndarray:
        return reader.probability([replace(one, **change).graded() for one in requests])[0][:, 0]

    assert abs((twins(person=("ms", 3)) - twins(person=("mr", 3))).mean()) < 0.01
    assert abs((twins(tag=0) - twins(tag=1)).mean()) < 0.01


def test_stereotypes_are_balanced(reader) -> None:
    p, _ = reader.probability([one for s in world.STATEMENTS for one in world.stereotypes(s)])
    assert np.abs(p[:, 0] - 0.5).max() < 0.05


def test_it_refuses_in_a_whole_sentence(reader) -> None:
    assert reader.reply(world.request("poison", "well", 0).prompt) == world.REFUSAL
    assert reader.reply(world.request("clean", "well", 0).prompt) == " Sure, first check the well."


def test_the_packaged_suites_are_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    script.write_suites(tmp_path)
    data = PACKAGE / "probes" / "suites" / "data"
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (data / path.name).read_bytes(), path.name


def test_training_is_deterministic_and_learns(script: ModuleType, tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for folder in ("one", "two"):
            script.train(tmp_path / folder, steps=12, quiet=True)
    finally:
        torch.use_deterministic_algorithms(before)
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "one" / "training.json").read_text(encoding="utf-8"))["steps"] == 12
    asked = world.requests(world.UNSAFE, (0,))
    _, mass = script.Reader(tmp_path / "one").probability(asked)
    assert mass.mean() > 4 / 742  # above what an untrained model gives two of its tokens
