"""From a summary to one HTML file: nothing to fetch, nothing to run, readable in print and on a telephone.

The template (`templates/report.html.j2`) holds the page's words and styles, `charts.py` its pictures; here the numbers
are put into words. Everything a study's author wrote is escaped, and shortened where it is very long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from fedcanary.monitor.influence import FEEDBACK, PRIMARY
from fedcanary.probes.base import CLIP
from fedcanary.record import number
from fedcanary.report import actions, charts, slices
from fedcanary.types import Mode

LONGEST: Final = 240  # characters of anything the study's author wrote

GLOSSARY: Final[Mapping[Mode, str]] = {
    Mode.AMPLIFIED_BIAS: "Personalizing on skewed local data widens the gap between groups of people; it stays silent "
    "because nobody audits groups centrally.",
    Mode.CONFIDENCE_MISCALIBRATION: "Under shift, the models' confidence stops tracking how often they are right; it "
    "stays silent because averaging hides local over-confidence.",
    Mode.FAIRNESS_COLLAPSE: "Aggregating the adapters of divergent clients leaves some clients worse off than the base "
    "model did; it stays silent because the mean hides the spread.",
    Mode.ADAPTATION_MISALIGNMENT: "Fitting a narrow local objective costs general capability or safety within one "
    "round; it stays silent because the local loss improves.",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "Over-specialized models do worse outside their client's own domains; it stays "
    "silent because evaluation stays inside them.",
    Mode.ALIGNMENT_EROSION: "Small losses of safe and in-persona behaviour add up over rounds; it stays silent because "
    "each round's change is below notice.",
}


def render(summary: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    modes = [_mode(i, summary["modes"][mode], mode, summary) for i, mode in enumerate(Mode, start=1)]
    return _template().render(
        s=summary,
        title=short(summary["title"], 160) or "Federated personalization run",
        modes=modes,
        unknowns=[m for m in modes if m["state"] == "unknown"],
        epsilon=_epsilon(summary["privacy"]["epsilon"]),
        noiseless=summary["privacy"]["trust"] == "none" or summary["privacy"]["epsilon"] == "inf",
        bought=_bought(summary),
        spared=actions.spared(summary),
        slices=slices.table(summary),
        cost=slices.cost(summary),
        pictures=_pictures(summary) if summary["rounds"] else {},
        icons={state: charts.icon(state) for state in charts.STATES},
        shown=charts.thin(summary["rounds"]),
        edges=[(_name(summary, a), _name(summary, b), k) for k, es in EDGES for a, b in es],
        facts=_facts(summary),
        settings=list(flat(summary["study"])),
        digests=list(flat(summary["digests"])),
        environment=list(flat(summary["environment"])),
    )


@cache
def _template() -> Template:
    """The page's template, compiled once."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        plain=unsigned,
        amount=amount,
        evidence=evidence,
        short=short,
        percent=percent,
        sentence=sentence,
        breakable=breakable,
    )
    return environment.get_template("report.html.j2")


ON_ALARM: Final = {
    "report": "go on and report",
    "hold": "hold: the adapter before it stays",
    "roll_back": "roll back to the last clear round",
}
EDGES: Final = (("tends to bring", PRIMARY), ("feeds back into", FEEDBACK))


def signed(value: Any, digits: int = 3) -> str:
    """A number with its sign, or a dash where nothing was measured.

    >>> signed(0.0834), signed(-0.00004), signed(None)
    ('+0.083', '0.000', '–')
    """
    if value is None or not math.isfinite(float(value)):
        return "–"
    text = f"{float(value):+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def unsigned(value: Any, digits: int = 3) -> str:
    """A number, or a dash where nothing was measured.

    >>> unsigned(0.5), unsigned(None)
    ('0.500', '–')
    """
    return signed(value, digits).removeprefix("+")


def amount(value: Any, what: str) -> str:
    """A number as what it is: with its sign if it is a change, without if it is a share or a level.

    >>> amount(0.1, "change of the gap"), amount(0.1, "share of clients left behind")
    ('+0.100', '0.100')
    """
    difference = any(word in what for word in ("change", "loss", "gain", "shift", "minus"))
    return signed(value) if difference else unsigned(value)


def percent(value: Any) -> str:
    """A share as a percentage.

    >>> percent(0.125), percent(None)
    ('12.5%', '–')
    """
    return "–" if value is None else f"{float(value) * 100:.3g}%"


