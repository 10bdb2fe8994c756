"""LoRA adapters as plain tensors, and the door to and from peft's files.

An adapter is a dict from a tensor's name to the tensor. Names are a module's path in the base model plus what it is:
    model.layers.0.self_attn.q_proj.lora_A    (r, in)
    model.layers.0.self_attn.q_proj.lora_B    (out, r)
    classifier.weight, classifier.bias        a classifier's head, trained in full
K clients' adapters are the same dict with a leading K on every tensor (see `stacked.py`).
LoRA: Hu et al. 2021 (arXiv 2106.09685), section 4.1: h = W x + (alpha / r) B A x, with A random and B zero at first.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedcanary.errors import BadInput, did_you_mean
from fedcanary.models.base import BaseModel

Adapter = dict[str, Tensor]
_PEFT = "base_model.model."
_HEADS = ("classifier", "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Which modules of a base get an adapter, and its shape. `targets` and `heads` are module paths."""

    r: int
    alpha: float
    targets: tuple[str, ...]
    heads: tuple[str, ...]  # Linear modules of a classifier's head
    head_modules: tuple[str, ...]  # the modules peft is to save whole, e.g. "classifier"
    names: tuple[str, ...]  # the suffixes peft knows the targets by, e.g. "q_proj"
    layers: tuple[int, ...] | None
    fan_in_fan_out: bool

    @property
    def scale(self) -> float:
        """Factor on B A x."""
        return self.alpha / self.r


def find_targets(
    base: BaseModel,
    *,
    r: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | str = "auto",
    layers: Sequence[int] | None = None,
) -> Lora:
    """Choose the modules to adapt.

    `targets="auto"` takes peft's own default of the architecture, `"all-linear"` every linear layer of the backbone,
    a list of names (for example `["q_proj", "v_proj"]`) the modules whose last path component is among them.

    Raises:
        BadInput: the targets match nothing, an architecture has no default, or a head is not made of linear layers.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from transformers.pytorch_utils import Conv1D

    linear = {n: m for n, m in base.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    output = base.head if base.task == "causal" else None
    head_modules = tuple(h for h in _HEADS if base.task == "classify" and hasattr(base.model, h))
    heads = tuple(n for n in linear if n.split(".")[0] in head_modules)
    backbone = {n: m for n, m in linear.items() if m is not output and n not in heads}
    suffixes = sorted({n.rsplit(".", 1)[-1] for n in backbone})
    config: Any = base.model.config
    model_type = str(config.model_type)
    where = "model.lora.targets"
    if targets == "auto":
        if model_type not in DEFAULTS:
            raise BadInput.of(
                where, f"no default for architecture {model_type!r}", f"name some of: {', '.join(suffixes)}"
            )
        names = tuple(DEFAULTS[model_type])
    elif targets == "all-linear":
        names = tuple(suffixes)
    else:
        names = (targets,) if isinstance(targets, str) else tuple(targets)
    absent = [name for name in names if name not in suffixes]
    if absent:
        problem = f"{absent[0]!r} matches no linear layer of {base.source!r}"
        raise BadInput.of(where, problem, f"{did_you_mean(absent[0], suffixes)} (there are: {', '.join(suffixes)})")
    named = [n for n in backbone if n.rsplit(".", 1)[-1] in names]
    beyond = [layer for layer in layers or () if not any(_in_layers(n, (layer,)) for n in named)]
    chosen = tuple(n for n in named if _in_layers(n, layers))
    if beyond or not chosen:
        raise BadInput.of("model.lora.layers", f"no target lies in layers {beyond}", "count layers from 0")
    if base.task == "classify" and not heads:
        raise BadInput.of("model.source", "the classifier's head was not found", "use a model with a classifier head")
    whole = sum(p.numel() for h in head_modules for p in base.model.get_submodule(h).parameters())
    if whole != sum(p.numel() for h in heads for p in linear[h].parameters()):
        raise BadInput.of("model.source", "the head has layers that are not linear", "use a model with a linear head")
    return Lora(
        r=r,
        alpha=alpha,
        targets=chosen,
        heads=heads,
        head_modules=head_modules,
        names=names,
        layers=None if layers is None else tuple(layers),
        fan_in_fan_out=any(isinstance(backbone[n], Conv1D) for n in chosen),
    )


def _in_layers(name: str, layers: Sequence[int] | None) -> bool:
    if layers is None:
        return True
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    return bool(numbers) and int(numbers[0]) in layers


def _sizes(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # Conv1D of GPT-2 keeps its weight as (in, out)
    return int(rows), int(columns)


def initial(base: BaseModel, lora: Lora, seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter every study starts from: A uniform in +-1/sqrt(in), B zero, heads as in the base."""
    generator = torch.Generator().manual_seed(seed)
    adapter: Adapter = {}
    for name in lora.targets:
        inputs, outputs = _sizes(base.model.get_submodule(name))
        bound = 1 / math.sqrt(inputs)
        uniform = torch.rand(lora.r, inputs, generator=generator, dtype=torch.float64) * 2 - 1
        adapter[f"{name}.lora_A"] = (uniform * bound).to(dtype)
        adapter[f"{name}.lora_B"] = torch.zeros(outputs, lora.r, dtype=dtype)
    for name in lora.heads:
        head = base.model.get_submodule(name)
        for part, tensor in head.named_parameters():
            adapter[f"{name}.{part}"] = tensor.detach().clone().cpu().to(dtype)
    return adapter


def to_peft(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename to the keys of peft's adapter_model.safetensors."""
    return {
        _PEFT + (f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name): tensor.contiguous()
        for name, tensor in adapter.items()
    }


def from_peft(tensors: Mapping[str, Tensor]) -> Adapter:
    """Inverse of `to_peft`."""
    short = {name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()}
    return {n.removesuffix(".weight") if ".lora_" in n else n: tensor for n, tensor in short.items()}


def save(folder: Path, adapter: Mapping[str, Tensor], lora: Lora, base: BaseModel) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; the folder appears whole or not at all."""
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=set(lora.names),
        layers_to_transform=list(lora.layers) if lora.layers is not None else None,
        fan_in_fan_out=lora.fan_in_fan_out,
        modules_to_save=list(lora.head_modules) or None,
        task_type=TaskType.CAUSAL_LM if base.task == "causal" else TaskType.SEQ_CLS,
        base_model_name_or_path=base.source,
        revision=base.revision,
        inference_mode=True,
    )
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    draft = folder.with_name(folder.name + ".part")
    draft.mkdir(parents=True, exist_ok=True)
    save_file(to_peft(adapter), draft / "adapter_model.safetensors", metadata={"format": "pt"})
    (draft / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
    if folder.exists():  # a resumed round writes the same adapter again
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (draft / name).replace(folder / name)
        draft.rmdir()
    else:
        draft.rename(folder)


def load(folder: Path) -> Adapter:
    """Read an adapter's tensors from a folder that `save` or peft wrote.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        BadInput: its file is damaged.
    """
    path = folder / "adapter_model.safetensors"
    try:
        return from_peft(load_file(path))
    except SafetensorError as error:
        raise BadInput.of(str(path), f"is no adapter file ({error})", "restore it, or save it again") from error


def digest(adapter: Mapping[str, Tensor]) -> str:
    """Hex digest of an adapter's names, shapes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(adapter.items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
