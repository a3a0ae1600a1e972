"""The workload as a Flower app, written as Flower's own template for PyTorch is: FedAvg over the network's state."""

from pathlib import Path

import workload
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def _site(message: Message, context: Context) -> workload.Site:
    name = workload.SITES[int(str(context.node_config["partition-id"]))]
    site = workload.opened(str(context.run_config["folder"]), name)
    site.net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return site


@client.train()
def train(message: Message, context: Context) -> Message:
    site = _site(message, context)
    images = site.train(int(str(message.content.config_records["config"]["server-round"])))
    arrays, metrics = ArrayRecord(site.net.state_dict()), MetricRecord({"num-examples": images})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    right, images = _site(message, context).validate()
    metrics = MetricRecord({"right": right, "num-examples": images})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    folder, sites = Path(str(context.run_config["folder"])), len(workload.SITES)
    start = ArrayRecord(workload.opened(str(folder), workload.SITES[0]).net.state_dict())

    def note(_: int, __: ArrayRecord) -> None:
        workload.mark(folder)

    strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
    rounds = int(str(context.run_config["rounds"]))
    strategy.start(grid, start, num_rounds=rounds, train_config=ConfigRecord(), evaluate_fn=note)
