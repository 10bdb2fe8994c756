"""Elementwise parts of Llama-like models in fewer passes over memory: root mean square norms and rotary positions.

On a processor a pass over a tensor costs about as much as a small product of matrices, and the library's own versions,
with what autograd makes of them, take about twice as many as are needed. While `lean` is open, those parts of a base
that a check on random numbers finds to be these very functions are computed here, forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

ROTARY: Final = "apply_rotary_pos_emb"
Parts = tuple[tuple[nn.Module, ...], tuple[Any, ...]]  # norms, and python modules whose rotary function is the usual


@contextmanager
def lean(parts: Parts) -> Iterator[None]:
    """While open, these parts are computed in fewer passes; afterwards they are themselves again."""
    norms, modules = parts
    before = [getattr(module, ROTARY) for module in modules]
    try:
        for norm in norms:
            norm.forward = partial(_normed, norm)
        for module, original in zip(modules, before, strict=True):
            setattr(module, ROTARY, partial(_rotary, original))
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)
        for module, original in zip(modules, before, strict=True):
            setattr(module, ROTARY, original)


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model that `lean` knows; none unless it computes in float32, as the library's norms do."""
    first = next(model.parameters(), None)
    if first is None or first.dtype != torch.float32:
        return (), ()
    with torch.inference_mode(False), torch.enable_grad():  # whoever asks, gradients are a part of the check
        norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _is_rms(m)]
        names = sorted({type(m).__module__ for m in model.modules()})
        modules = [m for m in map(sys.modules.get, names) if _is_rotary(getattr(m, ROTARY, None), first.device)]
    return tuple(norms), tuple(modules)


class _RootMeanSquare(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    With r = 1 / sqrt(mean(x^2) + eps) and n = x r, the gradient is r (h - n mean(h n)), h = weight * gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        normed = x * root
        ctx.save_for_backward(normed, root, weight)
        scaled: Tensor = normed * weight
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normed, root, weight = ctx.saved_tensors
        h = gradients[0] * weight
        along = torch.linalg.vecdot(h, normed).div_(h.shape[-1]).unsqueeze(-1)
        return h.addcmul_(normed, along, value=-1).mul_(root), None, None


class _Rotated(torch.autograd.Function):
    """x cos + (-x2, x1) sin, halves x = (x1, x2): rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        g, half = gradients[0], cos.shape[-1] // 2
        back = g * cos
        back[..., :half].addcmul_(g[..., half:], sin[..., half:])
        back[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return back, None, None


def _normed(norm: Any, x: Tensor) -> Tensor:
    apply: Any = _RootMeanSquare.apply  # which torch has no types for
    found: Tensor = apply(x, norm.weight, norm.variance_epsilon)
    return found


def _rotary(
    original: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    if rest or more or cos.shape[-1] != q.shape[-1]:  # only some of each head's numbers are turned
        return original(q, k, cos, sin, *rest, **more)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    apply: Any = _Rotated.apply  # which torch has no types for
    return apply(q, cos, sin), apply(k, cos, sin)


def _is_rms(norm: Any) -> bool:
    if not hasattr(norm, "variance_epsilon") or getattr(norm, "bias", None) is not None:
        return False
    (x,) = _numbers(((2, 3, norm.weight.shape[0]),), norm.weight.device)
    return _same(norm, partial(_normed, norm), x)


def _is_rotary(function: Any, device: torch.device) -> bool:
    if function is None:
        return False
    q, k, cos, sin = _numbers(((1, 2, 3, 4), (1, 1, 3, 4), (1, 3, 4), (1, 3, 4)), device)
    return _same(
        lambda x: torch.cat(function(x, k, cos, sin), dim=1),
        lambda x: torch.cat(_rotary(function, x, k, cos, sin), dim=1),
        q,
    )


def _same(original: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether two functions agree on x, and their gradients too."""
    found = []
    for function in (original, ours):
        leaf = x.clone().requires_grad_()
        try:
            y = function(leaf)
            found.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), leaf)))
        except (TypeError, RuntimeError, AttributeError, ValueError):
            return False  # another signature or shape: not this function
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def _numbers(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
