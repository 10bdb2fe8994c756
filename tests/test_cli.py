"""Every command used wrongly: one message with every problem and its remedy, the right exit code, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedcanary import cli
from fedcanary.models.base import BUNDLED_DIR

TRUST = '[privacy]\ntrust = "none"\n'
ROWS = [{"text": f"a sentence number {i}", "label": str(i % 2), "who": f"c{i % 2}"} for i in range(40)]


def data(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return path


def run(tmp_path: Path, study: str, *more: str) -> tuple[int, Path]:
    (tmp_path / "study.toml").write_text(study)
    out = tmp_path / "out"
    return cli.main(["run", str(tmp_path / "study.toml"), "--out", str(out), "--quiet", *more]), out


def file_study(path: Path, columns: str, more: str = "") -> str:
    head = f'[clients]\nsource = "{path}"\n{more}\n[clients.columns]\n{columns}\n'
    return f"rounds = 1\n{TRUST}{head}"


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("rounds = 1\n", ["privacy.updates.noise", "not differentially private"]),
        (f"roundz = 1\n{TRUST}", ["roundz", "unknown key", "did you mean 'rounds'?"]),
        (f'{TRUST}[personalize]\nmethod = "fedavgg"\nlr = -1\n', ["did you mean 'fedavg'?", "lr", "2 problems"]),
        (f'{TRUST}[model]\nsource = "owner/name"\n', ["without a pinned revision", "40-hex"]),
        (f'{TRUST}[model]\nsource = "./nowhere"\n', ["no such folder"]),
        (f'{TRUST}[model.lora]\ntargets = ["q_projj"]\n', ["matches no linear layer", "did you mean 'q_proj'?"]),
        (f'{TRUST}[[probes.suites]]\nsource = "world-bia"\n', ["did you mean 'world-bias'?"]),
        ("rounds = [\n", ["is not TOML"]),
        (
            'rounds = 7\n[clients]\ncount = 30\n[privacy.updates]\nnoise = "none"\n',
            ["privacy.min_cohort", "4 in a round", "fedcanary plan"],
        ),
        (
            "[clients]\ncount = 200\n[privacy.updates]\nnoise = 0.5\nclip = 1.0\n",
            ["privacy.updates.noise", "spends more than the whole epsilon", "give more than"],
        ),
        (
            '[clients]\ncount = 200\npolicies = "nowhere"\n[privacy.updates]\nnoise = "none"\n',
            ["nowhere", "holds no policy"],
        ),
        (f"{TRUST}[probes.margins]\namplified_bias = 0.9\n", ["less than or equal to 0.2"]),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_written(
    study: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path, study)
    message = capsys.readouterr().err
    assert code == 2
    assert all(words in message for words in said), message
    assert "remedy:" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "columns", "more", "said"),
    [
        (None, 'text = "textt"\nclient = "who"', "", ["textt", "did you mean 'text'?"]),
        (None, 'text = "text"', "", ["client column"]),
        (None, 'text = "text"\nclient = "who"', "min_examples = 30", ["c0", "c1", "30"]),
        ([], 'text = "text"\nclient = "who"', "", ["holds no rows"]),
        ([{"text": "one", "who": "a"}, {"text": "", "who": "b"}], 'text = "text"\nclient = "who"', "", [":2"]),
        (
            [*ROWS, {"text": "t", "label": "7", "who": "c0"}],
            'text = "text"\nlabel = "label"\nclient = "who"',
            'labels = ["x", "y"]',
            [":41", "'7'"],
        ),
    ],
)
def test_bad_data_is_refused_with_file_and_line(
    rows: list[dict[str, str]] | None,
    columns: str,
    more: str,
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = data(tmp_path / "rows.jsonl", rows)
    code, out = run(tmp_path, file_study(path, columns, more))
    message = capsys.readouterr().err
    assert code == 2
    assert all(words in message for words in said), message
    assert not out.exists()


def test_broken_lines_and_bad_bytes_are_listed_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a", "who": "c"}\n{"text": \n[1]\n{"text": "\xff", "who": "c"}\n')
    code, _ = run(tmp_path, file_study(path, 'text = "text"\nclient = "who"'))
    message = capsys.readouterr().err
    assert code == 2
    assert all(f"rows.jsonl:{line}" in message for line in (2, 3, 4)), message


def test_problems_of_model_suites_and_data_come_in_one_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = f'{TRUST}[model]\nsource = "./gone"\n[clients]\nsource = "./lost.jsonl"\n'
    study += '[clients.columns]\ntext = "text"\nclient = "who"\n[[probes.suites]]\nsource = "nothing"\n'
    code, _ = run(tmp_path, study)
    message = capsys.readouterr().err
    assert code == 2
    assert "3 problems" in message
    assert all(words in message for words in ("/gone", "lost.jsonl", "nothing")), message


def test_a_corrupt_model_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BUNDLED_DIR, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, out = run(tmp_path, f'{TRUST}[model]\nsource = "{tmp_path / "model"}"\n')
    assert code == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_holds_a_run_or_a_file_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.jsonl").write_text("")
    assert cli.main(["run", "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    (out / "record.jsonl").rename(out / "mine.txt")
    assert cli.main(["run", "--out", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["report", "replay", "verify"])
def test_commands_on_a_folder_without_a_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert "holds no run record" in capsys.readouterr().err


def test_resume_takes_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--resume", str(tmp_path), "--set", "rounds=1"]) == 2
    assert "takes the study from the record" in capsys.readouterr().err
    assert cli.main(["run", "--resume", str(tmp_path / "gone")]) == 2


def test_probe_lists_every_bad_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "bundled", "--adapter", str(tmp_path / "gone"), "--suite", "world-bia"]) == 2
    message = capsys.readouterr().err
    assert "gone" in message or "world-bia" in message
    assert "remedy:" in message


@pytest.mark.parametrize("arguments", [[], ["runn"], ["run", "--nope"], ["report"]])
def test_unknown_words_end_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2


def test_verify_finds_a_changed_adapter_and_a_changed_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = f"rounds = 1\n{TRUST}[clients]\ncount = 2\nexamples = 8\neval_examples = 2\n[engine]\nthreads = 1\n"
    study += "".join(f'[[probes.suites]]\nsource = "world-{s}"\nlimit = 4\n' for s in ("bias", "safety", "general"))
    code, out = run(tmp_path, study + "[probes]\npackaged = false\n")
    assert code in (0, 3)
    assert cli.main(["verify", str(out)]) == 0
    assert cli.main(["replay", str(out)]) == 0
    weights = out / "adapters" / "round-001" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["verify", str(out)]) == 2
    assert "is not the adapter of the record" in capsys.readouterr().err
    record = out / "record.jsonl"
    record.write_text(record.read_text().replace('"count": 2.0', '"count": 3.0', 1))
    assert cli.main(["replay", str(out)]) == 2
    assert "was changed since it was written" in capsys.readouterr().err
