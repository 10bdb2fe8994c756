"""fedcanary attached to an ordinary Flower app: what it reads, what it never disturbs, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attached import EXAMPLES, FIRST, Federation, changed, copy, edit, within
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

from fedcanary import pipeline
from fedcanary.engines import verify
from fedcanary.engines.flower import attach, certificates, enrol
from fedcanary.engines.flower.attach_node import AppClients
from fedcanary.engines.flower.clients import Patience
from fedcanary.engines.flower.grid import Fault
from fedcanary.engines.flower.wire import Ask, decode_answers, decode_asks, encode
from fedcanary.errors import BadInput
from fedcanary.flower import CanaryStrategy, strategy
from fedcanary.privacy import contract as contracts
from fedcanary.record import RunRecord

CLIENTS = 4
CONFIG = {"num-server-rounds": 2, "local-epochs": 1, "learning-rate": 0.01}
SMALL = (
    ("clients = 24", f"clients = {CLIENTS}"),
    ("epsilon = 8", "epsilon = 40"),
    ("min_cohort = 12", "min_cohort = 3"),
)


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """Make the example's app, attached, small, and with changes to its study or its code."""
    monkeypatch.chdir(tmp_path)

    def make(trust, *, study=(), app=(), **more) -> Federation:
        where = copy("attach-pytorch", tmp_path, attach=True)
        edit(where / "study.toml", *SMALL, ("rounds = 5", "rounds = 2"), *study)
        edit(where / "study.toml", ('trust = "secure_aggregation"', f'trust = "{trust}"'))
        if trust == "none":
            edit(where / "study.toml", ('panel = "same"\n', ""), ("epsilon = 40\n", ""))
        edit(where / "loans" / "task.py", ("(partition_id, 160)", "(partition_id, 50)"), ("120", "30"))
        for file, *pairs in app:
            edit(where / "loans" / file, *pairs)
        imported.enter_context(within(where))
        return Federation(where, CLIENTS, CONFIG, **more)

    with ExitStack() as imported:
        yield make


def record_of(one: Federation) -> RunRecord:
    return RunRecord.load(one.folder / "fedcanary-runs" / "1")


def shown(one: Federation) -> list[str]:
    return [path.read_text("utf-8") for path in one.folder.rglob("errors.log")]


def final(one: Federation) -> dict[str, torch.Tensor]:
    return torch.load(one.folder / "loans.pt")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """What the app trains without us."""
    folder = tmp_path_factory.mktemp("untouched")
    app = copy("attach-pytorch", folder, attach=False)
    edit(app / "loans" / "task.py", ("(partition_id, 160)", "(partition_id, 50)"), ("120", "30"))
    with pytest.MonkeyPatch.context() as patch, within(app):
        patch.chdir(folder)
        Federation(app, CLIENTS, CONFIG).run()
    return torch.load(folder / "loans.pt")


@pytest.mark.parametrize("example", ["attach-pytorch", "attach-peft"])
def test_two_lines_and_one_file_attach_it(example, tmp_path):
    lines = changed(example)
    assert sorted(Path(file).name for file in lines) == ["client_app.py", "server_app.py"]
    for old, new in lines.values():
        assert len(old) == len(new) == 1
        assert old[0].startswith("from flwr.") and new[0].startswith("from fedcanary.flower import ")
    before = {p.relative_to(EXAMPLES / example / "before") for p in (EXAMPLES / example / "before").rglob("*.*")}
    app = copy(example, tmp_path, attach=True)
    assert {p.relative_to(app) for p in app.rglob("*.*")} - before == {Path("study.toml")}


@pytest.mark.parametrize("trust", ["local", "central", "secure_aggregation"])
def test_the_app_trains_what_it_trained_before_to_the_last_bit(federation, untouched, trust):
    """Its clients shuffle with the global generator, and its strategy draws nodes with another."""
    attached = federation(trust)
    grid = attached.run()["grid"]
    assert same(final(attached), untouched)
    assert shown(attached) == []
    record = record_of(attached)
    assert record.rounds == 2 and record.ended
    assert all(release.count == CLIENTS for body in record.releases().values() for release in body.values())
    questions = {kind for kind in grid.sent if kind.startswith("query")}
    assert questions == ({"query.fedcanary"} if trust == "secure_aggregation" else set())
    assert verify.verify(attached.folder / "fedcanary-runs" / "1")["rounds"] == 2
    for (_, again), body in zip(pipeline.replay(record), record.of("round"), strict=True):
        assert again == body["evidence"]
    agreed = contracts.load(attached.folder / "fedcanary-runs" / "1" / "contract.toml")
    assert agreed.updates is None
    assert "outside of the contract" in record.header["attached"]["updates"]