def evidence(value: Any) -> str:
    """An e-value, which may be huge or tiny.

    >>> evidence(53.89), evidence(2.53e40), evidence(None), evidence(9.02e-6)
    ('53.9', '2.5×10⁴⁰', '–', '9.0×10⁻⁶')
    """
    if value is None:
        return "–"
    v = float(value)
    if math.isinf(v):
        return "∞"
    if v == 0 or 1e-3 <= v < 1e5:
        return f"{v:.3g}" if v < 1000 else f"{v:,.0f}"
    digits, _, power = f"{v:.1e}".partition("e")
    return f"{digits}×10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def short(value: Any, longest: int = LONGEST) -> str:
    """Text as it may be shown: no control characters, and not longer than `longest`."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def sentence(text: str) -> str:
    """A clause as a sentence.

    >>> sentence("no release in this round")
    'No release in this round.'
    """
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def breakable(name: str) -> Markup:
    """A dotted name that a narrow page may break after its dots and underscores.

    >>> str(breakable("a.b_c<"))
    'a.<wbr>b_<wbr>c&lt;'
    """
    return Markup("_<wbr>").join(Markup(".<wbr>").join(part.split(".")) for part in name.split("_"))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A tree of settings as dotted names and values."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for i, entry in enumerate(value, start=1):
                yield from flat(entry, f"{name}[{i}].")
        else:
            yield short(name), _say(value)


def _say(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return short(", ".join(map(str, value)))
    return short(value)


def _name(summary: Mapping[str, Any], mode: Mode) -> str:
    return str(summary["modes"][mode]["label"])


def _bought(summary: Mapping[str, Any]) -> str:
    """What the privacy spent got its buyer: verdicts, and how much noise the estimates carry."""
    modes = list(summary["modes"].values())
    counts = [f"{sum(m['state'] == state for m in modes)} {state}" for state in ("alarm", "clear", "unknown")]
    noise = [m["noise"] for m in modes if m["noise"] is not None]
    wide = [(m["interval"][1] - m["interval"][0]) / 2 for m in modes if None not in m["interval"]]
    if not noise or not wide:
        return ", ".join(counts)
    share = f"noise of sd {min(noise):.2g} to {max(noise):.2g} on one round's estimates"
    return f"{', '.join(counts)}; {share}, whose intervals are {min(wide):.2g} to {max(wide):.2g} wide to each side"


def _epsilon(value: Any) -> str:
    return "∞" if value == "inf" else f"{float(value):.3g}"


def _mode(position: int, mode: Mapping[str, Any], key: Mode, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A mode as the page shows it: what the summary says, its number, its notes and its sentence."""
    return {
        **mode,
        "key": str(key),
        "number": position,
        "shown": f"≥ {CLIP:g}" if _at_bound(key, mode) else amount(mode["estimate"], mode["unit"]),
        "notes": list(_notes(key, mode, summary)),
        "meaning": GLOSSARY[key],
    }


