"""The contract in words, for a reader at a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Final

from fedcanary.privacy.contract.document import Contract, Slices, Trust, Unit, Update

WIDTH: Final = 100
SEEN: Final[Mapping[Trust, str]] = {
    "secure_aggregation": "the server sees masked sums only; clients add the noise, in shares, before anything leaves",
    "central": "the server sees each client's own numbers, and adds the noise to their sum",
    "local": "the server sees each client's own numbers, with that client's noise already in them",
    "none": "NO PRIVACY: the server sees each client's own numbers without noise; epsilon is infinite",
}


def show(contract: Contract) -> str:
    """What leaves, for what, who reads it; then the noise, the price, when nothing is said, and what is kept."""
    c = contract
    lines = [f"Contract {c.digest}", c.title, "", f"{len(c.numbers)} numbers may leave a client:", ""]
    wide = max([len("number"), *(len(n.coord) for n in c.numbers)]) + 2
    lines.append(f"  {'number':<{wide}}{'from':>8} to {'':<8} {'scale':<8} what it is [who reads it]")
    for probe, version in sorted({(n.probe, n.version) for n in c.numbers}):
        lines.append(f"{probe} (version {version})")
        for n in c.numbers:
            if (n.probe, n.version) == (probe, version):
                scale = "" if n.scale is None else f"{n.scale:.4g}"
                head = f"  {n.coord:<{wide}}{n.low:>8.5g} to {n.high:<8.5g} {scale:<8} "
                lines += _wrap(head, f"{n.purpose} [read by {', '.join(n.readers)}]")
    lines.append("")
    for label, text in _facts(c).items():
        lines += _wrap(f"{label:<12}", text)
    return "\n".join(lines)


def _wrap(head: str, body: str) -> list[str]:
    return textwrap.wrap(body, max(WIDTH, len(head) + 40), initial_indent=head, subsequent_indent=" " * len(head))


def _facts(c: Contract) -> dict[str, str]:
    once = "a client answers in at most one of them" if c.panel == "rotating" else "a client may answer in all of them"
    noise = (
        f"{c.mechanism}, {c.noise_multiplier:g} times that norm; hides whether one {c.unit}'s part is {c.neighbours}"
    )
    if c.noise_source == "simulated" and c.trust != "none":
        noise += "; SIMULATED: it is drawn from the study's seed, and protects from nobody who knows that"
    price = (
        f"for each {c.unit}, at delta {c.delta:g}: epsilon {c.epsilon_per_panel:g} per panel, {c.epsilon_per_window:g} "
        f"per window of {c.rounds} rounds; {once}"
    )
    training = {}
    if c.examples is not None:
        e = c.examples
        price += "; the dearer of what training examples and held-out examples pay, as no example is both"
        noise += f"; one of {e.min_held_out} held-out examples moves a message by {c.reach:.3g} times that norm"
        training["training"] = (
            f"{e.steps} steps of DP-SGD in a round: an example joins with probability {e.sample_rate:g}, its gradient "
            f"is clipped to {e.clip:g}, noise {e.noise:g} times that; the update and {', '.join(e.exact)} are "
            f"post-processing of it and leave without further noise; the domains of a client are {e.domains}"
        )
    return {
        "together": f"L2 norm at most {c.norm:g} per client; the number of clients in a sum is public",
        "trust": f"{c.trust}: {SEEN[c.trust]}",
        "noise": noise,
        "price": price,
        **training,
        "update": describe(c.updates, c.unit) if c.updates else "none is sent",
        **({"drill-down": drill_down(c.slices)} if c.slices else {}),
        "silence": f"no sum over fewer than {c.min_cohort} of {c.population} clients is opened, nor one that lost more "
        f"than {c.dropouts:.0%} of those asked",
        "kept": c.retention,
        "items": "; ".join(c.suites) or "no public suite",
        "base model": c.model,
        "study": c.study,
    }


def drill_down(slices: Slices) -> str:
    """Drill-downs in words, with their cost."""
    n = slices.rounds
    rounds = "until the window ends" if n is None else f"for {n} round{'s' * (n > 1)} at most"
    return (
        f"the numbers of {slices.probe} are 0 unless a round's request asks about one number of a probe ({rounds} for "
        f"one alarm); then a client says that number once more under its own {', '.join(slices.attributes)}. It costs "
        f"no epsilon, but room: a message that is full without it loses {slices.lost_least:.1%} to "
        f"{slices.lost_most:.1%}. A slice of fewer than {slices.floor} clients (noisy count less 2 sd) is not reported"
    )


def describe(update: Update, unit: Unit) -> str:
    """The model update in words."""
    bare = "WITHOUT NOISE: no epsilon here covers it" if unit == "client" else "no noise but that of training"
    noise = f"noise {update.noise:g} times that" if update.noise else bare
    clip = f"clipped to {update.clip:g}" if math.isfinite(update.clip) else "NOT CLIPPED"
    if update.quantile is not None:
        clip += f" at first, then following the {update.quantile:g} quantile of the clients' norms"
    apart = "; asked for also in rounds in which the client says nothing else" if update.apart else ""
    return f"{update.dimension} numbers, {clip}, weights by {update.weighting}, {noise}{apart}"
