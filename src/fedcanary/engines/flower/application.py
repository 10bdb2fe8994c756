"""The folder that Flower is given as an app: it only names fedcanary's apps, which are installed at every node."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedcanary.engines.flower.doors import app_digest

PATIENCE = {"train_seconds": 3600, "step_seconds": 300, "nodes_seconds": 600}  # what `FlowerClients` waits for
MODULE = "fedcanary_app"
CODE = '''"""The apps of fedcanary, by the names that Flower looks for."""

from fedcanary.flower.apps import client_app, server_app

__all__ = ["client_app", "server_app"]
'''


def write_app(folder: Path, code: str = CODE) -> None:
    """Write `pyproject.toml` and a module. `code` defines `client_app` and `server_app`."""
    folder.mkdir(parents=True)
    project = {"name": "fedcanary", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []}
    components = {"serverapp": f"{MODULE}:server_app", "clientapp": f"{MODULE}:client_app"}
    config: dict[str, str | int] = {
        "study": "",
        "out": "",
        "state": "",
        **PATIENCE,
    }  # Flower lets a run set only keys that are here
    app = {"publisher": "fedcanary", "components": components, "config": config}
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}), "utf-8")
    (folder / f"{MODULE}.py").write_text(code, "utf-8")


def pin_of(folder: Path) -> str:
    """Digest of what Flower makes of an app's folder; nodes and server accept no other app."""
    from flwr.cli.build import build_fab_from_disk

    return app_digest(build_fab_from_disk(folder))
