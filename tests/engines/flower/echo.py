"""A small Flower app for tests of what runs apps: each round every node says who it is and how often it was asked."""

CODE = """
import json, os, time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()


@client_app.query()
def say(message, context):
    number = int(context.node_config.get("client", context.node_config.get("partition-id", -1)))
    state = context.node_config.get("folder") or f"{context.run_config['state']}/{number}"
    Path(state).mkdir(parents=True, exist_ok=True)
    asked = Path(state) / "asked"
    times = int(asked.read_text()) + 1 if asked.exists() else 1
    asked.write_text(str(times))
    record = ConfigRecord({"client": number, "times": times, "pid": os.getpid()})
    return Message(RecordDict({"echo": record}), reply_to=message)


@server_app.main()
def main(grid, context):
    out = Path(str(context.run_config["out"]))
    out.mkdir(parents=True, exist_ok=True)
    rounds, wanted = 2, ECHO_NODES

    def word(**content):
        (out / "live.part").write_text(json.dumps(content))
        (out / "live.part").replace(out / "live.json")

    while len(list(grid.get_node_ids())) < wanted:
        time.sleep(0.2)
    heard = []
    for t in range(1, rounds + 1):
        word(round=t, rounds=rounds, step="asking", done=0, clients=wanted)
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(asked, timeout=60))
        said = [reply.content["echo"] for reply in replies if reply.has_content()]
        heard.append(sorted([one["client"], one["times"]] for one in said))
    (out / "heard.json").write_text(json.dumps(heard))
    word(round=rounds, rounds=rounds, step="asking", done=wanted, clients=wanted, ended=ECHO_CODE)
"""


def code(nodes: int, ends: int = 0) -> str:
    """The app for so many nodes, ending with an exit code."""
    return CODE.replace("ECHO_NODES", str(nodes)).replace("ECHO_CODE", str(ends))
