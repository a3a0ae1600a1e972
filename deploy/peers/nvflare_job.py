"""The workload as an NVFlare job of its FedAvg recipe: `nvflare_job.py FOLDER ROUNDS simulator` runs it, `... poc` on a running
proof-of-concept federation with mutual TLS. The recipe starts this file at each client as well, with only FOLDER.
"""

import sys
from pathlib import Path
from typing import Any

import workload
from torch import nn


class Net(nn.Module):
    """The study's network, made of a word that fits into the job's settings."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net = workload.opened(folder, workload.SITES[0]).net


def client(folder: str) -> None:
    """Validate the model that comes and train it on, until the run is over; the first site marks the rounds."""
    import nvflare.client as flare

    flare.init()
    name = workload.SITES[int(flare.get_site_name().removeprefix("site-")) - 1]
    site = workload.opened(folder, name)
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        if name == workload.SITES[0]:
            workload.mark(Path(folder))
        site.net.load_state_dict({key.removeprefix("net."): value for key, value in model.params.items()})
        right, _ = site.validate()
        images = site.train(model.current_round + 1)
        params = {f"net.{key}": value for key, value in site.net.state_dict().items()}
        meta: dict[str, Any] = {"NUM_STEPS_CURRENT_ROUND": images}
        flare.send(flare.FLModel(params=params, metrics={"accuracy": right}, meta=meta))


def main(folder: str, rounds: int, where: str) -> None:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import PocEnv, SimEnv

    names = [f"site-{number}" for number, _ in enumerate(workload.SITES, 1)]
    recipe = FedAvgRecipe(
        name="peers",
        model={"class_path": "nvflare_job.Net", "args": {"folder": folder}},
        min_clients=len(names),
        num_rounds=rounds,
        train_script=str(Path(__file__)),
        train_args=folder,
    )
    if where == "simulator":
        environment: Any = SimEnv(clients=names, workspace_root=str(Path(folder) / "simulation"))
    else:
        environment = PocEnv(num_clients=len(names))
    print(recipe.execute(environment).get_result())
    if where == "poc":
        environment.stop(clean_up=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        client(sys.argv[1])
    else:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
