"""Where a client keeps what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

CLIENTS: Final = "clients"  # the folder of those that one process plays


def place(folder: Path, client: int) -> Path:
    """The folder that stands for a client's own disk."""
    return folder / f"{client:06d}"
