"""`contract` and `plan` at the command line: what they print, and what they say when used wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcanary import cli
from fedcanary.privacy import contract as contracts

STUDY = 'rounds = 3\n[clients]\ncount = 60\n[privacy.updates]\nnoise = "none"\n'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, its contract's text, and the text of one with a larger epsilon."""
    folder = tmp_path_factory.mktemp("contracts")
    (folder / "study.toml").write_text(STUDY)
    for name, more in (("one", []), ("more", ["--set", "privacy.epsilon=6"])):
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("builtins.print", lambda text="", said=said, **_: said.append(str(text)))
            assert cli.main(["contract", "show", str(folder / "study.toml"), "--toml", *more]) == 0
        (folder / f"{name}.toml").write_text("".join(said))
    return folder


def test_show_lists_every_number_and_what_it_costs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["contract", "show", str(files / "one.toml")]) == 0
    words = " ".join(capsys.readouterr().out.split())
    contract = contracts.load(files / "one.toml")
    assert contract.digest in words
    assert all(number.coord in words for number in contract.numbers)
    assert "epsilon 4 per panel, 4 per window of 3 rounds" in words
    assert "SIMULATED" in words and "WITHOUT NOISE: no epsilon here covers it" in words
    assert cli.main(["contract", "show", str(files / "one.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == contract.digest


def test_check_recomputes_the_price_and_asks_a_clients_policy(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["contract", "check", str(files / "one.toml")]) == 0
    assert "sound" in capsys.readouterr().out
    policy = tmp_path / "policy.toml"
    policy.write_text("max_epsilon = 1.0\nupdates_without_noise = true\nsimulated_noise = true\n")
    assert cli.main(["contract", "check", str(files / "one.toml"), "--policy", str(policy)]) == 4
    assert "over_own_epsilon" in capsys.readouterr().out
    policy.write_text("max_epsilon = 4.0\nupdates_without_noise = true\nsimulated_noise = true\n")
    assert cli.main(["contract", "check", str(files / "one.toml"), "--policy", str(policy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"] == []


def test_a_contract_that_states_too_low_a_price_is_not_sound(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = contracts.load(files / "one.toml").model_copy(update={"epsilon_per_panel": 1.0, "epsilon_per_window": 1.0})
    (tmp_path / "cheap.toml").write_text(cheap.text)
    assert cli.main(["contract", "check", str(tmp_path / "cheap.toml")]) == 2
    assert "epsilon_per_panel" in capsys.readouterr().err


def test_diff_says_in_words_what_is_new_and_asks_for_consent(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, more = str(files / "one.toml"), str(files / "more.toml")
    assert cli.main(["contract", "diff", one, more]) == 4
    assert "would newly cost: epsilon per window" in capsys.readouterr().out
    assert cli.main(["contract", "diff", more, one]) == 0
    assert "would narrow" in capsys.readouterr().out
    assert cli.main(["contract", "diff", one, one, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"consent": False, "changes": []}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["contract", "show", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["contract", "show", "."], ["holds no contract.toml"]),
        (["contract", "show", "one.toml", "--set", "rounds=2"], ["--set", "name the study instead"]),
        (["contract", "check", "torn.toml"], ["torn.toml"]),
        (["contract", "check", "one.toml", "--policy", "torn.toml"], ["torn.toml"]),
        (["contract", "check", "one.toml", "--policy", "misspelt.toml"], ["max_epsilom", "max_epsilon", "utilty"]),
        (["contract", "diff", "one.toml", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["plan", "--clients", "0", "--epsilon", "-1"], ["clients", "epsilon", "2 problems"]),
        (["plan", "--clients", "400", "--epsilon", "1", "--effect", "amplified_bia=.1"], ["amplified_bias"]),
        (["plan", "silos.toml", "--clients", "400", "--epsilon", "1"], ["privacy.unit", "made for the unit client"]),
        (["plan", "nowhere.toml", "--clients", "400", "--epsilon", "1"], ["nowhere.toml", "cannot be read"]),
    ],
)
def test_wrong_use_is_one_message_with_every_problem(
    arguments: list[str],
    said: list[str],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    silos = '[privacy]\nunit = "example"\nrecord = { noise = 1.0, clip = 1.0, sample_rate = 0.1 }\n'
    (files / "silos.toml").write_text(silos)
    (files / "torn.toml").write_text("[[numbers]]\nprobe = ")
    (files / "misspelt.toml").write_text('max_epsilom = 1\nforbidden_probes = ["utilty"]\n')
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert "remedy:" in message
    assert all(words in message for words in said), message


def test_plan_predicts_for_both_panels_and_recommends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--clients", "400", "--epsilon", "4", "--rounds", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {panel["kind"] for panel in found["panels"]} == {"rotating", "same"}
    assert cli.main(["plan", "--clients", "12", "--epsilon", "0.1", "--rounds", "4"]) == 0
    assert "cannot be met" in capsys.readouterr().out


def test_a_window_that_another_run_spent_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        "rounds = 1\n[clients]\ncount = 12\nexamples = 8\neval_examples = 4\n"
        '[privacy]\nledger = "shared.sqlite"\n[privacy.updates]\nnoise = "none"\n'
        '[probes]\npackaged = false\nsuites = [{ source = "world-general", limit = 4 }]\n'
    )

    def run(out: str, *changes: str) -> int:
        more = [word for change in changes for word in ("--set", change)]
        return cli.main(["run", str(study), "--out", str(tmp_path / out), "--quiet", *more])

    assert run("first") in (0, 3)
    capsys.readouterr()
    assert run("second", "personalize.lr=1e-3") == 4
    said = capsys.readouterr().err
    assert "would fit: the same with" in said and "the same in the next window" in said
    assert not (tmp_path / "second").exists()
    assert run("third", "seed=2") == 2  # another generated population has another ledger
    assert not (tmp_path / "third").exists()
    assert run("fourth", "personalize.lr=1e-3", "privacy.window=2") in (0, 3)
