"""The page: complete, self-contained, escaped, small, and honest about what is unknown."""

from __future__ import annotations

import copy
import html
import re
from html.parser import HTMLParser

import pytest

from fedcanary.report import charts
from fedcanary.report.html import GLOSSARY, render
from fedcanary.report.summary import LABELS, summarise
from fedcanary.types import Mode

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
LOADS = {"src", "srcset", "href", "action", "data", "poster", "background", "ping", "formaction"}
HOSTILE = "</title><script>alert(1)</script>\" onload='x' <img src=http://evil.example/x> {{ 7*7 }} \x1b[2J"


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; refuses badly nested markup."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words, self.inside = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            self.inside.setdefault(self.open[-1], []).append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="session")
def rendered(any_summary):
    return render(any_summary)


@pytest.fixture(scope="session")
def page(any_summary, rendered):
    return any_summary, Page(rendered)


def test_it_is_well_formed_and_says_the_headline_first(page):
    summary, parsed = page
    assert parsed.inside["h1"] == [summary["headline"][0]]
    for sentence in summary["headline"]:
        assert sentence in parsed.text


def test_nothing_is_fetched_and_nothing_runs(page):
    _, parsed = page
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
        "form",
        "a",
        "foreignobject",
        "use",
    }
    for tag, attributes in parsed.elements:
        assert not LOADS & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert all("url(" not in (v or "") or v.startswith("url(#") for v in attributes.values())


def test_the_file_names_no_address(rendered):
    text = rendered
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "default-src 'none'" in text


def test_all_six_modes_with_word_and_shape(page):
    summary, parsed = page
    for mode in Mode:
        assert LABELS[mode] in parsed.text
        assert GLOSSARY[mode] in parsed.text
    badges = [a["class"] for tag, a in parsed.elements if tag == "span" and a.get("class", "").startswith("badge")]
    states = [summary["modes"][mode]["state"] for mode in Mode]
    assert [b.removeprefix("badge s-") for b in badges[:6]] == states
    for state in states:
        assert state in parsed.text
    silent = [a for tag, a in parsed.elements if a.get("class") == "silent"]
    assert len(silent) == sum(m["silent"] for m in summary["modes"].values())


def test_unknown_is_shown_with_why_and_a_next_step(page):
    summary, parsed = page
    unknown = [m for m in summary["modes"].values() if m["state"] == "unknown"]
    for mode in unknown:
        assert mode["why"][1:] in parsed.text
        assert mode["next"] in parsed.text
    assert ("not a pass" in parsed.text) == bool(unknown)


def test_no_privacy_is_a_red_box_in_plain_words(page):
    summary, parsed = page
    if summary["privacy"]["trust"] != "none":
        assert "No privacy protection" not in parsed.text
        assert "It does not cover the adapter updates" in parsed.text
        assert "It protects nobody until" in parsed.text
        return
    boxes = [a["class"] for tag, a in parsed.elements if tag == "section" and "privacy" in (a.get("class") or "")]
    assert boxes == ["privacy red"]
    assert "without noise" in parsed.text
    assert "∞" in parsed.text
    assert "No privacy protection" in parsed.text
    assert ("Nothing has left a client yet" in parsed.text) == (summary["privacy"]["charges"] == 0)


def test_a_finite_epsilon_is_not_red(summary_of):
    summary = summary_of("all_clear")
    summary["privacy"].update(trust="central", epsilon=1.0, delta=1e-6, mechanism="discrete Gaussian")
    text = render(summary)
    assert 'class="privacy"' in text
    assert "No privacy protection" not in text
    assert "δ = 1e-06" in html.unescape(text)


def test_pictures_can_be_said_and_ids_are_unique(page):
    summary, parsed = page
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    drawn = [a for tag, a in parsed.elements if tag == "svg" and a.get("role") == "img"]
    details = 2 * (summary["privacy"]["trust"] == "none")  # accuracy and score stay at protected clients
    assert len(drawn) == (10 + details if summary["rounds"] else 0)
    for picture in drawn:
        assert set(picture["aria-labelledby"].split()) <= set(ids)
    rest = [a for tag, a in parsed.elements if tag == "svg" and a.get("role") != "img"]
    assert all(a.get("aria-hidden") == "true" for a in rest)


