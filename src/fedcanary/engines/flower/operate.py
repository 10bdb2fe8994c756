"""Starting, watching and stopping what a deployment's folder describes. See `deploy` for the folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from fedcanary.engines.flower import certificates, live
from fedcanary.engines.flower.certificates import Member
from fedcanary.engines.flower.deploy import (
    HOME,
    NODE,
    SERVER,
    SERVER_WORDS,
    STATE,
    STUDY,
    Node,
    Server,
    load,
    load_node,
    names_of,
    table,
)
from fedcanary.engines.flower.live import Screen
from fedcanary.engines.flower.processes import (
    PATIENCE,
    Group,
    Part,
    end,
    living,
    program,
    tail,
)
from fedcanary.engines.flower.programs import START, answers, flwr, register, registered, start_link, start_node
from fedcanary.errors import EXIT_BUG, BadInput, FedcanaryError

ARRIVAL = 5.0  # seconds that a `deploy up` typed just before may take to take its lock
LOCK = "lock"


def serve(server: Server, screen: Screen, nodes: Sequence[Node] = ()) -> None:
    """Run the SuperLink, and nodes beside it, until an interrupt or SIGTERM; leaves nothing running."""
    with _asked_to_stop() as stopped, _held(server.folder), contextlib.ExitStack() as stack:
        for node in nodes:
            stack.enter_context(_held(node.folder))
        group = stack.enter_context(Group(f"{server.id}.{'up' if nodes else 'server'}"))
        link = start_link(group, server)
        address = server.address
        screen.say(f"SuperLink at {address}")
        register(server, screen)
        for node in nodes:
            start_node(group, node, address)
        _look_after(group, screen, stopped, link, server.folder / "run")


def run_node(node: Node, screen: Screen) -> None:
    """Run one SuperNode until an interrupt or SIGTERM; leaves nothing running.

    Raises:
        BadInput: the node does not know where its SuperLink is.
    """
    if not node.superlink:
        remedy = f'write superlink = "HOST:PORT" into {node.folder / NODE}; on one machine: fedcanary deploy up'
        raise BadInput.of(str(node.folder), "does not say where its SuperLink is", remedy)
    with _asked_to_stop() as stopped, _held(node.folder), Group(f"{node.id}.{node.name}") as group:
        _look_after(group, screen, stopped, start_node(group, node, node.superlink))


def submit(server: Server, out: Path, screen: Screen) -> int:
    """Run the study on a deployment that is up; returns the run's exit code. An interrupt stops the run.

    Raises:
        BadInput: the SuperLink is not running.
        FedcanaryError: the run ended without a word; the log's end is in the text.
    """
    until = time.monotonic() + ARRIVAL
    while not (held := _is_held(server.folder)) and time.monotonic() < until:
        time.sleep(0.2)
    if not held:
        raise BadInput.of(str(server.folder), "its SuperLink is not running", "first: fedcanary deploy up")
    context = ssl.create_default_context(cafile=str(server.folder / "ca.crt"))
    until = time.monotonic() + START
    while not answers(f"https://127.0.0.1:{server.last_port}/health", context) and time.monotonic() < until:
        time.sleep(0.5)
    (out / live.NAME).unlink(missing_ok=True)
    config = server.home / "run-config.toml"
    words = {"study": str(server.folder / STUDY), "out": str(out.resolve()), **server.patience}
    config.write_text(tomli_w.dumps(words), "utf-8")
    run = str(flwr(server, "run", str(server.folder / "app"), "deployment", "-c", str(config))["run-id"])
    command = [program("flwr"), "log", run, "deployment", "--stream"]
    with Group(f"{server.id}.run") as group:
        try:
            while True:
                # The log's stream ends with the run, and with the SuperLink; then it is asked which of the two it was.
                part = group.add(Part(id=group.id, name="run", home=server.home, command=lambda: command))
                if (code := watched(part, out, screen)) is not None:
                    return code
                if _has_ended(server, run) and not live.read(out).get("ended"):
                    raise without_result(part)
        except KeyboardInterrupt:
            with contextlib.suppress(FedcanaryError, subprocess.TimeoutExpired):
                flwr(server, "stop", run, "deployment")
            raise


def watched(part: Part, out: Path, screen: Screen) -> int | None:
    """Show a run until it has ended or the command that streams it has: the run's exit code; none if it told none.

    Raises:
        Ended: the run ended with an error, which it told.
    """
    while True:
        over = part.process is None or part.process.poll() is not None  # first: what comes after is read
        word = live.read(out)
        screen(word)
        if word.get("error"):
            raise Ended(str(word["error"]), int(word.get("ended", EXIT_BUG)))
        if "ended" in word:
            return int(word["ended"])
        if over:
            return None
        time.sleep(live.STEP)


def without_result(part: Part) -> FedcanaryError:
    """What to say of a run that ended without a word."""
    return FedcanaryError(f"the run ended without a result; the end of {part.log}:\n{tail(part.log, 20)}")


def _has_ended(server: Server, run: str) -> bool:
    """Whether the SuperLink says so, which may be starting again. Raises FedcanaryError if it says nothing at all."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            listed = flwr(server, "list", "deployment").get("runs", [])
            states = {str(row["run-id"]): str(row["status"]) for row in listed}
            return states.get(run, "finished").startswith("finished")
        except (FedcanaryError, subprocess.TimeoutExpired):
            if time.monotonic() > until or not _is_held(server.folder):
                raise
            time.sleep(2)