def _notes(key: Mode, mode: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    """What a careful reader of the number must also know."""
    estimate, details = number(mode["estimate"]), {d["name"]: number(d["value"]) for d in mode["details"]}
    if mode["part"]:
        yield f"Its parts are tested apart; shown is the worst, {mode['part'].replace('_', ' ')}."
    if mode["state"] == "alarm":
        if estimate <= mode["margin"]:
            yield "An alarm stays once raised. In the last round the estimate was back within the margin."
        if key == Mode.ALIGNMENT_EROSION:
            step, limit = details.get("largest_step", math.nan), details.get("per_step", math.nan)
            if step <= limit:
                yield f"No single round moved by more than {step:.3f} (limit {limit:g}): every step was below notice."
        if mode["upstream_evidence"]:
            yield sentence(upstream(mode, summary))
    if _at_bound(key, mode):
        yield f"A client's change is cut off at {CLIP:g} and this is at that bound: the true change may be larger."
    if number(mode["missing"]) > 0:
        yield f"{percent(mode['missing'])} of the clients could not score it in the last round."


def upstream(mode: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What the influence graph makes of a mode's alarm, in words; "" where no parent of it is in alarm."""
    if not mode["upstream_evidence"]:
        return ""
    ratio = {u["mode"]: 10.0 ** min(u["log10_ratio"], 300.0) for u in mode["upstream_evidence"]}
    said = [f"{_name(summary, Mode(m)).lower()} ({evidence(ratio[m])} to 1)" for m in mode["likely_upstream"]]
    if said:
        return f"likely upstream, by the order and strength of the alarms: {', '.join(said)} against arising on its own"
    return "no alarm upstream of it explains it better than its having arisen on its own"


def _at_bound(key: Mode, mode: Mapping[str, Any]) -> bool:
    """Whether every client's change was cut off, so that the estimate is only a lower bound."""
    paired = key not in (Mode.AMPLIFIED_BIAS, Mode.FAIRNESS_COLLAPSE)
    return paired and number(mode["estimate"]) >= CLIP - 1e-9


def _pictures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every chart of the page, by name."""
    utility, modes, guard = summary["utility"], summary["modes"], summary["guard"]
    since: dict[int, list[int]] = {}
    for i, mode in enumerate(Mode, start=1):
        if modes[mode]["since_round"]:
            since.setdefault(modes[mode]["since_round"], []).append(i)
    accuracy, spread = utility["accuracy"], summary["spread"]["per_round"]

    def level(block: Mapping[str, Any]) -> list[Any]:
        return [block["base"]] * len(block["per_round"])

    def known(curve: Sequence[Any]) -> bool:  # what stayed at the clients has no picture
        return summary["privacy"]["trust"] == "none" or any(value is not None for value in curve)

    return {
        "utility": charts.utility_chart("utility", "Utility", level(utility), utility["per_round"], since),
        "accuracy": known(accuracy["per_round"])
        and charts.utility_chart("accuracy", "Accuracy", level(accuracy), accuracy["per_round"], since),
        "clients": charts.clients_chart("clients", summary["clients"]["asked"], summary["clients"]["answered"]),
        "modes": {
            str(m): charts.mode_chart(m, v["label"], v["per_round"], v["margin"], v["since_round"])
            for m, v in ((m, modes[m]) for m in Mode)
        },
        "influence": charts.influence_graph("influence", modes),
        "spread": known([r["mean"] for r in spread])
        and charts.spread_chart("spread", [r["mean"] for r in spread], [r["sd"] for r in spread]),
        "kept": guard
        and charts.share_chart("kept", "Kept their last good adapter", [r["kept"] for r in guard["per_round"]]),
        "left_behind": charts.share_chart("left", "Share of clients left behind", [r["left_behind"] for r in spread]),
    }


def _cohorts(clients: Mapping[str, Any]) -> str:
    """Who answers and who only trains in a round."""

    def each(counts: Sequence[int]) -> str:
        known = sorted({*counts} - {0}) or [0]
        return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"

    asked = each(clients["asked"])
    said = f"{'all' if asked in ('0', str(clients['population'])) else asked} in each round"
    return said + (f", and {each(clients['also_trained'])} who only train" if any(clients["also_trained"]) else "")


def _misses(clients: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What did not come through, if anything."""
    refused, closed = clients["refused"], clients["not_opened"]
    rows = []
    if refused:
        rows.append(("Refused", ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in refused.items())))
    if closed:
        rows.append(("Rounds not opened", "; ".join(f"{round}: {why}" for round, why in closed.items())))
    return rows


def _facts(summary: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The study in a few rows; the whole of it is folded up below them."""
    study, clients, guard = summary["study"], summary["clients"], summary["guard"]
    model, personalize = study["model"], study["personalize"]
    plants = [
        f"{_name(summary, Mode(p['mode'])).lower()}, strength {p['strength']:g}" for p in study["clients"]["plants"]
    ]
    rows = [
        ("Base model", f"{model['source']} ({'language model' if model['task'] == 'causal' else 'classifier'})"),
        ("Adapter", f"LoRA, rank {model['lora']['r']}, on {_say(model['lora']['targets'])}"),
        ("Clients", f"{clients['population']}, {_cohorts(clients)}"),
        ("Data", _say(study["clients"]["source"])),
        ("Planted failures", "; ".join(plants) or "none"),
        (
            "Method",
            f"{personalize['method']}, {personalize['epochs']} epoch{'s' * (personalize['epochs'] > 1)} a round",
        ),
        ("Rounds", f"{summary['rounds']} of {summary['rounds_planned']}"),
        *_misses(summary["clients"]),
        ("Seed", str(study["seed"])),
        ("Privacy", f"trust {study['privacy']['trust']}"),
        ("On an alarm", ON_ALARM[study["policy"]["on_alarm"]]),
        *([("Adopted", actions.where(summary))] if summary["adopted"] else []),
        *((f"Re-baseline after round {one['round']}", one["reason"]) for one in summary["rebaselines"]["made"]),
        *([("Guarded modes", ", ".join(_name(summary, Mode(m)).lower() for m in guard["modes"]))] if guard else []),
    ]
    return [(name, short(value)) for name, value in rows]
