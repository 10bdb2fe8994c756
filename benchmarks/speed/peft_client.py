"""A client that trains with peft, as the plain loop, Flower and pfl use it. Needs torch, transformers and peft only."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import ALPHA, LR, TARGETS, Job, R, load, read
from torch import Tensor, nn


def model(job: Job, source: str) -> Any:
    """The base with one adapter around it, in training mode (there is no dropout)."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    causal = job.task == "causal"
    base = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_pretrained(source)
    if causal:
        base.config.use_cache = False
    kind = TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS  # SEQ_CLS trains and saves the head
    lora = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS[job.model]), task_type=kind)
    return get_peft_model(base, lora).train()


def ours(path: str) -> str:
    """The name of a trained parameter in fedcanary, from peft's."""
    short = path.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    return short.replace(".default.weight", "")


def parameters(wrapped: Any) -> dict[str, nn.Parameter]:
    """What is trained, under our names."""
    return {ours(path): p for path, p in wrapped.named_parameters() if p.requires_grad}


def tensors(data: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """All clients' rows as tensors; nothing is copied."""
    return {name: torch.from_numpy(array) for name, array in data.items()}


def optimizer(params: Any, lr: float = LR) -> torch.optim.Optimizer:
    """AdamW in its fastest form here: fused; one tensor at a time and foreach were at best equal."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


def loss_of(wrapped: Any, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """The loss that transformers computes from labels: the next token's, or the row's."""
    result: Tensor = wrapped(input_ids=ids, labels=ids if labels is None else labels).loss
    return result


def train(
    job: Job, wrapped: Any, params: list[nn.Parameter], data: dict[str, Tensor], round: int, client: int
) -> float:
    """One client's round, in place. Its mean loss."""
    adamw = optimizer(params)
    losses = []
    ids, labels = data["ids"][client], data["labels"][client] if "labels" in data else None
    for chosen in job.batches(round, client):
        index = torch.from_numpy(chosen)
        loss = loss_of(wrapped, ids[index], None if labels is None else labels[index])
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        adamw.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@cache
def loaded(folder: str) -> tuple[Job, Any, dict[str, nn.Parameter], dict[str, Tensor]]:
    """A job, its model and its data, kept by a worker that plays one client after another."""
    job, source = read(Path(folder))
    wrapped = model(job, source)
    return job, wrapped, parameters(wrapped), tensors(load(Path(folder) / "data.npz"))
