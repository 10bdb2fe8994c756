"""The study: every problem at once, each with its remedy; overrides; relative paths; the digest."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcanary import study
from fedcanary.errors import BadInput
from fedcanary.study import Study, Table

NEEDED = {"privacy": {"trust": "none"}}


def parse(*overrides: str, **tables) -> Study:
    return study.parse({**NEEDED, **tables}, overrides)


def problems(*overrides: str, **tables) -> dict[str, tuple[str, str]]:
    """What is wrong, by place (without the file's name)."""
    with pytest.raises(BadInput) as caught:
        parse(*overrides, **tables)
    return {p.where.removeprefix("study: "): (p.what, p.remedy) for p in caught.value.problems}


def test_the_smallest_study_is_protected_and_says_how_its_updates_leave():
    one = study.parse({"privacy": {"updates": {"noise": "none"}}})
    assert one.rounds == 12
    assert one.personalize.method == "fedavg"
    assert (one.privacy.trust, one.privacy.panel, one.privacy.rotates) == ("secure_aggregation", "rotating", True)
    assert (one.privacy.epsilon, one.privacy.delta) == (4.0, 1e-6)


def test_exact_updates_are_never_a_default_by_omission():
    for tree in ({}, {"privacy": {}}, {"privacy": {"trust": "central"}}, {"privacy": {"updates": {}}}):
        with pytest.raises(BadInput) as caught:
            study.parse(tree)
        (problem,) = caught.value.problems
        assert problem.where == "study: privacy.updates.noise"
        assert "not differentially private" in problem.remedy + problem.what
    study.parse({"privacy": {}, "personalize": {"method": "local_only"}})  # shares nothing, so has nothing to say
    assert list(problems(privacy={"trust": "nobody"})) == ["privacy.trust"]


def test_no_protection_is_said_by_its_own_word():
    one = parse()
    assert (one.privacy.trust, one.privacy.rotates) == ("none", False)


@pytest.mark.parametrize(
    ("privacy", "more", "where"),
    [
        ({"trust": "none", "updates": {"noise": "none"}}, {}, "privacy.updates"),
        ({"updates": {"noise": 1.0}}, {}, "privacy.updates.clip"),
        ({"updates": {"noise": 1.0, "clip": 0.5}}, {"personalize": {"weighting": "examples"}}, "personalize.weighting"),
        ({"updates": {"noise": 0.0, "clip": 0.5}}, {}, "privacy.updates.noise"),
        ({"updates": {"noise": "none", "clip": -1.0}}, {}, "privacy.updates.clip"),
        ({"updates": {"noise": "none"}, "epsilon": 0.0}, {}, "privacy.epsilon"),
        ({"updates": {"noise": "none"}, "delta": 0.5}, {}, "privacy.delta"),
        ({"updates": {"noise": "none"}, "min_cohort": 1}, {}, "privacy.min_cohort"),
        ({"updates": {"noise": "none"}, "dropouts": 0.4}, {}, "privacy.dropouts"),
        ({"updates": {"noise": "none"}, "noise": "seeded"}, {}, "privacy.noise"),
        (
            {"unit": "example", "record": {"noise": 1.0, "clip": 1.0, "sample_rate": 0.5}},
            {"personalize": {"dropout": 0.1}},
            "personalize",
        ),
    ],
)
def test_a_privacy_table_that_does_not_fit_is_refused(privacy, more, where):
    assert any(place.startswith(where) for place in problems(privacy=privacy, **more))


# Every table of the tree, with the path that leads to it.
def tables(at: type[Table] = Study, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], type[Table]]]:
    found = [(path, at)]
    for name, field in at.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found += [t for k in kinds if isinstance(k, type) and issubclass(k, Table) for t in tables(k, (*path, name))]
    return found


LISTS = {"plants", "suites"}


