"""What a personalization method is: which numbers are shared, which stay private, and one local training step.

A client holds two sets of tensors: `shared`, which it received from the server and whose change it sends back, and
`private`, which never leaves it and is never put into a message, a record or a shared adapter file. A method is a few
pure functions over the two; the same code trains one client or K stacked ones.

Laws (tests/contracts/test_methods.py holds every method to them)
    the names of `shared` and `private` never overlap, and training never moves a name from one to the other
    what a client sends has exactly the names of `shared`
    a method whose private part is empty leaves a client nothing to keep
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedcanary.models.adapters import Adapter
from fedcanary.types import Array


@dataclass(frozen=True, slots=True)
class Held:
    """What K clients hold: stacked tensors, shared and private."""

    shared: Adapter
    private: Adapter


@dataclass(frozen=True, slots=True)
class Trained:
    """What local training made of it: the new tensors, each client's loss (K,) and whether it failed (K,)."""

    held: Held
    loss: Array
    failed: np.ndarray


Fit = Callable[..., Any]  # personalize.fit.fit with base, adapter shape, data, recipe and order already given


class Method(ABC):
    """A personalization method."""

    name: ClassVar[str]
    needs_embedding: ClassVar[bool] = False  # whether the mixture looks at the base's embedding of an item
    fits: ClassVar[int] = 1  # trainings on the client's examples in a round; each is paid for

    def __init__(self, mu: float = 0.1) -> None:
        self.mu = mu

    @abstractmethod
    def split(self, initial: Mapping[str, Tensor]) -> Held:
        """The shared and private tensors a study begins with, from the initial adapter (not stacked)."""

    @abstractmethod
    def train(self, held: Held, fit: Fit) -> Trained:
        """One round of local training of K stacked clients."""

    @abstractmethod
    def adapters(self, held: Held) -> list[Adapter]:
        """The adapter the client's predictions use, or several that are mixed."""

    def weights(self, held: Held, embedding: Sequence[Array]) -> list[Array] | None:
        """For a mixture: one (K, n) array for each adapter, its weight on each of n items; else None."""
        return None

    def prepare(self, held: Held, embedding: Sequence[Array]) -> Held:
        """Before training: take note of the embeddings of each client's own training items."""
        return held

    def published(self, shared: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Adapter:
        """The shared adapter as a file: the shared tensors, the rest at their initial values."""
        return {name: shared.get(name, tensor) for name, tensor in initial.items()}


class OneAdapter(Method):
    """A client has one adapter; some of its tensors are shared and the rest are private."""

    proximal: ClassVar[bool] = False

    def shares(self, name: str) -> bool:
        """Whether the tensor is sent to the server."""
        return True

    def trains(self, name: str) -> bool:
        """Whether local training moves the tensor."""
        return True

    def split(self, initial: Mapping[str, Tensor]) -> Held:
        """See `Method.split`."""
        shared = {name: t for name, t in initial.items() if self.shares(name)}
        return Held(shared, {name: t for name, t in initial.items() if name not in shared})

    def train(self, held: Held, fit: Fit) -> Trained:
        """See `Method.train`."""
        start = held.shared | held.private
        anchor, mu = (start, self.mu) if self.proximal else (None, 0.0)
        fitted = fit(start, trains=self.trains, anchor=anchor, mu=mu)
        new = Held(
            {name: fitted.params[name] for name in held.shared}, {name: fitted.params[name] for name in held.private}
        )
        return Trained(new, fitted.loss, fitted.failed)

    def adapters(self, held: Held) -> list[Adapter]:
        """See `Method.adapters`."""
        return [held.shared | held.private]
