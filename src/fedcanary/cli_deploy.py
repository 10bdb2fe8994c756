"""The commands that run a study on Flower: `deploy`, and `run --engine flower`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.errors import EXIT_ALARM, EXIT_OK

if TYPE_CHECKING:
    from fedcanary.record import RunRecord

Finish = Callable[["RunRecord", Path, bool], int]  # writes and prints the result of a run; its exit code


def add(commands: Any, finish: Finish) -> None:
    """The command, its verbs and their options."""
    deploy = commands.add_parser("deploy", help="run a study over Flower: a SuperLink, and a node for each client")
    verbs = deploy.add_subparsers(
        dest="verb", required=True, metavar="init|up|server|node|run|status|down|rekey|recertify|keys"
    )

    init = verbs.add_parser("init", help="write a deployment's folders: keys, certificates, a study for each")
    init.add_argument("dir", type=Path, metavar="DIR")
    init.add_argument(
        "--study", type=Path, default=DEMONSTRATION, metavar="STUDY.toml", help="default: the bundled one"
    )
    init.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")
    init.add_argument("--nodes", type=int, metavar="N", help="how many clients there are; default: what the study says")
    init.add_argument("--host", default="127.0.0.1", help="the name or address by which nodes reach the SuperLink")
    init.add_argument("--port", type=int, default=0, help="default: a free one at each start, for one machine only")
    init.set_defaults(action=_init)

    for name, help_, action in (
        ("up", "run the SuperLink and all nodes on this machine, until Ctrl-C", _up),
        ("server", "run the SuperLink of DIR/server, until Ctrl-C", _server),
        ("node", "run the node of DIR/nodes/NNN, until Ctrl-C", _node),
        ("down", "stop all of a deployment that runs on this machine", _down),
        ("rekey", "make the keys of DIR/nodes/NNN anew, and print their public halves", _rekey),
        ("recertify", "make the server's certificate anew, with the key in DIR/authority", _recertify),
    ):
        verb = verbs.add_parser(name, help=help_)
        verb.add_argument("dir", type=Path, metavar="DIR")
        verb.set_defaults(action=action)

    keys = verbs.add_parser("keys", help="for an app that is attached: make a client's key in its node's own folder")
    keys.add_argument("dir", type=Path, metavar="DIR", help="the folder that its node config calls fedcanary-folder")
    keys.add_argument("--client", type=int, required=True, metavar="N", help="its fedcanary-client")
    keys.add_argument("--replace", action="store_true", help="make it anew if there is one")
    keys.set_defaults(action=_keys)

    run = verbs.add_parser("run", help="run the study on a deployment that is up, or go on with its run")
    run.add_argument("dir", type=Path, metavar="DIR")
    run.add_argument("--out", type=Path, metavar="DIR", help="where the run goes; default: run/ of the server's folder")
    run.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")
    run.set_defaults(action=lambda arguments: _run(arguments, finish))

    status = verbs.add_parser("status", help="what of a deployment runs on this machine, and which nodes are online")
    status.add_argument("dir", type=Path, metavar="DIR")
    status.add_argument("--json", action="store_true", help="print one JSON document")
    status.set_defaults(action=_status)


def simulate(study: Path, out: Path, clients: int, arguments: argparse.Namespace, finish: Finish) -> int:
    """`run --engine flower`: the study in Flower's simulation."""
    from fedcanary.engines.flower import simulate
    from fedcanary.engines.flower.live import Screen

    try:
        code = simulate.run(study, out, clients, screen=Screen(None if arguments.quiet else sys.stderr))
    except KeyboardInterrupt:
        print(f"\ngo on with: fedcanary run --resume {out} --engine flower", file=sys.stderr)
        raise
    return _result(code, out, arguments.json, finish)


def _result(code: int, out: Path, as_json: bool, finish: Finish) -> int:
    from fedcanary.record import RunRecord

    return finish(RunRecord.load(out), out, as_json) if code in (EXIT_OK, EXIT_ALARM) else code


def _init(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import deploy

    folder = arguments.dir
    deploy.init(folder, arguments.study, arguments.set, nodes=arguments.nodes, host=arguments.host, port=arguments.port)
    print(f"{folder}: written. On one machine: fedcanary deploy up {folder}, then fedcanary deploy run {folder}")
    print(f"On several: read {folder / 'server' / 'README.md'} and each node's; take {folder / 'authority'} off-line")
    return EXIT_OK


def _up(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import deploy, live, operate

    server, nodes = deploy.load(arguments.dir)
    operate.serve(server, live.Screen(sys.stderr), nodes)
    return EXIT_OK


def _server(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import deploy, live, operate

    operate.serve(deploy.load_server(arguments.dir), live.Screen(sys.stderr))
    return EXIT_OK


def _node(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import deploy, live, operate

    operate.run_node(deploy.load_node(arguments.dir), live.Screen(sys.stderr))
    return EXIT_OK


def _run(arguments: argparse.Namespace, finish: Finish) -> int:
    from fedcanary.engines.flower import deploy, live, operate

    whole = (arguments.dir / "server").is_dir()
    server = deploy.load_server(arguments.dir / "server" if whole else arguments.dir)
    out = (arguments.out or server.folder / "run").resolve()
    try:
        code = operate.submit(server, out, live.Screen(None if arguments.quiet else sys.stderr))
    except KeyboardInterrupt:
        print(f"\ngo on with: fedcanary deploy run {arguments.dir}", file=sys.stderr)
        raise
    return _result(code, out, arguments.json, finish)


def _status(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import operate

    found = operate.status(arguments.dir)
    if arguments.json:
        print(json.dumps(found))
        return EXIT_OK
    link = found["superlink"]
    print(f"SuperLink {link['address']}: {'running' if link['running'] else 'not running'}")
    for node in found["nodes"]:
        here = "running here" if node["process"] else "not running here"
        print(f"client {node['client']}: {here}{', ' + node['flower'] if node['flower'] else ''}")
    if word := found["run"]:
        from fedcanary.engines.flower import live

        now = f"ended with exit code {word['ended']}" if "ended" in word else live.line(word)
        print("run: " + "; the last: ".join(part for part in (now, live.decision(word)) if part))
    return EXIT_OK


def _down(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import operate

    count = operate.down(arguments.dir)
    print(f"{count} processes stopped" if count else "nothing was running")
    return EXIT_OK


def _rekey(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import operate

    print(operate.rekey(arguments.dir), end="")
    print("put this in the place of the node's entry in registry.toml of the server and of every node", file=sys.stderr)
    return EXIT_OK


def _keys(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import enrol

    print(enrol.one(arguments.dir, arguments.client, replace=arguments.replace), end="")
    where = "one in every node's folder, one where attach.registry says"
    print(f"all clients' entries together are registry.toml: {where}", file=sys.stderr)
    return EXIT_OK


def _recertify(arguments: argparse.Namespace) -> int:
    from fedcanary.engines.flower import operate

    operate.recertify(arguments.dir)
    print("written; start the server again")
    return EXIT_OK
