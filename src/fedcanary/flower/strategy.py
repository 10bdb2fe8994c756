"""The server's end of an app that exists: a strategy around the app's own, which sees what it would see without us.

The wrapped strategy draws the nodes, sends the arrays and averages the replies; ours adds one ConfigRecord to each
training message, and takes the client's out of each reply before the wrapped one gets it. A verdict is written after
each round; whatever goes wrong after the first one began is logged, and ends the watching, not the training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from safetensors.torch import save

from fedcanary import pipeline
from fedcanary.engines import consent, places
from fedcanary.engines.flower import attach, attach_server, certificates, enrol
from fedcanary.engines.flower.attach import AppSetup
from fedcanary.engines.flower.attach_server import AppServer, Closed, Drawn, Turns
from fedcanary.engines.flower.clients import Patience
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.wire import KEY, RECORD
from fedcanary.errors import BadInput
from fedcanary.flower.mod import BASE, RUN, STUDY
from fedcanary.models import adapters
from fedcanary.models.adapters import Adapter
from fedcanary.pipeline import Progress
from fedcanary.privacy.secagg import Registry

RUNS, FOLDER = "fedcanary-runs", "fedcanary-clients"
PATIENCE: Final = Patience(step=120.0, nodes=60.0)
ENDED: Final = "ended"
LOG: Final = logging.getLogger("flwr")


class CanaryStrategy(Strategy):
    """Any strategy, and fedcanary beside it.

    Args:
        strategy: the app's own.
        study: the study's file; `attach.find` says where it is looked for.
        out: the run's folder, for `fedcanary report`, `replay` and `verify`; one that is there goes on. When absent,
            `fedcanary-runs/<the Flower run's number>` in the working directory.
        patience: seconds for each step of a secure sum.

    Attributes:
        out: the folder, once the first round has begun.

    Raises:
        BadInput: every problem of the study and of what it names in the app; or the strategy has a loop of its own.
    """

    def __init__(
        self,
        strategy: Strategy,
        study: str | Path = STUDY,
        *,
        out: str | Path | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        if type(strategy).start is not Strategy.start:
            what = f"{type(strategy).__name__} has a start of its own, which would pass us by"
            raise BadInput.of("strategy", what, "leave the loop to Strategy.start")
        file = attach.find(study)
        self.strategy, self._study, self._patience = strategy, file, patience
        self._attached = attach.load(file)
        self._named = attach.named(self._attached, file)
        self.out = None if out is None else Path(out)
        self._turns = Turns()
        self._thread: threading.Thread | None = None
        self._server: AppServer | None = None
        self._setup: AppSetup | None = None
        self._messages: list[Message] = []
        self._begun = self._over = self._open_round = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "strategy" not in vars(self):
            raise AttributeError(name)
        return getattr(self.strategy, name)

    # --- Flower's side

    def start(self, grid: Grid, *arguments: Any, **more: Any) -> Result:
        """As `Strategy.start`."""
        try:
            return super().start(grid, *arguments, **more)
        finally:
            self.close()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, with our question in each."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        if messages:
            self._watched(lambda: self._open(messages, grid))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The wrapped strategy's aggregate of the replies without our part of them."""
        replies = list(replies)
        said = {}
        ids = {message.metadata.message_id: message.metadata.dst_node_id for message in self._messages}
        for reply in replies:
            part = reply.content.pop(RECORD, None) if reply.has_content() else None
            node, data = ids.get(reply.metadata.reply_to_message_id), part.get(KEY) if part is not None else None
            if node is not None and isinstance(data, bytes):
                said[node] = data
        result = self.strategy.aggregate_train(server_round, replies)
        if self._open_round:
            self._watched(lambda: self._close_round(said))
        return result

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The wrapped strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The wrapped strategy's, and where the record is."""
        self.strategy.summary()
        LOG.info("\t└──> fedcanary: study %s, up to %s rounds", self._study, self._attached.rounds)

    # --- ours

    def close(self) -> None:
        """There is no next round; what is complete is in the record."""
        if self._thread is not None and not self._over:
            self._over = True
            self._turns.close()
            self._thread.join()

    def _watched(self, step: Callable[[], None]) -> None:
        """Take a step; what goes wrong before the first round is raised, and later ends the watching alone."""
        if self._over:
            return
        try:
            step()
        except Exception as error:
            if not self._begun:
                raise
            self._over = True
            LOG.error("fedcanary stopped watching, the training goes on: %s: %s", type(error).__name__, error)

    def _open(self, messages: list[Message], grid: Grid) -> None:
        arrays = {id(message.content): _arrays(message.content) for message in messages}
        if self._thread is None:
            self._begin(arrays[id(messages[0].content)], grid)
        server, setup = self._server, self._setup
        if self._over or server is None or setup is None:
            return  # the run in the folder had come to its end before
        digests = {key: adapters.digest(each) for key, each in arrays.items()}
        drawn = Drawn({m.metadata.dst_node_id: digests[id(m.content)] for m in messages})
        asks: dict[int, bytes] = self._turns.give(drawn)
        self._begun = True
        begun = adapters.digest(setup.theta_0)
        parts: dict[tuple[int, bytes, bool], RecordDict] = {}
        for message in messages:
            node, key = message.metadata.dst_node_id, id(message.content)
            if node not in asks:
                continue
            needs = digests[key] != begun and node not in server.begun
            known = (key, asks[node], needs)
            if known not in parts:  # equal contents are one object, which Flower uploads once
                ours = ConfigRecord({KEY: asks[node], RUN: server.run})
                if needs:
                    ours[BASE] = save({name: tensor.contiguous() for name, tensor in setup.theta_0.items()})
                parts[known] = RecordDict({**message.content, RECORD: ours})
            message.content = parts[known]
        self._messages, self._open_round = messages, True

    def _close_round(self, said: dict[int, bytes]) -> None:
        self._open_round = False
        self._over = self._turns.give(said) is ENDED

    def _begin(self, arrays: Adapter, grid: Grid) -> None:
        """Check everything that can be wrong, then let our loop run to where it waits for the app's first round."""
        out = self.out = (self.out or Path(RUNS) / str(grid.run.run_id)).absolute()
        known = attach.setup_of(self._attached, self._named, arrays)  # before anything is written
        consent.check(known)
        setup = attach.setup_of(self._attached, self._named, attach_server.theta_0(out, arrays))
        self._setup = setup
        (out / "study.toml").write_text(self._attached.toml(), encoding="utf-8")
        turns, registry = self._turns, self._registry(setup)

        def loop() -> None:
            server = None
            try:
                server = self._server = AppServer(setup, out, Link(grid), registry, turns, self._patience)
                pipeline.run(setup, out, clients=server, watch=self._tell)
            except Closed:
                pass
            except BaseException as error:
                turns.end(error)
            else:
                turns.end(ENDED)
            finally:
                if server is not None:
                    server.close()

        self._thread = threading.Thread(target=loop, name="fedcanary", daemon=True)
        self._thread.start()
        self._over = turns.wait() is ENDED
        LOG.info("fedcanary: the run's folder is %s", out)

    def _registry(self, setup: AppSetup) -> Registry | None:
        """Everybody's keys, for secure sums; in a simulation, whose clients are on this machine, they are made."""
        if setup.study.privacy.trust != "secure_aggregation":
            return None
        own = self._attached.attach.registry
        if own is None:
            enrol.everybody(Path(FOLDER).absolute() / places.CLIENTS, len(setup.population))
        file = self._study.parent / own if own else Path(FOLDER).absolute() / certificates.REGISTRY
        return Registry(keys={client: member.key for client, member in certificates.load_registry(file).items()})

    def _tell(self, progress: Progress) -> None:
        if progress.verdict is None:
            return
        states = progress.verdict.states.items()
        told = ", ".join(f"{mode} {state}" for mode, state in states if state != "unknown") or "nothing known yet"
        alarm = any(state == "alarm" for _, state in states)
        LOG.log(logging.WARNING if alarm else logging.INFO, "fedcanary, round %s: %s", progress.round, told)


def _arrays(content: RecordDict) -> Adapter:
    records = list(content.array_records.values())
    if len(records) != 1:
        what = f"a training message has {len(records)} ArrayRecords"
        raise BadInput.of("the app's messages", what, "send the model as the one ArrayRecord")
    return dict(records[0].to_torch_state_dict())


def around(name: str) -> type[CanaryStrategy]:
    """Flower's strategy of that name with ours around it, which takes the same arguments, and `study` and `out`.

    Raises:
        AttributeError: Flower has none of that name.
    """
    own = getattr(flower, name, None)
    if not (isinstance(own, type) and issubclass(own, Strategy)) or own is Strategy:
        raise AttributeError(f"fedcanary.flower has no {name!r}, and neither has flwr.serverapp.strategy")

    def begin(self: CanaryStrategy, *arguments: Any, **more: Any) -> None:
        ours = {key: more.pop(key) for key in ("study", "out", "patience") if key in more}
        CanaryStrategy.__init__(self, own(*arguments, **more), **ours)

    return type(name, (CanaryStrategy,), {"__init__": begin, "__doc__": f"{name} with fedcanary around it."})
