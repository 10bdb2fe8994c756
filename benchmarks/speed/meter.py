"""Processor time and peak memory of a command with all its descendants, detached ones too: python meter.py OUT -- ...

The meter makes itself the reaper of orphans (PR_SET_CHILD_SUBREAPER, prctl(2)), so a daemon that detaches itself
becomes the meter's child. When the command has ended, what it left running is ended too, and the time of every process
that was waited for is the kernel's own count (getrusage(2), RUSAGE_CHILDREN). A process whose parent ignores SIGCHLD is
never waited for (wait(2)): such a one, a worker of Ray for example, counts with its last sample from /proc.

Memory is the largest sum, over samples, of all processes' proportional set sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.1  # seconds between two samples
GRACE = 10.0  # seconds that what is left running has to end before it is killed
TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[int, str, float, float]:
    """Parent, state, own seconds, and seconds of its waited children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, waited = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
    return int(fields[1]), fields[0], own / TICK, waited / TICK


def _table() -> dict[int, tuple[int, str, float, float]]:
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                table[int(name)] = _stat(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return table


def _below(root: int, table: dict[int, tuple[int, str, float, float]]) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, *_) in table.items():
        children.setdefault(parent, []).append(pid)
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting.extend(children.get(pid, ()))


def _pss(pid: int) -> int:
    """KiB; 0 where the process has just gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return 0


def _ignores_children(pid: int) -> bool:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGCHLD - 1) & 1)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


class Meter:
    """Watches everything below this process."""

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
        self.peak = 0  # KiB
        self._unwaited: dict[int, float] = {}  # seconds of those below a parent that ignores SIGCHLD
        self._code: int | None = None

    def sample(self) -> list[int]:
        """Take one; the processes that live."""
        table = _table()
        living = [pid for pid in _below(os.getpid(), table) if table[pid][1] != "Z"]
        self.peak = max(self.peak, sum(map(_pss, living)))
        for pid in living:
            parent, _, own, waited = table[pid]
            if parent != os.getpid() and _ignores_children(parent):
                self._unwaited[pid] = own + waited
            else:
                self._unwaited.pop(pid, None)
        return living

    def reap(self, main: int) -> bool:
        """Wait for all that has ended; whether any child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._unwaited.pop(pid, None)
            if pid == main:
                self._code = os.waitstatus_to_exitcode(status)

    def end(self, main: int = 0) -> None:
        """End and wait for all that is left below this process."""
        until = time.monotonic() + GRACE
        while self.reap(main):
            for pid in self.sample():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
            time.sleep(INTERVAL)

    def run(self, command: list[str]) -> dict[str, float]:
        """Run a command to its end, and end what it leaves behind."""
        began = time.monotonic()
        main = subprocess.Popen(command).pid
        left = True
        while self._code is None and left:
            self.sample()
            time.sleep(INTERVAL)
            left = self.reap(main)
        wall = time.monotonic() - began
        self.end(main)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        waited, unwaited = usage.ru_utime + usage.ru_stime, sum(self._unwaited.values())
        return {
            "code": -1 if self._code is None else self._code,
            "cpu": waited + unwaited,
            "unwaited": unwaited,
            "wall": wall,
            "mib": self.peak / 1024,
            "largest_mib": usage.ru_maxrss / 1024,  # of one process
        }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(Meter().run(sys.argv[3:])), "utf-8")
