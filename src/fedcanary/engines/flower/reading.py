"""What an app's model says to items, and what an app's held-out examples are, without the app's being disturbed.

The app's own objects are never touched: a reader has its own copy of the module, in eval mode, and no generator of
random numbers that the app could be using moves (`undisturbed`).

`call` gets a client's own held-out examples from a function of the app, `own_of` makes items of what it gave:
    parts      a tuple of two or three, as (train, test) or (train, validation, test): the last is held out
    examples   Item; {"text", "label", and perhaps "group", "domain", "positive"}; {"prompt", "response"};
               {"prompt", "choices", "answer", ...}; (text, label); (tensor, label)
    batches    as a DataLoader gives: (inputs, labels), or {..., "label" or "labels"} whose rest are the inputs
A label is its number or its name. What has no text is put to the module as it is.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.models import adapters, stacked
from fedcanary.models.adapters import Adapter, Lora
from fedcanary.models.base import BaseModel
from fedcanary.types import Array, Item, Scores

PASS: Final = 256  # texts in a pass of a module
TOKENS: Final = 1024  # in a pass of a language model
LABELS: Final = ("label", "labels")


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is done inside moves none of the generators that the app may draw from."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the app's
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002 - as above


@dataclass(frozen=True, slots=True)
class Own:
    """Items, and what the module is given for each, where that is not made of their text: tensors of one row each."""

    items: tuple[Item, ...]
    inputs: tuple[Any, ...] = ()

    @property
    def domains(self) -> frozenset[str]:
        """The domains that they name."""
        return frozenset(item.domain for item in self.items if item.domain is not None)


class Reader(Protocol):
    """What a model with given arrays says."""

    def check(self, arrays: Adapter) -> None:
        """Raise BadInput if the model cannot take the arrays, or nothing it says can be read."""

    def said(self, arrays: Adapter, own: Own) -> Array:
        """(n, C) choice probabilities of n items; NaN for those that cannot be scored."""


class ModuleReader:
    """A module with a classifier's head, which takes what `encode` makes of texts and gives (n, labels) logits."""

    def __init__(self, build: Callable[[], Any], encode: Callable[[list[str]], Any], labels: Sequence[str]) -> None:
        self._build, self._encode, self._labels = build, encode, tuple(labels)
        self._module: Any = None

    def check(self, arrays: Adapter) -> None:
        """See `Reader`; every problem of building, loading, encoding and reading, as far as one can be seen."""
        try:
            with undisturbed(), torch.inference_mode():
                logits = self._logits(self._loaded(arrays), self._encoded(["a text", "another"]))
        except BadInput:
            raise
        except Exception as error:
            what = f"could not be asked about a text ({type(error).__name__}: {error})"
            remedy = "attach.encode must make, of a list of texts, what the module of attach.model takes"
            raise BadInput.of("the app's model", what, remedy) from error
        if tuple(logits.shape) != (2, len(self._labels)):
            what = f"says {tuple(logits.shape)} to two texts, and there are {len(self._labels)} labels"
            raise BadInput.of("the app's model", what, "give (texts, labels) logits, and name each in attach.labels")

    def said(self, arrays: Adapter, own: Own) -> Array:
        """See `Reader`."""
        if not own.items:
            return np.zeros((0, 1))
        with undisturbed(), torch.inference_mode():
            module = self._loaded(arrays)
            if own.inputs:
                parts = [self._logits(module, together) for together in _passes(own.inputs)]
            else:
                texts = [item.prompt for item in own.items]
                chunks = [texts[at : at + PASS] for at in range(0, len(texts), PASS)]
                parts = [self._logits(module, self._encoded(chunk)) for chunk in chunks]
            whole = torch.log_softmax(torch.cat(parts).double(), dim=1).numpy()
        return self._table(whole, own.items)

    def _table(self, logp: Array, items: Sequence[Item]) -> Array:
        table = np.full((len(items), max(len(item.choices) for item in items)), -math.inf)
        where = {label: at for at, label in enumerate(self._labels)}
        for row, item in enumerate(items):
            columns = [where.get(choice) for choice in item.choices]
            known = [column for column in columns if column is not None]
            scored = len(known) == len(columns) and bool(np.isfinite(logp[row]).all())
            table[row, : len(columns)] = logp[row, known] if scored else math.nan
            if not scored:
                table[row] = math.nan
        return Scores(logp=table, tokens=np.ones_like(table)).choice_probability()

    def _loaded(self, arrays: Adapter) -> Any:
        if self._module is None:
            self._module = copy.deepcopy(self._build())  # it may be one that the app holds too
        module = self._module
        if hasattr(module, "peft_config"):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            arrays = _renamed(arrays, list(get_peft_model_state_dict(module)))
            wrong = set_peft_model_state_dict(module, arrays).unexpected_keys
        else:
            state = module.state_dict()
            arrays = _renamed(arrays, list(state))
            wrong = sorted(arrays.keys() ^ state.keys())
            wrong += [name for name in arrays.keys() & state.keys() if arrays[name].shape != state[name].shape]
            if not wrong:
                module.load_state_dict(arrays)
        if wrong:
            what = f"cannot take the app's arrays: {len(wrong)} are missing, unknown or of another shape: {wrong[0]}"
            raise BadInput.of("attach.model", what, "name what builds the module whose state dict the app sends")
        return module.eval()

    def _encoded(self, texts: list[str]) -> Any:
        return self._encode(texts)

    @staticmethod
    def _logits(module: Any, given: Any) -> Tensor:
        if isinstance(given, Mapping):
            said = module(**given)
        elif isinstance(given, tuple | list):
            said = module(*given)
        else:
            said = module(given)
        logits = getattr(said, "logits", said)
        return torch.as_tensor(logits).cpu()