class Ended(FedcanaryError):
    """The ServerApp ended with an error, which it told."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]  # the class says one for all; here it is the run's


def status(folder: Path) -> dict[str, Any]:
    """What runs of a deployment on this machine, and what the SuperLink, if it runs, says of the nodes."""
    server, nodes = load(folder)
    up = _is_held(server.folder)
    online: dict[str, str] = {}
    if up:
        with contextlib.suppress(FedcanaryError, subprocess.TimeoutExpired):
            listed = flwr(server, "supernode", "list", "deployment").get("nodes", [])
            states = {str(row.get("node-id")): str(row.get("status")) for row in listed}
            online = {key: states.get(id, "unknown") for key, id in registered(server.home).items()}
    keys = {c: m.flower for c, m in certificates.load_registry(server.folder / certificates.REGISTRY).items()}
    return {
        "id": server.id,
        "superlink": {"address": server.address, "running": up},
        "nodes": [
            {
                "client": node.client,
                "process": bool(living(node.id, node.name)),
                "flower": online.get(keys.get(node.client, ""), ""),
            }
            for node in nodes
        ],
        "processes": len(living(server.id)),
        "run": live.read(server.folder / "run"),
    }


def down(folder: Path) -> int:
    """Stop everything of a deployment on this machine; returns how many processes there were."""
    server, nodes = load(folder)
    keepers = {pid for place in (server.folder, *(n.folder for n in nodes)) if (pid := _holder(place))}
    found = len(living(server.id))
    for pid in keepers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + 40
    while any(_is_held(place) for place in (server.folder, *(n.folder for n in nodes))) and time.monotonic() < until:
        time.sleep(0.2)
    end(server.id)
    return found + len(keepers)


def rekey(folder: Path) -> str:
    """Make both keys of a node anew, on its own machine; returns its new entry for everybody's `registry.toml`."""
    node = load_node(folder)
    with _held(node.folder):
        path = node.folder / STATE / certificates.REGISTRY
        members = certificates.load_registry(path)
        key = certificates.identity(node.folder / STATE, replace=True)
        line = certificates.flower_key(node.folder, node.name, replace=True)
        members[node.client] = Member(name=node.name, key=key, flower=line)
        certificates.write_registry(path, members)
        return certificates.registry_text({node.client: members[node.client]})


def recertify(folder: Path) -> None:
    """Make the server's certificate anew, with the key in `authority/`; nodes need nothing new."""
    words = table(folder / "server" / SERVER, SERVER_WORDS)
    certificates.server(folder / "server", folder / "authority", names_of(words["host"]), replace=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time runs a server or a node; the lock ends with its process."""
    (folder / HOME).mkdir(mode=0o700, exist_ok=True)
    with (folder / HOME / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput.of(str(folder), "is running already", "stop it first: fedcanary deploy down") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_held(folder: Path) -> bool:
    try:
        with (folder / HOME / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _holder(folder: Path) -> int:
    """The process that runs it; 0 if none does."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / HOME / LOCK).read_text()) if _is_held(folder) else 0
    return 0


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look_after(group: Group, screen: Screen, stopped: Callable[[], bool], main: Part, out: Path | None = None) -> None:
    """Keep all parts running until asked to stop, and say what changes; `out`: show the run in that folder too."""
    before: dict[str, str] = {}
    while not stopped():
        now = group.poll()
        for part in group.parts:
            state = now[part.name]
            if state not in (before.get(part.name), "starting"):
                why = f"; the end of {part.log}:\n{tail(part.log, 4)}" if state in ("waiting", "ended") else ""
                screen.say(f"{part.name}: {state}{why}")
        if now[main.name] == "ended":
            remedy = "see its log: is the node's key registered, the port free, the certificate in date?"
            raise BadInput.of(main.name, f"does not stay up; the end of {main.log}:\n{tail(main.log)}", remedy)
        if out is not None and (word := live.read(out)):
            screen(word, f"{sum(state == 'up' for state in now.values())} of {len(now)} programs up")
        before = now
        time.sleep(live.STEP)
