"""Flower's simulation, as `flwr run` does it. python flower_sim.py JOB OUT, in a venv with flwr[simulation].

Ray's backend with two workers of one core each. `flwr run` starts a SuperLink that detaches itself; all that Flower and
Ray write goes to a temporary folder, and what is still running at the end is ended.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from job import read
from meter import Meter

HERE = Path(__file__).parent
WORKERS = 2
CONNECTION = """[superlink]
default = "local"
[superlink.local]
address = ":local:"
"""
PROJECT = """[project]
name = "speed"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
[tool.flwr.app.config]
folder = "{folder}"
out = "{out}"
"""


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(folder: Path, out: Path) -> int:
    job, _ = read(folder)
    meter = Meter()  # what detaches itself stays below this process
    with tempfile.TemporaryDirectory(prefix="fl") as name:  # short: Ray's sockets lie in it
        home = Path(name)
        (home / "config.toml").write_text(CONNECTION, "utf-8")
        app = home / "app"
        app.mkdir()
        shutil.copy(HERE / "flower_app.py", app)
        (app / "pyproject.toml").write_text(PROJECT.format(folder=folder.resolve(), out=out.resolve()), "utf-8")
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(HERE.resolve()),  # job.py and peft_client.py
            "FLWR_HOME": name,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "RAY_TMPDIR": name,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        federation = f"num-supernodes={job.clients} client-resources-num-cpus=1 init-args-num-cpus={WORKERS}"
        command = ["flwr", "run", str(app), "local", "--stream", "--federation-config", federation]
        try:
            return subprocess.run(command, cwd=home, env=environment).returncode
        finally:
            meter.end()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
