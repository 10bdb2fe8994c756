"""Record-level differential privacy: each client trains with DP-SGD or DP-AdamW, by ghost clipping in Opacus.

Abadi et al. 2016 (arXiv 1607.00133), algorithm 1: every example joins a step by its own coin (Poisson sampling), its
gradient is scaled to a norm of at most C, and the sum gets Gaussian noise of standard deviation sigma * C before it is
divided by the expected batch. Ghost clipping: Li et al. 2022 (arXiv 2110.05679), section 4: one backward pass for the
examples' gradient norms, a second one for the sum of the clipped gradients.

What is protected: the trained tensors, and with them whatever is computed from them and from public data, against
replacing one example by an empty one (Kairouz et al. 2021, arXiv 2103.00039, definition 1.1; so the number of rows
counts as public). Rate and steps are the same for every client, so that the cost says nothing about anybody's number
of rows: `accounting.dpsgd_epsilon(noise_multiplier, sample_rate, steps, ...)` for each call of the fit. What is not
protected: `loss`, which must not leave the client.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from fedcanary.errors import BadInput, Problem
from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel, Rows
from fedcanary.models.stacked import Batch, Part, attached, batch, log_probabilities, stack, unstack
from fedcanary.personalize.fit import Fitted, Recipe
from fedcanary.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLevel:
    """What bounds and hides one example's part in a training.

    `max_grad_norm` C > 0 bounds its gradient (L2, all tensors together); `noise_multiplier` sigma >= 0 (at 0 nothing is
    hidden and epsilon is infinite); it joins each of `steps` steps with probability `sample_rate` in (0, 1].
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        allowed = {
            "max_grad_norm": 0 < self.max_grad_norm < inf,
            "noise_multiplier": 0 <= self.noise_multiplier < inf,
            "sample_rate": 0 < self.sample_rate <= 1,
            "steps": self.steps >= 1,
        }
        problems = [
            Problem(name, f"{getattr(self, name)!r} is out of range", "see its documentation")
            for name, fits in allowed.items()
            if not fits
        ]
        if problems:
            raise BadInput(problems)


class Source(Protocol):
    """Where coins and noise come from; a numpy Generator is one."""

    def random(self, size: int) -> Array:
        """Uniform numbers in [0, 1), (size,)."""

    def standard_normal(self, size: int) -> Array:
        """Standard normal numbers, (size,)."""


class SystemSource:
    """Coins and noise from the operating system's cryptographic generator.

    torch's own generator on a CPU has 2^32 seeds, so its noise can be found by trying them all; Opacus offers
    torchcsprng instead (`secure_mode`), which is not available for current versions of torch. Here every number comes
    from `os.urandom`. As in Opacus's secure mode a normal number is half the sum of four, and noise is added in
    float64, so that the low bits of a result do not betray the number it was added to (Holohan & Braghin 2021, arXiv
    2107.10138, section 5.1). That answers the published attacks on floating-point noise; it is no proof that such
    noise is as good as a real Gaussian.
    """

    def random(self, size: int) -> Array:
        """Multiples of 2^-52 plus 2^-53: never 0, never 1."""
        words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return np.asarray(((words >> np.uint64(12)) + 0.5) * 2.0**-52)

    def standard_normal(self, size: int) -> Array:
        """By inversion of the normal distribution function."""
        return np.asarray(ndtri(self.random(4 * size)).reshape(4, size).sum(axis=0) / 2)


