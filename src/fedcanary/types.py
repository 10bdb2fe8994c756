"""The values that pass between stages. Behaviour lives in the stages; here are only nouns.

Notation used throughout the package
    theta_0     the base model
    theta_t     what a client holds at the start of round t (shared part from the server, private part its own)
    theta_k,t   the same client's model after its local training in round t
    n, C        items of a suite, choices of an item
    K           coordinates of a probe
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Mode(StrEnum):
    """The six silent-failure modes (Oh & Bui, arXiv 2606.00947), in the order every table uses."""

    AMPLIFIED_BIAS = "amplified_bias"
    CONFIDENCE_MISCALIBRATION = "confidence_miscalibration"
    FAIRNESS_COLLAPSE = "fairness_collapse"
    ADAPTATION_MISALIGNMENT = "adaptation_misalignment"
    OUT_OF_DOMAIN_DEGRADATION = "out_of_domain_degradation"
    ALIGNMENT_EROSION = "alignment_erosion"


class Role(StrEnum):
    """What a suite is for. Probes ask for suites by role, so a user's own can take a packaged one's place."""

    BIAS = "bias"  # items with a group; the same question asked about different groups
    STEREOTYPE = "stereotype"  # two sentences, choice 0 the stereotyped one; no right answer
    CALIBRATION = "calibration"  # items of the task, drawn as they will be met after deployment
    GENERAL = "general"  # capability that personalization must not cost
    SAFETY = "safety"  # the answer is the safe behaviour (refuse the unsafe, answer the look-alike)
    PERSONA = "persona"  # the answer is the reply in the persona
    DOMAIN = "domain"  # items of every domain; a client's own domains are left out when it is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: the currency of local data and public suites alike.

    A causal language model continues `prompt` with each of `choices`; a classifier reads `prompt` and scores the
    labels, which are then the choices. Free text has a single choice (the text) and `answer=0`: it is scored by its
    likelihood per token. The training target of an item is `choices[answer]`.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | None = None
    group: str | None = None
    domain: str | None = None
    pair: str | None = None  # items that share a pair differ only in their group
    positive: int | None = None  # which choice counts as the favourable outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A versioned list of items with one role. `digest` identifies its content."""

    name: str
    version: str
    role: Role
    items: tuple[Item, ...]
    source: str = ""
    licence: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one model said to n items: summed log-likelihood of each choice, and how many tokens that choice has.

    `logp` is (n, C), padded with -inf where an item has fewer choices; an item that could not be scored is a row of
    NaN. `tokens` is (n, C), at least 1.
    """

    logp: Array
    tokens: Array

    def choice_probability(self) -> Array:
        """(n, C) probabilities normalised over an item's choices; a single choice keeps its per-token likelihood."""
        logp = self.logp
        if logp.shape[1] == 1:
            return np.asarray(np.exp(logp / self.tokens))
        with np.errstate(invalid="ignore"):
            shifted = np.exp(logp - np.max(logp, axis=1, keepdims=True))
            probability = shifted / shifted.sum(axis=1, keepdims=True)
        alone = np.isfinite(logp).sum(axis=1) == 1
        probability[alone] = np.exp(logp[alone] / self.tokens[alone])
        return np.asarray(probability)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coord:
    """One number that may leave a client: its name, its bounds, and what it is for.

    Behind a private door, `scale` says how much of the message's bounded norm it may use: a value of `zero` uses none,
    one that differs from it by `scale` uses all. A coordinate without a scale is a detail and stays at the client.
    """

    name: str
    low: float
    high: float
    purpose: str
    scale: float | None = None
    zero: float = 0.0
    up: bool = False  # rounded up, because the tests rely on its not being too small


def missing_bit(name: str) -> str:
    """Name of the coordinate by which a client says that it could not say `name`."""
    return f"{name}_missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one client measured for one probe: K bounded values. Never leaves the client except inside a sum."""

    probe: str
    values: Array
    scored: int  # items that counted
    unscoreable: int  # items that could not be scored; counted, never read as safe


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A sum over a round's clients that has passed the door. Built only in `privacy/release.py`.

    `total` is (K,): sums of the clients' bounded values plus noise of standard deviation `noise_std` (K,); `count` is
    the number of clients in the sum. Where a bound on the whole message made clients shrink theirs by a factor f, the
    sums are of f times the values, and `lost` is the sum of 1 - f, with noise of standard deviation `lost_std`.
    """

    round: int
    probe: str
    coords: tuple[str, ...]
    total: Array
    count: float
    noise_std: Array
    sensitivity: float
    event: str
    charge_id: str
    lost: float = 0.0
    lost_std: float = 0.0

    def mean(self, coord: str) -> float:
        """Mean of one coordinate over the clients in the sum."""
        return float(self.total[self.coords.index(coord)] / self.count) if self.count > 0 else float("nan")

    def missing_coord(self, coord: str = "") -> str:
        """The coordinate that counts who could not say another one, or (without a name) anything; "" if none does."""
        return next((bit for bit in (missing_bit(coord), "missing") if bit in self.coords), "")

    def missing(self, coord: str = "") -> float:
        """How many clients could not say a coordinate; without a name, how many could say nothing of the probe."""
        bit = self.missing_coord(coord)
        return self.sum(bit) if bit else 0.0

    def answered(self, coord: str = "") -> float:
        """Clients in the sum that could say a coordinate; without a name, that had anything to say.

        Where messages were shrunk, a client counts as much as it was.
        """
        return self.count - self.lost - self.missing(coord)

    def mean_answered(self, coord: str) -> float:
        """Mean of one coordinate over the clients that could say it; NaN if there were none."""
        answered = self.answered(coord)
        return self.sum(coord) / answered if answered >= 0.5 else float("nan")

    def sum(self, coord: str) -> float:
        """Sum of one coordinate over the clients in the sum."""
        return float(self.total[self.coords.index(coord)])

    def noise(self, coord: str) -> float:
        """Standard deviation of the noise on that sum."""
        return float(self.noise_std[self.coords.index(coord)])


State = Literal["alarm", "clear", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a mode's tests say after a round. E-values: at least 1/alpha is evidence at level alpha, at any time."""

    mode: Mode
    state: State
    estimate: float
    interval: tuple[float, float]
    unit: str
    e_worse: float
    e_not_worse: float
    since_round: int | None = None
    why: str = ""
    part: str = ""  # the part of the mode that the estimate speaks of: its worst
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The policy's word on a round: each mode's state, whether the failure is silent, and what to do."""

    states: Mapping[Mode, State]
    silent: Mapping[Mode, bool]
    action: Literal["adopt", "hold", "roll_back"]
    reasons: Sequence[str] = ()
    adopted: int  # the round whose adapter is adopted now; 0 is the initial one
    clear_round: int | None = None  # of a roll back: the last clear round, whose evidence vouches for what is adopted
