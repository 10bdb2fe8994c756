"""Apple pfl's simulated FederatedAveraging around the same peft model. python pfl_sim.py JOB OUT, in pfl's own venv.

As pfl's guide on speed says: users' data in memory as tensors, one process on one core, no central evaluation. pfl also
evaluates every user before and after its training in the first round; `Training` leaves that out, in pfl's favour.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from job import LR, Job, finish, load, read
from peft_client import loss_of, model, optimizer, parameters, tensors
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor


class Training(FederatedAveraging):
    """Federated averaging that never evaluates."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Only the training of what pfl's own does."""
        contexts, *rest = super().get_next_central_contexts(*args, **kwargs)
        return (contexts and tuple(replace(context, do_evaluation=False) for context in contexts), *rest)


class Rounds(TrainingProcessCallback):
    """Counts the rounds, for the order of each client's rows, and gathers their losses."""

    def __init__(self) -> None:
        self.round = 0
        self.step_losses: list[Tensor] = []
        self.losses: list[float] = []

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        """Close a round."""
        self.round += 1
        self.losses.append(float(torch.stack(self.step_losses).mean()))
        self.step_losses.clear()
        return False, Metrics()


def module(wrapped: Any, rounds: Rounds) -> Any:
    """The peft model with the two methods that pfl asks of a module."""

    def loss(ids: Tensor, labels: Tensor | None = None) -> Tensor:
        value = loss_of(wrapped, ids, labels)
        rounds.step_losses.append(value.detach().clone())  # pfl divides the loss in place
        return value

    wrapped.loss, wrapped.metrics = loss, lambda *batch: {}
    return wrapped


def users(job: Job, data: dict[str, Tensor], rounds: Rounds) -> FederatedDataset:
    """Every client once in each round, its rows in the round's order."""

    def rows(client: int) -> PyTorchTensorDataset:
        order = torch.from_numpy(job.order(rounds.round, client).permutation(job.rows))
        return PyTorchTensorDataset(tuple(tensor[client][order] for tensor in data.values()), user_id=str(client))

    return FederatedDataset(rows, MinimizeReuseUserSampler(list(range(job.clients))))


def main(folder: Path, out: Path) -> None:
    job, source = read(folder)
    data = tensors(load(folder / "data.npz"))
    start = load(folder / "start.npz")
    rounds = Rounds()
    wrapped = module(model(job, source), rounds)
    places = parameters(wrapped)
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(torch.from_numpy(start[name]))
    trained = list(places.values())
    federated = users(job, data, rounds)
    began = time.process_time()
    Training().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=1,
            train_cohort_size=job.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(federated, federated, postprocessors=[WeightByUser()]),
        model=PyTorchModel(
            wrapped,
            local_optimizer_create=lambda _all, lr: optimizer(trained, lr),
            central_optimizer=torch.optim.SGD(trained, lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_batch_size=job.batch, local_num_epochs=1, local_learning_rate=LR, local_max_grad_norm=None
        ),
        callbacks=[rounds],
    )
    adapter = {name: place.detach().numpy() for name, place in places.items()}
    finish(out, rounds.losses, adapter, time.process_time() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
