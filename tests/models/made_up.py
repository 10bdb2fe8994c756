"""Items and adapters that are drawn."""

from __future__ import annotations

import torch

from fedcanary.models import adapters, base
from fedcanary.models.adapters import initial
from fedcanary.rng import stream
from fedcanary.types import Item
from oracles.tiny import LABELS

F64 = torch.float64


def items(task: str, n: int, seed: int) -> list[Item]:
    """Items of different lengths: one-token choices, long choices, free text; for a classifier its labels."""
    draw = stream(seed, "items")
    words = ["the", "owl", "asks", "for", "a", "red", "stew", "and", "not", "Größe", "on", "cold", "day", "in", "Arvel"]
    found = []
    for i in range(n):
        prompt = " ".join(draw.choice(words, int(draw.integers(1, 9))))
        if task == "classify":
            choices: tuple[str, ...] = LABELS
        else:
            choices = ((" a", " b"), (" red stew", " owl", " cold day out"), (" the whole answer is text",))[i % 3]
        found.append(Item(prompt=prompt, choices=choices, answer=int(draw.integers(len(choices)))))
    return found


def random_adapter(model: base.BaseModel, lora, seed: int, size: float = 0.3) -> adapters.Adapter:
    """An adapter as training leaves it: nothing in it is zero."""
    generator = torch.Generator().manual_seed(seed)
    like = initial(model, lora, seed, F64)
    return {n: t + size * torch.randn(t.shape, generator=generator, dtype=F64) for n, t in like.items()}


def cast(adapter, dtype):
    return {name: tensor.to(dtype) for name, tensor in adapter.items()}
