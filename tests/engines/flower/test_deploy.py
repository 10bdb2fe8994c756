"""Deployments: whole folders or none, one error for all that is wrong, one app only, and real ones of two nodes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")

import echo
from flwr.app import Message, RecordDict

from fedcanary import cli
from fedcanary.engines import consent, setup
from fedcanary.engines.flower import application, certificates, deploy, doors, live, operate, programs, simulate
from fedcanary.engines.flower.processes import free_port, living
from fedcanary.errors import EXIT_ALARM, EXIT_BAD_INPUT, BadInput

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's packing of an app
STUDY = 'rounds = 1\n[privacy]\ntrust = "none"\n'


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("echo") / "app"
    application.write_app(place, echo.code(2, EXIT_ALARM))
    return place


@pytest.fixture
def study(tmp_path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


@pytest.fixture
def made(tmp_path, study, app) -> Path:
    deploy.init(tmp_path / "a folder" / "d", study, nodes=2, app=app)
    return tmp_path / "a folder" / "d"


def refused(capsys, *words: object) -> str:
    assert cli.main(["deploy", *map(str, words)]) == EXIT_BAD_INPUT
    return capsys.readouterr().err


def test_init_gives_each_side_what_it_needs_and_no_key_of_another(made):
    server, nodes = deploy.load(made)
    assert [(node.client, node.name, node.app) for node in nodes] == [
        (0, "node-000", server.app),
        (1, "node-001", server.app),
    ]
    private = sorted(str(p.relative_to(made)) for p in made.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes())
    own = [f"nodes/{n}/{name}" for n in ("000", "001") for name in ("flower.key", "state/identity.pem")]
    assert private == ["authority/ca.key", *own, "server/server.key"]
    assert all((made / name).stat().st_mode & 0o077 == 0 for name in private)
    assert made.stat().st_mode & 0o077 == 0
    assert "clients.count" not in (made / "server" / "study.toml").read_text()
    assert len({(made / "nodes" / n / "state" / "registry.toml").read_bytes() for n in ("000", "001")}) == 1


def test_every_wrong_use_is_one_error_and_leaves_nothing(tmp_path, study, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "bad.toml").write_text("roundz = 1\n")
    wrong = ["--host", "a/b", "--port", "70000", "--nodes", "0"]
    text = refused(capsys, "init", tmp_path / "full", "--study", tmp_path / "bad.toml", *wrong)
    assert "5 problems" in text
    for part in ("roundz", "0 nodes", "not an empty folder", "no name or IPv4", "70000 is no port"):
        assert part in text
    (tmp_path / "bad.toml").unlink()
    text = refused(capsys, "init", tmp_path / "n", "--study", study, "--host", "link.example", "--nodes", "1")
    assert "nodes elsewhere must know the port" in text
    assert "1 nodes" in text
    monkeypatch.setattr(deploy, "pin_of", lambda folder: 1 / 0)  # in the midst of writing
    with pytest.raises(ZeroDivisionError):
        deploy.init(tmp_path / "n", study, nodes=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_is_bad_input(tmp_path, study, capsys):
    (tmp_path / "file").touch()
    for words in (("init", tmp_path / "file" / "d", "--study", study), ("init", tmp_path / ("x" * 300))):
        assert "choose another place" in refused(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "study.toml"]


def test_a_study_by_column_needs_the_number_of_nodes_said(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    columns = '[clients.columns]\ntext = "t"\nlabel = "l"\nclient = "c"\n'
    (tmp_path / "s.toml").write_text(f'{STUDY}[clients]\nsource = "data.jsonl"\n{columns}')
    with pytest.raises(BadInput, match="add --nodes N"):
        deploy.init(tmp_path / "d", tmp_path / "s.toml")


def test_a_broken_deployment_is_one_error_with_all_problems(made, capsys):
    (made / "server" / "server.key").chmod(0o644)
    (made / "nodes" / "000" / "node.toml").write_text("client = 0\n")
    (made / "nodes" / "001" / "state" / "registry.toml").write_text("")
    (made / "nodes" / "001" / "study.toml").write_text("rounds = 0\n")
    text = refused(capsys, "up", made)
    for part in ("mode 644", "must say id, client", "no list of registered", "rounds"):
        assert part in text
    assert "cannot be read" in refused(capsys, "server", made)
    assert "cannot be read" in refused(capsys, "down", made / "nowhere")


def test_what_needs_something_running_says_so(made, capsys, monkeypatch):
    monkeypatch.setattr(operate, "ARRIVAL", 0.0)
    assert "deploy up" in refused(capsys, "run", made)
    assert 'write superlink = "HOST:PORT"' in refused(capsys, "node", made / "nodes" / "000")
    assert cli.main(["deploy", "down", str(made)]) == 0
    assert cli.main(["deploy", "status", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["superlink"] == {"address": "", "running": False}
    assert found["nodes"] == [{"client": c, "process": False, "flower": ""} for c in (0, 1)]
    with operate._held(made / "server"):
        assert "is running already" in refused(capsys, "up", made)


def test_a_node_makes_its_own_keys_and_is_refused_until_the_others_have_them(made, capsys):
    place, other = made / "nodes" / "000", made / "nodes" / "001" / "state" / "registry.toml"
    before = [(place / name).read_bytes() for name in ("flower.key", "state/identity.pem")]
    assert cli.main(["deploy", "rekey", str(place)]) == 0
    entry = capsys.readouterr().out
    assert all(now not in before for now in [(place / n).read_bytes() for n in ("flower.key", "state/identity.pem")])
    assert "PRIVATE" not in entry
    deploy.load_node(place)
    mine = (place / "state" / "registry.toml").read_text()
    assert entry.strip() in mine
    assert other.read_text() != mine
    other.write_text(mine)
    deploy.load(made)
    first = (made / "server" / "server.crt").read_bytes()
    assert cli.main(["deploy", "recertify", str(made)]) == 0
    assert (made / "server" / "server.crt").read_bytes() != first
    deploy.load_server(made / "server")


def test_a_client_of_an_attached_app_has_its_key_in_its_nodes_folder_and_is_told_what_to_list(tmp_path, capsys):
    words = ["deploy", "keys", str(tmp_path / "own"), "--client", "3"]
    assert cli.main(words) == 0
    (tmp_path / "registry.toml").write_text(capsys.readouterr().out)
    (listed,) = certificates.load_registry(tmp_path / "registry.toml").items()
    key = certificates.load_identity(tmp_path / "own" / "clients" / "000003" / "identity.pem")
    assert (listed[0], listed[1].key) == (3, key.public_key().public_bytes_raw())
    assert "exists" in refused(capsys, *words[1:])
    assert "-1 is no client's number" in refused(capsys, *words[1:-1], "-1")
    assert "Not a directory" in refused(capsys, "keys", tmp_path / "registry.toml", "--client", "1")
    assert cli.main([*words, "--replace"]) == 0
    assert listed[1].key.hex() not in capsys.readouterr().out


# What Flower leaves open.


def bundle(**files: str) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return memory.getvalue()


def test_the_pin_tells_apps_apart_by_name_and_content():
    pin = doors.app_digest(bundle(a="1", b="2"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", "1")
        archive.writestr("b", "2")
    assert doors.is_pinned(packed.getvalue(), pin)
    others = [
        bundle(a="1", b="3"),
        bundle(a="1", c="2"),
        bundle(a="1"),
        bundle(a="1", b="2", c=""),
        bundle(a="12", b=""),
    ]
    assert not any(doors.is_pinned(other, pin) for other in [*others, b"", b"PK"])
    assert not doors.is_pinned(bundle(a="x" * (doors.LARGEST + 1)), pin)


def test_the_pin_of_an_app_is_that_of_the_bundle_which_flower_makes_again(app, tmp_path):
    again = shutil.copytree(app, tmp_path / "again")
    assert application.pin_of(app) == application.pin_of(again)
    (again / "fedcanary_app.py").write_text((again / "fedcanary_app.py").read_text() + "\n")
    assert application.pin_of(app) != application.pin_of(again)


class Taken:
    """A SuperLink that hands out one message of a run with an app, as a SuperNode sees it."""

    def __init__(self, content: bytes) -> None:
        from flwr.supercore.fab import Fab

        message = Message(RecordDict(), dst_node_id=7, message_type="query")
        message.metadata.__dict__["_message_id"] = "m"
        message.metadata.__dict__["_run_id"] = 1
        self.message, self.fab = message, Fab("hash", content, {"valid_license": "Valid"})

    def functions(self):
        run = SimpleNamespace(fab_hash="hash", override_config={}, series_id=1, primary_task_type="", run_id=1)
        receive = lambda: (self.message, None)  # noqa: E731  # two stand-ins, a line each
        nothing = lambda *_: None  # noqa: E731  # two stand-ins, a line each
        return 7, receive, nothing, lambda run_id: run, lambda hash, run_id: self.fab, nothing, nothing, nothing


@pytest.fixture
def node(monkeypatch) -> Iterator[object]:
    """Flower's SuperNode code, restored afterwards."""
    from flwr.supernode import start_client_internal as found

    for name in ("_init_connection", "_pull_and_store_message", "_verify_fab"):
        monkeypatch.setattr(found, name, getattr(found, name))
    return found


