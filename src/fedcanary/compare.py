"""One base model against one adapter, on this machine: what else did that adapter change?

    1  check everything that was given, and say all that is wrong with it at once
    2  ask the base every item of every suite, then the same items with the adapter attached through peft
    3  read the modes: how much worse, with an interval over items, against margins fixed beforehand  (compare_read)

Mode 3 is about many clients and stays `unknown` here; mode 4 takes the adapter's whole training as one round. A
second reading of safety, from generated replies, can be asked for; it never changes a verdict.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from fedcanary.compare_read import Asked, ModeReading, Rules, read_modes
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.models import base as models
from fedcanary.models import stacked
from fedcanary.models.adapters import Lora
from fedcanary.models.base import BaseModel, Task
from fedcanary.models.generate import replies as generate_replies
from fedcanary.probes import refusal
from fedcanary.probes import suites as library
from fedcanary.probes.base import Answers
from fedcanary.probes.bootstrap import units_of
from fedcanary.record import plain
from fedcanary.study import MarginTable
from fedcanary.types import Array, Item, Mode, Role, Suite

SCHEMA: Final = 1
TASK_TYPES: Final = {"causal": ("CAUSAL_LM", None), "classify": ("SEQ_CLS", None)}
UNREADABLE: Final = frozenset(  # these act on a model's inputs, in peft's own forward pass, which scoring does not use
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT", "XLORA", "POLY")
)
NO_LORA: Final = Lora(
    r=1, alpha=1.0, targets=(), heads=(), head_modules=(), names=(), layers=None, fan_in_fan_out=False
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Share of a stereotype suite's items whose first sentence is the likelier, strictly: `pct_stereotype`."""

    suite: str
    items: int
    base: float
    adapted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """Refusals among greedy replies, to the unsafe prompts or to their safe look-alikes. Second reading."""

    prompts: Literal["unsafe", "safe"]
    base: refusal.Matched
    adapted: refusal.Matched | None
    corrected_base: refusal.Corrected | None
    corrected_adapted: refusal.Corrected | None
    calibration: str  # where the matcher's errors were measured; "uncorrected" if no calibration was named


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything `compare` found. `as_dict` is the JSON document."""

    base: dict[str, Any]
    adapter: dict[str, Any] | None
    level: float
    alpha: float
    power: float
    seed: int
    own_domains: tuple[str, ...]
    suites: tuple[dict[str, Any], ...]
    modes: tuple[ModeReading, ...]
    pct_stereotype: tuple[Preference, ...]
    refusals: tuple[Refusals, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Mode, ...]:
        """The modes whose verdict is `worse`."""
        return tuple(reading.mode for reading in self.modes if reading.verdict == "worse")

    @property
    def any_worse(self) -> bool:
        """Whether there is an alarm, for the exit code."""
        return bool(self.worse)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, modes by name; a number that is not known is null."""
        content: dict[str, Any] = plain({"schema": SCHEMA, **asdict(self)})
        content["modes"] = {str(reading["mode"]): reading for reading in content["modes"]}
        for reading in self.modes:
            headline = reading.headline
            content["modes"][str(reading.mode)]["headline"] = None if headline is None else headline.name
        return content


