"""Who may import whom, and that importing does nothing else.

Data flows: base model -> clients -> personalization -> probes -> private release -> monitor -> policy -> report.
A stage imports only from stages above it in the flow, and from the foundation, which imports nothing of ours.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedcanary

SOURCE = Path(fedcanary.__file__).parent
FOUNDATION = {"", "errors", "types", "rng"}  # "" is the package itself, which holds only the version
# Every stage, in order, with the stages it imports from today. A new stage or a new edge is a decision: write it here.
MAY_IMPORT: dict[str, set[str]] = {
    "models": set(),
    "clients": set(),
    "personalize": {"models"},
    "probes": set(),
    "privacy": set(),
    "monitor": {"probes", "privacy"},  # privacy: the planner asks the accountant and the encoding what noise there is
    "study_tables": set(),
    "study": {"study_tables"},
    "record": {"privacy"},
    "act": {"monitor", "record"},
    "drill": {"probes", "monitor", "record"},
    # monitor: clients judge themselves by the same plan and the same worst part; act: verify checks what is adopted
    "engines": {"models", "clients", "personalize", "probes", "privacy", "monitor", "study", "record", "act"},
    "pipeline": {"models", "privacy", "monitor", "record", "act", "drill", "engines"},
    # models: the arrays of an app that exists are a model's, and named by their digest
    "flower": {"models", "privacy", "study", "engines", "pipeline"},
    "report": {"probes", "privacy", "monitor", "record", "act", "drill"},
    "landscape": set(),
    "bench": {"probes", "privacy", "monitor", "study", "record", "engines", "pipeline"},
    "compare_read": {"probes"},
    "compare": {"models", "probes", "study", "record", "compare_read"},
    "compare_text": {"compare_read", "compare"},
    "cli_privacy": {"privacy", "probes", "monitor", "study", "record", "engines"},
    "cli_deploy": {"record", "engines", "cli_privacy"},
    "cli": {
        *("monitor", "study", "record", "engines", "pipeline", "report", "landscape", "bench", "compare"),
        *("compare_text", "cli_privacy", "cli_deploy"),
    },
    "__main__": {"cli"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def stage(module: str) -> str:
    return [*module.split("."), ""][1] if module != "fedcanary" else ""


def imported(path: Path) -> set[str]:
    """Stages of ours that a file names in any import, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {stage(a.name) for a in node.names if a.name.split(".")[0] == "fedcanary"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fedcanary":
                names = {a.name for a in node.names}
                found |= {n if (SOURCE / n).is_dir() or (SOURCE / f"{n}.py").exists() else "" for n in names}
            elif (node.module or "").split(".")[0] == "fedcanary":
                found.add(stage(str(node.module)))
    return found


def owner(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_a_file_imports_only_what_its_stage_may(path):
    mine = owner(path)
    if mine in FOUNDATION:
        assert imported(path) <= FOUNDATION
        return
    assert mine in MAY_IMPORT, f"say in {Path(__file__).name} where {mine!r} stands and what it may import"
    extra = imported(path) - FOUNDATION - {mine} - MAY_IMPORT[mine]
    assert not extra, f"{mine} does not import from {sorted(extra)} today"


def test_the_allowed_edges_go_up_the_flow_and_are_all_in_use():
    order = list(MAY_IMPORT)
    used: dict[str, set[str]] = {name: set() for name in order}
    for path in FILES:
        if owner(path) in used:
            used[owner(path)] |= imported(path) - FOUNDATION - {owner(path)}
    for name, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in allowed), name
        assert not allowed - used[name], f"{name} no longer imports from {sorted(allowed - used[name])}: strike it out"


def test_the_server_side_cannot_reach_a_client():
    """What judges the federation sees releases; it has no way to a client's data, model or training."""
    for name in ("monitor", "report", "record"):
        assert not MAY_IMPORT[name] & {"clients", "personalize", "engines", "models", "pipeline"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_every_file_says_what_it_is(path):
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert text and len(text) > 20


def test_the_loop_stays_short_enough_to_be_the_table_of_contents():
    assert len((SOURCE / "pipeline.py").read_text("utf-8").splitlines()) < 220


WATCH = """
import builtins, importlib, json, os, pkgutil, sys, sysconfig
allowed = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), {source!r})]
import numpy, scipy.stats, torch, transformers, peft, pydantic, jinja2, pyarrow, pyarrow.compute, safetensors.torch
import tomli_w
found = []
def hook(event, args):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.")):
        found.append([event, str(args)[:200]])
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        writes = any(letter in str(args[1] or "r") for letter in "wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        inside = any(path == a or path.startswith(a + os.sep) for a in allowed)
        if writes or not (inside or path.startswith(("/proc", "/sys", "/dev"))):
            found.append([event, path])
sys.addaudithook(hook)
import fedcanary
names = [m.name for m in pkgutil.walk_packages(fedcanary.__path__, "fedcanary.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(json.dumps([len(names), found]))
"""


@pytest.mark.slow
@pytest.mark.services
def test_importing_every_module_reads_and_writes_nothing_and_calls_nobody():
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(source=str(SOURCE))], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    count, found = json.loads(done.stdout.splitlines()[-1])
    assert count >= len(FILES) - 2  # all but the package itself and __main__
    assert found == []
