"""fedcanary's own study as Flower apps: the loop on the server, one client behind each node.

run_config    study (the server's file), out (the run's folder; a run that is there goes on), state (simulation alone:
              the folder of the clients' folders), and seconds of patience: train_seconds, step_seconds, nodes_seconds
node_config   deployment: client (its number), study (the node's own file), folder (its own disk)
              simulation: partition-id, which is the client's number
"""

from __future__ import annotations

import traceback
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcanary.engines.flower import certificates
from fedcanary.engines.flower.node import FAILED, Node, host
from fedcanary.engines.flower.wire import LARGEST, Answer, Malformed, data_of, decode_asks, encode, record
from fedcanary.engines.places import place

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
@client_app.query("fedcanary")
def answer(message: Message, context: Context) -> Message:
    """What comes from the server, answered; nothing is raised, as an exception's text would travel."""
    try:
        asks = decode_asks(data_of(message.content), LARGEST)
    except Malformed:
        return Message(record(encode([])), reply_to=message)
    try:
        answers = _node(context).answer(asks)
    except Exception:
        traceback.print_exc()  # for the node's own log
        answers = [Answer(ask.id, {}, FAILED) for ask in asks]
    return Message(record(encode(answers)), reply_to=message)


def _node(context: Context) -> Node:
    config, run = context.node_config, context.run_config
    if "partition-id" in config:
        client, state = int(config["partition-id"]), Path(str(run["state"]))
        return Node(host(Path(str(run["study"])), state.parent), client, place(state, client) / certificates.IDENTITY)
    folder = Path(str(config["folder"]))
    return Node(host(Path(str(config["study"])), folder), int(config["client"]), folder / certificates.IDENTITY)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study, or go on with it; what becomes of it is in `live.json`, whatever happens."""
    from fedcanary.flower.serve import serve

    serve(grid, context.run_config)
