"""The command line. Exit codes are in `errors.py`; progress goes to stderr, results to stdout."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcanary import __version__, cli_deploy, cli_privacy
from fedcanary.bench import cli as bench
from fedcanary.errors import EXIT_ALARM, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, BadInput, FedcanaryError
from fedcanary.landscape import cli as landscape

if TYPE_CHECKING:
    from fedcanary.pipeline import Progress
    from fedcanary.record import RunRecord

# what a user's machine may say to any write; other errors of the system are ours
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="fedcanary",
        description="Personalize foundation models over many clients, and hear it when their behaviour silently fails.",
        epilog="exit codes: 0 no alarm, 3 at least one alarm, 2 bad input, 4 refused, 1 our bug, 130 interrupted",
    )
    top.add_argument("--version", action="version", version=f"fedcanary {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a study (without one: the bundled demonstration)")
    run.add_argument("study", nargs="?", type=Path, metavar="STUDY.toml")
    run.add_argument("--out", type=Path, metavar="DIR", help="where the run goes; must not hold one yet")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    run.add_argument(
        "--rebaseline", metavar="WHAT", help="after a fix, with --resume: what was fixed; a held run goes on"
    )
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")
    run.add_argument(
        "--engine", choices=("inprocess", "flower"), default="inprocess", help="flower: in Flower's simulation"
    )
    run.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")
    run.set_defaults(action=_run)

    probe = commands.add_parser("probe", help="what one adapter changes in one base model, on this machine")
    probe.add_argument("base", metavar="BASE", help='"bundled", a model folder, or a hub id with --revision')
    probe.add_argument("--adapter", type=Path, metavar="DIR", help="a peft adapter's folder")
    probe.add_argument(
        "--suite", action="append", default=[], metavar="NAME|FILE[:ROLE]", help="default: the packaged ones"
    )
    probe.add_argument("--task", choices=("causal", "classify"), default="causal")
    probe.add_argument("--label", action="append", default=[], metavar="NAME", help="a classifier's labels, in order")
    probe.add_argument("--revision", metavar="COMMIT")
    probe.add_argument("--own-domain", action="append", default=[], metavar="NAME", help="a domain the adapter is for")
    probe.add_argument("--generate", action="store_true", help="also read refusals from generated replies")
    probe.add_argument("--matcher", metavar="NAME", help="correct its rate by a measured matcher, for example gpt4")
    probe.add_argument("--seed", type=int, default=1)
    probe.add_argument("--json", action="store_true", help="print one JSON document")
    probe.set_defaults(action=_probe)

    cli_privacy.add(commands)
    cli_deploy.add(commands, _finish)
    landscape.add(commands)
    bench.add(commands)
    for name, help_, action in (
        ("report", "write a run's summary.json and report.html again", _report),
        ("replay", "compute every verdict again from the record, and compare", _replay),
        ("verify", "check that a run's record and adapters are what was written", _verify),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("dir", type=Path, metavar="DIR")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(action=action)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    # A waiting thread must not burn the core that a neighbour needs; has to be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.action(arguments)
        return code
    except FedcanaryError as error:
        problems = getattr(error, "problems", ())
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}" if problems else "refused"
        print(f"fedcanary {arguments.command}: {count}\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno not in (*NO_SPACE, *NO_PLACE):
            raise
        again = getattr(arguments, "out", None) or getattr(arguments, "resume", None)
        remedy = "free space" if error.errno in NO_SPACE else "choose another place, or make this one writable"
        remedy += f", then: fedcanary run --resume {again}" if again and Path(again).is_dir() else ""
        where = error.filename or "disk"
        print(f"fedcanary {arguments.command}: 1 problem\n{where}: {error.strerror}", file=sys.stderr)
        print(f"    remedy: {remedy}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    from fedcanary import pipeline, study
    from fedcanary.engines import consent
    from fedcanary.engines.setup import cache, prepare
    from fedcanary.record import NAME, RunRecord

    if arguments.rebaseline is not None and arguments.resume is None:
        raise BadInput.of("--rebaseline", "is about a run that was held", "add --resume DIR")
    if arguments.rebaseline is not None and arguments.engine == "flower":
        raise BadInput.of("--rebaseline", "is not for --engine flower", "leave out --engine; then go on with it")
    if arguments.resume is not None:
        if arguments.study is not None or arguments.set or arguments.out not in (None, arguments.resume):
            raise BadInput.of("--resume", "takes the study from the record", "leave out STUDY, --set and --out")
        out = arguments.resume
        record = RunRecord.load(out)
        chosen = study.parse(record.header["study"], where=f"{out}: header")
    else:
        chosen = study.load(arguments.study or cli_privacy.DEMONSTRATION, arguments.set)
        out = arguments.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        if (out / NAME).exists():
            raise BadInput.of(
                str(out), "already holds a run", f"choose another --out, or: fedcanary run --resume {out}"
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput.of(str(out), "exists and is not an empty folder", "choose another --out")
    watch = _quiet if arguments.quiet else _Watch(sys.stderr)
    setup = prepare(chosen, cache())
    consent.check(setup)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.toml").write_text(chosen.toml(), encoding="utf-8")
    if arguments.engine == "flower":
        return cli_deploy.simulate(out / "study.toml", out, len(setup.population), arguments, _finish)
    try:
        record = pipeline.run(setup, out, watch=watch, rebaseline=arguments.rebaseline)
    except pipeline.Stopped:
        print(f"\nstopped after the last complete round; go on with: fedcanary run --resume {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _finish(record, out, arguments.json)


def _quiet(progress: Progress) -> None:
    pass


class _Watch:
    """Progress on stderr: round, clients, estimated time left, utility, alarms. One line a round where it is piped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._first: int | None = None

    def __call__(self, p: Progress) -> None:
        self._first = p.round if self._first is None else self._first
        share = (p.round - self._first) + p.done / max(p.clients, 1)
        left = (time.monotonic() - self._began) / share * (p.rounds - self._first + 1 - share) if share else 0.0
        line = f"round {p.round}/{p.rounds}  clients {p.done}/{p.clients}  about {_clock(left)} left"
        if p.verdict is not None and p.releases is not None:
            from fedcanary.monitor.verdict import utility_gain

            alarms = [mode for mode, state in p.verdict.states.items() if state == "alarm"]
            line += f"  utility {utility_gain(p.releases.get('utility'))[0]:+.3f}"
            line += f"  ALARM {', '.join(alarms)}" if alarms else ""
            if p.verdict.action != "adopt":
                line += f"  {p.verdict.action.upper()}: adopted is round {p.verdict.adopted}'s adapter"
            print(("\r\x1b[K" if self._live else "") + line, file=self._stream, flush=True)
        elif self._live:
            print("\r\x1b[K" + line, end="", file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _finish(record: RunRecord, out: Path, as_json: bool) -> int:
    summary = _write_report(record, out)
    _say(summary, as_json, out)
    return EXIT_ALARM if any(mode["state"] == "alarm" for mode in summary["modes"].values()) else EXIT_OK


def _write_report(record: RunRecord, out: Path) -> dict[str, Any]:
    from fedcanary.report.html import render
    from fedcanary.report.summary import summarise

    summary = summarise(record)
    _replace(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(out / "report.html", render(summary))
    return summary


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _say(summary: dict[str, Any], as_json: bool, out: Path) -> None:
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False))
        return
    from fedcanary.report.text import terminal

    print(terminal(summary, colour=sys.stdout.isatty()))
    print(f"\nreport: {(out / 'report.html').resolve()}")


