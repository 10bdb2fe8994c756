"""Ditto: a global adapter is averaged as in FedAvg; beside it every client trains its own, pulled towards the global.

Shared: one adapter, trained on the client's data from the round's average. Private: a second adapter, which makes the
client's predictions; its objective is loss + mu / 2 |v - w_t|^2 with w_t the average received in the round.

Li et al. 2021 (arXiv 2012.04221), algorithm 1.
"""

from collections.abc import Mapping

from torch import Tensor

from fedcanary.models.adapters import Adapter
from fedcanary.personalize.base import Fit, Held, Method, Trained

_OWN = "own."


class Ditto(Method):
    """A private adapter near the shared one."""

    name = "ditto"
    fits = 2

    def split(self, initial: Mapping[str, Tensor]) -> Held:
        """See `Method.split`."""
        return Held(dict(initial), {_OWN + name: t.clone() for name, t in initial.items()})

    def train(self, held: Held, fit: Fit) -> Trained:
        """See `Method.train`."""
        sent = fit(held.shared)
        own = fit(self.adapters(held)[0], anchor=held.shared, mu=self.mu)
        private = {_OWN + name: t for name, t in own.params.items()}
        return Trained(Held(sent.params, private), own.loss, sent.failed | own.failed)

    def adapters(self, held: Held) -> list[Adapter]:
        """See `Method.adapters`."""
        return [{name.removeprefix(_OWN): t for name, t in held.private.items()}]
