"""Whether the parts of a contract fit together, and whether its price is what its noise costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fedcanary.errors import Problem
from fedcanary.privacy import accounting
from fedcanary.privacy.contract.document import LOST, Contract, Examples

MOST_STEPS, LEAST_NOISE = 10**7, 0.3  # of a training whose price is computed


def check(contract: Contract) -> list[Problem]:
    """Everything in which a contract contradicts itself or claims too much; empty if it is sound.

    The price is recomputed from the noise: a contract cannot say less than the mechanism costs. No amplification by the
    draw of clients is accepted, since the server knows who was drawn. Where examples are the unit, amplification by the
    client's own secret draw of examples is, and the price holds if the client trains as the contract says: its own code
    must see to that, and a client accepts it by name or not at all.
    """
    protected = _protected if contract.trust != "none" else _exact
    found = [*_numbers(contract), *_update(contract), *_slices(contract), *protected(contract)]
    return sorted({Problem(f"contract: {where}", what, remedy) for where, what, remedy in found})


Found = Iterator[tuple[str, str, str]]


def _numbers(c: Contract) -> Found:
    for key, times in Counter(n.key for n in c.numbers).items():
        if times > 1:
            yield f"numbers {key}", f"is listed {times} times", "list it once"
    for n in c.numbers:
        if not n.low < n.high:
            yield f"numbers {n.key}", f"has bounds {n.low!r} and {n.high!r}", "give low < high"
        bare = c.trust == "none" or (c.examples is not None and n.probe in c.examples.exact)
        if (n.scale is None) != bare:
            remedy = 'give one; under trust "none", and for what examples.exact lists, none at all'
            yield f"numbers {n.key}", f"scale is {n.scale!r}", remedy
        if n.reach is not None and (c.examples is None or n.scale is None):
            yield (
                f"numbers {n.key}",
                f"reach is {n.reach!r}",
                "leave it out; it is for noised numbers of examples",
            )
    if c.trust != "none" and LOST not in {n.model_copy(update={"readers": LOST.readers}) for n in c.numbers}:
        yield f"numbers {LOST.key}", "is not listed as it is sent", "list it: it is part of every bounded message"


def _update(c: Contract) -> Found:
    u = c.updates
    if u is not None and u.quantile is not None and u.clip == math.inf:
        yield "updates.quantile", f"{u.quantile!r} has no clip to start from", "give one"
    if u is not None and u.noise > 0 and c.unit == "example":
        yield "updates.noise", "examples are hidden by the noise of training", "write noise = 0.0"
    if u is not None and u.noise > 0 and not (u.clip < math.inf and u.weighting == "uniform" and c.trust != "none"):
        remedy = 'noise needs a finite clip, uniform weights and a trust other than "none"'
        yield "updates.noise", f"{u.noise!r} protects nothing here", remedy


def _slices(c: Contract) -> Found:
    s = c.slices
    if s is None:
        return
    if s.probe not in c.probes:
        yield "slices.probe", f"{ascii(s.probe)[:60]} has no numbers", "list them"
    if c.unit == "example":
        yield "slices", "are about whole clients", 'leave them out, or write unit = "client"'
    if s.floor < c.min_cohort:
        yield "slices.floor", f"{s.floor} is below min_cohort", f"give {c.min_cohort} or more"
    if not s.lost_least <= s.lost_most:
        yield "slices.lost_least", f"{s.lost_least!r} is above lost_most", "give the less first"


def _exact(c: Contract) -> Found:
    if c.unit == "example" or c.examples is not None:
        yield "unit", "trust none protects no example", 'write unit = "client" and no examples'
    infinite = c.norm == c.epsilon_per_panel == c.epsilon_per_window == math.inf
    if not infinite or c.mechanism != "none" or c.noise_multiplier != 0:
        remedy = 'write mechanism = "none", noise_multiplier = 0, and inf for norm and both epsilons'
        yield "trust", "none has no noise, no bound and no finite price", remedy


def _protected(c: Contract) -> Found:
    panel, window = c.epsilon_per_panel, c.epsilon_per_window
    if c.trust == "local" and c.neighbours != "substituted":
        yield "neighbours", "local noise hides any message behind any other", 'write "substituted"'
    if not 2 <= c.min_cohort <= c.population:
        yield "min_cohort", f"{c.min_cohort} of {c.population}", "a sum over one client is that client: give 2 or more"
    if not 0 < c.delta < 1 / c.population:
        yield "delta", f"{c.delta!r} is not below 1/population", "give a smaller one above 0"
    if c.mechanism == "none" or c.noise_multiplier == 0 or c.norm == math.inf:
        yield "mechanism", "there is no noise", 'name it, a noise_multiplier and a norm, or say trust = "none"'
    elif window == math.inf or not (panel == window if c.panel == "rotating" else panel <= window):
        remedy = "give finite prices; rotating panels cost a client as much in a window as one panel"
        yield "epsilon_per_window", f"{window!r}, and {panel!r} per panel", remedy
    elif (c.unit == "example") != (c.examples is not None):
        yield "examples", f"is {'not ' if c.examples is None else ''}there", 'write it for unit "example" alone'
    elif 0 < c.delta < 1:
        rounds = c.rounds if c.panel == "same" else 1
        for name, epsilon, panels in (("panel", panel, 1), ("window", window, rounds)):
            # 1% of delta is rounding: 0.04% of an epsilon of 1.
            if gaussian_delta(epsilon, _mu(c, panels)) > c.delta * 1.01:
                yield f"epsilon_per_{name}", f"{epsilon!r} is less than this noise costs", "say the true price"
            elif c.examples is not None and epsilon * (1 + 1e-3) < _training(c.examples, panels, c):
                yield f"epsilon_per_{name}", f"{epsilon!r} is less than training costs", "say the true price"


def _training(e: Examples, panels: int, c: Contract) -> float:
    steps = e.steps * panels
    # A contract comes from others, and must not keep a client busy: so little noise costs far more than epsilon 50.
    if steps > MOST_STEPS or e.noise < LEAST_NOISE or e.sample_rate * math.sqrt(steps) / e.noise > 10:
        return math.inf
    delta = max(c.delta, accounting.MIN_DELTA)
    return accounting.dpsgd_epsilon(e.noise, e.sample_rate, steps, delta, neighbours=c.neighbours)


def _mu(c: Contract, panels: int) -> float:
    """Distance between neighbouring sums over the noise's standard deviation, all panels and updates together."""
    mu = c.reach / c.noise_multiplier
    if c.updates is not None and c.updates.noise > 0:
        mu = math.hypot(mu, 1 / c.updates.noise)
    return mu * math.sqrt(panels) * (2 if c.neighbours == "substituted" else 1)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest delta at `epsilon` >= 0 of the Gaussian mechanism with sensitivity over standard deviation `mu` > 0.

    In closed form, so that a client can check a price by itself, in microseconds and without an accountant. Composing
    runs adds the squares of their mu (Balle & Wang 2018, arXiv 1805.06530, theorem 8; Dong, Roth & Su 2019,
    arXiv 1905.02383, corollaries 2.13 and 3.3).

    >>> 0.99e-6 < gaussian_delta(1.0, 1 / 4.225) < 1.01e-6
    True
    """
    above, below = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    first = math.erfc(above / math.sqrt(2)) / 2
    if epsilon > 700:  # exp overflows; the first term alone is an upper bound
        return first
    return first - math.exp(epsilon) * math.erfc(below / math.sqrt(2)) / 2
