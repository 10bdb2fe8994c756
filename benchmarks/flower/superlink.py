"""What a message costs Flower's SuperLink and the ServerApp's process, by its size; prints a table and a line.

    OMP_NUM_THREADS=1 python benchmarks/flower/superlink.py [--nodes 16] [--exchanges 5]

A SuperLink with TLS and registered keys, as `fedcanary deploy` starts it. Nodes are connections of this process: they
speak Flower's protocol, and answer at once with as many random bytes as they got, so that what is counted is the
SuperLink's and the ServerApp's own CPU time. A node's polls are counted beside the messages, and paid for apart.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.engines.flower import application, certificates, deploy, operate, programs
from fedcanary.engines.flower.live import Screen
from fedcanary.engines.flower.processes import Group

SIZES = (1 << 10, 1 << 17, 1 << 20)  # bytes of a record's content
POLL = 3.0  # seconds between two polls of a node, as Flower has it
CODE = """
import json, os, time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()


@server_app.main()
def main(grid, context):
    out = Path(str(context.run_config["out"]))
    told = json.loads((out / "told.json").read_text())

    def now():
        words = Path(f"/proc/{told['pid']}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{told['pid']}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        link = sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")
        return {"link": link, "app": time.process_time(), "polls": int((out / "polls").read_text()), "rss": rss / 1024}

    while len(nodes := list(grid.get_node_ids())) < told["nodes"]:
        time.sleep(0.5)
    found = [("start", now())]
    time.sleep(told["idle"])
    found.append(("idle", now()))
    for size in told["sizes"]:
        for _ in range(told["exchanges"]):
            asked = []
            for node in nodes:
                say = ConfigRecord({"data": os.urandom(size)})
                asked.append(Message(RecordDict({"say": say}), dst_node_id=node, message_type="query"))
            replies = list(grid.send_and_receive(asked, timeout=120))
            good = sum(r.has_content() and len(r.content["say"]["data"]) == size for r in replies)
            if good != len(nodes):
                raise RuntimeError(f"{good} of {len(nodes)} answered")
        found.append((size, now()))
    (out / "found.json").write_text(json.dumps(found))
    (out / "live.part").write_text(json.dumps({"ended": 0}))
    (out / "live.part").replace(out / "live.json")
"""


class Nodes:
    """Connections that poll, and answer whatever they get."""

    def __init__(self, server: deploy.Server, nodes: list[deploy.Node], polls: Path) -> None:
        self._server, self._polls = server, polls
        self._counts = [0] * len(nodes)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(place, n)) for place, n in enumerate(nodes)]
        self._threads.append(threading.Thread(target=self._count))

    def __enter__(self) -> Nodes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _count(self) -> None:
        while not self._over.is_set():
            draft = self._polls.with_suffix(".part")
            draft.write_text(str(sum(self._counts)))
            draft.replace(self._polls)
            time.sleep(0.1)

    def _live(self, place: int, node: deploy.Node) -> None:
        private = load_ssh_private_key((node.folder / certificates.FLOWER[0]).read_bytes(), None)
        keys = private, private.public_key()
        certificate = (node.folder / "ca.crt").read_bytes()
        with http_request_response(self._server.address, False, certificate, keys, 10, 60.0) as connection:
            _, receive, send, get_run, get_fab, pull, push, confirm = connection
            known: set[int] = set()
            while not self._over.is_set():
                self._counts[place] += 1
                found = receive()
                if found is None:
                    self._over.wait(POLL)
                    continue
                message, tree = found
                run = message.metadata.run_id
                if run not in known:  # as a node does
                    get_fab(get_run(run).fab_hash, run)
                    known.add(run)
                ids = [one.object_id for one in iterate_object_tree(tree)]
                size = sum(map(len, pull_objects(ids, functools.partial(pull, run)).values()))
                confirm(run, message.metadata.message_id)
                self._answer(message, size, send, push)

    def _answer(self, message: Message, size: int, send: Any, push: Any) -> None:
        size = min(SIZES, key=lambda each: abs(each - size))
        reply = Message(RecordDict({"say": ConfigRecord({"data": os.urandom(size)})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        wanted, session = send(reply, get_object_tree(reply), 0.0)
        for name in wanted:
            push(message.metadata.run_id, session, name, objects[name])


def measure(nodes: int, exchanges: int, idle: float) -> list[tuple[Any, dict[str, float]]]:
    """What the app read between the phases."""
    with tempfile.TemporaryDirectory(prefix="fl") as name:
        folder, out = Path(name) / "d", Path(name) / "out"
        application.write_app(Path(name) / "app", CODE)
        out.mkdir()
        deploy.init(folder, DEMONSTRATION, nodes=nodes, app=Path(name) / "app")
        server, members = deploy.load(folder)
        screen = Screen(None)
        with operate._held(server.folder), Group(f"{server.id}.up") as group:
            link = programs.start_link(group, server)
            programs.register(server, screen)
            assert link.process is not None
            told = {"pid": link.process.pid, "nodes": nodes, "idle": idle, "sizes": SIZES, "exchanges": exchanges}
            (out / "told.json").write_text(json.dumps(told))
            (out / "polls").write_text("0")
            with Nodes(server, members, out / "polls"):
                operate.submit(server, out, screen)
        return [(phase, found) for phase, found in json.loads((out / "found.json").read_text("utf-8"))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--exchanges", type=int, default=5)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds of polls alone (default 30)")
    chosen = parser.parse_args()
    (_, before), (_, idle), *phases = measure(chosen.nodes, chosen.exchanges, chosen.idle)
    poll = (idle["link"] - before["link"]) / (idle["polls"] - before["polls"])
    print("| bytes each way | SuperLink, ms | ServerApp, ms | SuperLink's memory, MiB |\n| --: | --: | --: | --: |")
    last, count = idle, chosen.nodes * chosen.exchanges
    for size, now in phases:
        link = now["link"] - last["link"] - poll * (now["polls"] - last["polls"])
        app = now["app"] - last["app"]
        print(f"| {size:,} | {1000 * link / count:.1f} | {1000 * app / count:.1f} | {now['rss']:,.0f} |")
        last = now
    print(f"\nA node's poll costs the SuperLink {1000 * poll:.2f} ms; one every 3 s, {poll / 3:.2%} of a core.")


if __name__ == "__main__":
    main()