@pytest.mark.parametrize(("path", "table"), tables(), ids=lambda v: ".".join(v) if isinstance(v, tuple) else "")
def test_an_unknown_key_is_an_error_with_a_suggestion_at_every_depth(path, table):
    key = max(table.model_fields, key=len)
    wrong = key[:-1] + "_" + key[-1]
    record = {"noise": 1.0, "clip": 1.0, "sample_rate": 0.1}
    tree: dict = {"privacy": {"updates": {"noise": "none"}, "record": record}, "slices": {"by": ["region"]}}
    at = tree
    place = []
    for name in path:
        place.append(name)
        if name in LISTS:
            entry: dict = {"mode": "amplified_bias"} if name == "plants" else {"source": "x"}
            at[name] = [entry]
            at = entry
            place.append("0")
        else:
            at = at.setdefault(name, {})
    at[wrong] = 1
    with pytest.raises(BadInput) as caught:
        study.parse(tree)
    assert [p.where for p in caught.value.problems] == [f"study: {'.'.join([*place, wrong])}"]
    (problem,) = caught.value.problems
    assert problem.what == "unknown key"
    assert problem.remedy == f"did you mean {key!r}?"


def test_a_word_that_is_not_allowed_is_met_with_the_closest():
    found = problems(personalize={"method": "fedpox"}, clients={"plants": [{"mode": "amplified_biass"}]})
    assert found["personalize.method"] == ("'fedpox' is not allowed", "did you mean 'fedprox'?")
    assert found["clients.plants.0.mode"][1] == "did you mean 'amplified_bias'?"


def test_every_problem_is_reported_at_once():
    found = problems(
        "engine.stck=3",
        "nonsense",
        rounds=0,
        personalize={"lr": -1, "methd": "fedavg"},
        model={"lora": {"r": "many"}},
        probes={"suites": [{"source": "a"}, {"rle": "bias"}]},
    )
    assert set(found) == {
        "rounds",
        "personalize.lr",
        "personalize.methd",
        "model.lora.r",
        "probes.suites.1.source",
        "probes.suites.1.rle",
        "engine.stck",
        "--set nonsense",
    }
    assert all(what and remedy for what, remedy in found.values())


@pytest.mark.parametrize(
    ("tables", "place"),
    [
        ({"model": {"task": "classify"}}, "clients.source"),
        ({"clients": {"source": "x.csv", "columns": {"client": "who"}}}, "clients.columns"),
        ({"clients": {"source": "x.csv", "columns": {"text": "t"}}}, "clients.columns.client"),
        (
            {"clients": {"source": "x.csv", "columns": {"text": "t"}, "partition": {"kind": "dirichlet"}}},
            "clients.partition.clients",
        ),
        ({"probes": {"packaged": False}}, "probes.suites"),
    ],
)
def test_tables_that_do_not_fit_together_are_named(tables, place):
    found = problems(**tables)
    assert found[place][0] == "does not fit"
    assert len(found[place][1]) > 20


def test_two_tables_that_do_not_fit_are_two_problems():
    found = problems(model={"task": "classify"}, probes={"packaged": False})
    assert set(found) == {"clients.source", "probes.suites"}


# --- overrides --------------------------------------------------------------------------------------------------


def test_overrides_are_toml_or_bare_words():
    one = parse(
        "rounds=3",
        "personalize.method = ditto",
        'model.lora.targets=["q_proj", "v_proj"]',
        "probes.packaged=true",
        "personalize.lr=1e-4",
        "title=a run = of mine",
        "probes.margins.fairness_collapse=0.2",
    )
    assert (one.rounds, one.personalize.method, one.personalize.lr) == (3, "ditto", 1e-4)
    assert one.model.lora.targets == ("q_proj", "v_proj")
    assert one.title == "a run = of mine"
    assert one.probes.margins.fairness_collapse == 0.2
    assert one.probes.margins.amplified_bias == study.MarginTable().amplified_bias


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('rounds = 5\n[privacy]\ntrust = "none"\n')
    assert study.load(path).rounds == 5
    assert study.load(path, ["rounds=7", "rounds=8"]).rounds == 8