def compare(
    base_source: str,
    adapter: Path | None,
    suites: Sequence[Suite],
    *,
    task: Task = "causal",
    revision: str | None = None,
    labels: tuple[str, ...] = (),
    level: float = 0.95,
    alpha: float = 0.05,
    power: float = 0.8,
    margins: MarginTable | None = None,
    own_domains: Collection[str] = (),
    generate: bool = False,
    calibration: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Read the six modes of one adapter against its base, or the base's own values if there is no adapter.

    Args:
        base_source: as `models.base.load` takes it.
        adapter: a folder in peft's format.
        suites: whatever is to be asked; a mode without a suite of its roles is unknown.
        task: `causal` or `classify`.
        revision: of a hub model.
        labels: of a classifier.
        level: joint confidence of all five verdicts.
        alpha: joint error rate at which a part's `detectable` is computed.
        power: its chance of finding such a change.
        margins: how much worse is too much; a study's defaults when None.
        own_domains: the domains the adapter was made for; mode 5 leaves their items out.
        generate: also let both models reply to the safety prompts and count refusals.
        calibration: one of `refusal.CALIBRATIONS`, to correct those counts; None leaves them uncorrected.
        seed: of the bootstrap.

    Raises:
        BadInput: every problem of base, adapter, suites and options together.
    """
    problems = _bad_options(suites, level, alpha, power, own_domains, calibration)
    config = _try(problems, lambda: None if adapter is None else _adapter_config(adapter, task))
    base = _try(problems, lambda: models.load(base_source, task=task, revision=revision, labels=labels))
    if problems or base is None:
        raise BadInput(problems)
    about = {"source": base_source, "revision": revision, "task": task, "digest": base.digest}
    notes = _notes(base, config, suites)
    nothing = "no adapter was given: these are the base's own values" if adapter is None else ""
    if task == "classify" and _head_is_new(base):
        nothing = nothing or "the base's classifier head is untrained, so its own answers are no standard"
    prompts = [item for suite in suites if suite.role == Role.SAFETY for item in suite.items] if generate else []
    if prompts and task == "classify":
        notes.append("a classifier does not reply: no refusals were read from replies")
        prompts = []

    items = tuple(item for suite in suites for item in suite.items)
    rows = base.rows(items)
    (before,) = stacked.score(base, NO_LORA, [], [rows])
    replies = generate_replies(base, prompts)
    after = before
    if adapter is not None:  # peft changes the base's module: nothing below may ask the base again
        adapted = _attach(base, adapter, notes)
        (after,) = stacked.score(adapted, NO_LORA, [], [rows])
        replies += generate_replies(adapted, prompts)

    first, second = before.choice_probability(), after.choice_probability()
    asked = Asked(
        answers=Answers(items=items, base=first, received=first, personalized=second),
        roles=tuple(suite.role for suite in suites for _ in suite.items),
        suites=tuple(suite.name for suite in suites for _ in suite.items),
        units=units_of([(at, item.pair) for at, suite in enumerate(suites) for item in suite.items]),
        nothing=nothing,
    )
    rules = Rules(
        margins=(margins or MarginTable()).model_dump(),
        level=level,
        alpha=alpha,
        power=power,
        seed=seed,
        own_domains=frozenset(own_domains),
    )
    return Comparison(
        base=about,
        adapter=None if adapter is None else {"folder": str(adapter), "digest": _file_digest(adapter), **config},
        level=level,
        alpha=alpha,
        power=power,
        seed=seed,
        own_domains=tuple(sorted(own_domains)),
        suites=tuple(
            {"name": s.name, "version": s.version, "role": str(s.role), "items": len(s.items), "digest": s.digest}
            for s in suites
        ),
        modes=read_modes(asked, rules),
        pct_stereotype=_preferences(suites, [before.logp] if adapter is None else [before.logp, after.logp]),
        refusals=_refusals(prompts, replies, calibration),
        notes=tuple(notes),
    )


def load_suites(given: Sequence[str]) -> tuple[Suite, ...]:
    """The suites a command line names: NAME, FILE, or FILE:ROLE for a file that does not say what it is for.

    Without any, the packaged suites of the bundled world.

    Raises:
        BadInput: every problem of every suite.
    """
    problems: list[Problem] = []
    found: list[Suite] = []
    for text in given or tuple(library.packaged()):
        name, _, role = text.rpartition(":")
        given_role = not Path(text).exists() and (Path(name).is_file() or name in library.packaged())
        source, wanted = (name, role) if given_role else (text, None)
        suite = _try(problems, partial(library.load, source, wanted))
        found += [] if suite is None else [suite]
    if problems:
        raise BadInput(problems)
    return tuple(found)


# ---------------------------------------------------------------------------------------------- what was given


def _try(problems: list[Problem], make: Callable[..., Any]) -> Any:
    try:
        return make()
    except BadInput as error:
        problems += error.problems
        return None


def _bad_options(
    given: Sequence[Suite],
    level: float,
    alpha: float,
    power: float,
    own_domains: Collection[str],
    calibration: str | None,
) -> list[Problem]:
    problems = []
    for name, value in (("level", level), ("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            problems.append(Problem(name, f"is {value}", "choose a number between 0 and 1, both excluded"))
    if not any(suite.items for suite in given):
        problems.append(Problem("suites", "there is nothing to ask", "name at least one suite that has items"))
    seen: set[tuple[str, str]] = set()
    for suite in given:
        key = (suite.role, library.digest(suite.items))
        if key in seen:
            what = f"the items of {suite.name!r} are given twice as {suite.role}, and would count twice"
            problems.append(Problem("suites", what, "name it once"))
        seen.add(key)
    known = {item.domain for suite in given if suite.role == Role.DOMAIN for item in suite.items if item.domain}
    for domain in sorted(set(own_domains) - known):
        remedy = did_you_mean(domain, known) if known else "name a suite with the role domain, or no own domains"
        problems.append(Problem("own domains", f"no item has the domain {domain!r}", remedy))
    if calibration is not None and calibration not in refusal.CALIBRATIONS:
        remedy = did_you_mean(calibration, refusal.CALIBRATIONS)
        problems.append(Problem("calibration", f"unknown calibration {calibration!r}", remedy))
    return problems


def _adapter_config(folder: Path, task: Task) -> dict[str, Any]:
    """What `adapter_config.json` says of the adapter, after all checks that need no base."""
    where = f"adapter {str(folder)!r}"
    if not folder.is_dir():
        raise BadInput.of(where, "no such folder", "name a folder that holds adapter_config.json and its weights")
    remedy = "name the folder that peft's save_pretrained wrote"
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if inside and not (folder / "adapter_config.json").exists():
        remedy = f"name the folder inside it, one of: {', '.join(inside)}"
    problems = []
    content: Any = {}
    if not (folder / "adapter_config.json").is_file():
        problems.append(Problem(where, "the folder has no adapter_config.json", remedy))
    else:
        try:
            content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            kind = content["peft_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"adapter_config.json cannot be read ({type(error).__name__}: {error})"
            problems.append(Problem(where, what, "save the adapter again with peft"))
        else:
            task_type = content.get("task_type")
            if kind in UNREADABLE or content.get("alora_invocation_tokens"):
                what = f"adapters of the kind {kind} act on the inputs, which scoring here does not pass through"
                problems.append(Problem(where, what, "compare an adapter that changes weights, such as LoRA"))
            if task_type not in TASK_TYPES[task]:
                other = "classify" if task_type == "SEQ_CLS" else "causal"
                what = f"it was made for {task_type}, and the base is read as a {task} model"
                can = any(task_type in types for types in TASK_TYPES.values())
                mend = f"read the base as a {other} model" if can else "compare a CAUSAL_LM or SEQ_CLS adapter"
                problems.append(Problem(where, what, mend))
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        problems.append(Problem(where, "the folder has no adapter_model.safetensors", remedy))
    if problems:
        raise BadInput(problems)
    return {"kind": content["peft_type"], "made_for": content.get("base_model_name_or_path")}


def _attach(base: BaseModel, folder: Path, notes: list[str]) -> BaseModel:
    """The base with the adapter attached, asked through the same token rows. The base's own module is changed."""
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    where = f"adapter {str(folder)!r}"
    remedy = "name the base that the adapter was made for, or save the adapter again"
    lacking, homeless = (
        "weights that this base needs are not in the file",
        "weights in the file fit nowhere in this base",
    )
    try:
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(base.model, str(folder), torch_device="cpu")
            # Once more by hand: only then does peft say which weights of the file it had no place for.
            disagree = set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
    except KeyError as error:
        raise BadInput.of(where, f"{lacking} (first {error})", remedy) from error
    except Exception as error:  # peft, torch and safetensors each raise their own
        raise BadInput.of(where, f"does not fit the base ({_short(error)})", remedy) from error
    told = [str(w.message) for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)]
    problems = [Problem(where, f"{lacking} ({t[:160]})", remedy) for t in told if "missing adapter keys" in t]
    if disagree.unexpected_keys:
        first = f"{len(disagree.unexpected_keys)} of them, first {disagree.unexpected_keys[0]!r}"
        problems.append(Problem(where, f"{homeless} ({first})", remedy))
    if problems:
        raise BadInput(problems)
    notes += [f"peft: {text}" for text in dict.fromkeys(told)]
    module = wrapped.get_base_model().eval().requires_grad_(False)
    return replace(base, model=module)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}"