def fit_private(
    base: BaseModel,
    lora: Lora,
    start: Mapping[str, Tensor],
    data: Sequence[Rows],
    recipe: Recipe,
    privacy: RecordLevel,
    sources: Sequence[Source] | None = None,
    *,
    trains: Callable[[str], bool] = lambda name: True,
    anchor: Mapping[str, Tensor] | None = None,
    mu: float = 0.0,
    beside: Sequence[tuple[Mapping[str, Tensor], float]] = (),
    weight: float | None = None,
) -> Fitted:
    """Train a stacked adapter on K clients' rows, one client after the other, each with its own noise.

    A drop-in for `fit.fit`, with these differences. A step takes each of a client's n rows with probability
    `sample_rate`, so their number varies and may be 0 (then the step is noise alone); they go through the model at most
    `recipe.batch` at once, which changes nothing but memory. An example's loss is the mean over its own target tokens,
    as `fit` computes it for a client that holds only this example; `fit`'s mean over all tokens of a batch would let
    one example's length change the others' gradients. The bound on each example takes the place of `recipe.clip`, and
    `steps` that of its epochs. The pull to the anchor and weight decay look at no data and come after the noise. An
    example whose gradient is not finite adds nothing. A client failed if its tensors are not finite, whatever its loss.
    Arithmetic of the adapter is in float64.

    Args:
        base: the frozen model.
        lora: where the adapters sit.
        start: stacked parameters to begin from; not changed.
        data: K row lists, each example one row (`base.targets` makes such).
        recipe: optimizer, learning rate, schedule, weight decay, and the most examples in one pass.
        privacy: bound, noise, sampling and steps.
        sources: K sources of coins and noise for a simulation that is to be repeatable, for example numpy Generators.
            Their numbers move on, so one source serves several calls. None: the operating system, as it must be
            wherever the guarantee is to hold.
        trains: which parameters move.
        anchor: centre of the pull; counts as known to all, like `start` and `beside`.
        mu: weight of the pull.
        beside: unmoved adapters of a mixture, with their weights.
        weight: weight of the trained adapter in that mixture.

    Raises:
        BadInput: an example has several rows, or ghost clipping does not work for a target (which is named).
    """
    owners = [[own[0][2] // rows.shape[1] for own in rows.targets if own] for rows in data]
    if any(len(set(items)) < len(items) for items in owners):
        raise BadInput.of("training rows", "an example has several rows", "train on the rows that base.targets makes")
    trained = []
    for j, rows in enumerate(data):
        model = _Adapted(base, lora, unstack(start, j), trains, [(unstack(o, j), w) for o, w in beside], weight)
        source = SystemSource() if sources is None else sources[j]
        near = {} if anchor is None or mu <= 0 else unstack(anchor, j)
        trained.append(_train(model, rows, recipe, privacy, source, near, mu))
    params = stack([adapter for adapter, _ in trained])
    bad = [not all(bool(torch.isfinite(t).all()) for t in adapter.values()) for adapter, _ in trained]
    losses = np.array([loss for _, loss in trained])
    return Fitted(params, losses, np.array(bad, dtype=bool))


class _Adapted(nn.Module):
    """The loss of each example under one client's adapter, whose tensors are linear layers that Opacus can watch.

    The base is no submodule: it stays frozen and unwatched, and its forward hooks last one pass.
    """

    def __init__(
        self,
        base: BaseModel,
        lora: Lora,
        start: Mapping[str, Tensor],
        trains: Callable[[str], bool],
        beside: Sequence[tuple[Adapter, float]],
        weight: float | None,
    ) -> None:
        super().__init__()
        self.base, self.lora, self.start, self.beside, self.weight = base, lora, start, beside, weight
        self.layers = nn.ModuleList()
        self.tensors: dict[str, nn.Parameter] = {}
        self._by_name: dict[str, list[nn.Linear]] = {}
        for name in lora.targets:
            self._by_name[name] = [self._linear(trains, f"{name}.lora_A"), self._linear(trains, f"{name}.lora_B")]
        for name in lora.heads:
            self._by_name[name] = [self._linear(trains, f"{name}.weight", f"{name}.bias")]
        self._calls: dict[str, int] = {}
        if base.task == "causal":
            _ = base.plain_head  # a fact about the bare base, found out before there are hooks
        # Public rows of a shape that nothing else has, to see how each target meets its batch.
        ids = torch.full((2, 3), base.pad)
        none = torch.zeros(0, dtype=torch.int64)
        with torch.no_grad():
            self(Batch(ids, torch.ones_like(ids), none, none, none, none, none))

    def _linear(self, trains: Callable[[str], bool], weight: str, bias: str = "") -> nn.Linear:
        rows, columns = self.start[weight].shape
        layer = nn.Linear(columns, rows, bias=bias in self.start, device="meta")  # draws no random start
        for part, name in (("weight", weight), ("bias", bias)):
            if name in self.start:
                # float64: ghost norms subtract tokens' contributions, and in float32 a large example whose tokens
                # nearly cancel can come out as small as 0, and would then pass unclipped
                value = nn.Parameter(self.start[name].detach().clone().double(), requires_grad=trains(name))
                setattr(layer, part, value)
                self.tensors[name] = value
        self.layers.append(layer)
        return layer

    def forward(self, laid: Batch) -> Tensor:
        """Loss of each row, (B,): mean over its targets, 0 if it has none."""
        tall = laid.ids.shape[0]
        others = [
            Part({n: t[None] for n, t in o.items()}, torch.full((tall,), w, dtype=next(iter(o.values())).dtype))
            for o, w in self.beside
        ]
        with attached(self.base, self.lora, others, 1), self._attached(tall):
            nll = -log_probabilities(self.base, laid)
        count = torch.bincount(laid.row, minlength=tall).clamp(min=1)
        return torch.zeros(tall, dtype=nll.dtype).index_add_(0, laid.row, nll) / count

    def adapter(self) -> Adapter:
        """The tensors as they are now, under their names and in the dtype they came in."""
        return {name: self.tensors[name].detach().to(t.dtype) for name, t in self.start.items()}

    @contextmanager
    def _attached(self, tall: int) -> Iterator[None]:
        handles = []
        self._calls = dict.fromkeys(self._by_name, 0)
        try:
            for name in self._by_name:
                hook = self._hook(name, tall)
                handles.append(self.base.model.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, calls in self._calls.items():
            if calls != 1:
                raise _unfit(name, "is not part of the model's forward pass")

    def _hook(self, name: str, tall: int) -> Any:
        layers, head = self._by_name[name], name in self.lora.heads
        factor = (1.0 if head else self.lora.scale) * (1.0 if self.weight is None else self.weight)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            self._calls[name] += 1
            if self._calls[name] > 1:
                raise _unfit(name, "is used more than once in a forward pass")
            if x.dim() not in (2, 3) or x.shape[0] != tall:
                raise _unfit(name, f"sees a batch of {tall} examples as a tensor of shape {tuple(x.shape)}")
            y = x.double()
            for layer in layers:
                y = layer(y if y.requires_grad else y.detach().requires_grad_())  # its backward hook needs a path
            y = (factor * y).to(output.dtype)
            return y if head and not self.beside else output + y

        return hook


def _unfit(name: str, why: str) -> BadInput:
    remedy = "leave it out of model.lora.targets, or use another privacy unit"
    return BadInput.of(f"target {name!r}", f"{why}, so its gradient cannot be bounded example by example", remedy)


def _train(
    model: _Adapted,
    rows: Rows,
    recipe: Recipe,
    privacy: RecordLevel,
    source: Source,
    anchor: Mapping[str, Tensor],
    mu: float,
) -> tuple[Adapter, float]:
    """One client: its adapter, and its mean loss over the last epoch (NaN if no example joined)."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    n, rate, steps = len(rows), privacy.sample_rate, privacy.steps
    moving = {name: p for name, p in model.tensors.items() if p.requires_grad}
    watched = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=privacy.max_grad_norm)
    optimizer = _optimizer(list(moving.values()), recipe, privacy, rate * max(n, 1), source)

    def accumulate(chosen: list[int]) -> float:
        """Leave the sum of the chosen examples' clipped gradients in the parameters; their mean loss."""
        sums = [torch.zeros_like(p) for p in moving.values()]
        losses: list[float] = []
        waiting = [chosen[i : i + recipe.batch] for i in range(0, len(chosen), recipe.batch)]
        while waiting:
            part = waiting.pop()
            loss = watched(batch(model.base, [rows], [part]))
            DPTensorFastGradientClipping(watched, optimizer, loss, "sum").backward()
            finite = torch.isfinite(watched.per_sample_gradient_norms).tolist()
            if all(finite):
                losses += loss.detach().tolist()
                for total, p in zip(sums, moving.values(), strict=True):
                    total.add_(p.grad if p.grad is not None else 0.0)
            elif any(finite):
                waiting.append([index for index, good in zip(part, finite, strict=True) if good])
        optimizer.zero_grad()
        for total, p in zip(sums, moving.values(), strict=True):
            p.grad = total
        return float(np.mean(losses)) if losses else nan

    def pull(_: Any) -> None:
        for name in anchor.keys() & moving.keys():
            gradient, p = moving[name].grad, moving[name].detach()
            if gradient is not None:
                gradient.add_(p - anchor[name], alpha=mu)

    optimizer.attach_step_hook(pull)  # runs after the noise
    last = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 - step / steps) if recipe.schedule == "linear" else recipe.lr
        loss = accumulate(np.flatnonzero(source.random(n) < rate).tolist())
        optimizer.step()
        if step >= steps - round(1 / rate) and isfinite(loss):
            last.append(loss)
    return model.adapter(), float(np.mean(last)) if last else nan


def _optimizer(
    moving: list[nn.Parameter], recipe: Recipe, privacy: RecordLevel, expected: float, source: Source
) -> Any:
    """Opacus's optimizer around torch's, with noise from `source`."""
    from opacus.optimizers import DPOptimizerFastGradientClipping

    # Opacus has no types, so its classes are Any to the checker, which strict mode forbids as a base.
    class Noised(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
        def add_noise(self) -> None:
            for p in self.params:
                noise = torch.from_numpy(source.standard_normal(p.numel())).view_as(p)
                p.grad = p.summed_grad + self.noise_multiplier * self.max_grad_norm * noise

    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
    return Noised(
        kind(moving, lr=recipe.lr, weight_decay=recipe.weight_decay),
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=expected,
    )
