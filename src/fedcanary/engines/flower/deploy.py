"""A deployment in a folder: what the server and each node need.

    authority/        ca.key, ca.crt: signs the server's certificate; belongs on neither machine
    server/           server.toml study.toml registry.toml, the server's key and certificate, app/, run/ (the record)
    nodes/003/        node.toml study.toml, the node's Flower key, state/ (its identity, ledger, adapters)

A node's folder goes to the machine of its owner. `flower/` in each is Flower's own home with its logs.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedcanary import study as studies
from fedcanary.engines.flower import certificates
from fedcanary.engines.flower.application import PATIENCE, pin_of, write_app
from fedcanary.engines.flower.certificates import Member
from fedcanary.engines.flower.processes import program
from fedcanary.errors import BadInput, Problem
from fedcanary.study import Study

SERVER, NODE, STUDY, STATE, HOME = "server.toml", "node.toml", "study.toml", "state", "flower"
SERVER_WORDS = {"id": str, "host": str, "port": int, "app": str, **dict.fromkeys(PATIENCE, int)}
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`server/`. The port is 0 where it is to be found when the SuperLink starts."""

    folder: Path
    id: str
    host: str
    port: int
    app: str  # the pinned digest
    patience: Mapping[str, int]  # seconds that an exchange may take, with training in it or not, and nodes to come

    @property
    def home(self) -> Path:
        """Flower's own home: logs, database, connection."""
        return self.folder / HOME

    @property
    def last_port(self) -> int:
        """The SuperLink's port as of its last start; 0 before the first."""
        with contextlib.suppress(OSError, ValueError):
            return self.port or int((self.home / "port").read_text())
        return 0

    @property
    def address(self) -> str:
        """Where nodes find it; empty before the first start."""
        return f"{self.host}:{self.last_port}" if self.last_port else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`nodes/NNN/`. `superlink` is empty where only `up`, on the same machine, knows it."""

    folder: Path
    id: str
    client: int
    superlink: str
    app: str

    @property
    def name(self) -> str:
        """As Flower lists it."""
        return name_of(self.client)


def names_of(host: str) -> list[str]:
    """What the server's certificate is for: what nodes call it, and what it calls itself."""
    return list(dict.fromkeys([host, "localhost", "127.0.0.1"]))


def name_of(client: int) -> str:
    """A client's node, as Flower lists it."""
    return f"node-{client:03d}"


def init(
    folder: Path,
    study: Path,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    app: Path | None = None,
) -> None:
    """Write a deployment: keys, certificates, a copy of the study for each. Whole or not at all.

    `nodes` sets how many clients a generated or partitioned population has; one by column needs it said. `app` is a
    folder with another Flower app than fedcanary's own.

    Raises:
        BadInput: all problems with what was given.
    """
    problems: list[Problem] = []
    chosen, count = None, None
    try:
        chosen, count = _sized(study, overrides, nodes)
    except BadInput as error:
        problems += error.problems
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(Problem(str(folder), "exists and is not an empty folder", "choose another folder"))
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", host):
        problems.append(Problem("--host", f"{host!r} is no name or IPv4 address", "give one that nodes can reach"))
    if not 0 <= port < 1 << 16:
        problems.append(Problem("--port", f"{port} is no port", "choose one from 1 to 65535, or 0: found at the start"))
    if host not in LOOPBACK and port == 0:
        problems.append(Problem("--port", "nodes elsewhere must know the port", "add --port, for example 8000"))
    try:
        program("flower-superlink")
    except BadInput as error:
        problems += error.problems
    if problems or chosen is None or count is None:
        raise BadInput(problems)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(draft, chosen, count, host, port, app)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_server(folder: Path) -> Server:
    """Read `server/` and check its keys. Raises BadInput with all problems."""
    words = table(folder / SERVER, SERVER_WORDS)
    problems: list[Problem] = []
    for check in (
        lambda: certificates.check_server(folder, words["host"]),
        lambda: certificates.load_registry(folder / certificates.REGISTRY),
        lambda: studies.load(folder / STUDY),
    ):
        try:
            check()
        except BadInput as error:
            problems += error.problems
    patience = {name: words.pop(name) for name in PATIENCE}
    for name, seconds in patience.items():
        if seconds < 1:
            problems.append(Problem(f"{folder / SERVER}: {name}", f"is {seconds}", "give seconds, 1 or more"))
    if problems:
        raise BadInput(problems)
    return Server(folder=folder.resolve(), patience=patience, **words)


def load_node(folder: Path) -> Node:
    """Read `nodes/NNN/` and check its keys. Raises BadInput with all problems."""
    words = table(folder / NODE, {"id": str, "client": int, "superlink": str, "app": str})
    problems: list[Problem] = []
    for check in (
        lambda: certificates.load_node(folder, folder / STATE, words["client"]),
        lambda: studies.load(folder / STUDY),
    ):
        try:
            check()
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return Node(folder=folder.resolve(), **words)


def load(folder: Path) -> tuple[Server, list[Node]]:
    """A whole deployment on one machine. Raises BadInput with all problems."""
    problems: list[Problem] = []
    server, nodes = None, []
    try:
        server = load_server(folder / "server")
    except BadInput as error:
        problems += error.problems
    for place in sorted((folder / "nodes").glob("*/")):
        try:
            nodes.append(load_node(place))
        except BadInput as error:
            problems += error.problems
    if problems or server is None:
        raise BadInput(problems)
    return server, nodes


