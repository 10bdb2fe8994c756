"""Suites by name and from users' own JSONL: what is read, what is chosen, and what is refused and why."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.probes import suites
from fedcanary.probes.suites import Pick, Wording, digest, load, packaged
from fedcanary.probes.suites.rows import canonical
from fedcanary.types import Item, Role

SHIPPED = suites.DATA


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    """A small shelf of packaged suites, so that these tests do not depend on the shipped data."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    entry = {"name": "capitals", "version": "3", "role": "general", "file": "capitals.jsonl"}
    index = {"suites": [{**entry, "source": "written for the test", "licence": "Apache-2.0"}]}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    write(folder / "capitals.jsonl", [LINE, {**LINE, "prompt": "Capital of Italy?", "answer": " Rome"}])
    monkeypatch.setattr(suites, "DATA", folder)
    return folder


LINE = {"prompt": "Capital of France?", "choices": [" Rome", " Paris"], "answer": 1}


def write(path: Path, lines) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def refused(*args, **options):
    with pytest.raises(BadInput) as raised:
        load(*args, **options)
    assert all(problem.remedy and problem.what for problem in raised.value.problems)
    return raised.value.problems


# ---------------------------------------------------------------- packaged


def test_packaged_suite_by_name(shelf):
    suite = load("capitals")
    assert (suite.name, suite.version, suite.role, suite.licence) == ("capitals", "3", Role.GENERAL, "Apache-2.0")
    assert [item.answer for item in suite.items] == [1, 0]
    assert packaged()["capitals"].file == "capitals.jsonl"
    part = load("capitals", pick=Pick(at_most=1))
    assert part.version == f"3+{part.digest[:12]}" and part.digest != suite.digest
    assert load("capitals", "safety").role is Role.SAFETY


def test_unknown_name_is_told_the_nearest():
    (problem,) = refused("capitols")
    assert problem.remedy == "did you mean 'capitals'?"


@pytest.mark.parametrize("index", ["", "{}", '{"suites": [{"name": "x"}]}', '{"suites": [{"role": "nonsense"}]}'])
def test_a_broken_index_is_our_fault(shelf, index):
    (shelf / "index.json").write_text(index, encoding="utf-8")
    with pytest.raises(FedcanaryError) as raised:
        packaged()
    assert not isinstance(raised.value, BadInput)


def test_shipped_suites_can_be_read(monkeypatch):
    if not (SHIPPED / "index.json").is_file():
        pytest.skip("this checkout has no packaged suites: generate probes/suites/data")
    monkeypatch.setattr(suites, "DATA", SHIPPED)
    infos = packaged()
    for name, info in infos.items():
        suite = load(name)
        assert suite.items and suite.role is info.role and suite.source and suite.licence
    listed = {info.file for info in infos.values()}
    assert listed == {path.name for path in SHIPPED.glob("*.jsonl")}


# ---------------------------------------------------------------- users' JSONL


def test_own_file(tmp_path):
    lines = [
        {**LINE, "answer": " Paris", "group": "a", "pair": "1", "domain": "geo", "positive": " Rome"},
        "",
        {"prompt": "", "choices": ["Free text."]},
        {"prompt": "Which?", "choices": ["x", "y"], "answer": 0, "group": None},
    ]
    suite = load(write(tmp_path / "mine.jsonl", lines), "general")
    assert suite.items[0] == Item(
        prompt="Capital of France?",
        choices=(" Rome", " Paris"),
        answer=1,
        group="a",
        pair="1",
        domain="geo",
        positive=0,
    )
    assert suite.items[1] == Item(prompt="", choices=("Free text.",), answer=0)
    assert (suite.name, suite.source, suite.role) == ("mine", "mine.jsonl", Role.GENERAL)
    assert suite.digest == digest(suite.items) and suite.version == suite.digest[:12]


def test_bom_and_windows_line_ends(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(LINE) + "\r\n").encode() * 2)
    assert len(load(path, "general").items) == 2


