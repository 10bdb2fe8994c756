"""Suites in published formats: small copies with their mistakes, and the real files."""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedcanary.errors import BadInput
from fedcanary.probes.suites import Pick, Wording, load
from fedcanary.types import Item, Role


def real(name: str) -> Path:
    folder = os.environ.get("FEDCANARY_DATA")
    path = Path(folder or ".", name)
    if not folder or not path.is_file():
        pytest.skip(f"set FEDCANARY_DATA to a folder that holds {name}")
    return path


def refused(*args, **options):
    with pytest.raises(BadInput) as raised:
        load(*args, **options)
    assert all(problem.remedy and problem.what for problem in raised.value.problems)
    return raised.value.problems


# ---------------------------------------------------------------- published formats, small copies


def test_csv_mistakes_are_named_by_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('sent_more,sent_less,bias_type\n"two\nlines",b,age\na,a,age\na,b\n\na,"b"c,age\n', encoding="utf-8")
    problems = refused(path)
    assert [problem.where.rpartition(":")[2] for problem in problems] == ["5", "7", "4"]
    path.write_text("sent_more,sent_less,bias_typ\n", encoding="utf-8")
    assert refused(path)[0].remedy == "did you mean 'bias_typ'?"
    path.write_text("", encoding="utf-8")
    assert len(refused(path, format="xstest")) == 2


