"""The client's end of an app that exists: a mod around its training, and a handler of the questions that follow.

node_config   fedcanary-client: the client's number (else partition-id); fedcanary-folder: its own disk (else
              fedcanary-clients in the working directory, which the clients of a simulation share)

What the app gets is what its server sent, and what it returns is what its server gets, but for one ConfigRecord of ours
beside each. Whatever goes wrong here is in the client's own errors.log; the app's training does not fail of it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import ClientFnExt
from flwr.clientapp import ClientApp as FlowerApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedcanary.engines.flower.attach import find
from fedcanary.engines.flower.attach_node import AppNode, Trained, app_of, host_of
from fedcanary.engines.flower.node import FAILED, HELLO, Wrong
from fedcanary.engines.flower.wire import (
    KEY,
    LARGEST,
    RECORD,
    Answer,
    Ask,
    Malformed,
    data_of,
    decode_asks,
    encode,
    record,
)
from fedcanary.models.adapters import Adapter

STUDY: Final = "study.toml"
RUN, BASE = "run", "base"  # keys beside the parcel, in what comes with a training


def probe_mod(study: str | Path = STUDY) -> Mod:
    """A mod that reads what training made of the arrays, and sends it sealed with the training's reply.

    Enough by itself where no secure sum is made: a mod is asked nothing that its app has no handler for.

    Raises:
        BadInput: the study's file is not there.
    """
    return partial(_around, find(study))


class ClientApp(FlowerApp):
    """Flower's ClientApp with the mod around its handlers, and a handler of its own for secure sums."""

    def __init__(
        self,
        client_fn: ClientFnExt | None = None,
        mods: Sequence[Mod] | None = None,
        *,
        study: str | Path = STUDY,
    ) -> None:
        file = find(study)
        super().__init__(client_fn, [partial(_around, file), *(mods or ())])
        if client_fn is None:  # else it has no handlers by type
            self._registered_funcs["query.fedcanary"] = partial(_asked, file)


def _around(study: Path, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    part = message.content.pop(RECORD, None) if message.has_content() else None
    if not isinstance(part, ConfigRecord):
        return call_next(message, context)
    received = _arrays(message.content)  # now: the app may change them in place
    reply = call_next(message, context)
    if reply.has_content():
        said = _answered(study, part, received, _arrays(reply.content), context)
        reply.content = RecordDict({**reply.content, RECORD: ConfigRecord({KEY: said})})
    return reply


def _answered(study: Path, part: ConfigRecord, received: Adapter, returned: Adapter, context: Context) -> bytes:
    """What the client says of its training; nothing is raised, as an exception's text would travel."""
    try:
        parcel, run, base = part.get(KEY), part.get(RUN), part.get(BASE)
        asks = decode_asks(parcel if isinstance(parcel, bytes) else b"", LARGEST)
    except Malformed:
        return encode([])
    try:
        client, folder = _who(context)
        host = host_of(study, folder, client, str(run))
        host.begin(_loaded(base) if isinstance(base, bytes) else received, asks[0].fields.get(BASE))
        known = _known(context)
        try:
            host.clients.trained = Trained(received, returned, lambda: app_of(study, folder).held_out(known))
            return encode(AppNode(host, client, folder).answer(asks))
        finally:
            host.clients.trained = None
    except Wrong as wrong:
        return encode([Answer(ask.id, {}, wrong.word) for ask in asks])
    except Exception:
        traceback.print_exc()  # for the node's own log
        return encode([Answer(ask.id, {}, FAILED) for ask in asks])


def _asked(study: Path, message: Message, context: Context) -> Message:
    """A question of a secure sum, answered."""
    try:
        asks = decode_asks(data_of(message.content), LARGEST)
    except Malformed:
        return Message(record(encode([])), reply_to=message)
    try:
        answers = _sum_step(study, asks, context)
    except Wrong as wrong:
        answers = [Answer(ask.id, {}, wrong.word) for ask in asks]
    except Exception:
        traceback.print_exc()
        answers = [Answer(ask.id, {}, FAILED) for ask in asks]
    return Message(record(encode(answers)), reply_to=message)


def _sum_step(study: Path, asks: Sequence[Ask], context: Context) -> list[Answer]:
    client, folder = _who(context)
    if [ask.kind for ask in asks] == [HELLO]:
        return [Answer(asks[0].id, {"client": client})]
    (run,) = {str(ask.fields.get(RUN)) for ask in asks}
    return AppNode(host_of(study, folder, client, run), client, folder).answer(asks)


def _who(context: Context) -> tuple[int, Path]:
    config = context.node_config
    number = config.get("fedcanary-client", config.get("partition-id"))
    folder = Path(str(config.get("fedcanary-folder", "fedcanary-clients")))
    if number is None and "fedcanary-folder" not in config:
        folder /= f"node-{context.node_id}"
    return int(number or 0), folder.absolute()


def _known(context: Context) -> dict[str, Any]:
    """What a function of the app may ask for by name."""
    configs = {**context.run_config, **context.node_config}
    return {**{str(name).replace("-", "_"): value for name, value in configs.items()}, "context": context}


def _arrays(content: RecordDict) -> Adapter:
    """The model's arrays, of which Flower's strategies know one record; none if there is not one."""
    records = list(content.array_records.values())
    return dict(records[0].to_torch_state_dict()) if len(records) == 1 else {}


def _loaded(base: bytes) -> Adapter:
    from safetensors.torch import load

    found: Adapter = load(base)
    return found
