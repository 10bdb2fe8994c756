"""Over real processes: messages twice, again, late, cut, too large and not ours, and nodes that come back as others."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from deployed import NODES, ROUNDS, begun, counts, in_one_process, released, said, table, tell, up, wait_for, word

from fedcanary.engines.flower.application import write_app
from fedcanary.engines.flower.node import HELLO, WORDS
from fedcanary.engines.verify import verify
from fedcanary.record import RunRecord

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(1200)]


def until(record: Path, round: int) -> list[object]:
    """What a record says of the rounds before this one."""
    return [(e.kind, e.body) for e in RunRecord.load(record).entries if 0 < e.body.get("round", 0) < round]


def test_hostile_messages_change_nothing_but_whom_they_silence(tmp_path):
    """See hostile.py for what is done to which node. Until a reply comes too late for its exchange, the record is that
    of one process; after it, the one node that was not heard is out of the next sum, and nobody else.
    """
    rounds = 5
    write_app(tmp_path / "app", Path(__file__).with_name("hostile.py").read_text("utf-8"))
    study = table(rounds=rounds)
    with up(tmp_path / "d", app=tmp_path / "app", study=study) as folder:
        run = begun(folder)
        assert run.wait(timeout=900) in (0, 3), said(folder)
        out, faults = folder / "server" / "run", word(folder)["faults"]
        assert verify(out)["rounds"] == rounds
        assert counts(folder) == [NODES] * (rounds - 1) + [NODES - 1]
        in_one_process(tmp_path / "here", study)
        assert until(out, rounds) == until(tmp_path / "here", rounds)
        notes = [json.loads(line) for line in (out / "hostile.jsonl").read_text("utf-8").splitlines()]
        logs = "".join(path.read_text("utf-8", "replace") for path in folder.rglob("*.log"))
    print(faults, Counter(note["attack"] for note in notes))
    assert faults["malformed"] == 1
    assert faults["oversized"] == 1
    assert faults["late"] >= 1
    assert faults["unknown"] >= 10
    first = {(n["place"], id): said for n in notes if not n["attack"] for id, said in n.get("answers", {}).items()}
    attacks: dict[str, list[dict]] = {}
    for note in notes:
        attacks.setdefault(note["attack"], []).append(note)
    twice, again = attacks.pop("duplicate"), attacks.pop("replay")
    hello = len([note for note in twice if note["asks"][0][0] == HELLO])
    assert len(twice) - hello >= 3 * rounds - 2
    for note in twice:  # the same question has the same answer
        assert {id: first[0, id] for id in note["answers"]} == note["answers"]
        assert note["answers"]
    assert {kind for note in again for kind, _ in note["asks"]} == {HELLO, "keys", "share", "train", "agree", "unmask"}
    for note in again:  # what is over is not answered, or as it was before
        for id, (refused, digest) in note["answers"].items():
            assert refused == "wrong_round" or first[1, id] == [refused, digest]
    del attacks[""]
    assert len(attacks) == 8
    for name, found in attacks.items():
        for note in found:
            if name == "another type":  # Flower's own word for what an app has no handler for
                assert note["code"] == 2
                assert "nobody" in note["error"]
                continue
            assert "error" not in note, note
            assert {refused for refused, _ in note["answers"].values()} <= WORDS, note
            assert note["reasons"] == []
    mistakes = logs.count("ValueError: No query function registered with name 'nobody'")
    assert logs.count("Traceback") == mistakes  # no handler of ours raised


def other_base(folder: Path, node: Path, tmp_path: Path) -> None:
    """Have a node's study name a copy of the base model, of which one number differs."""
    from safetensors.torch import load_file, save_file

    from fedcanary.models.base import BUNDLED_DIR

    there = tmp_path / "base"
    shutil.copytree(BUNDLED_DIR, there)
    file = there / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    text = (node / "study.toml").read_text("utf-8")
    changed = text.replace('source = "bundled"', f'source = "{there}"')
    assert changed != text
    (node / "study.toml").write_text(changed, "utf-8")


def test_nodes_that_come_back_with_an_old_contract_or_another_base_are_out(tmp_path):
    with up(tmp_path / "d") as folder:
        old, model = folder / "nodes" / "001", folder / "nodes" / "002"
        right = (old / "study.toml").read_text("utf-8")
        run = begun(folder)
        wait_for(folder, 1, "train")
        (old / "study.toml").write_text(re.sub(r"^epsilon = .*", "epsilon = 7.0", right, flags=re.MULTILINE), "utf-8")
        tell(folder, "node-001")
        wait_for(folder, 3, "train")
        assert released(folder)[1] == NODES - 1
        (old / "study.toml").write_text(right, "utf-8")
        tell(folder, "node-001")
        other_base(folder, model, tmp_path)
        tell(folder, "node-002")
        assert run.wait(timeout=600) in (0, 3), said(folder)
        found = counts(folder)
        assert len(found) == ROUNDS
        assert found[-1] == NODES - 1
        refused = word(folder)["refused"]
        assert refused["other_contract"] >= 1
        assert refused["other_model"] >= 1


@pytest.mark.parametrize("step", ["keys", "share", "train", "agree", "unmask"])
def test_a_server_that_is_killed_at_a_step_goes_on_there(tmp_path, step):
    """Its record is byte for byte that of one process: no round is lost and none is charged twice."""
    with up(tmp_path / "d") as folder:
        run = begun(folder)
        wait_for(folder, 1, step)
        tell(folder, "superexec")  # and with it the ServerApp
        assert run.wait(timeout=300) not in (0, 3), said(folder)
        assert begun(folder).wait(timeout=580) in (0, 3), said(folder)
        out = folder / "server" / "run"
        assert verify(out)["rounds"] == ROUNDS
        assert (out / "record.jsonl").read_bytes() == in_one_process(tmp_path / "here")
