"""How Flower's programs are called: the SuperLink, the SuperNodes, and the commands that ask and tell a SuperLink."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tomli_w

from fedcanary.engines.flower import certificates
from fedcanary.engines.flower.deploy import HOME, LOOPBACK, STATE, STUDY, Node, Server
from fedcanary.engines.flower.live import Screen
from fedcanary.engines.flower.processes import Group, Part, environment, free_port, program
from fedcanary.errors import FedcanaryError

START = 60.0  # seconds that a SuperLink may take to answer
# `flwr` once for many commands: most of what one costs is its start
EACH = (
    "import json, sys; from flwr.cli.app import app\nfor line in json.load(sys.stdin): app(line, standalone_mode=False)"
)


def start_link(group: Group, server: Server) -> Part:
    """Start the SuperLink, wait until it answers, and start what runs its apps. Returns the SuperLink.

    Raises:
        BadInput: it does not come up; the text holds the end of its log.
    """
    home, folder = server.home, server.folder
    port = server.last_port if server.port or _is_free(server.last_port) else free_port()
    (home / "port").write_text(str(port))
    connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(folder / "ca.crt")}
    tables = {"superlink": {"default": "deployment", "deployment": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(tables), "utf-8")
    listen = "127.0.0.1" if server.host in LOOPBACK else "0.0.0.0"  # noqa: S104  # other machines: `doors` says where
    command = [*shut("flower-superlink", server.app), "--host", listen, "--port", str(port)]
    for name in ("certfile", "keyfile"):
        command += [f"--ssl-{name}", str(folder / {"certfile": "server.crt", "keyfile": "server.key"}[name])]
    command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--database", str(home / "state.db")]
    # The ServerApp is not a child of the SuperLink: it goes on while the SuperLink is started again.
    command += ["--enable-supernode-auth", "--isolation", "process", "--disable-runtime-dependency-installation"]
    link = group.add(Part(id=group.id, name="superlink", home=home, command=lambda: command))
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    group.wait(link, START, lambda: answers(f"https://127.0.0.1:{port}/health", context))
    runner = [program("flower-superexec"), "--root-certificates", str(folder / "ca.crt")]
    runner += ["--runtime-api-address", f"127.0.0.1:{port}"]
    group.add(Part(id=group.id, name="superexec", home=home, command=lambda: runner))
    return link


def start_node(group: Group, node: Node, superlink: str) -> Part:
    """Start a SuperNode that connects to `superlink`."""
    folder, home = node.folder, node.folder / HOME
    home.mkdir(mode=0o700, exist_ok=True)
    words = {"client": node.client, "study": str(folder / STUDY), "folder": str(folder / STATE)}
    (home / "node-config.toml").write_text(tomli_w.dumps(words), "utf-8")

    def command() -> list[str]:
        fixed = [*shut("flower-supernode", node.app), "--superlink", superlink, "--root-certificates"]
        fixed += [str(folder / "ca.crt"), "--auth-supernode-private-key", str(folder / certificates.FLOWER[0])]
        fixed += ["--node-config", str(home / "node-config.toml")]
        return [*fixed, "--host", "127.0.0.1", "--port", str(free_port())]

    return group.add(Part(id=group.id, name=node.name, home=home, command=command, ready="SuperNode ID:"))


def shut(name: str, pin: str) -> list[str]:
    """The command for a daemon of Flower that accepts one app only. Raises BadInput where Flower is not installed."""
    program(name)
    return [sys.executable, "-m", "fedcanary.engines.flower.doors", name, pin]


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether a SuperLink is there."""
    try:
        with urllib.request.urlopen(url, timeout=2, context=context) as reply:  # noqa: S310  # our own address
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(("127.0.0.1", port))
        return port > 0
    return False


def registered(home: Path) -> dict[str, str]:
    """Flower's node ids by public key, of the keys that the SuperLink with this home was told."""
    try:
        table = json.loads((home / "registered.json").read_text("utf-8"))
        return {str(key): str(id) for key, id in table.items()}
    except (OSError, ValueError):
        return {}


def clients_of_nodes(folder: Path) -> dict[int, int]:
    """The client whose key each of Flower's nodes has shown, of those in a server's folder."""
    ids, members = registered(folder / HOME), certificates.load_registry(folder / certificates.REGISTRY)
    return {int(ids[member.flower]): client for client, member in members.items() if member.flower in ids}


def register(server: Server, screen: Screen) -> None:
    """Make the SuperLink accept the keys of the registry and no others; one that was taken out is struck out."""
    known = registered(server.home)
    members = {m.flower: m for m in certificates.load_registry(server.folder / certificates.REGISTRY).values()}
    gone, new = [key for key in known if key not in members], [key for key in members if key not in known]
    lines = [["supernode", "unregister", known[key], "deployment"] for key in gone]
    for place, key in enumerate(new):
        public = server.home / f"key-{place}.pub"
        public.write_text(key + "\n", "utf-8")
        lines.append(["supernode", "register", str(public), "deployment", "--name", members[key].name])
    if not lines:
        return
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([[*line, "--format", "json"] for line in lines]),
        capture_output=True,
        text=True,
        timeout=60 + 5 * len(lines),
        env=environment(f"{server.id}.command", "command", server.home),
    )
    rest, replies = done.stdout.strip(), []
    while rest.startswith("{"):
        reply, used = json.JSONDecoder().raw_decode(rest)
        replies.append(reply)
        rest = rest[used:].strip()
    for key, reply in zip([*gone, *new], replies, strict=False):
        if reply.get("success") and key in known:
            del known[key]
        elif reply.get("success"):
            known[key] = str(reply["node-id"])
    certificates.write_private(server.home / "registered.json", json.dumps(known).encode())
    if known.keys() != members.keys():
        raise FedcanaryError(f"flwr supernode register: {(done.stdout + done.stderr).strip()[-500:]}")
    screen.say(f"{len(new)} nodes registered, {len(gone)} struck out")


def flwr(server: Server, *words: str) -> dict[str, Any]:
    """The answer of a `flwr` command as JSON. Raises FedcanaryError with what it says instead."""
    done = subprocess.run(
        [program("flwr"), *words, "--format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(f"{server.id}.command", "command", server.home),
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    if done.returncode or not isinstance(found, dict) or found.get("success") is False:
        raise FedcanaryError(f"flwr {' '.join(words[:2])}: {(done.stdout + done.stderr).strip()[-500:]}")
    return found