def test_a_generator_that_moved_would_have_been_seen(federation, untouched, monkeypatch):
    """The planted bug: reading that is not kept apart from the app's random numbers."""
    attached = federation("none")
    monkeypatch.setattr(AppClients, "_view", lambda self, read=AppClients._view: (torch.rand(1), read(self))[1])
    attached.run()
    assert not same(final(attached), untouched)


def test_what_is_released_is_what_the_models_say(federation):
    """Against an oracle that asks the app's own module, over the app's own messages."""
    one = federation("none", inbox=True)
    grid = one.grid()
    sent: list[dict[str, torch.Tensor]] = []
    push = grid.push_messages

    def watched(messages):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "train":
            sent.append(messages[0].content["arrays"].to_torch_state_dict())
        return push(messages)

    grid.push_messages = watched
    one.run(grid)
    task = one.module("task")
    items = next(s for s in attach.load(one.folder / "app" / "study.toml").attach.suites if s.role == "bias").items
    texts, women = [i["text"] for i in items], np.array([i["group"] == "ms" for i in items])

    def granted(arrays, bags):
        net = task.Net()
        net.load_state_dict(arrays)
        return torch.softmax(net(bags), 1)[:, 1].detach().double().numpy()

    replies = [m for m in grid.inbox if m.metadata.message_type == "train"]
    for round in (1, 2):
        returned = [m.content["arrays"].to_torch_state_dict() for m in replies[(round - 1) * CLIENTS :][:CLIENTS]]
        base = granted(sent[0], task.encode(texts))
        change = [granted(arrays, task.encode(texts)) - base for arrays in returned]
        contrast = sum(np.clip(c[~women].mean() - c[women].mean(), -0.25, 0.25) for c in change)
        released = record_of(one).releases()[round]
        assert released["amplified_bias"].sum("contrast:mr") == pytest.approx(contrast, abs=1e-6)
        scores = []
        for client in range(CLIENTS):
            texts_of, labels = task.requests(client, 50)
            right = granted(sent[round - 1], task.encode(texts_of[30:]))
            scores.append(np.where(labels[30:].numpy() == 1, right, 1 - right).mean())
        assert released["fairness_collapse"].sum("score") == pytest.approx(sum(scores), abs=1e-5)


def test_nothing_of_a_client_is_in_the_inbox_but_its_sealed_part(federation):
    """Under secure aggregation the training's reply says that a vector waits, and whose key masks it; no number."""
    one = federation("secure_aggregation")
    grid, inbox = one.grid(), []
    pull = grid.pull_messages

    def watched(ids):
        for message in pull(ids):
            inbox.append((message.metadata.message_type, {name: dict(part) for name, part in message.content.items()}))
            yield message

    grid.pull_messages = watched
    one.run(grid)
    trained = [content for kind, content in inbox if kind == "train"]
    assert len(trained) == 2 * CLIENTS
    for content in trained:
        assert set(content) == {"arrays", "metrics", "fedcanary"} and set(content["fedcanary"]) == {"parcel"}
        answers = decode_answers(content["fedcanary"]["parcel"], 1 << 20)
        assert [(a.refused, set(a.fields)) for a in answers] == [("sealed", set()), ("", {"message"})]
    steps = [content for kind, content in inbox if kind == "query.fedcanary"]
    assert len(steps) == CLIENTS * (1 + 2 * 4)  # who are you; share, mask, agree, unmask
    assert all(set(content) == {"fedcanary"} for content in steps)


