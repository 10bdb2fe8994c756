"""Flower's programs as processes that never outlive whoever started them.

Every process of a deployment, and whatever it starts, carries the deployment's id in its environment. That finds those
too that left their process group, as Flower's own children do. A watcher (this module, run as a program) holds the end
of a pipe of the process that started all: when that one dies, by whatever signal, the pipe closes and the watcher ends
every process with the id. A death signal of the kernel (prctl) would reach direct children only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedcanary.errors import BadInput

MARK, PART = "FEDCANARY_DEPLOYMENT", "FEDCANARY_PART"
GRACE = 12.0  # seconds between asking a process to end and killing it
AGAIN = (2.0, 4.0, 8.0, 15.0)  # seconds before each further start; the last one repeats
PATIENCE = 120.0  # a SuperLink refuses a killed node until 2 heartbeats of 30 s were missed; then it is up to the user
SETTLED = 30.0  # a process that lived so long is well


def program(name: str) -> str:
    """A program beside the running interpreter. Raises BadInput if the extra `flower` is not installed."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise BadInput.of(name, "is not installed beside this Python", "pip install 'fedcanary[flower]'")
    return str(path)


def environment(id: str, part: str, home: Path) -> dict[str, str]:
    """What a program of Flower runs under: its own home; no telemetry, look for updates, or installing."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))}
    return kept | {
        # programs start each other by name
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        MARK: id,
        PART: part,
    }


def free_port() -> int:
    """One of the loopback interface that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def living(id: str, part: str = "") -> list[int]:
    """Processes with an id, or one of the form `id.more`; only of one part, or of those whose name begins with "x-".

    Zombies do not count.
    """
    marks = [f"\0{MARK}={id}{after}".encode() for after in "\0."]
    name_mark = f"\0{PART}={part}{'' if part.endswith('-') or not part else chr(0)}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                content = b"\0" + Path(f"/proc/{name}/environ").read_bytes()
                if name_mark in content and any(mark in content for mark in marks):
                    found.append(int(name))
    return found


def end(id: str, part: str = "", grace: float = GRACE) -> int:
    """End all processes of a deployment or of its parts; returns how many there were. Those of nodes are ended first.

    A node that ends while its SuperLink lives signs off, and may come back at once.
    """
    ended: set[int] = set()
    for group in ("node-", "") if not part else (part,):
        until = time.monotonic() + grace
        asked: set[int] = set()
        while found := living(id, group):
            kill = time.monotonic() > until
            for pid in found:
                if kill or pid not in asked:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            asked |= set(found)
            time.sleep(0.1)
        ended |= asked
    return len(ended)


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log file."""
    try:
        return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


@dataclass(kw_only=True)
class Part:
    """One program that is kept running: started again when it ends, with growing pauses, until `PATIENCE` is over."""

    id: str
    name: str
    home: Path
    command: Callable[[], Sequence[str]]  # made anew at each start: it may name a free port
    ready: str = ""  # in the log once it works
    extra: Mapping[str, str] = field(default_factory=dict)  # added to the environment
    clock: Callable[[], float] = time.monotonic
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _failures: int = field(default=0, init=False)
    _given_up: bool = field(default=False, init=False)
    _began: float = field(default=0.0, init=False)
    _failing: float | None = field(default=None, init=False)  # since when
    _due: float | None = field(default=None, init=False)
    _offset: int = field(default=0, init=False)

    @property
    def log(self) -> Path:
        """What the program says."""
        return self.home / f"{self.name}.log"

    def start(self) -> None:
        """Start it, in a session of its own."""
        command = list(self.command())
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._offset = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env=environment(self.id, self.name, self.home) | dict(self.extra),
                start_new_session=True,
            )
        self._began, self._due = self.clock(), None

    def poll(self) -> str:
        """Look after it; what it is doing now: starting, up, waiting, or ended for good."""
        now = self.clock()
        if self._given_up or self.process is None:
            return "ended"
        if self._due is not None:
            if now < self._due:
                return "waiting"
            self.start()
            return "starting"
        if self.process.poll() is None:
            if now - self._began >= SETTLED:
                self._failing = None
            return "up" if self.is_ready() else "starting"
        end(self.id, self.name, grace=2.0)  # what it started must not work on beside its successor
        if self._failing is None:
            self._failing, self._failures = now, 0
        if now - self._failing > PATIENCE:
            self._given_up = True
            return "ended"
        self._due = now + AGAIN[min(self._failures, len(AGAIN) - 1)]
        self._failures += 1
        return "waiting"

    def is_ready(self) -> bool:
        """Whether it said so since it was last started."""
        if not self.ready:
            return True
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(self._offset)
            return self.ready.encode() in log.read(1 << 16)
        return False


class Group:
    """The parts that this process started. Used in a `with`; leaves nothing running, however it ends."""

    def __init__(self, id: str, grace: float = GRACE) -> None:
        self.id, self._grace = id, grace
        self.parts: list[Part] = []
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Group:
        command = [sys.executable, "-m", __name__, self.id]
        bare = {k: v for k, v in os.environ.items() if k not in (MARK, PART)}
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, env=bare, start_new_session=True)
        return self

    def add(self, part: Part) -> Part:
        """Start a part and keep it."""
        self.parts.append(part)
        part.start()
        return part

    def poll(self) -> dict[str, str]:
        """Look after all parts: what each is doing."""
        return {part.name: part.poll() for part in self.parts}

    def wait(self, part: Part, seconds: float, until: Callable[[], bool]) -> None:
        """Wait until a part works. Raises BadInput with the end of its log if it does not."""
        limit = time.monotonic() + seconds
        while not until():
            if part.process is None or part.process.poll() is not None or time.monotonic() > limit:
                what = f"did not start; the end of {part.log}:\n{tail(part.log)}"
                raise BadInput.of(part.name, what, "see its log; is its port free, and its certificate in date?")
            time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        end(self.id, grace=self._grace)
        for part in self.parts:
            if part.process is not None:
                part.process.wait()
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()  # it looks once more, and ends
            self._watcher.wait()


def _watch(id: str) -> None:
    """Until the other end of stdin closes; then end the deployment."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1 << 10):
        pass
    end(id)


if __name__ == "__main__":
    _watch(sys.argv[1])