BROKEN = [
    ('{"prompt": "a"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('["a"]', "a list, not an object"),
    ({"choices": ["a"]}, "'prompt' is missing"),
    ({"prompt": "a"}, "'choices' is missing"),
    ({**LINE, "promt": "x"}, "unknown key 'promt'"),
    ({**LINE, "prompt": 3}, "'prompt' is a int"),
    ({**LINE, "group": 3}, "'group' is a int"),
    ({**LINE, "choices": []}, "not a list of at least one text"),
    ({**LINE, "choices": "ab"}, "not a list of at least one text"),
    ({**LINE, "choices": ["a", 1]}, "'choices[1]' is a int"),
    ({**LINE, "choices": ["a", " "]}, "a choice is empty"),
    ({**LINE, "choices": ["a", "a"]}, "the choice 'a' is given twice"),
    ({**LINE, "answer": 2}, "'answer' is 2, and there are 2 choices"),
    ({**LINE, "answer": -1}, "'answer' is -1"),
    ({**LINE, "answer": True}, "'answer' is a bool"),
    ({**LINE, "answer": 0.5}, "'answer' is a float"),
    ({**LINE, "answer": " Pariss"}, "'answer' is not one of the choices"),
    ({**LINE, "positive": 9}, "'positive' is 9"),
    ('{"prompt": "\\ud800", "choices": ["a"]}', "half a surrogate pair"),
    ({**LINE, "answer": None}, "no 'answer'"),
]


@pytest.mark.parametrize("line, what", BROKEN, ids=[what for _, what in BROKEN])
def test_each_mistake_is_named(tmp_path, line, what):
    path = write(tmp_path / "mine.jsonl", [LINE, line])
    problems = refused(path, "general")
    assert any(what in problem.what and problem.where == f"{path}:2" for problem in problems), problems


def test_every_mistake_is_listed_at_once(tmp_path):
    path = write(tmp_path / "mine.jsonl", [line for line, _ in BROKEN])
    problems = refused(path, "general")
    assert {int(problem.where.rpartition(":")[2]) for problem in problems} == set(range(1, len(BROKEN) + 1))


def test_near_misses_are_suggested(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"promt": "a", "choices": ["yes", "no"], "answer": "yess"}])
    remedies = [problem.remedy for problem in refused(path, "general")]
    assert "did you mean 'prompt'?" in remedies and "did you mean 'yes'?" in remedies


def test_what_load_itself_refuses(tmp_path):
    path = write(tmp_path / "mine.jsonl", [LINE])
    assert "give it a role" in refused(path)[0].remedy
    assert refused(path, "saftey")[0].remedy == "did you mean 'safety'?"
    assert refused(path, "general", format="jsnol")[0].remedy == "did you mean 'jsonl'?"
    assert "wording" in refused(path, "general", wording=Wording(template="{prompt}"))[0].remedy
    assert refused(tmp_path / "absent.jsonl", "general")[0].what == "neither a packaged suite nor a file"
    assert len(refused("capitols", "saftey", format="jsnol")) == 3
    assert refused(write(tmp_path / "empty.jsonl", [""]), "general")[0].what == "no items"
    assert "cannot be read" in refused(tmp_path, "general", format="jsonl")[0].what
    text = tmp_path / "notes.txt"
    text.write_text("hello\n", encoding="utf-8")
    assert "crows_pairs, hatecheck" in refused(text, "general")[0].remedy


def test_lines_that_are_not_utf8_are_listed(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "ok"}\n\xff\n')
    problems = refused(path, "general")
    assert [problem.where for problem in problems] == [f"{path}:1", f"{path}:3"]
    assert all("UTF-8" in problem.remedy for problem in problems)


