"""The Flower app: FedAvg over the LoRA tensors, every client trains with the same peft model. See flower_sim.py."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from job import finish, load, read
from peft_client import loaded, train

client = ClientApp()
server = ServerApp()


@client.train()
def one_round(message: Message, context: Context) -> Message:
    """Train one client from the arrays received. A worker loads model and data once."""
    job, wrapped, places, data = loaded(str(context.run_config["folder"]))
    received = message.content["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(received[name])
    number = int(context.node_config["partition-id"])
    round = int(message.content["config"]["server-round"]) - 1  # Flower counts from 1
    loss = train(job, wrapped, list(places.values()), data, round, number)
    arrays = ArrayRecord({name: place.detach() for name, place in places.items()})
    metrics = MetricRecord({"loss": loss, "num-examples": job.rows})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.query()
def ready(message: Message, context: Context) -> Message:
    """Load model and data."""
    loaded(str(context.run_config["folder"]))
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; then the result."""
    folder, out = Path(str(context.run_config["folder"])), Path(str(context.run_config["out"]))
    job, _ = read(folder)
    start = ArrayRecord({name: torch.from_numpy(array) for name, array in load(folder / "start.npz").items()})
    if not job.rounds:  # what a start costs includes the workers' models, which are loaded when a message comes
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
        list(grid.send_and_receive(asked))
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=job.clients, min_available_nodes=job.clients)
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=job.rounds)
    arrays = (result.arrays if job.rounds else start).to_torch_state_dict()
    losses = [float(result.train_metrics_clientapp[round + 1]["loss"]) for round in range(job.rounds)]
    finish(out, losses, {name: tensor.numpy() for name, tensor in arrays.items()})
