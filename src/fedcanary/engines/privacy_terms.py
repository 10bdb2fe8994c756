"""What a study's privacy table means for a round: layout, noise, reach, training, clips. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from fedcanary.engines import guard
from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput
from fedcanary.personalize import METHODS
from fedcanary.personalize.private_fit import RecordLevel
from fedcanary.privacy import accounting, seal
from fedcanary.privacy.accounting import Mechanism, Neighbours
from fedcanary.privacy.encode import Encoding
from fedcanary.privacy.seal import Terms
from fedcanary.probes import OwnProbe, Probe, slices
from fedcanary.study import Study
from fedcanary.types import Coord, Release

CLIPPING: Final = "clipping"  # where clients say whether their update's norm was within the round's clip
# Zero in the middle: a client's word, as likely one as the other, uses little of its message's norm.
WITHIN: Final = Coord(
    name="within", low=0.0, high=1.0, purpose="1 if the update's norm is within the clip", scale=1.5, zero=0.5
)
ETA: Final = 0.2  # how fast the clip follows its quantile; the paper's


def neighbours(study: Study) -> Neighbours:
    """What the study's epsilon hides. A locally noised message must hide any value behind any other."""
    return "substituted" if study.privacy.trust == "local" else study.privacy.neighbours


def layout(setup: Setup) -> dict[str, tuple[Coord, ...]]:
    """Every number that may leave a client, by probe: its modes', its guard's, its slices', its update's norm."""
    updates = setup.study.privacy.updates
    clips = updates is not None and updates.quantile is not None
    guards = {guard.GUARD: (guard.KEPT, guard.AVOIDED)} if setup.study.guard is not None else {}
    drills = {slices.SLICES: slices.coords(setup.slices)} if setup.slices else {}
    return setup.layout | guards | drills | ({CLIPPING: (WITHIN,)} if clips else {})


def versions(setup: Setup) -> dict[str, str]:
    """Version of each name in the layout."""
    own = {CLIPPING: "1", guard.GUARD: guard.VERSION, slices.SLICES: slices.VERSION}
    return own | {probe.name: probe.version for probe in setup.probes}


def next_clip(clip: float, quantile: float, within: Release | None) -> float:
    """The bound after a round in which this share of the clients was within it.

    The geometric update of Andrew et al. 2021 (arXiv 1905.03871, section 2.1), of a share that noise cannot carry
    outside [0, 1]. A round without a release changes nothing.
    """
    if within is None or not within.answered() >= 1:
        return clip
    share = min(max(within.mean_answered(WITHIN.name), 0.0), 1.0)
    return clip * math.exp(-ETA * (share - quantile))


def exact(probes: Iterable[Probe]) -> tuple[str, ...]:
    """Names in the layout that are post-processing of the trained adapter, for the unit `example`."""
    return (*(probe.name for probe in probes if not probe.own), guard.GUARD, CLIPPING)


def training(study: Study) -> RecordLevel | None:
    """How clients train on their examples, where these are the unit."""
    record = study.privacy.record
    if study.privacy.unit != "example" or record is None:
        return None
    return RecordLevel(
        max_grad_norm=record.clip,
        noise_multiplier=record.noise,
        sample_rate=record.sample_rate,
        steps=max(round(study.personalize.epochs / record.sample_rate), 1),
    )


def training_mechanism(study: Study) -> Mechanism | None:
    """What a round's training does to an example; a method that trains twice in a round pays twice."""
    record = training(study)
    if record is None:
        return None
    return Mechanism(
        kind="poisson_gaussian",
        noise_multiplier=record.noise_multiplier,
        sample_rate=record.sample_rate,
        count=record.steps * METHODS[study.personalize.method].fits,
    )


def reach(study: Study, probes: Sequence[Probe]) -> float:
    """How far what epsilon hides moves a client's bounded message, in units of its norm cap (see encode.py)."""
    record = study.privacy.record
    if study.privacy.unit != "example" or record is None:
        return 1.0
    own = [probe for probe in probes if isinstance(probe, OwnProbe)]
    encoding = Encoding({probe.name: probe.coords for probe in own})
    # Unless told which probes there are, any message for any other.
    far = encoding.reach(record.min_held_out, {probe.name: probe.reach for probe in own}) if own else 2.0
    # two messages are at most 2 apart, and `substituted` neighbours are charged for twice this
    return min(far, 1.0 if neighbours(study) == "substituted" else 2.0)