def test_the_strategy_inside_sees_the_apps_own_records_alone(federation):
    seen = []

    class Own(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(set(reply.content) for reply in replies)
            return super().aggregate_train(server_round, replies)

    one = federation("local")
    server = one.module("server_app")
    server.FedAvg = lambda **more: CanaryStrategy(Own(**more), study=one.folder / "app" / "study.toml")
    one.run()
    assert seen == [{"arrays", "metrics"}] * 2 * CLIENTS


def test_any_strategy_can_be_inside(federation):
    one = federation("local", app=[("server_app.py", ("import FedAvg", "import FedMedian"), ("FedAvg(", "FedMedian("))])
    one.run()
    assert record_of(one).rounds == 2
    built = strategy.around("FedMedian")(study=one.folder / "app" / "study.toml", fraction_train=0.5)
    assert isinstance(built.strategy, FedMedian) and isinstance(built, Strategy) and built.fraction_train == 0.5
    with pytest.raises(AttributeError, match="FedAverage"):
        strategy.around("FedAverage")


def test_a_strategy_with_a_loop_of_its_own_is_told_so(federation):
    class Loop(FedAvg):
        def start(self, *arguments, **more):
            raise AssertionError

    one = federation("local")
    with pytest.raises(BadInput, match="start of its own"):
        CanaryStrategy(Loop(), study=one.folder / "app" / "study.toml")


def test_a_mod_alone_is_enough_where_there_is_no_secure_sum(federation):
    lines = ("from fedcanary.flower import ClientApp", "from flwr.clientapp import ClientApp\nimport fedcanary.flower")
    one = federation(
        "local",
        app=[("client_app.py", lines, ("ClientApp()", 'ClientApp(mods=[fedcanary.flower.probe_mod("study.toml")])'))],
    )
    one.run()
    assert [r["utility"].count for r in record_of(one).releases().values()] == [CLIENTS, CLIENTS]


def test_who_comes_later_is_told_what_the_run_began_with(federation):
    """Half of the nodes train in a round; each compares with the first round's arrays, which most never received."""
    half = ("server_app.py", ("FedAvg(fraction_evaluate=0.5)", "FedAvg(fraction_train=0.5, fraction_evaluate=0.0)"))
    one = federation("local", study=[("min_cohort = 3", "min_cohort = 2"), ("rounds = 2", "rounds = 4")], app=[half])
    one.config = CONFIG | {"num-server-rounds": 4}
    one.run()
    record = record_of(one)
    assert [body["clients"] for body in record.of("round")] == [2] * 4
    assert [r["utility"].count for r in record.releases().values()] == [2] * 4
    assert len({p.read_bytes() for p in one.folder.rglob("base.safetensors")}) == 1


def test_under_rotating_panels_a_client_answers_once(federation):
    change = [('panel = "same"', 'panel = "rotating"'), ("min_cohort = 3", "min_cohort = 2")]
    one = federation("local", study=change)
    one.run()
    record = record_of(one)
    assert [body["clients"] for body in record.of("round")] == [2, 2]
    assert not any(body["refused"] for body in record.of("round"))


def test_a_client_holds_the_server_to_its_own_policy(federation, untouched):
    one = federation("local")
    for client in (2,):
        own = one.folder / "fedcanary-clients" / "clients" / f"{client:06d}"
        own.mkdir(parents=True)
        (own / "policy.toml").write_text('forbidden_probes = ["amplified_bias"]\nsimulated_noise = true\n', "utf-8")
    one.run()
    for body in record_of(one).of("round"):
        assert body["refused"]["probe_forbidden"] == 1 and body["failed"] == 0
    assert [r["utility"].count for r in record_of(one).releases().values()] == [3, 3]
    assert same(final(one), untouched)


def test_what_goes_wrong_at_a_client_stays_there(federation):
    """Its training goes on, and no text of an exception travels."""
    broken = (
        "def load_data(partition_id",
        "def held_out(partition_id):\n    if partition_id == 2:\n        raise ValueError('the secret of Ms Ada')\n"
        "    return load_data(partition_id, 4)\n\n\ndef load_data(partition_id",
    )
    one = federation(
        "local", study=[("loans.task:load_data", "loans.task:held_out")], app=[("task.py", broken)], inbox=True
    )
    grid = one.run()["grid"]
    assert [body["failed"] for body in record_of(one).of("round")] == [1, 1]
    assert any("the secret" in text for text in shown(one))
    assert not any("secret" in str(m.content) or m.has_error() for m in grid.inbox)


def test_nodes_without_the_mod_are_missing_and_too_few_open_nothing(federation):
    one = federation("local")
    app, plain = one.module("client_app").app, FIRST + 1

    class Mixed:
        def __call__(self, message: Message, context):
            ours = message.content.pop("fedcanary", None) if context.node_id > plain else None
            reply = app(message, context)
            assert ours is None or "fedcanary" not in reply.content
            return reply

    app_of = one.grid()
    app_of._app = Mixed()
    one.run(app_of)
    for body in record_of(one).of("round"):
        assert body["failed"] == 2 and "no sum over fewer than 3" in body["aborted"]


def test_what_goes_wrong_here_ends_the_watching_and_not_the_training(federation, untouched, monkeypatch, caplog):
    one = federation("local")
    step = pipeline.monitor.step

    def broken(plan, state, releases):
        if releases["utility"].round == 2:
            raise OSError("disk full")
        return step(plan, state, releases)

    monkeypatch.setattr(pipeline.monitor, "step", broken)
    one.run()
    assert same(final(one), untouched)
    assert record_of(one).rounds == 1 and not record_of(one).ended


def test_a_run_goes_on_in_its_folder_when_the_server_was_lost(federation, monkeypatch):
    """The second server's rounds are the record's third and fourth, compared with the first server's beginning."""
    one = federation("local", study=[("rounds = 2", "rounds = 4")])
    one.run()
    assert (record_of(one).rounds, record_of(one).ended) == (2, False)
    first = (one.folder / "fedcanary-runs/1/base.safetensors").read_bytes()
    one.run(seed=4)
    record = record_of(one)
    assert (record.rounds, record.ended) == (4, True)
    assert [r["utility"].count for r in record.releases().values()] == [CLIENTS] * 4
    assert (one.folder / "fedcanary-runs/1/base.safetensors").read_bytes() == first
    one.run(seed=5)  # all rounds are over: the app trains unwatched
    assert record_of(one).rounds == 4


@pytest.mark.parametrize("noise", ["system", "simulated"])
def test_a_server_that_calls_itself_another_run_gets_no_second_look(federation, noise):
    """With the operating system's noise a second sealed vector would halve it: the client's own ledger says no."""
    more = [("min_cohort = 3", f'min_cohort = 3\nnoise = "{noise}"')]
    one = federation("local", study=more)
    one.run()
    for name in ("attach.sqlite", "flower.sqlite", "record.jsonl", "ledger.sqlite", "ledger.sqlite.anchor"):
        (one.folder / "fedcanary-runs/1" / name).unlink()
    one.run()
    counts = [r["utility"].count if r else 0 for r in record_of(one).releases().values()]
    assert counts == ([0, 0] if noise == "system" else [CLIENTS] * 2)
    if noise == "system":
        assert [body["refused"] for body in record_of(one).of("round")] == [{"already_answered": CLIENTS}] * 2


def test_a_node_goes_by_its_own_list_of_keys_and_not_by_the_servers(federation):
    """The attack: the list that comes with the app has a key of the server's own in a client's place."""
    one = federation("secure_aggregation", study=(("[attach]\n", '[attach]\nregistry = "registry.toml"\n'),))
    own = one.folder / "fedcanary-clients"
    enrol.everybody(own / "clients", CLIENTS)
    members = certificates.load_registry(own / "registry.toml")
    forged = members | {3: replace(members[3], key=bytes(32))}
    certificates.write_registry(one.folder / "app" / "registry.toml", forged)
    one.run()
    assert not any(record_of(one).releases().values())
    shutil.rmtree(one.folder / "fedcanary-runs")
    (own / "registry.toml").unlink()  # who has no list of its own believes the server's
    one.run()
    assert [release["utility"].count for release in record_of(one).releases().values()] == [CLIENTS - 1] * 2


def test_a_client_answers_only_about_what_it_was_sent(federation, monkeypatch):
    """A server that asks under another digest than that of the arrays is refused, and so is another beginning."""
    one = federation("local")
    forge = {"arrays": "0" * 32}
    make = Ask.__init__

    def forged(self, kind, fields):
        make(self, kind, {**fields, **forge} if "arrays" in fields else fields)

    monkeypatch.setattr("fedcanary.engines.flower.attach_server.Ask", type("Forged", (Ask,), {"__init__": forged}))
    one.run()
    assert [body["failed"] for body in record_of(one).of("round")] == [CLIENTS] * 2


def test_a_malformed_question_is_answered_with_nothing(federation):
    one = federation("local")
    one.config = CONFIG | {"num-server-rounds": 1}
    for parcel in (b"", b"\x01\x00\x01", encode([Ask("train", {"round": 1})])):
        grid = one.grid(inbox=True)
        push = grid.push_messages

        def planted(messages, push=push, parcel=parcel):
            messages = list(messages)
            for message in messages:
                message.content["fedcanary"] = ConfigRecord({"parcel": parcel, "run": "../../etc"})
            return push(messages)

        grid.push_messages = planted
        server = one.module("server_app")
        server.FedAvg = FedAvg
        one.run(grid)
        replies = [m for m in grid.inbox if m.metadata.message_type == "train"]
        said = [decode_answers(m.content["fedcanary"]["parcel"], 1 << 20) for m in replies]
        assert not any(answer.fields for answers in said for answer in answers)
    assert not (one.folder / "fedcanary-clients" / "runs").exists()


def problems(one: Federation) -> list[str]:
    with pytest.raises(BadInput) as error:
        CanaryStrategy(FedAvg(), study=one.folder / "app" / "study.toml")
    assert all(problem.remedy for problem in error.value.problems)
    return [f"{problem.where}: {problem.what}" for problem in error.value.problems]


def test_every_problem_of_the_file_is_told_at_once(federation):
    one = federation("local")
    edit(
        one.folder / "app" / "study.toml",
        ('encode = "loans.task:encode"', 'encoder = "loans.task:encode"'),
        ("epsilon = 40", "epsilon = 400"),
        ("[privacy]", '[personalize]\nlr = 1\n\n[policy]\non_alarm = "hold"\n\n[privacy]'),
    )
    text = "\n".join(problems(one))
    for word in ("personalize", "attach.encoder", "privacy.epsilon"):
        assert word in text


def test_every_name_that_is_not_there_is_told_at_once(federation):
    one = federation("local")
    edit(
        one.folder / "app" / "study.toml",
        ("loans.task:Net", "loans.task:Nett"),
        ("loans.task:encode", "loans.tasks:encode"),
        ("loans.task:load_data", "load_data"),
        ('label = "refused"', 'label = "rejected"'),
    )
    text = "\n".join(problems(one))
    for word in ("'Nett'", "loans.tasks", "'load_data'", "'rejected'"):
        assert word in text


def test_a_model_that_cannot_take_the_arrays_is_told_before_anything_is_written(federation):
    one = federation(
        "local", app=[("task.py", ("def fit(", "def Other():\n    return nn.Linear(BUCKETS, 2)\n\n\ndef fit("))]
    )
    edit(one.folder / "app" / "study.toml", ("loans.task:Net", "loans.task:Other"))
    with pytest.raises(BadInput, match="cannot take the app's arrays"):
        one.run()
    assert not (one.folder / "fedcanary-runs").exists()


def test_nothing_of_flower_is_loaded_before_it_is_asked_for():
    code = "import sys, fedcanary.flower; assert 'flwr' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's and transformers' own
def test_an_app_that_trains_a_peft_adapter_is_read_and_trains_the_same(tmp_path, monkeypatch):
    finals, released = [], {}
    for name, ours in (("before", False), ("after", True)):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        app = copy("attach-peft", folder, attach=ours)
        if ours:
            table = 'trust = "secure_aggregation"\npanel = "same"\nepsilon = 8\nmin_cohort = 12'
            edit(app / "study.toml", ("clients = 24", "clients = 2"), (table, 'trust = "none"'))
        edit(app / "orders" / "task.py", ("range(36)", "range(12)"), ("rows[:24], rows[24:]", "rows[:8], rows[8:]"))
        with within(app):
            Federation(app, 2, {"num-server-rounds": 2, "local-epochs": 1, "learning-rate": 0.01}).run()
        finals.append(torch.load(folder / "orders.pt"))
        if ours:
            released = RunRecord.load(folder / "fedcanary-runs" / "1").releases()
    assert same(*finals)
    assert [r["utility"].count for r in released.values()] == [2, 2]
    assert released[1]["alignment_erosion"].sum("refusal") == 0  # received is theta_0 in the first round
    assert released[2]["alignment_erosion"].sum("refusal") != 0
    assert released[2]["utility"].sum("score_gain") > 0


LOST = {
    # who is lost with which message under way: sent in a round are train, share, masked vector, agree, unmask
    "before it shares": ((2,), "share", CLIENTS - 1),
    "before it masks": ((2,), "train", CLIENTS - 1),
    "before it agrees": ((2,), "agree", CLIENTS),
    "before it unmasks": ((2,), "unmask", CLIENTS),
    "with too many": ((1, 2), "train", 0),
}


@pytest.mark.parametrize("when", LOST)
def test_who_falls_out_of_a_secure_sum_costs_no_more_than_its_own_part(federation, untouched, when):
    """Its vector is in the sum if it had come; below the floor nothing is opened; training goes on."""
    who, step, count = LOST[when]

    def faults(message):
        if message.metadata.message_type != "query.fedcanary" or message.metadata.dst_node_id - FIRST not in who:
            return None
        kinds = {
            (ask.kind, ask.fields.get("round")) for ask in decode_asks(message.content["fedcanary"]["parcel"], 1 << 20)
        }
        return Fault(kind="drop_request") if (step, 1) in kinds else None

    one = federation("secure_aggregation", faults=faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CanaryStrategy.__init__, "__kwdefaults__", {"out": None, "patience": Patience(step=0.2, nodes=0.2)}
        )
        one.run()
    first, second = record_of(one).releases().values()
    assert (first["utility"].count if first else 0) == count
    assert bool(count) != bool(next(record_of(one).of("round"))["aborted"])
    assert second["utility"].count == CLIENTS
    assert same(final(one), untouched)