def pulled(node, content: bytes, monkeypatch) -> list[Message]:
    """What a SuperNode answers at once to a message of a run with this app; nothing where it goes on to run it."""
    from contextlib import contextmanager

    @contextmanager
    def connection(**_):
        yield Taken(content).functions()

    answers: list[Message] = []
    monkeypatch.setattr(node, "_init_connection", connection)
    monkeypatch.setattr(node, "_insert_message", lambda message, *_: answers.append(message))
    monkeypatch.setattr(node, "get_fused_config_from_fab", lambda *_: (_ for _ in ()).throw(RuntimeError("runs it")))
    doors.shut_node(doors.app_digest(bundle(a="1")))
    with node._init_connection() as (_, receive, _send, get_run, get_fab, pull, _push, confirm):
        node._pull_and_store_message(
            state=SimpleNamespace(get_run=lambda run: None),
            object_store=None,
            node_config={},
            receive=receive,
            get_run=get_run,
            get_fab=get_fab,
            pull_object=pull,
            confirm_message_received=confirm,
            trusted_entities=None,
        )
    return answers


def test_a_node_runs_the_pinned_app_only_whatever_the_server_vouches_for(node, monkeypatch):
    """The attack: a server that hands out another app, which would read the client's data."""
    (answer,) = pulled(node, bundle(a="evil"), monkeypatch)
    assert answer.has_error()
    assert "could not be verified" in answer.error.reason


