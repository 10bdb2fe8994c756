"""What a client keeps on its own disk from round to round. Nothing here is read by server-side code."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcanary.engines.places import place
from fedcanary.models.adapters import Adapter


class Store:
    """Each client's tensors of one name, by round: `clients/<number>/<name>.<round>.safetensors`.

    With `everything`, no round's are dropped: a run that may roll back may need any of them.
    """

    def __init__(self, folder: Path, name: str, everything: bool = False) -> None:
        self._folder, self._name, self._everything = folder, name, everything

    def load(self, client: int, rounds: Container[int]) -> Adapter | None:
        """What the client kept in the last of these rounds that it kept anything in; None if there is none."""
        usable = {round: path for round, path in self._found(client).items() if round in rounds}
        return load_file(usable[max(usable)]) if usable else None

    def save(self, client: int, round: int, tensors: Mapping[str, Tensor], before: Container[int]) -> None:
        """Keep a round's tensors, and what `load` gives of those `before` it, in case this round is not completed."""
        folder = place(self._folder, client)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{self._name}.part"
        save_file({name: t.contiguous() for name, t in tensors.items()}, draft)
        draft.replace(folder / f"{self._name}.{round}.safetensors")
        found = self._found(client)
        last = max((earlier for earlier in found if earlier in before), default=None)
        for earlier, path in found.items():
            if not self._everything and earlier not in (round, last):
                path.unlink()

    def _found(self, client: int) -> dict[int, Path]:
        files = place(self._folder, client).glob(f"{self._name}.*.safetensors")
        return {int(path.name.split(".")[1]): path for path in files}
