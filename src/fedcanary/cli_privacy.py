"""The commands that are about privacy before anything is spent: `contract` and `plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedcanary.errors import EXIT_OK, EXIT_REFUSED, BadInput

DEMONSTRATION = Path(__file__).with_name("demonstration.toml")
CONTRACT = "contract.toml"  # in a run's folder


def add(commands: Any) -> None:
    """The two commands and their options."""
    contract = commands.add_parser("contract", help="what may leave a client, and what it costs")
    verbs = contract.add_subparsers(dest="verb", required=True, metavar="show|check|diff")

    show = verbs.add_parser("show", help="a study's contract, in words or as the text that clients pin")
    show.add_argument("source", nargs="?", type=Path, metavar="STUDY.toml|CONTRACT.toml|DIR")
    show.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")
    show.add_argument("--toml", action="store_true", help="the canonical text, whose digest clients pin")
    show.add_argument("--json", action="store_true", help="print one JSON document")
    show.set_defaults(action=_show)

    check = verbs.add_parser("check", help="whether a contract is sound, and whether a client's policy accepts it")
    check.add_argument("source", type=Path, metavar="CONTRACT.toml|STUDY.toml|DIR")
    check.add_argument("--policy", type=Path, metavar="POLICY.toml", help="a client's own ceilings")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.set_defaults(action=_check)

    diff = verbs.add_parser("diff", help="what a new contract would newly reveal and cost; exit code 4 if consent must")
    diff.add_argument("old", type=Path, metavar="OLD")
    diff.add_argument("new", type=Path, metavar="NEW")
    diff.add_argument("--json", action="store_true", help="print one JSON document")
    diff.set_defaults(action=_diff)

    plan = commands.add_parser("plan", help="the noise, delay and power that so many clients and an epsilon would buy")
    plan.add_argument(
        "study", nargs="?", type=Path, metavar="STUDY.toml", help="whose modes, margins and privacy table"
    )
    plan.add_argument("--clients", type=int, required=True, metavar="N", help="everybody there is")
    plan.add_argument("--epsilon", type=float, required=True, metavar="E", help="what the window may cost a client")
    plan.add_argument("--delta", type=float, metavar="D", help="default: the study's")
    plan.add_argument("--rounds", type=int, metavar="R", help="default: the study's")
    plan.add_argument("--effect", action="append", default=[], metavar="X|MODE=X", help="default: twice each margin")
    plan.add_argument("--change", type=int, default=0, metavar="R", help="first round with it; default: a quarter in")
    plan.add_argument("--per-round", type=int, default=0, metavar="N", help="most clients that can be asked in a round")
    plan.add_argument("--spread", type=float, metavar="STD", help="between clients; default: the bundled world's")
    plan.add_argument("--power", type=float, default=0.8, metavar="P", help="what counts as enough")
    plan.add_argument("--json", action="store_true", help="print one JSON document")
    plan.set_defaults(action=_plan)


def _contract(source: Path | None, overrides: list[str] | None = None) -> Any:
    """The contract that a file holds, that a run was under, or that a study would make."""
    from fedcanary import study
    from fedcanary.engines.consent import contract_of
    from fedcanary.engines.setup import cache, prepare
    from fedcanary.privacy import contract as contracts

    if source is not None and source.is_dir():
        if not (source / CONTRACT).exists():
            raise BadInput.of(str(source), f"holds no {CONTRACT}", "point to the --out folder of a run")
        source = source / CONTRACT
    text = "" if source is None or not source.is_file() else source.read_text("utf-8", errors="replace")
    if "[[numbers]]" in text:  # every contract lists a number, and no study has such a table
        if overrides:
            raise BadInput.of("--set", "changes a study, and this is a contract", "name the study instead")
        return contracts.load(source or Path())
    return contract_of(prepare(study.load(source or DEMONSTRATION, overrides or []), cache()))


def _show(arguments: argparse.Namespace) -> int:
    from fedcanary.privacy.contract import show

    contract = _contract(arguments.source, arguments.set)
    if arguments.json:
        _print({"digest": contract.digest, **contract.model_dump(mode="json")})
    else:
        print(contract.text if arguments.toml else show(contract), end="" if arguments.toml else "\n")
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> int:
    from fedcanary.privacy import contract as contracts

    contract = _contract(arguments.source)
    if problems := contracts.check(contract):
        raise BadInput(problems)
    refused: list[Any] = []
    if arguments.policy is not None:
        policy = contracts.load_policy(arguments.policy, contract.probes)
        asked = {
            "contract": contract.digest,
            "round": 1,
            "probes": contract.probes,
            "update": contract.updates is not None,
            "cohort": contract.population,
        }
        sends = [number for number in contract.numbers if number.probe in contract.probes]
        refused = list(contracts.refusals(contract, policy, asked, sends=sends, spent=(0.0, 0.0), answered=0))
    if arguments.json:
        reasons = [{"reason": str(r.reason), "sentence": r.sentence} for r in refused]
        _print({"digest": contract.digest, "sound": True, "refused": reasons})
    else:
        print(f"{contract.digest}: sound; its price is what its noise costs")
        if arguments.policy is not None:
            print("\n".join(f"refused, {r.reason}: {r.sentence}" for r in refused) or "a client of this policy answers")
    return EXIT_REFUSED if refused else EXIT_OK


def _diff(arguments: argparse.Namespace) -> int:
    from fedcanary.privacy.contract import diff

    found = diff(_contract(arguments.old), _contract(arguments.new))
    if arguments.json:
        changes = [{"kind": str(change.kind), "what": change.what} for change in found.changes]
        _print({"consent": found.consent, "changes": changes})
    else:
        print(found)
    return EXIT_REFUSED if found.consent else EXIT_OK


def _plan(arguments: argparse.Namespace) -> int:
    from fedcanary import study
    from fedcanary.engines.setup import load_suites
    from fedcanary.monitor import planner
    from fedcanary.monitor.planner_text import text
    from fedcanary.probes import probes
    from fedcanary.probes.base import merge
    from fedcanary.types import Role

    chosen = study.load(arguments.study or DEMONSTRATION)
    privacy, suites = chosen.privacy, load_suites(chosen)
    if privacy.unit != "client":
        what = f"the unit is {privacy.unit}, and plans are made for the unit client"
        raise BadInput.of("privacy.unit", what, "leave STUDY out, and see docs/privacy.md for what examples cost")
    wish = planner.Wish(
        clients=arguments.clients,
        epsilon=arguments.epsilon,
        delta=privacy.delta if arguments.delta is None else arguments.delta,
        rounds=chosen.rounds if arguments.rounds is None else arguments.rounds,
        per_round=arguments.per_round,
        effects=planner.parse_effects(arguments.effect),
        alpha=chosen.monitor.alpha,
        severe=chosen.monitor.severe,
        power=arguments.power,
        change=arguments.change,
        spread=arguments.spread,
        trust="secure_aggregation" if privacy.trust == "none" else privacy.trust,
        neighbours=privacy.neighbours,
        min_cohort=privacy.min_cohort,
        dropouts=privacy.dropouts,
        seed=chosen.seed,
    )
    instruments = probes({role: merge(suites, role) for role in Role}, chosen.probes.tail)
    found = planner.plan(wish, instruments, chosen.probes.margins.model_dump())
    if arguments.json:
        _print(asdict(found))
    else:
        print(text(found))
    return EXIT_OK


def _print(document: Mapping[str, Any]) -> None:
    from fedcanary.record import plain

    print(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False))
