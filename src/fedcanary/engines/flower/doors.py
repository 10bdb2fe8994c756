"""Flower's two daemons, with what Flower 1.41 leaves open shut: python -m fedcanary.engines.flower.doors NAME PIN ...

A SuperNode runs any app that the SuperLink hands out, and a SuperLink starts any app that anybody sends who reaches its
port (without the account service of Flower's company). So the server, or whoever reaches it, could run code at the
clients, and no contract, ledger or secure sum would bind it. Here both accept one app only: the one whose content has
the digest PIN; and a SuperLink answers another machine only where nodes speak to it, who must have a registered key.

Flower has no option for this, so its functions are wrapped; one that is not found ends the program before it listens.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGEST = 10 << 20  # bytes of an app, unpacked; Flower's own bound on the packed one
OPEN = "/v1/fleet/"  # what other machines may ask for


def app_digest(bundle: bytes) -> str:
    """Hex digest of an app bundle's files, in order, by name and content; not of how they were compressed.

    Raises:
        ValueError: not a bundle, or larger than `LARGEST`.
    """
    digest = hashlib.sha256(b"app")
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            files = archive.infolist()
            if sum(file.file_size for file in files) > LARGEST:
                raise ValueError("too large")
            for file in files:
                content = archive.read(file)
                digest.update(f"{len(file.filename.encode())} {len(content)} {file.filename}".encode() + content)
    except zipfile.BadZipFile as error:
        raise ValueError("no app bundle") from error
    return digest.hexdigest()


def is_pinned(bundle: bytes, pin: str) -> bool:
    """Whether a bundle is the pinned app."""
    try:
        return app_digest(bundle) == pin
    except ValueError:
        return False


class NodesOnly:
    """ASGI middleware: another machine than this one gets 403 everywhere but under `OPEN`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, or hand on."""
        host = (scope.get("client") or ("?",))[0]
        here = host in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        if scope["type"] == "lifespan" or here or str(scope.get("path", "")).startswith(OPEN):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def shut_link(pin: str) -> None:
    """Wrap the SuperLink's functions in this process."""
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.superlink import extensions as installed
    from flwr.superlink.servicer.control import control_handlers
    from starlette.middleware import Middleware

    extensions: Any = installed
    control: Any = control_handlers
    read, others = control.get_fab_config, extensions.get_middleware

    def config(bundle: bytes) -> Any:
        if not is_pinned(bundle, pin):
            raise FlowerError(ApiErrorCode.INVALID_APP_SPEC, "not the app of this deployment")
        return read(bundle)

    control.get_fab_config = config
    extensions.get_middleware = lambda: (Middleware(NodesOnly), *others())


def shut_node(pin: str) -> None:
    """Wrap the SuperNode's functions in this process: of another app it says that it could not be verified."""
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal

    node: Any = start_client_internal
    connect, pull, _ = node._init_connection, node._pull_and_store_message, node._verify_fab

    @contextmanager
    def connection(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*args, **kwargs) as (*first, get_fab, pull_object, push_object, confirm):

            def fab(hash: str, run: int) -> Fab:
                found = get_fab(hash, run)
                said = {"valid_license": "pinned"} if is_pinned(found.content, pin) else {}
                return Fab(found.hash_str, found.content, said)

            yield (*first, fab, pull_object, push_object, confirm)

    def pull_verified(**kwargs: Any) -> Any:
        return pull(**kwargs | {"trusted_entities": {"pin": pin}})

    node._init_connection, node._pull_and_store_message = connection, pull_verified
    node._verify_fab = lambda fab, entities: fab.verifications == {"valid_license": "pinned"}


def main(name: str, pin: str) -> None:
    """Run `flower-superlink` or `flower-supernode` with the rest of the command line."""
    if name == "flower-superlink":
        from flwr.superlink.cli import flower_superlink as program

        shut_link(pin)
    else:
        from flwr.supernode.cli import flower_supernode as program

        shut_node(pin)
    sys.argv = [name, *sys.argv[3:]]
    program()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
