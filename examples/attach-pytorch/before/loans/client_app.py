"""A lender."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from loans.task import Net, fit, load_data, score

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came on the lender's own requests."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader, _ = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    loss = fit(net, loader, context.run_config["local-epochs"], context.run_config["learning-rate"])
    arrays = ArrayRecord(net.state_dict())
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the model that came on the lender's held-out requests."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, loader = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    loss, accuracy = score(net, loader)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
