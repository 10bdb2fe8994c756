"""Which files hold the users' data, and the list of everything found wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from fedcanary.errors import BadInput, Problem, did_you_mean

ENDINGS: Final = (".csv", ".jsonl", ".parquet")
LISTED: Final = 20  # problems of one kind that are spelled out; the rest are counted


class Problems:
    """Everything found wrong so far. The first `LISTED` of a kind keep their place; later ones are only counted."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, list[Problem]] = {}
        self._more: dict[str, int] = {}

    def add(self, kind: str, where: str, what: str, remedy: str | Callable[[], str]) -> None:
        """Note one problem; `kind` decides which cap it falls under and names the ones only counted."""
        self.count += 1
        listed = self._kinds.setdefault(kind, [])
        if len(listed) < LISTED:
            listed.append(Problem(where, what, remedy if isinstance(remedy, str) else remedy()))
        else:
            self._more[kind] = self._more.get(kind, 0) + 1

    def raise_any(self) -> None:
        """Raise one `BadInput` with all that was noted; return if there was nothing."""
        if not self.count:
            return
        found: list[Problem] = []
        for kind, listed in self._kinds.items():
            found += listed
            if more := self._more.get(kind):
                found.append(Problem("and more", f"{more} more of the same kind: {kind}", listed[-1].remedy))
        raise BadInput(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file to read. `classes` are names of integer codes that the file itself declares, by column."""

    path: Path
    kind: str  # csv, jsonl, parquet or arrow
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find(source: Path | Sequence[Path], split: str | None, problems: Problems) -> list[Source]:
    """The files meant by `source`, in the order their rows will have: as given, and by name within a folder."""
    found: list[Source] = []
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    for path in paths:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found += _saved(path, split, problems)
            continue
        if split is not None:
            what = f"has no split {split!r}: only saved datasets have splits"
            problems.add("split", str(path), what, "leave `split` out")
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in ENDINGS and entry.is_file())
            if not inside:
                what = f"holds no {', '.join(ENDINGS)} file and is no saved dataset (subfolders are not searched)"
                problems.add("empty", str(path), what, "name the folder that holds the files")
            found += [_file(entry) for entry in inside]
        elif not path.exists():
            near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            remedy = did_you_mean(path.name, near) if 0 < len(near) <= LISTED else "check the path"
            problems.add("missing", str(path), "no such file or folder", remedy)
        elif path.suffix.lower() not in ENDINGS:
            remedy = f"convert it to one of {', '.join(ENDINGS)}"
            problems.add("ending", str(path), f"cannot read files ending in {path.suffix!r}", remedy)
        else:
            found.append(_file(path))
    for one in found:
        if not os.access(one.path, os.R_OK):
            problems.add("unreadable", str(one.path), "cannot be opened for reading", "change its permissions")
    if not paths:
        problems.add("missing", "data", "no file is named", f"name a {', '.join(ENDINGS)} file or a folder of them")
    return found


# --- saved datasets: what Hugging Face `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in a folder


def _saved(folder: Path, split: str | None, problems: Problems) -> list[Source]:
    try:
        if (listing := folder / "dataset_dict.json").is_file():
            splits = list(json.loads(listing.read_text("utf-8"))["splits"])
            if split is None and len(splits) != 1:
                problems.add("split", str(folder), "has several splits", f"name a split: {', '.join(splits)}")
                return []
            if split is not None and split not in splits:
                problems.add("split", str(folder), f"has no split {split!r}", did_you_mean(split, splits))
                return []
            folder = folder / (split or splits[0])
        elif split is not None:
            problems.add("split", str(folder), f"has no split {split!r}: it is a single dataset", "leave `split` out")
            return []
        state = json.loads((folder / "state.json").read_text("utf-8"))
        features = json.loads((folder / "dataset_info.json").read_text("utf-8"))["features"]
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names or state.get("_indices_files") or any(Path(name).name != name for name in names):
            raise ValueError("no data files, or a list of rows kept outside them")
        if lost := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{', '.join(lost[:3])} is not there")
        classes = _classes(features)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"not a sound saved dataset: {type(error).__name__}: {error}"
        problems.add("unreadable", str(folder), what, "save the dataset again with save_to_disk")
        return []
    return [Source(path=folder / name, kind="arrow", classes=classes) for name in names]


def _file(path: Path) -> Source:
    kind = path.suffix.lower().removeprefix(".")
    try:  # a Parquet file that a dataset library wrote declares its classes too
        noted = (pq.read_schema(path).metadata or {}).get(b"huggingface") if kind == "parquet" else None
        return Source(path=path, kind=kind, classes=_classes(json.loads(noted)["info"]["features"]) if noted else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return Source(path=path, kind=kind)  # reading it tells what is wrong


def _classes(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        column: tuple(str(name) for name in kind["names"])
        for column, kind in features.items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }
