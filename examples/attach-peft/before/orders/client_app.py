"""A shop."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from orders.task import fit, get_model, load_data

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter that came on the shop's own orders."""
    model = get_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    rows, _ = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    loss = fit(model, rows, context.run_config["local-epochs"], context.run_config["learning-rate"])
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
