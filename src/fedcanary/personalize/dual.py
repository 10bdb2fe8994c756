"""Dual adapters: a global and a local one, mixed for every example by how much it resembles the client's own data.

Shared: the global adapter, trained on the client's data and averaged. Private: the local adapter, trained beside the
round's (frozen) global one at equal weights, and the centre of the client's training items in the base's embedding.
An example x gets the local adapter with weight g(x) in [0, 1] and the global one with 1 - g(x).

After FedDPA, Yang et al. 2024 (arXiv 2403.19211), sections 4.2 and 4.3: global and local adapter, and an instance-wise
weight from the similarity between the input's representation and those of local training examples. Ours measures the
similarity by distance, because hidden states of language models all point the same way and their cosine hardly
varies: with centre c and root mean square radius s of the client's own training items, and d = |z(x) - c|,
    g(x) = exp(-max(d / s - 1, 0)^2 / 2),
so an item as near as the client's own typical one is answered by the local adapter, and a far one by the global.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedcanary.models.adapters import Adapter
from fedcanary.personalize.base import Fit, Held, Method, Trained
from fedcanary.types import Array

_OWN = "own."
_CENTRE = "gate.centre"  # (D,) mean embedding of the client's training items
_SPREAD = "gate.spread"  # () their root mean square distance from it


class Dual(Method):
    """Global and local adapter, mixed per example."""

    name = "dual"
    fits = 2
    needs_embedding: ClassVar[bool] = True

    def split(self, initial: Mapping[str, Tensor]) -> Held:
        """See `Method.split`."""
        return Held(dict(initial), {_OWN + name: t.clone() for name, t in initial.items()})

    def prepare(self, held: Held, embedding: Sequence[Array]) -> Held:
        """Note each client's centre and spread."""
        centres = [np.nanmean(z, axis=0) for z in embedding]
        spreads = [
            float(np.sqrt(np.nanmean(((z - c) ** 2).sum(axis=1)))) for z, c in zip(embedding, centres, strict=True)
        ]
        note = {
            _CENTRE: torch.from_numpy(np.stack(centres)),
            _SPREAD: torch.tensor(spreads, dtype=torch.float64),
        }
        return Held(held.shared, held.private | note)

    def train(self, held: Held, fit: Fit) -> Trained:
        """See `Method.train`."""
        sent = fit(held.shared)
        own = fit(self._own(held), beside=[(held.shared, 0.5)], weight=0.5)
        private = {n: t for n, t in held.private.items() if not n.startswith(_OWN)}
        private |= {_OWN + name: t for name, t in own.params.items()}
        return Trained(Held(sent.params, private), own.loss, sent.failed | own.failed)

    def adapters(self, held: Held) -> list[Adapter]:
        """See `Method.adapters`: global, then local."""
        return [held.shared, self._own(held)]

    def weights(self, held: Held, embedding: Sequence[Array]) -> list[Array] | None:
        """See `Method.weights`."""
        local = np.stack([self.gate(z, *self._note(held, k)) for k, z in enumerate(embedding)])
        return [1 - local, local]

    @staticmethod
    def gate(z: Array, centre: Array, spread: float) -> Array:
        """Weight (n,) of the local adapter for embeddings z (n, D)."""
        distance = np.sqrt(((z - centre) ** 2).sum(axis=1))
        weight = np.exp(-0.5 * np.maximum(distance / max(spread, 1e-12) - 1, 0) ** 2)
        return np.asarray(np.nan_to_num(weight))

    @staticmethod
    def _note(held: Held, k: int) -> tuple[Array, float]:
        return held.private[_CENTRE][k].double().numpy(), float(held.private[_SPREAD][k])

    @staticmethod
    def _own(held: Held) -> Adapter:
        return {n.removeprefix(_OWN): t for n, t in held.private.items() if n.startswith(_OWN)}
