"""A study in Flower's simulation: Ray plays the nodes, in a SuperLink of its own that ends with the run."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from fedcanary.engines.flower import live
from fedcanary.engines.flower.application import pin_of, write_app
from fedcanary.engines.flower.live import Screen
from fedcanary.engines.flower.operate import watched, without_result
from fedcanary.engines.flower.processes import Group, Part, free_port, program
from fedcanary.engines.flower.programs import START, answers, shut

WORKERS = 2  # processes that play the nodes; each holds a model
LOG = "flower.log"


def run(
    study: Path,
    out: Path,
    clients: int,
    *,
    screen: Screen,
    workers: int | None = None,
    app: Path | None = None,
) -> int:
    """Run a study, or go on with the run in `out`; returns its exit code. Nothing of Flower or Ray is left.

    Each client's own state is kept in `out/clients/<number>`; what Flower said is in `out/flower.log`. Memory is
    bounded by `workers` (default: one for each core, at most 2), however many clients there are.

    Raises:
        BadInput: Flower is not installed.
        Ended: the run ended with an error, which it tells; its exit code is the run's.
        FedcanaryError: it ended without a word.
    """
    workers = workers or min(os.cpu_count() or 1, WORKERS)
    (out / live.NAME).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="fl") as name:  # short: Ray's sockets lie in it
        home = Path(name)
        if app is None:
            write_app(home / "app")
        else:
            shutil.copytree(app, home / "app")
        words = {"study": str(study.resolve()), "out": str(out.resolve()), "state": str((out / "clients").resolve())}
        (home / "run-config.toml").write_text(tomli_w.dumps(words), "utf-8")
        link = shut("flower-superlink", pin_of(home / "app"))
        try:
            with simulated(home / "app", clients, workers, link, str(home / "run-config.toml"), home=home) as streamed:
                code = watched(streamed, out, screen)
                if code is None:
                    raise without_result(streamed)
                return code
        finally:
            if (home / "run.log").exists():
                shutil.copy(home / "run.log", out / LOG)


@contextmanager
def simulated(app: Path, clients: int, workers: int, link: Sequence[str], config: str, *, home: Path) -> Iterator[Part]:
    """Start any app in Flower's simulation, in a SuperLink (`link` is the command for one) that ends with the context.

    Gives the process that streams what the run says, and ends with it. `config` is a file of the app's configuration or
    its words; all that Flower and Ray write goes to `home`, whose path is to be short.

    Raises:
        BadInput: Flower is not installed, or its SuperLink does not come up.
    """
    port = free_port()
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    tables = {"superlink": {"default": "simulation", "simulation": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(tables), "utf-8")
    start = [*link, "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    start += ["--database", str(home / "state.db"), "--disable-runtime-dependency-installation"]
    federation = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
    submit = [program("flwr"), "run", str(app), "simulation", "--stream", "--federation-config", federation]
    extra = {"RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    with Group(secrets.token_hex(8)) as group:
        part = Part(id=group.id, name="superlink", home=home, command=lambda: start, extra=extra)
        group.add(part)
        group.wait(part, START, lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield group.add(Part(id=group.id, name="run", home=home, command=lambda: [*submit, "-c", config]))