def test_a_node_goes_on_to_run_the_pinned_app(node, monkeypatch):
    with pytest.raises(RuntimeError, match="runs it"):
        pulled(node, bundle(a="1"), monkeypatch)


def asked(path: str, host: str) -> int:
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    asyncio.run(doors.NodesOnly(inner)({"type": "http", "path": path, "client": (host, 5)}, None, send))
    return sent[0]["status"]


def test_another_machine_reaches_only_what_nodes_use():
    """The attack: `flwr run` from elsewhere, which would run its app on the server; or a task's token asked for."""
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/", "/v1/fleetx"):
        assert asked(path, "10.0.0.9") == 403
        assert asked(path, "127.0.0.1") == 200
    assert asked("/v1/fleet/pull-messages", "10.0.0.9") == 200
    assert asked("/v1/control/../fleet/", "10.0.0.9") == 403


def test_flower_serves_nodes_where_the_middleware_expects_it():
    from flwr.superlink.routers.fleet.router import router

    assert router.prefix + "/" == doors.OPEN


# What is shown.


def test_the_screen_shows_a_line_a_round_where_it_is_piped():
    stream = io.StringIO()
    screen = live.Screen(stream)
    word = {"round": 1, "rounds": 2, "step": "mask", "done": 3, "clients": 6}
    screen(word)
    states = {"amplified_bias": "alarm", "x": "clear", "y": "unknown", "z": "unknown"}
    done = word | {"decided": {"round": 1, "states": states, "action": "hold"}}
    screen(done | {"round": 2, "step": "train", "done": 0})  # the next round's first word may come at once
    screen(done | {"round": 2, "step": "train", "done": 1})
    assert stream.getvalue() == "round 1/2  ALARM amplified_bias  CLEAR x  2 unknown  HOLD\n"


