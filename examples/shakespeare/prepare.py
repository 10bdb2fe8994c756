"""Cut tiny Shakespeare into rows, each with its speaker, and teach the bundled model the language of the plays.

    FEDCANARY_DATA=DIR python examples/shakespeare/prepare.py [--out runs/shakespeare-prepared]

DIR/tinyshakespeare/input.txt is a sequence of speeches: a line with the speaker's name and a colon, then what is said,
then an empty line. A row is a run of whole lines of one speech, as long as it can be within `LONGEST` characters; a
scrap shorter than `SHORTEST` is left out. The file does not say which play a speech is from, so rows have no domain,
and a name that several plays use ("First Citizen", "Nurse") is one speaker.

The bundled model has never seen a real sentence, so a base is made of it first: all its weights are trained on the
rows of the speakers who have too few to be clients, which are public here. Beside every such batch it is held to what
it said before (its own distribution, over questions of its own world), so that the packaged suites still read it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedcanary.errors import BadInput, FedcanaryError
from fedcanary.rng import stream

ROOT = Path(__file__).resolve().parents[2]
PREPARED = ROOT / "runs" / "shakespeare-prepared"
FILE = Path("tinyshakespeare") / "input.txt"
LONGEST = 96
SHORTEST = 20
CLIENT_ROWS = 20  # the study's clients.min_examples; speakers with fewer are public

SEED = 5
STEPS = 400
BATCH = 24
HELD = 16  # questions of the bundled world beside each batch
RATE = 4e-3

SPEAKER = re.compile(r"^([A-Z][^\n:]*):$")


def locate() -> Path:
    """The text. Raises BadInput if it is not where FEDCANARY_DATA says."""
    folder = os.environ.get("FEDCANARY_DATA")
    source = Path(folder or ".") / FILE
    if not folder or not source.is_file():
        what = "is not set" if not folder else f"names a folder without {FILE}"
        remedy = f"set it to a folder that holds {FILE}, from github.com/karpathy/char-rnn, data/tinyshakespeare"
        raise BadInput.of("FEDCANARY_DATA", what, remedy)
    return source


def speeches(text: str) -> Iterator[tuple[str, list[str]]]:
    """(speaker, lines) of every speech, in order."""
    for block in re.split(r"\n{2,}", text.strip()):
        first, *lines = block.split("\n")
        named = SPEAKER.match(first)
        if named and lines:
            yield named[1].strip(), lines


def rows(text: str) -> Iterator[dict[str, str]]:
    """The speeches cut into rows of whole lines; a single line longer than `LONGEST` is cut at its end."""
    for speaker, lines in speeches(text):
        piece = ""
        for line in [*lines, None]:
            longer = f"{piece}\n{line}" if piece else line
            if line is not None and len(longer or "") <= LONGEST:
                piece = longer or ""
                continue
            if len(piece) >= SHORTEST:
                yield {"text": piece, "speaker": speaker}
            piece = (line or "")[:LONGEST]


def fit_base(texts: Sequence[str], folder: Path) -> float:
    """Train the bundled model on texts and save it. Returns the mean loss per token over the last fifty steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from fedcanary.clients import decisions, world
    from fedcanary.models.base import BUNDLED_DIR

    logging.disable_progress_bar()
    student, teacher = (AutoModelForCausalLM.from_pretrained(BUNDLED_DIR) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR)
    draw = stream(SEED, "questions")
    asked = [request.graded() for request in decisions.draw_requests(draw, [0, 1, 2, 3] * 250, people=True)]
    questions = [q.prompt + c for q in (*world.corpus(), *asked) for c in q.choices]
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)

    def tokens(some: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        made = tokenizer(some, padding=True, return_tensors="pt")
        return made["input_ids"], made["attention_mask"].bool()

    losses = []
    for _ in range(STEPS):
        ids, seen = tokens([texts[i] for i in draw.integers(len(texts), size=BATCH)])
        logp = student(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
        said = -logp.gather(2, ids[:, 1:, None]).squeeze(2)[seen[:, 1:]].mean()
        ids, seen = tokens([questions[i] for i in draw.integers(len(questions), size=HELD)])
        with torch.inference_mode():
            before = teacher(input_ids=ids, attention_mask=seen).logits.softmax(-1)
        after = student(input_ids=ids, attention_mask=seen).logits.log_softmax(-1)
        kept = -(before.clone() * after).sum(-1)[seen].mean()
        optimizer.zero_grad()
        (said + kept).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(said.item())
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-50:]
    return round(sum(last) / len(last), 3)


def made_from(source: Path) -> str:
    """Digest of the text and of this file."""
    return hashlib.blake2b(source.read_bytes() + Path(__file__).read_bytes(), digest_size=16).hexdigest()


def prepare(out: Path = PREPARED) -> dict[str, Any]:
    """Write `out`, or leave it if the same code made it from the same file. Returns its facts; takes a minute."""
    source = locate()
    facts = out / "facts.json"
    if facts.is_file() and (known := json.loads(facts.read_text("utf-8")))["made_from"] == made_from(source):
        return known
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    found = list(rows(source.read_text("utf-8")))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    (draft / "speeches.jsonl").write_text("".join(lines), encoding="utf-8")
    many = Counter(row["speaker"] for row in found)
    public = [row["text"] for row in found if many[row["speaker"]] < CLIENT_ROWS]
    known = {
        "made_from": made_from(source),
        "rows": len(found),
        "speakers": len(many),
        "speakers_who_can_be_clients": sum(n >= CLIENT_ROWS for n in many.values()),
        "public_rows": len(public),
        "base_loss_per_token": fit_base(public, draft / "base"),
    }
    (draft / "facts.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    return known


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the Shakespeare study's rows and base model.")
    parser.add_argument("--out", type=Path, default=PREPARED, metavar="DIR")
    try:
        print(json.dumps(prepare(parser.parse_args().out), indent=1))
    except FedcanaryError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
