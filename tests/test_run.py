"""The whole loop on the bundled model: resuming, interrupting, writing, replaying; a slice of the planted runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcanary import pipeline, study
from fedcanary.engines.setup import Setup, prepare
from fedcanary.models.base import BUNDLED_DIR
from fedcanary.monitor.base import plan_from
from fedcanary.monitor.evaluate import AllSeeingOracle
from fedcanary.personalize import METHODS, method
from fedcanary.pipeline import Progress, Stopped
from fedcanary.record import RunRecord
from fedcanary.types import Mode
from oracles.few import setup_of

SUITES = ("bias", "stereotype", "calibration", "general", "safety", "persona", "domain")


def tiny_study(**tables: object) -> study.Study:
    """Three clients and a few items of each packaged suite: a whole run in a second or two."""
    tree: dict[str, object] = {
        "rounds": 3,
        "clients": {"count": 3, "examples": 12, "eval_examples": 4},
        "personalize": {"lr": 5e-3},
        "privacy": {"trust": "none"},
        "probes": {"suites": [{"source": f"world-{name}", "limit": 6} for name in SUITES]},
        "engine": {"threads": 1, "stack": 2},
    }
    for name, table in tables.items():
        tree[name] = {**tree.get(name, {}), **table} if isinstance(table, dict) else table
    return study.parse(tree)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the wall times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.jsonl" and not path.name.startswith("ledger.sqlite-")
    }


PROTECTED = {"min_cohort": 2, "panel": "same", "trust": "secure_aggregation", "updates": {"noise": "none"}}


@pytest.mark.parametrize(
    "name", ["fedavg", "ditto", "dual", pytest.param("bundled, protected", marks=pytest.mark.slow)]
)
def test_a_stopped_run_resumes_to_the_same_bytes(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Whatever clients keep from round to round, over a tiny random model; and all that a study loads, protected."""

    def setup() -> Setup:
        if name not in METHODS:
            return prepare(tiny_study(privacy=PROTECTED), tmp_path / "cache")
        chosen = tiny_study(personalize={"method": name})
        return replace(setup_of(tiny["llama"], 3), study=chosen, method=method(name, chosen.personalize.mu))

    pipeline.run(setup(), tmp_path / "whole")

    class Enough(Exception):
        pass

    def stop_in_round_two(progress: Progress) -> None:
        if progress.round == 2 and progress.done == 2 and progress.verdict is None:
            raise Enough

    with pytest.raises(Enough):
        pipeline.run(setup(), tmp_path / "halves", watch=stop_in_round_two)
    assert RunRecord.load(tmp_path / "halves").rounds == 1
    pipeline.run(setup(), tmp_path / "halves")
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_an_interrupt_ends_after_the_stack_and_leaves_whole_rounds(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.round == 2 and progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    setup = prepare(tiny_study(), tmp_path / "cache")
    with pytest.raises(Stopped):
        pipeline.run(setup, tmp_path / "run", watch=interrupt)
    record = RunRecord.load(tmp_path / "run")
    assert record.rounds == 1
    assert not record.ended
    assert {entry.kind for entry in record.entries if entry.body.get("round") == 2} == set()


def test_a_finished_run_is_left_alone_by_resuming(tmp_path: Path) -> None:
    setup = prepare(tiny_study(rounds=1), tmp_path / "cache")
    pipeline.run(setup, tmp_path / "run")
    before = contents(tmp_path / "run")
    pipeline.run(setup, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_replay_gives_every_verdict_again(tmp_path: Path) -> None:
    record = pipeline.run(prepare(tiny_study(), tmp_path / "cache"), tmp_path / "run")
    recorded = [(body["round"], body["evidence"]) for body in RunRecord.load(tmp_path / "run").of("round")]
    assert pipeline.replay(record) == recorded


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for the old name
def test_saved_adapters_answer_in_plain_peft_as_they_did_here(tmp_path: Path) -> None:
    """The shared adapter of the last round, scored by peft alone, gives the next round's received reading."""
    taken: dict[int, float] = {}

    def tap(round: int, client: int, readings: object) -> None:
        if client == 0:
            taken[round] = float(readings["fairness_collapse"].values[5])

    chosen = tiny_study(rounds=2)
    setup = prepare(chosen, tmp_path / "cache")
    pipeline.run(setup, tmp_path / "run", oracle_tap=tap)
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapters" / "round-001")).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR)
    scores = []
    for item in setup.population.items(0, "eval"):
        ids = tokenizer(item.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = ids.new_full((1, 1), tokenizer.bos_token_id)
        logits = model(input_ids=torch.cat([start, ids], dim=1)).logits[0, -1].double()
        choices = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in item.choices]
        assert item.answer is not None
        scores.append(float(logits[choices].softmax(0)[item.answer]))
    assert taken[2] == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def test_readings_from_replies_are_a_second_opinion(tmp_path: Path) -> None:
    chosen = tiny_study(rounds=1, probes={"generate": True})
    record = pipeline.run(prepare(chosen, tmp_path / "cache"), tmp_path / "run")
    release = record.releases()[1]["alignment_erosion"]
    assert release.mean("said_no_base") >= 0.9  # the bundled base refuses the unsafe in so many words
    assert release.mean("said_no") >= 0.9
    assert release.mean("said_nothing") == 0


@pytest.mark.services
def test_control_c_and_resume_through_the_command_line(tmp_path: Path) -> None:
    text = tiny_study(rounds=4).toml()
    (tmp_path / "study.toml").write_text(text)
    command = [sys.executable, "-m", "fedcanary"]
    run = [*command, "run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "a")]
    with subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 1/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert f"--resume {tmp_path / 'a'}" in rest
    code = subprocess.run([*command, "run", "--resume", str(tmp_path / "a"), "--quiet"], check=False).returncode
    assert code in (0, 3)
    whole = [*run[:-1], str(tmp_path / "b"), "--quiet"]
    assert subprocess.run(whole, check=False).returncode == code
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.services
def test_kill_at_any_time_and_resume(tmp_path: Path) -> None:
    """kill -9 after an ever longer while; resuming always comes to the same adapters, releases and verdicts."""
    (tmp_path / "study.toml").write_text(tiny_study(rounds=3).toml())
    command = [sys.executable, "-m", "fedcanary", "run"]
    subprocess.run([*command, str(tmp_path / "study.toml"), "--out", str(tmp_path / "whole"), "--quiet"], check=False)
    for wait in (0.0, 0.4, 0.9):
        out = tmp_path / f"killed-{wait}"
        run = [*command, str(tmp_path / "study.toml"), "--out", str(out)]
        with subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            process.stderr.readline()
            time.sleep(wait)
            process.kill()
        assert subprocess.run([*command, "--resume", str(out), "--quiet"], check=False).returncode in (0, 3)
        for name in ("adapters/round-003/adapter_model.safetensors",):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        one, other = (RunRecord.load(tmp_path / name) for name in (out.name, "whole"))
        assert list(one.of("round")) == list(other.of("round"))
        assert one.releases().keys() == other.releases().keys()


def test_a_full_disk_is_told_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcanary import cli

    (tmp_path / "study.toml").write_text(tiny_study().toml())
    out = tmp_path / "run"
    real, calls = pipeline.adapters.save, []

    def full(folder: Path, *rest: object) -> None:
        calls.append(folder)
        if len(calls) == 3:  # the initial adapter's, round 1's, round 2's
            raise OSError(28, "No space left on device", str(folder))
        real(folder, *rest)

    monkeypatch.setattr(pipeline.adapters, "save", full)
    assert cli.main(["run", str(tmp_path / "study.toml"), "--out", str(out), "--quiet"]) == 2
    assert RunRecord.load(out).rounds == 1
    assert cli.main(["run", "--resume", str(out), "--quiet"]) in (0, 3)
    assert RunRecord.load(out).rounds == 3


@pytest.mark.slow
def test_the_headline_of_a_planted_slice(tmp_path: Path) -> None:
    """One small planted federation: the oracle finds the planted mode, no other, and utility rises."""
    chosen = tiny_study(
        rounds=6,
        clients={"count": 8, "examples": 48, "eval_examples": 24, "plants": [{"mode": "amplified_bias"}]},
        probes={"suites": [{"source": f"world-{name}", "limit": 6} for name in SUITES if name != "bias"]},
        engine={"threads": 1, "stack": 8},
    )
    setup = prepare(chosen, tmp_path / "cache")
    oracle = AllSeeingOracle(setup.probes)
    record = pipeline.run(setup, tmp_path / "run", oracle_tap=oracle)
    oracle.plan = plan_from(record.header["plan"])
    alarms = oracle.alarms(chosen.probes.margins.model_dump())
    assert [mode for mode, alarm in alarms.items() if alarm] == [Mode.AMPLIFIED_BIAS]
    assert oracle.utility(6)[1] > oracle.utility(6)[0]


@pytest.mark.slow
@pytest.mark.parametrize("plant", [None, *Mode])
def test_each_plant_once(plant: Mode | None, tmp_path: Path) -> None:
    """One seed of the 140 runs; benchmarks/plants.py does the rest."""
    chosen = tiny_study(
        seed=121,
        rounds=10,
        clients={
            "count": 16,
            "examples": 48,
            "eval_examples": 24,
            "plants": [{"mode": plant}] if plant is not None else [],
        },
        probes={"suites": []},
        engine={"threads": 1, "stack": 16},
    )
    setup = prepare(chosen, tmp_path / "cache")
    oracle = AllSeeingOracle(setup.probes)
    record = pipeline.run(setup, tmp_path / "run", oracle_tap=oracle)
    oracle.plan = plan_from(record.header["plan"])
    alarms = {mode for mode, alarm in oracle.alarms(chosen.probes.margins.model_dump()).items() if alarm}
    assert plant is None or plant in alarms
    assert plant is not None or not alarms
    assert oracle.utility(10)[1] > oracle.utility(10)[0]
    assert all(math.isfinite(oracle.judged(mode)) for mode in Mode)


def test_summary_is_plain_json(tmp_path: Path) -> None:
    from fedcanary import cli

    (tmp_path / "study.toml").write_text(tiny_study(rounds=1).toml())
    assert cli.main(["run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "run"), "--quiet"]) in (0, 3)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["modes"]) == set(Mode)
    assert summary["privacy"]["epsilon"] == "inf"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert cli.main(["report", str(tmp_path / "copy"), "--json"]) in (0, 3)
    assert json.loads((tmp_path / "copy" / "summary.json").read_text()) == summary