@pytest.mark.parametrize("text", ["rounds", "=3", " =3", ""])
def test_an_override_that_is_none_is_named(text):
    with pytest.raises(BadInput, match="is not key=value"):
        parse(text)


def test_an_override_through_a_value_is_named():
    assert "--set rounds.x=1" in problems("rounds.x=1", rounds=3)


def test_overriding_leaves_the_given_tree_alone():
    tree = {"privacy": {"trust": "none"}, "personalize": {"lr": 0.1}}
    study.parse(tree, ["personalize.lr=0.2", "engine.stack=2"])
    assert tree == {"privacy": {"trust": "none"}, "personalize": {"lr": 0.1}}


# --- files ------------------------------------------------------------------------------------------------------

FILE = """
title = "Größe"
rounds = 3
[privacy]
trust = "none"
[model]
source = "{model}"
[clients]
source = "data.csv"
columns = {{ text = "t", client = "who" }}
[[probes.suites]]
source = "./suites/own.jsonl"
"""


def test_relative_paths_are_the_files_own(tmp_path, monkeypatch):
    home = tmp_path / "study"
    (home / "suites").mkdir(parents=True)
    (home / "model").mkdir()
    (home / "data.csv").write_text("t,who\n")
    (home / "s.toml").write_text(FILE.format(model="model"))
    monkeypatch.chdir(tmp_path)
    one = study.load(Path("study/s.toml"))
    assert Path(one.clients.source) == home / "data.csv"
    assert Path(one.model.source) == home / "model"
    assert Path(one.probes.suites[0].source) == home / "suites" / "own.jsonl"  # said to be a path, though not there yet


def test_names_that_are_no_paths_stay(tmp_path):
    (tmp_path / "s.toml").write_text(FILE.format(model="owner/name"))
    one = study.load(tmp_path / "s.toml")
    assert one.model.source == "owner/name"
    assert one.clients.source == "data.csv"
    assert parse(clients={"source": "generated"}).clients.source == "generated"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"rounds = \n", "is not TOML"),
        (b"rounds = 3\nrounds = 4\n", "is not TOML"),
        (b'title = "\xff"', "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_toml_is_named(tmp_path, content, says):
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=says) as caught:
        study.load(path)
    assert str(path) in caught.value.problems[0].where


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            study.load(path)


def test_problems_of_a_file_name_the_file(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("roundz = 3\n[privacy]\ntrust = 'none'\n")
    with pytest.raises(BadInput) as caught:
        study.load(path)
    assert caught.value.problems[0].where == f"{path}: roundz"
    assert "did you mean 'rounds'?" in str(caught.value)


# --- digest -----------------------------------------------------------------------------------------------------

ONE = 'rounds = 3\ntitle = "x"\n[privacy]\ntrust = "none"\n[personalize]\nlr = 0.001\nmethod = "ditto"\n'
TWO = """# the same, laid out otherwise
title = 'x'
personalize.method = "ditto"
personalize.lr = 1e-3
personalize.epochs = 1    # said, though it is the default
privacy = { trust = "none" }
rounds = 3
"""


def test_the_digest_is_of_the_content_not_of_the_layout():
    one, two = (study.parse(tomllib.loads(text)) for text in (ONE, TWO))
    assert one == two
    assert one.digest == two.digest
    assert study.parse(tomllib.loads(ONE), ["seed=2"]).digest != one.digest
    assert study.parse(tomllib.loads(ONE), ["model.lora.r=4"]).digest != one.digest
    assert len(one.digest) == 32


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 99), st.floats(1e-6, 10), st.sampled_from(["fedavg", "ditto"]), st.text(max_size=10))
def test_written_out_and_read_again_it_is_the_same_study(rounds, lr, method, title):
    one = parse(rounds=rounds, title=title, personalize={"lr": lr, "method": method})
    again = study.parse(tomllib.loads(one.toml()))
    assert again == one
    assert again.digest == one.digest
    assert study.parse(one.model_dump(mode="json")).digest == one.digest


def test_a_study_is_frozen():
    with pytest.raises(ValidationError):
        parse().rounds = 3