def _file_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _head_is_new(base: BaseModel) -> bool:
    """Whether a local classifier's folder has no weights for its head, which was then created at random."""
    from safetensors import safe_open

    heads = tuple(f"{name}." for name in ("classifier", "score") if hasattr(base.model, name))
    names: list[str] = []
    for path in sorted(Path(base.source).expanduser().glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return bool(names) and bool(heads) and not any(name.startswith(heads) for name in names)


def _notes(base: BaseModel, config: dict[str, Any] | None, given: Sequence[Suite]) -> list[str]:
    notes = []
    made_for = (config or {}).get("made_for")
    if made_for and Path(str(made_for)).name != Path(base.source).name:
        notes.append(f"the adapter says it was made for {made_for!r}; it is read on {base.source!r}")
    packaged = [suite.name for suite in given if suite.name in library.packaged()]
    if packaged and base.source != models.BUNDLED:
        notes.append(
            f"{', '.join(packaged)}: about the world of the bundled model; another model should be asked suites "
            "about its own use"
        )
    return notes


# ---------------------------------------------------------------------------------------------- what the models say


def _preferences(suites: Sequence[Suite], tables: Sequence[Array]) -> tuple[Preference, ...]:
    """From the base's and, if there is an adapter, the adapted model's log-likelihoods, each (n, C)."""
    found, at = [], 0
    for suite in suites:
        own = [table[at : at + len(suite.items)] for table in tables]
        at += len(suite.items)
        if suite.role != Role.STEREOTYPE:
            continue
        known = ~np.any([np.isnan(table).any(axis=1) for table in own], axis=0)
        shares = [float(np.mean(t[known, 0] > t[known, 1])) if known.any() else float("nan") for t in own]
        adapted = shares[1] if len(shares) > 1 else float("nan")
        found.append(Preference(suite=suite.name, items=int(known.sum()), base=shares[0], adapted=adapted))
    return tuple(found)


def _refusals(
    prompts: Sequence[Item], replies: Sequence[Sequence[str]], calibration: str | None
) -> tuple[Refusals, ...]:
    """Refusals to the unsafe (whose right answer is the first choice) and to their safe look-alikes, apart."""
    quality = None if calibration is None else refusal.CALIBRATIONS[calibration]
    found = []
    kinds: tuple[tuple[Literal["unsafe", "safe"], int], ...] = (("unsafe", 0), ("safe", 1))
    for kind, answer in kinds:
        own = [i for i, item in enumerate(prompts) if item.answer == answer]
        if not own:
            continue
        matched = [refusal.match(said[i] for i in own) for said in replies]
        corrected = [None if quality is None else refusal.correct(m, quality) for m in matched]
        found.append(
            Refusals(
                prompts=kind,
                base=matched[0],
                adapted=matched[1] if len(matched) > 1 else None,
                corrected_base=corrected[0],
                corrected_adapted=corrected[1] if len(corrected) > 1 else None,
                calibration="uncorrected" if quality is None else quality.source,
            )
        )
    return tuple(found)