def test_no_number_leaks_as_nan_or_none(page):
    _, parsed = page
    assert not re.search(r"\b(nan|NaN|None|null|inf|undefined)\b", parsed.text)
    for tag, attributes in parsed.elements:
        for name in ("d", "x", "y", "cx", "cy", "width", "height"):
            assert not re.search(r"nan|inf|None", attributes.get(name) or ""), (tag, attributes)


def test_rectangles_have_room(page):
    """No picture draws a bar of negative size."""
    for tag, attributes in page[1].elements:
        if tag == "rect":
            assert float(attributes["width"]) >= 0
            assert float(attributes["height"]) >= 0


def test_what_an_author_wrote_is_only_text(make):
    summary = summarise(make("mixed", title=HOSTILE))
    summary["suites"][0] |= {"name": HOSTILE, "licence": HOSTILE, "version": HOSTILE, "role": HOSTILE}
    summary["digests"]["suites"][HOSTILE] = HOSTILE
    summary["study"]["clients"]["source"] = HOSTILE
    summary["environment"]["packages"][HOSTILE] = HOSTILE
    summary["modes"]["amplified_bias"]["unit"] = HOSTILE
    text = render(summary)
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img"}
    assert "\x1b" not in text
    assert "{{ 7*7 }}" in parsed.text
    assert "alert(1)" in parsed.text
    assert not any("onload" in a for _, a in parsed.elements)


def test_very_long_names_are_shortened(make):
    summary = summarise(make("all_unknown", title="x" * 1_000_000))
    assert len(render(summary)) < 150_000


def test_size(summary_of):
    summary = summary_of("mixed")
    assert len(render(summary).encode()) < 150_000
    long = copy.deepcopy(summary)
    times = 2000
    long["rounds"] *= times
    for holder in (long["utility"], long["utility"]["accuracy"]):
        holder["per_round"] *= times
        holder["base_per_round"] *= times
    for mode in long["modes"].values():
        mode["per_round"] *= times
    long["spread"]["per_round"] *= times
    for name in ("asked", "also_trained", "failed", "answered"):
        long["clients"][name] *= times
    assert long["rounds"] == 12_000
    assert len(render(long).encode()) < 1_500_000


def test_the_graph_lights_edges_between_alarms_only(summary_of):
    lit = re.findall(r'class="edge (\w+) lit"', charts.influence_graph("g", summary_of("mixed")["modes"]))
    assert lit == ["feedback"]  # adaptation misalignment -> alignment erosion
    assert len(re.findall(r'class="edge \w+ lit"', charts.influence_graph("g", summary_of("all_alarm")["modes"]))) == 9


def test_a_curve_breaks_where_nothing_was_measured():
    frame = charts.Frame(rounds=5, low=0.0, high=1.0)
    parts = charts.line(frame, [0.1, 0.2, None, float("nan"), 0.5], "now")
    assert [p.partition(" ")[0] for p in map(str, parts)] == ["<path", "<circle"]
    assert len(charts.band(frame, [0.1, None, 0.2, 0.2, None], [0.2, None, 0.3, 0.4, None])) == 2


def test_a_value_at_the_bound_says_at_least(make_from):
    def says(t, k):
        return {"change": {Mode.ALIGNMENT_EROSION: -0.9}, "score": 0.5, "utility": (0.5, 0.5)}

    text = Page(render(summarise(make_from(says, rounds=2, clients=9)))).text
    assert "≥ 0.25, margin 0.050" in text
    assert "the true change may be larger" in text


@pytest.mark.parametrize(("estimates", "end"), [((0.0, 0.0, 0.1), False), ((0.1, 0.0, 0.0), True)])
def test_the_word_at_the_margin_stands_where_the_curve_does_not(estimates, end):
    curve = [(value, value - 0.01, value + 0.01, "unknown") for value in estimates]
    drawn = charts.mode_chart("1", "Amplified bias", curve, 0.09, None)
    (word,) = re.findall(r"<text[^>]*>margin</text>", drawn)
    assert ("end" in word) == end