def check_training(study: Study) -> None:
    """Raise BadInput unless the window's training fits epsilon; say how much noise would."""
    privacy, mechanism = study.privacy, training_mechanism(study)
    if mechanism is None:
        return
    steps = mechanism.count * (1 if privacy.rotates else study.rounds)

    def cost(noise: float) -> float:
        if mechanism.sample_rate * math.sqrt(steps) / noise > 10:  # far beyond any epsilon a study may ask for
            return math.inf
        return accounting.dpsgd_epsilon(
            noise, mechanism.sample_rate, steps, privacy.delta, neighbours=neighbours(study)
        )

    spent = cost(mechanism.noise_multiplier)
    if spent <= privacy.epsilon:
        return
    low, high = mechanism.noise_multiplier, 2 * mechanism.noise_multiplier
    while cost(high) > privacy.epsilon:
        low, high = high, 2 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > privacy.epsilon else (low, middle)
    costs = f"epsilon {spent:.3g}" if math.isfinite(spent) else "far more than epsilon 50"
    raise BadInput.of(
        "privacy.record.noise",
        f"{mechanism.noise_multiplier:g} in {steps} steps at sample_rate {mechanism.sample_rate:g} costs {costs}, and "
        f"the window has {privacy.epsilon:g}",
        f"give {math.ceil(high * 1e3) / 1e3:g} or more, fewer epochs or rounds, or a larger epsilon",
    )


def readings_noise(study: Study, reach: float = 1.0) -> float:
    """Noise multiplier of a round's readings, such that everything a unit pays for in the window fits epsilon.

    Gaussians of multipliers z_i cost together what one of 1/z^2 = sum 1/z_i^2 costs. Examples that are trained on are
    not held out, so training and readings do not add up: each must fit.

    Raises:
        BadInput: noised updates alone cost more than the whole budget.
    """
    privacy = study.privacy
    times = study.rounds if privacy.panel == "same" else 1
    norm = accounting.sensitivity(reach, neighbours(study))
    whole = accounting.gaussian_std(privacy.epsilon, privacy.delta, norm)
    updates = privacy.updates.noise if privacy.updates is not None else "none"
    left = 1 / whole**2 / times - (0.0 if updates == "none" else 1 / updates**2)
    if left <= 0:
        least = whole * math.sqrt(times)
        raise BadInput.of(
            "privacy.updates.noise",
            f"{updates} spends more than the whole epsilon of {privacy.epsilon:g}",
            f"give more than {least:.3g}, or a larger epsilon",
        )
    return math.sqrt(1 / left) * (1 + 1e-9)


def terms(study: Study, cohort: int, probes: Sequence[Probe] = (), clip: float | None = None) -> Terms:
    """How a round of so many clients is protected; `clip` is the round's own bound on updates, if it adapts."""
    privacy = study.privacy
    if privacy.trust == "none":
        return Terms(trust="none")
    updates, far, trains = privacy.updates, reach(study, probes), training_mechanism(study)
    first = math.inf if updates is None or updates.clip is None else updates.clip
    return Terms(
        trust=privacy.trust,
        noise_multiplier=readings_noise(study, far),
        delta=privacy.delta,
        neighbours=neighbours(study),
        floor=floor(study, cohort),
        dropouts=privacy.dropouts,
        update_clip=first if clip is None else clip,
        update_noise=0.0 if updates is None or updates.noise == "none" else updates.noise,
        simulated=study.seed if privacy.noise == "simulated" else None,
        training=trains,
        exact=() if trains is None else exact(probes),
        reach=far,
    )


def floor(study: Study, cohort: int) -> int:
    """See `seal.floor`."""
    return seal.floor(study.privacy.min_cohort, study.privacy.dropouts, cohort)


def panel_size(study: Study, clients: int) -> int:
    """How many clients a round asks, if they are there."""
    if study.privacy.rotates:
        return study.clients.per_round or max(clients // study.rounds, 1)
    return min(study.clients.per_round or clients, clients)


def check(setup: Setup) -> None:
    """Raise BadInput where a study's privacy cannot be had: before anything is written."""
    study, privacy = setup.study, setup.study.privacy
    if privacy.trust == "none":
        return
    clients = len(setup.population)
    size = panel_size(study, clients)
    if size < privacy.min_cohort:
        raise BadInput.of(
            "privacy.min_cohort",
            f"{clients} clients in {study.rounds} {privacy.panel} panels are {size} in a round, and no sum over fewer "
            f"than {privacy.min_cohort} is opened",
            'take more clients, fewer rounds, or privacy.panel = "same" (see `fedcanary plan`)',
        )
    readings_noise(study)  # raises where the budget cannot hold the updates
    check_training(study)