def _sized(path: Path, overrides: Sequence[str], nodes: int | None) -> tuple[Study, int]:
    sized = list(overrides)
    try:
        chosen = studies.load(path, overrides)
    except BadInput as error:
        raise BadInput([*error.problems, *_miscounted(nodes)]) from None
    generated, kind = chosen.clients.source == "generated", chosen.clients.partition.kind
    if nodes is None:
        nodes = chosen.clients.count if generated else chosen.clients.partition.clients
    elif generated or kind != "column":
        sized.append(f"clients.{'count' if generated else 'partition.clients'}={nodes}")
    if nodes is None:
        raise BadInput.of("--nodes", "this study's data say how many clients there are", "add --nodes N")
    if problems := _miscounted(nodes):
        raise BadInput(problems)
    return studies.load(path, sized), nodes


def _miscounted(nodes: int | None) -> list[Problem]:
    if nodes is None or 2 <= nodes <= 1000:
        return []
    return [Problem("--nodes", f"{nodes} nodes", "from 2 to 1000; more clients are simulated")]


def _write(draft: Path, study: Study, count: int, host: str, port: int, app: Path | None) -> None:
    authority, server = draft / "authority", draft / "server"
    for place in (draft, authority, server, draft / "nodes"):
        place.mkdir(parents=True, mode=0o700)
    id, text = secrets.token_hex(8), study.toml()
    if app is None:
        write_app(server / "app")
    else:
        shutil.copytree(app, server / "app")
    pin = pin_of(server / "app")
    certificates.authority(authority)
    certificates.server(server, authority, names_of(host))
    shutil.copy(authority / "ca.crt", server)
    members = {}
    for client in range(count):
        place = draft / "nodes" / f"{client:03d}"
        (place / STATE).mkdir(parents=True, mode=0o700)
        key = certificates.identity(place / STATE)
        line = certificates.flower_key(place, name_of(client))
        members[client] = Member(name=name_of(client), key=key, flower=line)
        words = {"id": id, "client": client, "superlink": f"{host}:{port}" if port else "", "app": pin}
        (place / NODE).write_text(tomli_w.dumps(words), "utf-8")
        (place / STUDY).write_text(text, "utf-8")
        (place / "README.md").write_text(FOR_NODE.format(client=client, superlink=words["superlink"] or "?"), "utf-8")
        shutil.copy(authority / "ca.crt", place)
    for place in (server, *(draft / "nodes" / f"{client:03d}" / STATE for client in range(count))):
        certificates.write_registry(place / certificates.REGISTRY, members)
    (server / SERVER).write_text(tomli_w.dumps({"id": id, "host": host, "port": port, "app": pin, **PATIENCE}), "utf-8")
    (server / STUDY).write_text(text, "utf-8")
    (server / "README.md").write_text(FOR_SERVER, "utf-8")


def table(path: Path, wanted: dict[str, type]) -> dict[str, Any]:
    """Read a flat table with these keys. Raises BadInput."""
    try:
        words = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        remedy = "name a folder that fedcanary deploy init made, or one of its server/ and nodes/NNN/"
        raise BadInput.of(str(path), "cannot be read", remedy) from error
    if {key: type(value) for key, value in words.items()} != wanted:
        raise BadInput.of(str(path), f"must say {', '.join(wanted)} and nothing else", "restore it")
    return words


FOR_SERVER = """# The server of a fedcanary deployment

Start it:  fedcanary deploy server .        (in this folder; Ctrl-C stops it)
Run the study, or go on with it:  fedcanary deploy run .

- `server.toml`: the name and port that nodes connect to, the digest of the one app that may run here, and the seconds
  that clients are given to train, to answer anything else, and to come online.
- `server.key`, `server.crt`, `ca.crt`: TLS. The authority's key is not here; keep it where no machine of this
  deployment can read it. Before the certificate expires: fedcanary deploy recertify, where authority/ lies.
- `registry.toml`: the public keys of all clients. Every node holds its own copy and goes by that.
- `run/`: the record, the adapters, the ledger of what was released. Back it up; it is what a run resumes from.
- `flower/`: Flower's database and logs. It may be deleted while nothing runs.

Only nodes' traffic (/v1/fleet/) is answered to other machines. Whoever has an account on this one can stop or start
runs of this app, so use a machine of its own. Forward the port through no tunnel that makes others look local.
"""
FOR_NODE = """# Node {client} of a fedcanary deployment

Start it:  fedcanary deploy node .        (in this folder, on the client's own machine; Ctrl-C stops it)

- `node.toml`: this client's number, where the SuperLink is ({superlink}), and the digest of the one app that may run.
- `study.toml`: what this client agrees to do. Set `clients.source` to where the data lie here.
- `flower.key`: by it the SuperLink knows this node. `state/identity.pem`: by it the other clients know it when sums are
  kept secret from the server. Whoever made these files could have kept copies. Trust them with it; or, before the first
  run, make both anew with fedcanary deploy rekey, and have what it prints put into everybody's `registry.toml`.
- `state/`: this client's ledger, private adapters and answers given. Back it up without `journal.sqlite`: put back, it
  would say less than has been answered. Never run two copies of it.
- `flower/`: Flower's logs. It may be deleted while nothing runs.
"""