@pytest.mark.parametrize(
    "role, line, what",
    [
        ("stereotype", {**LINE, "choices": ["a", "b", "c"]}, "two choices"),
        ("bias", {**LINE, "group": "a"}, "at least two groups"),
        ("safety", {**LINE, "answer": None}, "no 'answer'"),
    ],
)
def test_items_must_fit_the_role(tmp_path, role, line, what):
    assert what in refused(write(tmp_path / "mine.jsonl", [line]), role)[0].what


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some = st.builds(
    Item,
    prompt=texts,
    choices=st.lists(texts.filter(str.strip), min_size=2, max_size=4, unique=True).map(tuple),
    answer=st.sampled_from([0, 1]),
    group=st.none() | texts,
    domain=st.none() | texts,
    pair=st.none() | st.sampled_from("ab"),
    positive=st.sampled_from([None, 0, 1]),
)


@given(st.lists(some, min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read(tmp_path, items):
    path = tmp_path / "round.jsonl"
    path.write_text("\n".join(canonical(item) for item in items), encoding="utf-8")
    suite = load(path, "general")
    assert suite.items == tuple(items) and suite.digest == digest(items)


# ---------------------------------------------------------------- choosing


def numbered(tmp_path, order=range(40)):
    lines = [{**LINE, "prompt": f"{n}", "domain": "ab"[n % 2], "pair": f"{n // 4}" if n < 20 else None} for n in order]
    return write(tmp_path / "many.jsonl", lines)


def test_where_combines_columns_and_values(tmp_path):
    path = numbered(tmp_path)
    kept = load(path, "general", pick=Pick(where={"domain": ["a"], "pair": ["0", "1"]})).items
    assert [item.prompt for item in kept] == ["0", "2", "4", "6"]
    assert load(path, "general", pick=Pick(where={"domain": "a", "pair": ("0", "1")})).items == kept


def test_a_sample_is_nested_and_independent_of_order(tmp_path):
    def sample(n, order=range(40)):
        return {i.prompt for i in load(numbered(tmp_path, order), "general", pick=Pick(at_most=n)).items}

    chosen = [sample(n) for n in (4, 10, 25, 40)]
    assert all(few <= more for few, more in pairwise(chosen))
    assert len(chosen[-1]) == 40 and all(len(c) <= n for c, n in zip(chosen, (4, 10, 25, 40), strict=True))
    assert sample(12) == {i.prompt for i in load(numbered(tmp_path), "general", pick=Pick(at_most=12)).items}
    unpaired = [{**LINE, "prompt": f"{n}"} for n in range(20)]
    forward = load(write(tmp_path / "f.jsonl", unpaired), "general", pick=Pick(at_most=7)).items
    backward = load(write(tmp_path / "b.jsonl", unpaired[::-1]), "general", pick=Pick(at_most=7)).items
    assert set(forward) == set(backward) and forward == backward[::-1]


def test_pairs_stay_together(tmp_path):
    for by in ("digest", "order"):
        kept = load(numbered(tmp_path), "general", pick=Pick(at_most=11, by=by)).items
        assert set(Counter(item.pair for item in kept if item.pair).values()) <= {4}
    first = load(numbered(tmp_path), "general", pick=Pick(at_most=11, by="order")).items
    assert [item.prompt for item in first] == [f"{n}" for n in range(8)]


def test_choices_that_cannot_be_met_are_refused(tmp_path):
    path = numbered(tmp_path)
    (problem,) = refused(path, "general", pick=Pick(where={"domian": ["a"]}))
    assert problem.remedy == "did you mean 'domain'?"
    (problem,) = refused(path, "general", pick=Pick(where={"domain": ["c"]}))
    assert problem.what == "no item has domain = 'c'"
    assert "at least one" in refused(path, "general", pick=Pick(at_most=0))[0].remedy
    assert "keep at least 4" in refused(path, "general", pick=Pick(at_most=3, by="order"))[0].remedy
    lone = write(
        tmp_path / "lone.jsonl", [{**LINE, "domain": "a", "group": "x"}, {**LINE, "domain": "b", "group": "y"}]
    )
    assert "no items" in refused(lone, "general", pick=Pick(where={"domain": "a", "group": "y"}))[0].what
    assert (
        "leave the filter out"
        in refused(write(tmp_path / "p.jsonl", [LINE]), "general", pick=Pick(where={"x": "y"}))[0].remedy
    )