def _renamed(arrays: Adapter, names: Sequence[str]) -> Adapter:
    """Arrays that an app sends as a list are named by their place; they are in the state dict's order."""
    if len(arrays) == len(names) and arrays.keys() == {str(at) for at in range(len(names))}:
        return {name: arrays[str(at)] for at, name in enumerate(names)}
    return dict(arrays)


class PeftReader:
    """An adapter of one of our bases, given as peft's state dict."""

    def __init__(self, base: BaseModel, lora: Lora) -> None:
        self._base, self._lora = base, lora
        self._shapes = {name: tensor.shape for name, tensor in adapters.initial(base, lora, 0).items()}

    def check(self, arrays: Adapter) -> None:
        """See `Reader`."""
        given = {name: tensor.shape for name, tensor in adapters.from_peft(arrays).items()}
        wrong = sorted(name for name in given.keys() | self._shapes.keys() if given.get(name) != self._shapes.get(name))
        if wrong:
            what = f"{len(wrong)} of the app's arrays are not those of an adapter of the [model] table: {wrong[0]}"
            remedy = "give model.lora the app's own r, alpha, targets and layers"
            raise BadInput(Problem("model.lora", what, remedy) for _ in (0,))

    def said(self, arrays: Adapter, own: Own) -> Array:
        """See `Reader`."""
        if not own.items:
            return np.zeros((0, 1))
        with undisturbed():
            adapter = stacked.repeat(adapters.from_peft(arrays), 1)
            rows = self._base.rows(own.items)
            return stacked.score(self._base, self._lora, [adapter], [rows], tokens=TOKENS)[0].choice_probability()


def call(function: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """Call a function of the app with what it asks for by name.

    Raises:
        BadInput: it asks for something that is not known.
    """
    wanted = inspect.signature(function).parameters.values()
    named = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.name not in known and p.default is p.empty]
    if missing:
        problem = f"asks for {missing[0]!r}, which neither the run config nor the node config has"
        raise BadInput.of("attach.items", problem, did_you_mean(missing[0], known))
    return function(**{p.name: known[p.name] for p in named if p.name in known})


