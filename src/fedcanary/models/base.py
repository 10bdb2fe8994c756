"""The base model: loaded once, frozen, never changed; and how a question becomes tokens for it.

A base is a causal language model or a sequence classifier of the `transformers` library, from the hub at a pinned
revision, from a local folder, or the one that ships with this package. Its digest covers weights, configuration and
tokenizer, so a study can say exactly what it personalized.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedcanary.errors import BadInput, Problem
from fedcanary.models.lean import Parts, parts_of
from fedcanary.types import Item

Task = Literal["causal", "classify"]
BUNDLED = "bundled"
BUNDLED_DIR = Path(__file__).parent / "bundled"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Rows:
    """Token sequences, and what to read from each.

    `targets[i]` lists (position, token or label, cell) of row i: the target is predicted at that position (unused by
    a classifier) and adds to that cell of the flattened (n, C) table of scores; `shape` is (n, C).

    A row may end in several branches that go on from the same prompt and do not see each other: `branches[i]` says
    where each begins. `hidden[i]` (T, D) is what the layers below the first adapter say of row i, if that is known.
    """

    ids: list[list[int]]
    targets: list[list[tuple[int, int, int]]]
    shape: tuple[int, int]
    branches: dict[int, tuple[int, ...]] = field(default_factory=dict)
    hidden: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, keep: Sequence[bool]) -> Rows:
        """The rows of the items to keep; the table's shape stays, so the other items become unscored."""
        kept = [row for row, item in enumerate(self.items()) if keep[item]]
        return Rows(
            [self.ids[row] for row in kept],
            [self.targets[row] for row in kept],
            self.shape,
            {at: self.branches[row] for at, row in enumerate(kept) if row in self.branches},
            None if self.hidden is None else [self.hidden[row] for row in kept],
        )

    def items(self) -> list[int]:
        """The item each row belongs to."""
        return [targets[0][2] // self.shape[1] if targets else 0 for targets in self.targets]


@dataclass(frozen=True)
class BaseModel:
    """A frozen model with its tokenizer. Parameters have `requires_grad=False`; the module is in eval mode."""

    model: nn.Module
    tokenizer: Any
    task: Task
    source: str
    revision: str | None
    max_length: int
    labels: tuple[str, ...] = ()
    _encoded: dict[tuple[str, str], tuple[list[int], int]] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """Hex digest of every weight, the configuration and the tokenizer."""
        return content_digest(self.model, self.tokenizer)

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return next(self.model.parameters()).dtype

    def on(self, device: torch.device) -> BaseModel:
        """The same model with its weights on a device."""
        return self if device == self.device else replace(self, model=self.model.to(device), _encoded={})

    @property
    def backbone(self) -> Any:
        """The model without its output layer."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """A causal model's output layer."""
        return self.model.get_output_embeddings()  # type: ignore[operator]  # to a type checker an nn.Module's attribute

    @cached_property
    def plain_head(self) -> bool:
        """Whether the logits are the output layer's, unscaled and uncapped (not so in Gemma or Cohere models)."""
        ids = torch.arange(4, device=self.device).unsqueeze(0) % self.head.weight.shape[0]
        with torch.inference_mode():
            alone = self.head(self.backbone(input_ids=ids).last_hidden_state)
            return torch.allclose(alone, self.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)

    @cached_property
    def lean_parts(self) -> Parts:
        """What of the model can be computed in fewer passes over memory."""
        return parts_of(self.model)

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether choices may be branches of one row: not in models that look only so far back, or ignore our mask."""
        if getattr(self.model.config, "sliding_window", None):
            return False
        ids = torch.arange(5, device=self.device) % self.head.weight.shape[0]  # prompt 0 1 2, branches 3 and 4
        sees = torch.tril(torch.ones(5, 5, dtype=torch.bool, device=self.device))
        sees[4, 3] = False
        mask = torch.zeros(1, 1, 5, 5, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~sees, torch.finfo(self.dtype).min)
        where = torch.tensor([[0, 1, 2, 3, 3]], device=self.device)
        with torch.inference_mode():
            both = self.model(input_ids=ids[None], attention_mask=mask, position_ids=where, use_cache=False).logits
            alone = self.model(input_ids=ids[None, [0, 1, 2, 4]], use_cache=False).logits
        return torch.allclose(both[:, [0, 1, 2, 4]], alone, rtol=1e-3, atol=1e-4)

    @property
    def pad(self) -> int:
        """Token id used for padding (masked out, so its value does not matter)."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    def encode(self, prompt: str, choice: str) -> tuple[list[int], int]:
        """Token ids of prompt + choice, and where the choice starts. The sequence begins with the model's BOS token.

        Splits as the field's evaluation harnesses do: trailing spaces of the prompt belong to the choice, and the
        choice is what the joint encoding adds to the prompt's own. Too long a prompt is cut at its left.
        """
        key = (prompt, choice)
        known = self._encoded.get(key)
        if known is not None:
            return known
        kept = prompt.rstrip(" ")
        choice = prompt[len(kept) :] + choice
        whole = self.tokenizer(kept + choice, add_special_tokens=False)["input_ids"]
        start = len(self.tokenizer(kept, add_special_tokens=False)["input_ids"]) if kept else 0
        start = min(start, len(whole) - 1)
        ids = [self._bos, *whole]
        start += 1
        if len(ids) > self.max_length:
            cut = min(len(ids) - self.max_length, start - 1)
            ids, start = [self._bos, *ids[1 + cut :]][: self.max_length], start - cut
        if len(self._encoded) > 50_000:  # bounds memory when many clients pass through
            self._encoded.clear()
        self._encoded[key] = (ids, start)
        return ids, start

    @property
    def _bos(self) -> int:
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return int(token)
        return 0

    def rows(self, items: Sequence[Item]) -> Rows:
        """Lay items out as token rows. Items whose choices are all one token share the prompt's single row."""
        width = max((len(item.choices) for item in items), default=1)
        rows = Rows([], [], (len(items), width))
        for i, item in enumerate(items):
            if self.task == "classify":
                self._classify_row(rows, i * width, item)
            else:
                self._causal_rows(rows, i * width, item)
        return rows

    def targets(self, items: Sequence[Item]) -> Rows:
        """Rows to train on: only the right choice of every item that has one."""
        right = [replace(i, choices=(i.choices[i.answer],), answer=0) for i in items if i.answer is not None]
        return self.rows(right)

    def _classify_row(self, rows: Rows, cell: int, item: Item) -> None:
        ids = self.tokenizer(item.prompt, truncation=True, max_length=self.max_length)["input_ids"]
        labels = [(0, self.labels.index(c), cell + i) for i, c in enumerate(item.choices) if c in self.labels]
        if len(labels) == len(item.choices):  # else no row: the item is unscoreable, and counted so
            rows.ids.append(ids)
            rows.targets.append(labels)

    def _causal_rows(self, rows: Rows, cell: int, item: Item) -> None:
        encoded = [self.encode(item.prompt, choice) for choice in item.choices]
        if not all(item.choices) or any(start == 0 for _, start in encoded):
            return  # nothing to predict, so no row: the item is unscoreable, and counted so
        prefixes = {tuple(ids[:start]) for ids, start in encoded}
        if len(prefixes) == 1 and all(len(ids) == start + 1 for ids, start in encoded):
            rows.ids.append(list(prefixes.pop()))
            rows.targets.append([(start - 1, ids[start], cell + i) for i, (ids, start) in enumerate(encoded)])
            return
        if len(encoded) > 1 and len(prefixes) == 1 and self.shares_prompts:
            self._branches(rows, cell, encoded)
            return
        for i, (ids, start) in enumerate(encoded):
            rows.ids.append(ids[:-1])
            rows.targets.append([(at - 1, ids[at], cell + i) for at in range(start, len(ids))])

    def _branches(self, rows: Rows, cell: int, encoded: Sequence[tuple[list[int], int]]) -> None:
        """One row: the prompt, then each choice but for its last token, which nobody has to read on from."""
        whole, targets, starts = list(encoded[0][0][: encoded[0][1]]), [], []
        for i, (ids, start) in enumerate(encoded):
            targets.append((start - 1, ids[start], cell + i))
            targets += [(len(whole) + at, ids[start + 1 + at], cell + i) for at in range(len(ids) - start - 1)]
            if len(ids) > start + 1:
                starts.append(len(whole))
                whole += ids[start:-1]
        rows.branches[len(rows.ids)] = tuple(starts)
        rows.ids.append(whole)
        rows.targets.append(targets)


def load(
    source: str,
    *,
    task: Task = "causal",
    revision: str | None = None,
    labels: tuple[str, ...] = (),
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
) -> BaseModel:
    """Load and freeze a base model.

    Args:
        source: `"bundled"`, a folder in the `transformers` format, or a hub id (then `revision` is required).
        task: `causal` for a language model, `classify` for a sequence classifier.
        revision: the 40-hex commit of a hub model.
        labels: a classifier's label names in order; when empty they come from the model's own configuration.
        max_length: longest token sequence; longer prompts are cut at their left.
        dtype: of the frozen weights.

    Raises:
        BadInput: the model cannot be found or read, or does not fit the task.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    where = _resolve(source, revision)
    kwargs: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(where, **kwargs)
        if task == "classify" and labels:
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a head the folder lacks is created here: always the same
            model, found = auto.from_pretrained(where, config=config, dtype=dtype, output_loading_info=True, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
    except Exception as error:  # transformers, safetensors, tokenizers and json each raise their own
        raise BadInput.of(
            f"model {source!r}",
            f"could not be loaded as a {task} model ({type(error).__name__}: {_first_line(error)})",
            "check that the folder holds config.json, model.safetensors and the tokenizer files, all complete, "
            "or name a hub id with its revision",
        ) from error
    absent = sorted(found["missing_keys"]) if task == "causal" else []  # a classifier's new head may be absent
    if absent:
        raise BadInput.of(
            f"model {source!r}",
            f"is no complete causal model: {len(absent)} of its tensors are in no file, {absent[0]} among them",
            "use a model that was saved as a causal language model, or set model.task",
        )
    model.eval().requires_grad_(False)
    if task == "classify" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    names = labels or tuple(str(v) for _, v in sorted(model.config.id2label.items())) if task == "classify" else ()
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    return BaseModel(model, tokenizer, task, source, revision, min(max_length, int(longest)), names)


def _resolve(source: str, revision: str | None) -> str:
    if source == BUNDLED:
        return str(BUNDLED_DIR)
    path = Path(source).expanduser()
    if path.exists():
        missing = [] if (path / "config.json").is_file() else ["config.json"]
        if not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
            missing.append("model.safetensors")
        if missing:
            raise BadInput(
                Problem(f"model {source!r}", f"the folder has no {name}", "point to a folder saved by save_pretrained")
                for name in missing
            )
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadInput.of(f"model {source!r}", "no such folder", "check the path, or name a hub id such as owner/name")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise BadInput.of(
            f"model {source!r}",
            "is a hub id without a pinned revision" if revision is None else f"revision {revision!r} is not a commit",
            'set model.revision to the 40-hex commit of the model (a branch name can move under you), or use "bundled"',
        )
    return source


def content_digest(model: nn.Module, tokenizer: Any) -> str:
    """Blake2b over sorted weights (name, dtype, shape, bytes), the configuration and the tokenizer's vocabulary."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    config: Any = model.config
    kept = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


class _quiet:
    """Silence transformers' loading chatter; our own errors say what matters."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging: Any = logging
        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        self._logging.enable_progress_bar()