def test_the_screen_changes_one_line_below_the_rounds_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    screen = live.Screen(stream)
    screen({"round": 1, "rounds": 2, "step": "train", "done": 3, "clients": 6})
    decided = {"round": 1, "states": {"x": "unknown"}, "action": "adopt"}
    now = {"round": 2, "rounds": 2, "step": "agree", "done": 0, "clients": 6, "decided": decided}
    screen(now, "8 of 8 programs up")
    first, second = ([shown.strip() for shown in row.split("\r\x1b[K")[1:]] for row in stream.getvalue().split("\n"))
    assert first == ["round 1/2  train 3/6  0 s", "round 1/2  1 unknown"]
    assert second == ["round 2/2  agree 0/6  8 of 8 programs up  0 s"]
    screen(now | {"ended": 0})
    assert stream.getvalue().endswith("\r\x1b[K")  # the summary begins on a line of its own


def test_a_run_that_told_an_error_ends_with_its_exit_code(tmp_path):
    part = SimpleNamespace(process=None, log=tmp_path / "x")
    assert operate.watched(part, tmp_path, live.Screen(None)) is None
    (tmp_path / live.NAME).write_text(json.dumps({"ended": 4, "error": "the ledger said no"}))
    with pytest.raises(operate.Ended, match="the ledger said no") as caught:
        operate.watched(part, tmp_path, live.Screen(None))
    assert caught.value.exit_code == 4


def test_run_with_the_engine_flower_gives_the_checked_study_to_the_simulation(tmp_path, study, capsys, monkeypatch):
    called = []

    def run(path: Path, out: Path, clients: int, screen: live.Screen) -> int:
        called.append((path, out, clients, path.read_text().count('trust = "none"')))
        return 4

    monkeypatch.setattr(simulate, "run", run)
    monkeypatch.setattr(setup, "prepare", lambda chosen, cache: SimpleNamespace(population=range(chosen.clients.count)))
    monkeypatch.setattr(consent, "check", lambda prepared: None)
    words = ["run", str(study), "--set", "clients.count=3", "--out", str(tmp_path / "out"), "--engine", "flower"]
    assert cli.main(words) == 4
    assert called == [(tmp_path / "out" / "study.toml", tmp_path / "out", 3, 1)]
    words = ["run", "--resume", str(tmp_path / "out"), "--engine", "flower", "--rebaseline", "x"]
    assert cli.main(words) == EXIT_BAD_INPUT
    assert "is not for --engine flower" in capsys.readouterr().err


# With real processes.


SUBMIT = """
import sys
from pathlib import Path
from fedcanary.engines.flower import deploy, live, operate
sys.exit(operate.submit(deploy.load_server(Path(sys.argv[1])), Path(sys.argv[2]), live.Screen(None)))
"""


def started_as(verb: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "started.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedcanary", "deploy", verb, str(folder)], stderr=log, stdout=log
        )


def up(made: Path) -> subprocess.Popen[bytes]:
    return started_as("up", made)


def until(true, seconds: float, log: Path) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.5)


