"""Row 13 is computed: the rule at its edges, what a wrong evidence file is told, and what the command prints."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from fedcanary import cli
from fedcanary.errors import BadInput
from fedcanary.landscape import matrix
from fedcanary.types import Mode

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # of the files as they were taken over
    "benchmark_matrix.csv": "00198cfc6b9e073b26d935ce4eaa33d940074ae308a795c2886bd61b7434d60e",
    "PROVENANCE.txt": "8699ac5df95313aa830b48572e984bb80644aeb1515e934512f927245ba91a99",
}
MODE = Mode.FAIRNESS_COLLAPSE


def figure(kind: str = "false_alarm", **how: Any) -> dict[str, Any]:
    """A figure that counts; `how` changes it."""
    given = {"false_alarm": (0.003, [0.001, 0.006]), "power": (0.97, [0.95, 0.98])}[kind]
    value, interval = given
    return {
        "id": f"SB-{kind}",
        "mode": str(MODE),
        "kind": kind,
        "private": True,
        "epsilon": 1.0,
        "clients": 1000,
        "source": "recorded",
        "value": value,
        "interval": interval,
        "runs": 10_000,
        "condition": "rotating panels",
        "where": "benchmarks/silentbench/README.md#null",
        **how,
    }


def write(folder: Path, *figures: Any, **more: Any) -> Path:
    path = folder / "evidence.json"
    path.write_text(json.dumps({"schema": 1, "figures": list(figures), **more}))
    return path


def level(folder: Path, *figures: dict[str, Any]) -> str:
    return matrix.ours(matrix.read(write(folder, *figures)))[MODE].level


def test_the_published_rows_are_the_files_as_taken_over() -> None:
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256((matrix.HERE / name).read_bytes()).hexdigest() == digest
    rows = matrix.published()
    assert len(rows) == 12
    assert {level for row in rows for level in row.cells.values()} == {"direct", "proxy", "none"}
    assert max(sum(level == "direct" for level in row.cells.values()) for row in rows) == 3
    assert "a7df030" in matrix.provenance()


def test_both_figures_on_real_readings_earn_direct(tmp_path: Path) -> None:
    for source in ("real", "recorded"):
        assert level(tmp_path, figure(source=source), figure("power", source=source)) == "direct"


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("false_alarm", {"interval": [0.001, 0.0501]}),
        ("false_alarm", {"runs": 999}),
        ("false_alarm", {"source": "simulated"}),
        ("false_alarm", {"private": False, "epsilon": "inf"}),
        ("false_alarm", {"mode": "amplified_bias"}),
        ("power", {"interval": [0.899, 0.98]}),
        ("power", {"private": False, "epsilon": None}),
        ("power", {"mode": "amplified_bias"}),
        ("power", {"id": "SB-other", "kind": "clear"}),
    ],
)
def test_a_figure_that_falls_short_earns_nothing(tmp_path: Path, kind: str, how: dict[str, Any]) -> None:
    figures = [figure(k) | (how if k == kind else {}) for k in ("false_alarm", "power")]
    cell = matrix.ours(matrix.read(write(tmp_path, *figures)))[MODE]
    assert (cell.level, cell.earned) == ("none", ())
    assert len(cell.missing) == 1


def test_at_the_edge_it_counts(tmp_path: Path) -> None:
    edge = figure(interval=[0.0, 0.05], runs=1000), figure("power", interval=[0.9, 1.0])
    assert level(tmp_path, *edge) == "direct"


def test_power_in_simulation_alone_is_a_proxy(tmp_path: Path) -> None:
    cell = matrix.ours(matrix.read(write(tmp_path, figure(), figure("power", source="simulated"))))[MODE]
    assert cell.level == "proxy"
    assert {f.kind for f in cell.earned} == {"false_alarm", "power"}
    assert cell.missing == ("power under a finite epsilon, on real readings, at least 0.9 with its interval",)


def test_a_measured_breach_outweighs_any_number_of_good_figures(tmp_path: Path) -> None:
    """The attack: publish the good cells of a grid and hope that the bad one is overlooked."""
    breach = figure(id="SB-burst", value=0.08, interval=[0.06, 0.1], condition="variance burst")
    good = [figure(id=f"SB-{i}") for i in range(5)]
    assert level(tmp_path, *good, breach, figure("power")) == "none"
    cell = matrix.ours(matrix.read(write(tmp_path, *good, breach, figure("power"))))[MODE]
    assert any("SB-burst breaches alpha" in lack for lack in cell.missing)
    weak = figure("power", id="SB-few", clients=50, value=0.2, interval=[0.18, 0.22])
    assert level(tmp_path, *good, weak, figure("power")) == "direct"


def test_the_figures_shown_are_the_least_flattering_that_count(tmp_path: Path) -> None:
    figures = (
        figure(id="a"),
        figure(id="b", value=0.02, interval=[0.01, 0.03]),
        figure("power", id="c", clients=10_000),
        figure("power", id="d", clients=200),
        figure("power", id="e", clients=50, value=0.2, interval=[0.1, 0.3]),
    )
    cell = matrix.ours(matrix.read(write(tmp_path, *figures)))[MODE]
    assert [f.id for f in matrix.shown(cell)] == ["b", "d"]
    assert {f.id for f in cell.earned} == {"a", "b", "c", "d"}


def test_every_problem_of_an_evidence_file_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        figure(mode="fairness"),
        figure(value=0.2),
        figure(id="x", epsilon="inf"),
        figure(id="y", private=False),
        figure(id="z", runs=0, clients=True),
        {k: v for k, v in figure(id="w").items() if k != "where"} | {"wher": "x"},
        figure("power", id="v", interval=[0.9, 1.1]),
        7,
        note="?",
        made_by=3,
    )
    with pytest.raises(BadInput) as caught:
        matrix.read(path)
    said = "\n".join(str(p) for p in caught.value.problems)
    for where in (
        *("note", "made_by", "figures[0].mode", "figures[1].interval", "figures[1].id", "figures[2].epsilon"),
        *("figures[3].epsilon", "figures[4].runs", "figures[4].clients", "figures[5].where", "figures[5].wher"),
        *("figures[6].interval", "figures[7]"),
    ):
        assert f"{path}: {where}:" in said, where
    assert "did you mean 'where'?" in said
    assert cli.main(["landscape", "--evidence", str(path)]) == 2
    assert f"{len(caught.value.problems)} problems" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "null", '{"schema": 2, "figures": []}', '{"schema": 1}', "\x00"])
def test_what_is_no_evidence_file_is_bad_input(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.json").write_text(content)
    assert cli.main(["landscape", "--evidence", str(tmp_path / "e.json")]) == 2
    assert cli.main(["landscape", "--evidence", str(tmp_path / "absent.json")]) == 2


def test_the_table_has_13_rows_and_links_each_cell_to_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, figure(condition="x\x1b[31m"), figure("power"), made_by="fedcanary bench")
    assert cli.main(["landscape", "--evidence", str(path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in out
    at = [i for i, line in enumerate(lines) if line.startswith("---")]
    assert len(lines[at[0] + 1 : at[1]]) == 12
    assert lines[at[1] + 1].split()[-6:] == ["none", "none", "direct", "none", "none", "none"]
    words = " ".join(out.split())
    assert "SB-false_alarm: false alarms 0.003 [0.001, 0.006], 10,000 runs, 1,000 clients, epsilon 1" in words
    assert "SB-power: power 0.97" in words and "README.md#null" in words
    assert cli.main(["landscape", "--evidence", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 13
    assert document["rows"][12]["cells"][MODE] == "direct"
    assert document["cells"][MODE]["figures"] == ["SB-false_alarm", "SB-power"]
    assert set(document["figures"]) == {"SB-false_alarm", "SB-power"}


def test_the_packaged_evidence_is_sound_and_its_pages_exist() -> None:
    evidence = matrix.read()
    assert all((ROOT / re.split("#", figure.where)[0]).is_file() for figure in evidence.figures)
    if not evidence.figures:
        assert {cell.level for cell in matrix.ours(evidence).values()} == {"none"}


def test_the_data_is_part_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fedcanary"]
    for name in (*PUBLISHED, "evidence.json"):
        assert any(fnmatch(f"landscape/{name}", pattern) for pattern in patterns), name
