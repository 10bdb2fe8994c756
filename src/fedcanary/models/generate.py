"""Greedy replies of one model, or of K stacked adapters at once: the second, generation-based reading of refusals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

import torch

from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel
from fedcanary.models.stacked import Part, attached
from fedcanary.types import Array, Item

NEW_TOKENS: Final = 24  # of a generated reply: a refusal says so in its first words


def replies(
    base: BaseModel,
    prompts: Sequence[Item],
    *,
    lora: Lora | None = None,
    adapters: Sequence[Adapter] = (),
    weights: Sequence[Array] | None = None,
    k: int = 1,
    new_tokens: int = NEW_TOKENS,
    rows_per_pass: int = 64,
) -> list[list[str]]:
    """K lists of n replies. Prompts of one length are answered together, so that no padding can change a reply.

    `adapters` and `weights` are as in `stacked.score`; without adapters the module answers as it is (then k is 1).
    """
    from transformers import GenerationConfig

    module: Any = base.model
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=module.generation_config.eos_token_id if module.can_generate() else None,
        pad_token_id=base.pad,
    )
    adapters = [{name: tensor.to(base.device) for name, tensor in adapter.items()} for adapter in adapters]
    room = base.max_length - new_tokens
    starts = []
    for item in prompts:
        ids, start = base.encode(item.prompt, item.choices[0])
        starts.append(ids[:start] if start <= room else [ids[0], *ids[start - room + 1 : start]])
    said = [[""] * len(prompts) for _ in range(k)]
    together = max(1, rows_per_pass // k)
    order = sorted(range(len(prompts)), key=lambda i: len(starts[i]))
    for _, same in groupby(order, key=lambda i: len(starts[i])):
        indices = list(same)
        for first in range(0, len(indices), together):
            chosen = indices[first : first + together]
            asked = torch.tensor([starts[i] for i in chosen]).repeat(k, 1).to(base.device)  # (K * B, T), by client
            shares = [_rows(w, chosen).to(base.device) for w in weights or ()]
            parts = [Part(adapter, share) for adapter, share in zip(adapters, shares, strict=False)]
            parts = parts or [Part(adapter) for adapter in adapters]
            with torch.inference_mode(), attached(base, lora, parts, k):
                out = module.generate(input_ids=asked, attention_mask=torch.ones_like(asked), generation_config=config)
            texts = base.tokenizer.batch_decode(out[:, asked.shape[1] :], skip_special_tokens=True)
            for at, text in enumerate(texts):
                said[at // len(chosen)][chosen[at % len(chosen)]] = text
    return said


def _rows(weight: Array, chosen: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(weight[:, chosen]).reshape(-1).float()