def ports(id: str) -> list[str]:
    """Sockets on which processes of a deployment listen."""
    listening = {
        line.split()[9]: line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    links = [link for pid in living(id) for link in Path(f"/proc/{pid}/fd").glob("*")]
    return [listening[inode] for link in links if (inode := os.readlink(link)[8:-1]) in listening]


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_deployment_runs_survives_a_killed_node_refuses_another_app_and_leaves_nothing(made, tmp_path):
    server, nodes = deploy.load(made)
    log, keeper = made / "started.log", up(made)
    try:

        def said(text: str, times: int = 1) -> bool:
            return log.exists() and log.read_text().count(text) >= times

        until(lambda: said("node-000: up") and said("node-001: up"), 120, log)
        assert len(ports(server.id)) == 3
        assert operate.submit(server, tmp_path / "out", live.Screen(None)) == EXIT_ALARM
        assert json.loads((tmp_path / "out" / "heard.json").read_text()) == [[[0, 1], [1, 1]], [[0, 2], [1, 2]]]
        # another app: the SuperLink accepts no run of it
        application.write_app(tmp_path / "evil", echo.code(2, 0) + "\n# other\n")
        with pytest.raises(operate.FedcanaryError, match="Invalid app specification"):
            programs.flwr(server, "run", str(tmp_path / "evil"), "deployment")
        assert len(programs.flwr(server, "list", "deployment")["runs"]) == 1
        # SIGKILL: Flower refuses the node until its old heartbeat has expired, about 55 s
        for pid in living(server.id, nodes[0].name):
            os.kill(pid, signal.SIGKILL)
        until(lambda: said("node-000: waiting") and said("node-000: up", 2), 150, log)
        assert operate.submit(server, tmp_path / "out2", live.Screen(None)) == EXIT_ALARM
        heard = json.loads((tmp_path / "out2" / "heard.json").read_text())
        assert heard == [[[0, 3], [1, 3]], [[0, 4], [1, 4]]]  # the node's own state outlived it
        assert operate.status(made)["nodes"][0] == {"client": 0, "process": True, "flower": "online"}
    finally:
        operate.down(made)
    assert keeper.wait(30) == 0
    assert living(server.id) == []
    assert not operate._is_held(made / "server")


def own_address() -> str:
    """An address of this machine that is not the loopback's; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        return "" if asked.getsockname()[0].startswith("127.") else str(asked.getsockname()[0])


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_server_and_nodes_on_their_own_and_what_another_machine_may_ask(tmp_path, study, app):
    host = own_address()
    if not host:
        pytest.skip("this machine has no other address than the loopback's")
    deploy.init(tmp_path / "d", study, nodes=2, host=host, port=free_port(), app=app)
    server, nodes = deploy.load(tmp_path / "d")
    started = [started_as("server", server.folder), *(started_as("node", node.folder) for node in nodes)]
    try:
        log = tmp_path / "d" / "nodes" / "001" / "started.log"
        until(lambda: log.exists() and "node-001: up" in log.read_text(), 150, log)
        assert operate.submit(server, tmp_path / "out", live.Screen(None)) == EXIT_ALARM
        context = ssl.create_default_context(cafile=str(server.folder / "ca.crt"))
        codes = {}
        for address in (host, "127.0.0.1"):
            for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/pull-messages"):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(f"https://{address}:{server.port}{path}", b"", 10, context=context)
                codes[address, path.split("/")[2]] = caught.value.code
                caught.value.close()
        assert codes[host, "control"] == codes[host, "runtime"] == 403
        assert 403 not in {codes["127.0.0.1", name] for name in ("control", "runtime")}
        assert codes[host, "fleet"] == codes["127.0.0.1", "fleet"]
    finally:
        for process in reversed(started):  # one's end leaves the others alone
            assert living(server.id)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    assert living(server.id) == []


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_run_goes_on_while_its_superlink_is_killed_and_started_again(made, tmp_path):
    server, _ = deploy.load(made)
    keeper = up(made)
    submit = [sys.executable, "-c", SUBMIT, str(made / "server"), str(tmp_path / "out")]
    try:
        until(lambda: "node-001: up" in (made / "started.log").read_text(), 120, made / "started.log")
        run = subprocess.Popen(submit)
        until(lambda: "round" in live.read(tmp_path / "out"), 120, made / "started.log")
        (link,) = living(server.id, "superlink")
        os.kill(link, signal.SIGKILL)
        assert run.wait(240) == EXIT_ALARM
        assert len(json.loads((tmp_path / "out" / "heard.json").read_text())) == 2
        assert "superlink: waiting" in (made / "started.log").read_text()
    finally:
        operate.down(made)
        keeper.wait(30)
    assert living(server.id) == []


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_deployment_ends_with_the_process_that_runs_it_even_by_sigkill(made):
    server, _ = deploy.load(made)
    keeper = up(made)
    until(lambda: len(living(server.id)) >= 4, 120, made / "started.log")
    keeper.kill()
    keeper.wait()
    until(lambda: not living(server.id), 40, made / "started.log")


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_simulation_plays_all_clients_and_leaves_neither_ray_nor_files(tmp_path, study, monkeypatch):
    application.write_app(tmp_path / "app", echo.code(5, EXIT_ALARM))
    short = Path(tempfile.mkdtemp(prefix="t"))  # a socket's path has 107 bytes
    monkeypatch.setattr(simulate.secrets, "token_hex", lambda n: "simulated")
    monkeypatch.setattr(simulate.tempfile, "tempdir", str(short))
    out = tmp_path / "out"
    out.mkdir()
    assert simulate.run(study, out, 5, screen=live.Screen(None), app=tmp_path / "app") == EXIT_ALARM
    assert json.loads((out / "heard.json").read_text()) == [[[c, t] for c in range(5)] for t in (1, 2)]
    assert sorted(p.name for p in (out / "clients").iterdir()) == list("01234")
    assert living("simulated") == []
    short.rmdir()  # which fails if anything is in it
    assert (out / simulate.LOG).exists()