def own_of(found: Any, labels: Sequence[str], most: int) -> Own:
    """The items in what a function of the app gave.

    Raises:
        BadInput: the first example that is none.
    """
    if isinstance(found, tuple) and len(found) in (2, 3) and not isinstance(found[-1], Item | str | int):
        found = found[-1]
    items: list[Item] = []
    inputs: list[Any] = []
    for example in found:
        if isinstance(example, Item):
            items.append(example)
        elif isinstance(example, Mapping) and not any(isinstance(example.get(key), Tensor) for key in LABELS):
            items.append(_told(example, labels))
        elif isinstance(example, tuple | list) and len(example) == 2 and isinstance(example[0], str):
            items.append(_told({"text": example[0], "label": example[1]}, labels))
        else:
            for given, label in _unpacked(example):
                items.append(_told({"text": "", "label": label}, labels))
                inputs.append(given)
        if len(items) >= most:
            break
    if inputs and len(inputs) != len(items):
        raise _wrong("texts beside tensors")
    return Own(tuple(items[:most]), tuple(inputs[:most]))


def _unpacked(example: Any) -> Iterable[tuple[Any, int]]:
    """The rows of a batch, or of the one example, each as a batch of one."""
    if isinstance(example, Mapping):
        key = next(key for key in LABELS if isinstance(example.get(key), Tensor))
        given, label = {name: value for name, value in example.items() if name != key}, example[key]
    elif isinstance(example, tuple | list) and len(example) == 2:
        given, label = example
    else:
        raise _wrong(f"a {type(example).__name__}")
    numbers = torch.as_tensor(label)
    if numbers.ndim == 0:
        yield _row(given, None), int(numbers)
        return
    for at, number in enumerate(numbers.reshape(-1).tolist()):
        yield _row(given, at), int(number)


def _row(given: Any, at: int | None) -> Any:
    if isinstance(given, Mapping):
        return {name: _row(value, at) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return tuple(_row(value, at) for value in given)
    tensor = torch.as_tensor(given)
    return tensor[None] if at is None else tensor[at : at + 1]


def _passes(rows: Sequence[Any]) -> Iterator[Any]:
    """Rows together, as many as go into a pass; each alone where they are of different shapes."""
    for at in range(0, len(rows), PASS):
        chunk = rows[at : at + PASS]
        try:
            yield _joined(chunk)
        except RuntimeError:
            yield from chunk


def _joined(rows: Sequence[Any]) -> Any:
    first = rows[0]
    if isinstance(first, Mapping):
        return {name: _joined([row[name] for row in rows]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined([row[at] for row in rows]) for at in range(len(first)))
    return torch.cat(list(rows))


def _told(example: Mapping[str, Any], labels: Sequence[str]) -> Item:
    more = {key: example[key] for key in ("group", "domain", "pair") if example.get(key) is not None}
    if "prompt" in example and "response" in example:
        return Item(prompt=example["prompt"], choices=(example["response"],), answer=0, **more)
    if "prompt" in example and "choices" in example:
        choices = tuple(example["choices"])
        return Item(
            prompt=example["prompt"],
            choices=choices,
            answer=_index(example.get("answer"), choices),
            positive=_index(example.get("positive"), choices),
            **more,
        )
    if "text" not in example or "label" not in example or not labels:
        raise _wrong(f"a mapping with {', '.join(sorted(map(str, example)))}")
    return Item(
        prompt=str(example["text"]),
        choices=tuple(labels),
        answer=_index(example["label"], labels),
        positive=_index(example.get("positive"), labels),
        **more,
    )


def _index(given: Any, names: Sequence[str]) -> int | None:
    if given is None:
        return None
    if isinstance(given, str):
        if given not in names:
            raise _wrong("a label that is none of the study's")
        return list(names).index(given)
    number = int(given)
    if not 0 <= number < len(names):
        raise _wrong(f"label {number}, and there are {len(names)}")
    return number


def _wrong(what: str) -> BadInput:
    remedy = 'give examples as {"text", "label"}, {"prompt", "choices", "answer"} or {"prompt", "response"}, or batches'
    return BadInput.of("attach.items", f"gave {what}", remedy)
