"""Identities of an attached app's clients, by which they know each other in secure sums, and the list of all."""

from __future__ import annotations

from pathlib import Path

from fedcanary.engines.flower import certificates
from fedcanary.engines.flower.certificates import Member
from fedcanary.engines.places import CLIENTS, place
from fedcanary.errors import BadInput


def one(folder: Path, client: int, *, replace: bool = False) -> str:
    """Make a client's identity in its node's own folder; returns its entry for everybody's `registry.toml`.

    Raises:
        BadInput: the client's number is none, or it has an identity and `replace` is not set.
    """
    if not 0 <= client < 2**32:
        raise BadInput.of("--client", f"{client} is no client's number", "count the app's clients from 0")
    return certificates.registry_text({client: _member(place(folder / CLIENTS, client), client, replace)})


def everybody(folder: Path, clients: int) -> None:
    """In a simulation: an identity for each client, in its own folder in `folder`, and the list beside the folder."""
    registry = folder.parent / certificates.REGISTRY
    if not registry.exists():
        members = {client: _member(place(folder, client), client, replace=True) for client in range(clients)}
        certificates.write_registry(registry, members)


def _member(folder: Path, client: int, replace: bool) -> Member:
    folder.mkdir(parents=True, exist_ok=True)
    key = certificates.identity(folder, replace=replace)
    return Member(name=str(client), key=key, flower=f"none {client}")  # Flower's own key is the app's matter
