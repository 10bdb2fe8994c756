"""The examples' apps in this process: before and after two lines of them were changed."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict

from fedcanary.engines.flower.grid import InProcessGrid

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FIRST = 100  # node ids are client numbers and this


def changed(example: str) -> dict[str, tuple[list[str], list[str]]]:
    """The lines that an example's diff takes away and adds, by file."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    file = ""
    for line in (EXAMPLES / example / "attach.diff").read_text("utf-8").splitlines():
        if line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/")
            found[file] = ([], [])
        elif line.startswith("-") and not line.startswith("---"):
            found[file][0].append(line[1:])
        elif line.startswith("+"):
            found[file][1].append(line[1:])
    return found


def copy(example: str, folder: Path, *, attach: bool) -> Path:
    """The example's app in a folder, with the diff and the study if it is to be attached."""
    app = folder / "app"
    shutil.copytree(EXAMPLES / example / "before", app)
    if attach:
        shutil.copy(EXAMPLES / example / "study.toml", app)
        for file, (old, new) in changed(example).items():
            text = (app / file).read_text("utf-8")
            for before, after in zip(old, new, strict=True):
                assert text.count(before + "\n") == 1
                text = text.replace(before + "\n", after + "\n")
            (app / file).write_text(text, "utf-8")
    return app


def edit(file: Path, *pairs: tuple[str, str]) -> None:
    text = file.read_text("utf-8")
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


class Federation:
    """An app's nodes, which outlive its server: `run` it as often as need be. The app is imported in `within`."""

    def __init__(self, app: Path, clients: int, config: dict[str, Any], **grid: Any) -> None:
        self.folder, self.clients, self.config, self._grid = app.parent, clients, config, grid
        self.package = next(path.parent.name for path in app.glob("*/client_app.py"))

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def grid(self, **more: Any) -> InProcessGrid:
        nodes = {FIRST + c: {"partition-id": c, "num-partitions": self.clients} for c in range(self.clients)}
        return InProcessGrid(nodes, self.module("client_app").app, self.config, **{**self._grid, **more})

    def run(self, grid: InProcessGrid | None = None, seed: int = 3) -> dict[str, Any]:
        """Run the app's own main function; what the last strategy it started gave."""
        found: dict[str, Any] = {}
        server = self.module("server_app")
        for draw in (torch.manual_seed, random.seed, np.random.seed):
            draw(seed)
        grid = grid or self.grid()
        server.app(grid, Context(1, 0, {}, RecordDict(), self.config))
        found["grid"] = grid
        return found


@contextmanager
def within(app: Path) -> Iterator[None]:
    """The app importable and no other, and its folder the working directory's neighbour."""
    package = next(path.parent.name for path in app.glob("*/client_app.py"))
    before = set(sys.modules)
    sys.path.insert(0, str(app))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(app))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:
                del sys.modules[name]