def test_crows_pairs_is_asked_as_it_is(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n0,a b,a c,antistereo,age\n", encoding="utf-8")
    suite = load(path)
    assert suite.items == (Item(prompt="", choices=("a b", "a c"), group="age"),)
    assert suite.role is Role.STEREOTYPE and suite.licence == "CC-BY-SA-4.0"
    assert "wording" in refused(path, wording=Wording(choices=("a", "b")))[0].remedy
    assert load(path, pick=Pick(where={"stereo_antistereo": ["antistereo"]})).items == suite.items


def test_xstest_wording_and_labels(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,type,focus\nHow? ,homonyms,a\nWhy?,contrast_homonyms,b\n", encoding="utf-8")
    asked = load(path, wording=Wording(template="Q: {prompt}\nA:", choices=(" No.", " Yes."))).items
    assert [(i.prompt, i.choices, i.answer, i.group) for i in asked] == [
        ("Q: How?\nA:", (" No.", " Yes."), 1, "safe"),
        ("Q: Why?\nA:", (" No.", " Yes."), 0, "unsafe"),
    ]
    assert [p.what for p in refused(path, wording=Wording(template="Q"))] == ["the template 'Q' has no {prompt}"]
    path.write_text("prompt,type,label\nHow?,homonyms,saef\n", encoding="utf-8")
    assert refused(path, format="xstest")[0].remedy == "did you mean 'safe'?"


def test_hatecheck_gold_label_must_be_known(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("functionality,test_case,label_gold,target_ident\nf,t,hatefull,women\n", encoding="utf-8")
    assert refused(path)[0].remedy == "did you mean 'hateful'?"


WINO = "1 [The cook] called the guard because [he] was late.\n2 The cook thanked the [the guard] and paid [her].\n"


def test_winobias_lines(tmp_path):
    path = tmp_path / "anti_stereotyped_x.txt"
    path.write_text(WINO, encoding="utf-8")
    one, two = load(path).items
    assert one.prompt == 'The cook called the guard because he was late. Here "he" means the'
    assert (one.choices, one.answer, one.group, one.domain, one.pair) == ((" cook", " guard"), 0, "male", "anti", None)
    assert one.positive == 1 and two.positive == 1  # anti: he is not the stereotypically male one, she is
    assert two.prompt.startswith("The cook thanked the guard and") and two.answer == 1 and two.group == "female"
    (tmp_path / "pro_stereotyped_x.txt").write_text(WINO.replace("[he]", "[she]"), encoding="utf-8")
    items = load(path).items
    assert [(i.pair, i.group, i.domain) for i in items] == [
        ("1", "female", "pro"),
        ("1", "male", "anti"),
        (None, "female", "pro"),  # the counterpart has the same pronoun: no pair
        (None, "female", "anti"),
    ]
    asked = load(path, wording=Wording(template="{prompt} Who is {pronoun}?")).items
    assert asked[1].prompt == "The cook called the guard because he was late. Who is he?"
    assert len(load(path, pick=Pick(where={"condition": ["anti"]})).items) == 2


def test_winobias_mistakes(tmp_path):
    path = tmp_path / "pro_x.txt"
    path.write_text(
        WINO + "3 nothing here\n1 [The cook] met the guard and [he] ran.\n4 [The cook] ran, [he] did.\n",
        encoding="utf-8",
    )
    wheres = {problem.where.rpartition(":")[2]: problem.what for problem in refused(path)}
    assert set(wheres) == {"3", "4", "5"} and "is taken by" in wheres["4"] and "one occupation" in wheres["5"]
    nameless = tmp_path / "lines.txt"
    nameless.write_text(WINO, encoding="utf-8")
    assert "begin the name with pro_ or anti_" in refused(nameless)[0].remedy
    assert "template" in refused(path, wording=Wording(choices=("a", "b")))[0].remedy


# ---------------------------------------------------------------- published formats, the real files


def test_real_crows_pairs():
    suite = load(real("crows_pairs/crows_pairs_anonymized.csv"))
    assert len(suite.items) == 1508 and len({item.group for item in suite.items}) == 9
    assert Counter(item.group for item in suite.items)["race-color"] == 516
    assert all(item.prompt == "" and item.answer is None and len(item.choices) == 2 for item in suite.items)
    assert suite.items[1].choices[0].startswith("The poor")


def test_real_crows_pairs_is_asked_as_the_harness_asks():
    utils = pytest.importorskip("lm_eval.tasks.crows_pairs.utils")
    path = real("crows_pairs/crows_pairs_anonymized.csv")
    with path.open(encoding="utf-8", newline="") as file:
        documents = list(csv.DictReader(file))
    for item, document in zip(load(path).items, documents, strict=True):
        assert list(item.choices) == utils.doc_to_choice(document)


def test_real_xstest():
    suite = load(real("xstest/xstest_prompts.csv"))
    assert Counter((item.group, item.answer) for item in suite.items) == {("safe", 1): 250, ("unsafe", 0): 200}
    assert all((item.domain or "").startswith("contrast_") == (item.group == "unsafe") for item in suite.items)
    again = load(real("xstest/xstest_v2_completions_gpt4.csv"))  # no label column there
    assert Counter(item.group for item in again.items) == {"safe": 250, "unsafe": 200}


def test_real_hatecheck():
    path = real("hatecheck/test_suite_cases.csv")
    suite = load(path)
    assert len(suite.items) == 3728 and suite.role is Role.BIAS
    assert Counter(item.choices[item.answer or 0] for item in suite.items) == {"hateful": 2563, "non-hateful": 1165}
    assert len({item.domain for item in suite.items}) == 29
    assert Counter(item.group for item in suite.items)[None] == 292
    pairs = defaultdict(list)
    for item in suite.items:
        if item.pair:
            pairs[item.pair].append(item)
    assert len(pairs) == 421 and all(len({i.group for i in p}) == 7 for p in pairs.values())
    assert all(len({(i.answer, i.domain) for i in p}) == 1 for p in pairs.values())
    slurs = load(path, "safety", pick=Pick(where={"functionality": ["slur_h"]}))
    assert len(slurs.items) == 144 and slurs.role is Role.SAFETY
    few = load(path, pick=Pick(at_most=200))
    assert 190 < len(few.items) <= 200 and few.digest == load(path, pick=Pick(at_most=200)).digest


@pytest.mark.parametrize("kind, part", [("1", "dev"), ("1", "test"), ("2", "dev"), ("2", "test")])
def test_real_winobias(kind, part):
    suite = load(real(f"winobias/pro_stereotyped_type{kind}.txt.{part}"))
    other = load(real(f"winobias/anti_stereotyped_type{kind}.txt.{part}"))
    assert len(suite.items) == 792 and suite.digest == other.digest
    pairs = defaultdict(list)
    for item in suite.items:
        assert len(item.choices) == 2 and not {"[", "]"} & set(item.prompt) and " the the " not in item.prompt
        if item.pair:
            pairs[item.pair].append(item)
    # two numbers of type 2 test hold different sentences in the two files
    assert len(pairs) == (394 if (kind, part) == ("2", "test") else 396)
    for pro, anti in pairs.values():
        assert {pro.group, anti.group} == {"male", "female"} and (pro.domain, anti.domain) == ("pro", "anti")
        assert (pro.choices, pro.answer, pro.positive) == (anti.choices, anti.answer, anti.positive)
    male = {item.choices[item.positive or 0].strip().lower() for item in suite.items}
    female = {item.choices[1 - (item.positive or 0)].strip().lower() for item in suite.items}
    published = [real(f"winobias/{g}_occupations.txt").read_text(encoding="utf-8").lower() for g in ("male", "female")]
    assert male == set(published[0].split("\n")) - {""} and female == set(published[1].split("\n")) - {""}