def _report(arguments: argparse.Namespace) -> int:
    from fedcanary.record import RunRecord

    return _finish(RunRecord.load(arguments.dir), arguments.dir, arguments.json)


def _replay(arguments: argparse.Namespace) -> int:
    from fedcanary.pipeline import replay, replay_slices
    from fedcanary.record import RunRecord

    record = RunRecord.load(arguments.dir)
    recorded = {int(body["round"]): body for body in record.of("round")}
    modes, slices = dict(replay(record)), dict(zip(recorded, replay_slices(record), strict=True))
    differ = sorted(
        round
        for round, body in recorded.items()
        if modes.get(round) != body["evidence"] or slices[round].get("slices") != body.get("slices")
    )
    if arguments.json:
        print(json.dumps({"rounds": len(recorded), "differ": differ}))
    elif not differ:
        print(f"{len(recorded)} rounds replayed: every e-value, state and interval is bit for bit the recorded one")
    if differ:
        raise BadInput.of(
            str(arguments.dir),
            f"the replay differs in rounds {', '.join(map(str, differ))}",
            "use the version of fedcanary that the record's header names",
        )
    return EXIT_OK


def _verify(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.verify import verify

    facts = verify(arguments.dir)
    print(json.dumps(facts) if arguments.json else "\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    return EXIT_OK


def _probe(arguments: argparse.Namespace) -> int:
    from fedcanary.compare import compare, load_suites
    from fedcanary.compare_text import table

    comparison = compare(
        arguments.base,
        arguments.adapter,
        load_suites(arguments.suite),
        task=arguments.task,
        labels=tuple(arguments.label),
        calibration=arguments.matcher,
        revision=arguments.revision,
        own_domains=frozenset(arguments.own_domain),
        generate=arguments.generate,
        seed=arguments.seed,
    )
    print(json.dumps(comparison.as_dict(), indent=2) if arguments.json else table(comparison))
    return EXIT_ALARM if comparison.any_worse else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
