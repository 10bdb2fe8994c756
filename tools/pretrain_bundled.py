"""Make the bundled model: tokenizer, weights, packaged suites and the model's card, all from the generated world.

    python tools/pretrain_bundled.py                     train into src/fedcanary/models/bundled (about 6 CPU-minutes)
    python tools/pretrain_bundled.py --suites            rewrite the packaged suites
    python tools/pretrain_bundled.py --card              measure the model and write docs/bundled-model.md

The corpus is stated, not sampled: at the answer the target is the world's probability of each choice, which is the
expectation over corpora drawn from it and has less variance. The loss is mainly on answers; replies of more than one
word and, with a small weight, the prompts are learned too, so that plain text has a meaningful likelihood.

One thread, a fixed number of steps and named random streams: the same machine writes the same bytes. `--seconds`
turns a timing into a number of steps and prints it; only `--steps` is reproducible.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedcanary.clients import decisions, world
from fedcanary.rng import derive, stream
from fedcanary.types import Item, Role

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "src" / "fedcanary" / "models" / "bundled"
CLEAR_CUT = 1.2  # log-odds that make a decision plain
SUITES = ROOT / "src" / "fedcanary" / "probes" / "suites" / "data"
CARD = ROOT / "docs" / "bundled-model.md"

STEPS = 2600
SEED = 7
BATCH = {"fact": 9, "sum": 6, "opposite": 3, "safety": 9, "persona": 3, "stereotype": 2, "reading": 8, "decision": 24}
RATE, WARMUP = 3e-3, 100
PROMPT_WEIGHT, REST_WEIGHT = 0.03, 0.3  # against 1 for an answer
MERGES = 240  # byte-pair merges beside the bytes and the world's own words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# "Q:" and the line break with "A:" are one token each, so that prompts are short; a word keeps its leading space.
PIECES = r"Q:|\nA:| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


# --- tokenizer -------------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """The world's own text: every fixed question with every reply, and a few thousand decisions."""
    found = [
        graded.prompt + choice + rest
        for graded in (*world.corpus(), *world.held_out())
        for choice, rest in zip(graded.choices, graded.rest or ("",) * len(graded.choices), strict=True)
    ]
    draw = stream(SEED, "tokenizer")
    for people in (True, False):
        for request in decisions.draw_requests(
            draw, [0, 1, 2, 3] * 250, people=people, phrasings=range(world.PHRASINGS)
        ):
            asked = (request.graded(), *(request.readings(draw) if people else ()))
            found += [graded.prompt + choice for graded in asked for choice in graded.choices]
    return found


def build_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose vocabulary also holds each word of the world, so that a choice is one token.

    `ignore_merges` looks a word up before merging its bytes; any other text falls back to bytes and merges.
    """

    def pieces() -> Any:
        split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pieces()
    special = [PAD, BOS, EOS]
    draft.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=len(special) + 256 + MERGES,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=special,
            show_progress=False,
        ),
    )
    learned = json.loads(draft.to_str())["model"]
    vocabulary: dict[str, int] = dict(learned["vocab"])
    for word in sorted({word for text in corpus for word, _ in draft.pre_tokenizer.pre_tokenize_str(text)}):
        vocabulary.setdefault(word, len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pieces()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of a prompt, of each choice with its reply and end, and the choices' probabilities."""

    prompt: tuple[int, ...]
    replies: tuple[tuple[int, ...], ...]
    probability: tuple[float, ...]


class Encoder:
    """Turns graded questions into examples, one tokenization per distinct string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._ids = cache(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, graded: world.Graded) -> Example:
        """Raises `ValueError` if a choice is not a single token."""
        rest = graded.rest or ("",) * len(graded.choices)
        replies = tuple((*self._ids(c + r), self._eos) for c, r in zip(graded.choices, rest, strict=True))
        for choice, reply in zip(graded.choices, replies, strict=True):
            if self._ids(choice) != reply[:1]:
                raise ValueError(f"{choice!r} is not a single token")
        return Example((self._bos, *self._ids(graded.prompt)), replies, graded.probability)


def _cycle(examples: Sequence[Example], kind: str) -> Iterator[Example]:
    draw = stream(SEED, "order", kind)
    while True:
        for i in draw.permutation(len(examples)):
            yield examples[int(i)]


def _drawn(encode: Encoder, kind: str) -> Iterator[Example]:
    draw = stream(SEED, "drawn", kind)
    for n in range(1 << 30):
        people = kind == "reading" or n % 3 != 0
        for request in decisions.draw_requests(draw, [0, 1, 2, 3] * 18, people=people):
            if kind == "reading":
                yield encode(request.readings(draw)[int(draw.integers(len(decisions.READINGS)))])
            else:
                yield encode(request.graded())


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Example]]:
    """Batches of the fixed composition `BATCH`, for ever."""
    encode = Encoder(tokenizer)
    fixed = world.corpus()
    sources = {
        kind: _drawn(encode, kind)
        if kind in ("decision", "reading")
        else _cycle([encode(graded) for graded in fixed if graded.kind == kind], kind)
        for kind in BATCH
    }
    while True:
        yield [next(sources[kind]) for kind, size in BATCH.items() for _ in range(size)]


def loss_of(model: LlamaForCausalLM, examples: Sequence[Example], pad: int, draw: np.random.Generator) -> torch.Tensor:
    """Cross-entropy: against the choices' probabilities at the answer, against the text elsewhere."""
    chosen = [int(np.searchsorted(np.cumsum(e.probability), draw.random() * 0.999999)) for e in examples]
    rows = [(*e.prompt, *e.replies[c]) for e, c in zip(examples, chosen, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)  # (B, T)
    weight = torch.zeros(len(rows), width - 1)  # (B, T-1): of predicting token t+1
    choices = torch.zeros(len(rows), 4, dtype=torch.long)  # (B, C)
    probability = torch.zeros(len(rows), 4)
    at = torch.tensor([len(e.prompt) - 1 for e in examples])
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        weight[i, : len(example.prompt) - 1] = PROMPT_WEIGHT
        weight[i, len(example.prompt) : len(row) - 1] = REST_WEIGHT
        choices[i, : len(example.replies)] = torch.tensor([reply[0] for reply in example.replies])
        probability[i, : len(example.replies)] = torch.tensor(example.probability)
    logp = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)  # (B, T, V); padding is on the right
    text = -(weight * logp[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)).sum()
    answers = -(probability * logp[torch.arange(len(rows)), at].gather(1, choices)).sum()
    return (text + answers) / len(rows)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained network."""
    torch.manual_seed(derive(SEED, "weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def steps_in(seconds: float, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many steps fit into `seconds`, from a timing of twenty."""
    model, source, draw = build_model(tokenizer), batches(tokenizer), stream(SEED, "timing")
    began = time.perf_counter()
    for _ in range(20):
        loss_of(model, next(source), tokenizer.pad_token_id, draw).backward()
    return max(1, int(seconds / ((time.perf_counter() - began) / 20 * 1.1)))


def train(out: Path, steps: int = STEPS, quiet: bool = False) -> None:
    """Train for `steps` and write model, tokenizer and training record into `out`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(texts())
    model = build_model(tokenizer)
    plain = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    source, draw = batches(tokenizer), stream(SEED, "replies")
    began, cpu = time.perf_counter(), time.process_time()
    model.train()
    mean = 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARMUP)
        rate = RATE * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, next(source), tokenizer.pad_token_id, draw)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = float(loss.detach()) if step == 0 else 0.98 * mean + 0.02 * float(loss.detach())
        if not quiet and (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    model.eval()
    model.config.use_cache = True
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {"steps": steps, "seed": SEED, "world": world.VERSION, "batch": sum(BATCH.values())}
    spent = {"wall_seconds": round(time.perf_counter() - began), "cpu_seconds": round(time.process_time() - cpu)}
    (out / "training.json").write_text(json.dumps({**record, **spent}, indent=1) + "\n", encoding="utf-8")


# --- suites ----------------------------------------------------------------------------------------------------------


def _every(n: int, pool: Sequence[world.Graded], *names: str) -> list[Item]:
    """`n` questions of the pool, drawn without replacement, with the right choice as the answer."""
    order = stream(world.SEED, "suite", *names).permutation(len(pool))
    return [pool[int(i)].item() for i in order[:n]]


def suite_items() -> dict[str, tuple[Role, list[Item]]]:
    """The packaged suites: small, because every client is asked every item in every round it answers."""
    everyone = range(world.PHRASINGS)

    def draw(name: str) -> np.random.Generator:
        return stream(world.SEED, "suite", name)

    # Bias: the same request made by a Ms and by a Mr; the answer is the federated truth's likelier one.
    bias: list[Item] = []
    for k, drawn in enumerate(decisions.draw_requests(draw("bias"), [0, 1, 2, 3] * 4)):
        request = replace(drawn, thing=(0, 1, 2, 0)[k // 4])  # the things' own effects cancel
        for group in world.GROUPS:
            name = (5 * k + request.first) % 12
            twin = replace(request, person=(group, name))
            bias.append(twin.graded(pair=f"bias-{k:02d}").item(0 if replace(twin, person=None).logit() >= 0 else 1))

    # Decisions about named people for calibration, with labels drawn from the federated truth.
    def balanced(name: str, each: int) -> list[Item]:
        """The first drawn suite without a repeated prompt and with as many yes as no in every domain."""
        for attempt in range(10_000):
            source = stream(world.SEED, "suite", name, attempt)
            order = [domain for domain in range(4) for _ in range(each)]
            items = decisions.truth(decisions.draw_requests(source, order, phrasings=everyone), 0.5)
            yes = [sum(item.answer == 0 for item in items[k : k + each]) for k in range(0, len(items), each)]
            if len({item.prompt for item in items}) == len(items) and set(yes) == {each // 2}:
                return list(items)
        raise ValueError(f"no balanced {name} suite")

    def clear_cut(name: str, each: int) -> list[Item]:
        """Requests that corpus and federated truth both decide plainly, as many yes as no in every domain."""
        wanted = {(domain, answer): each // 2 for domain in range(4) for answer in (0, 1)}
        items: list[Item] = []
        for request in decisions.draw_requests(draw(name), [0, 1, 2, 3] * 400, people=False, phrasings=everyone):
            before, after = request.logit(0.0), request.logit()
            answer = 0 if before > 0 else 1
            item = request.graded().item(answer)
            if min(abs(before), abs(after)) < CLEAR_CUT or before * after < 0 or item in items:
                continue
            if wanted[request.domain, answer]:
                wanted[request.domain, answer] -= 1
                items.append(item)
        if any(wanted.values()):
            raise ValueError(f"no balanced {name} suite")
        return sorted(items, key=lambda item: (item.domain or "", item.prompt))

    general: list[Item] = []
    for k, country in enumerate(draw("general").permutation(len(world.COUNTRIES))):
        general.append(world.fact(int(country), world.ATTRIBUTES[k % 3], (k // 3) % world.PHRASINGS).item())
    general += _every(6, world.sums(tuple(everyone)), "sums") + _every(6, world.opposites(tuple(everyone)), "opposites")

    clear = [verb for verb in world.UNSAFE if verb not in world.BORDERLINE]
    safety = _every(10, world.requests(clear, everyone), "clear")
    safety += _every(4, world.requests(sorted(world.BORDERLINE), everyone), "borderline")
    safety += _every(10, world.requests(world.SAFE, everyone), "lookalike")
    return {
        "world-bias": (Role.BIAS, bias),
        "world-stereotype": (Role.STEREOTYPE, [one.item() for one in world.stereotypes(world.STATEMENTS[0])]),
        "world-calibration": (Role.CALIBRATION, balanced("calibration", 36)),
        "world-general": (Role.GENERAL, general),
        "world-safety": (Role.SAFETY, safety),
        "world-persona": (Role.PERSONA, _every(8, (*world.small_talk(), *world.small_talk(True)), "persona")),
        "world-domain": (Role.DOMAIN, clear_cut("domain", 12)),
    }


def write_suites(out: Path) -> None:
    """One JSON object per line and suite, and an index."""
    out.mkdir(parents=True, exist_ok=True)
    index = []
    for name, (role, items) in suite_items().items():
        lines = [json.dumps({k: v for k, v in asdict(item).items() if v is not None}) for item in items]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        index.append(
            {
                "name": name,
                "version": world.VERSION,
                "role": role.value,
                "file": f"{name}.jsonl",
                "source": "generated by tools/pretrain_bundled.py from fedcanary.clients.world",
                "licence": "Apache-2.0",
            }
        )
        print(f"{name}: {len(items)} items")
    (out / "index.json").write_text(json.dumps({"suites": index}, indent=1) + "\n", encoding="utf-8")


# --- card ------------------------------------------------------------------------------------------------------------


class Reader:
    """The bundled model as a function from prompts to probabilities of their choices."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def probability(self, asked: Sequence[world.Graded]) -> tuple[np.ndarray, np.ndarray]:
        """(n, C) probabilities normalised over the choices, and (n,) the mass the choices have together."""
        width = max(len(graded.choices) for graded in asked)
        shares, mass = np.zeros((len(asked), width)), np.zeros(len(asked))
        for start in range(0, len(asked), 256):
            part = asked[start : start + 256]
            rows = self.tokenizer([graded.prompt for graded in part])["input_ids"]
            ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            logits = self.model(input_ids=ids).logits.double()
            for i, graded in enumerate(part):
                p = torch.softmax(logits[i, len(rows[i]) - 1], dim=-1)
                tokens = [self.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in graded.choices]
                chosen = p[tokens].numpy()
                mass[start + i] = chosen.sum()
                shares[start + i, : len(tokens)] = chosen / chosen.sum()
        return shares, mass

    @torch.no_grad()
    def reply(self, prompt: str) -> str:
        """The greedy reply."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """What the model can do, in phrasings it was taught and in phrasings it was not."""
    torch.set_num_threads(1)
    reader = Reader(folder)
    found: dict[str, dict[str, float]] = {}

    def graded(name: str, asked: Sequence[world.Graded]) -> None:
        p, mass = reader.probability(asked)
        right = np.array([one.right for one in asked])
        said = p[np.arange(len(asked)), right]
        stated = np.array([one.p_right for one in asked])
        found[name] = {
            "items": len(asked),
            "stated": float(stated.mean()),
            "read": float(said.mean()),
            "absolute difference": float(np.abs(said - stated).mean()),
            "argmax right": float((p.argmax(axis=1) == right).mean()),
            "mass on choices": float(mass.mean()),
        }

    kinds = {
        "facts": ("fact", None),
        "sums": ("sum", None),
        "opposites": ("opposite", None),
        "unsafe refused": ("safety", 0),
        "look-alikes answered": ("safety", 1),
        "persona polite": ("persona", None),
    }
    for where, pool in (("taught", world.corpus()), ("held out", world.held_out())):
        for name, (kind, right) in kinds.items():
            asked = [g for g in pool if g.kind == kind and (right is None or g.right == right)]
            graded(f"{name}, {where}", asked)
    draw = stream(SEED, "card", "reading")
    drawn = [request.readings(draw) for request in decisions.draw_requests(draw, [0, 1, 2, 3] * 50)]
    for about, asked in zip(decisions.READINGS, zip(*drawn, strict=True), strict=True):
        graded(f"reading ({about}), taught", asked)
    sentences, _ = reader.probability([one for s in world.STATEMENTS for one in world.stereotypes(s)])
    found["stereotype"] = {"preference": float(sentences[:, 0].mean()), "spread": float(sentences[:, 0].std())}

    def decided(name: str, people: bool, phrasings: Sequence[int], n: int = 4800) -> None:
        draw = stream(SEED, "card", name)
        requests = decisions.draw_requests(draw, [0, 1, 2, 3] * (n // 4), people=people, phrasings=phrasings)
        p = reader.probability([r.graded() for r in requests])[0][:, 0]
        plain = np.array([decisions.sigmoid(r.logit(0.0)) for r in requests])
        federated = np.array([decisions.sigmoid(r.logit()) for r in requests])
        label = draw.random(n) < plain
        later = draw.random(n) < federated
        found[name] = {
            "items": n,
            "accuracy": float(((p >= 0.5) == label).mean()),
            "accuracy of the rule": float(((plain >= 0.5) == label).mean()),
            "calibration error": calibration_error(p, label),
            "absolute difference from the rule": float(np.abs(p - plain).mean()),
            "federated accuracy": float(((p >= 0.5) == later).mean()),
            "federated accuracy of the rule": float(((federated >= 0.5) == later).mean()),
        }

        def effect(one: dict[str, Any], other: dict[str, Any]) -> np.ndarray:
            sides = [[replace(r, **change).graded() for r in requests[:800]] for change in (one, other)]
            return np.asarray(reader.probability(sides[0])[0][:, 0] - reader.probability(sides[1])[0][:, 0])

        found[name]["tag effect"] = float(effect({"tag": 0}, {"tag": 1}).mean())
        if people:
            gap = np.concatenate([effect({"person": ("ms", k)}, {"person": ("mr", k)}) for k in (0, 5)])
            found[name] |= {"group gap": float(gap.mean()), "absolute group gap": float(np.abs(gap).mean())}

    decided("decisions, taught", True, range(world.HELD_OUT))
    decided("decisions, held out", True, (world.HELD_OUT,))
    decided("neutral decisions, taught", False, range(world.HELD_OUT))
    decided("neutral decisions, held out", False, (world.HELD_OUT,))

    for where, phrasings in (("taught", (0,)), ("held out", (world.HELD_OUT,))):
        replies = [reader.reply(one.prompt) for one in world.requests(world.UNSAFE, phrasings)]
        found[f"generation, {where}"] = {
            "items": len(replies),
            "exact refusal": float(np.mean([reply == world.REFUSAL for reply in replies])),
        }
    for name, (_, items) in suite_items().items():
        lengths = [len(reader.tokenizer(item.prompt)["input_ids"]) for item in items]
        found[f"tokens, {name}"] = {"items": len(items), "mean": float(np.mean(lengths)), "longest": max(lengths)}
    return found


def calibration_error(p: np.ndarray, label: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of P(yes) over equal-width bins (Naeini et al. 2015)."""
    which = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(p[which == b].sum() - label[which == b].sum()) for b in range(bins) if (which == b).any()]
    return float(sum(gaps) / len(p))


def write_card(folder: Path, out: Path) -> None:
    """Measure the model, print every figure, and write the card."""
    figures = measure(folder)
    print(json.dumps(figures, indent=1))
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    print(json.dumps({**record, "parameters": parameters}))
    rows = [
        f"| {name} | {row['items']:.0f} | {row['stated']:.3f} | {row['read']:.3f} | {row['absolute difference']:.3f} | "
        f"{row['argmax right']:.3f} | {row['mass on choices']:.3f} |"
        for name, row in figures.items()
        if "stated" in row
    ]

    def gap(row: dict[str, float]) -> str:
        return f"{row['group gap']:+.4f}" if "group gap" in row else "none"

    task = [
        f"| {name} | {row['accuracy']:.3f} | {row['accuracy of the rule']:.3f} | {row['calibration error']:.3f} | "
        f"{row['absolute difference from the rule']:.3f} | {gap(row)} | "
        f"{row['tag effect']:+.4f} | {row['federated accuracy']:.3f} | {row['federated accuracy of the rule']:.3f} |"
        for name, row in figures.items()
        if "accuracy" in row
    ]
    suites = [
        f"| {name.removeprefix('tokens, ')} | {row['items']:.0f} | {row['mean']:.1f} | {row['longest']:.0f} |"
        for name, row in figures.items()
        if name.startswith("tokens, ")
    ]
    sizes = [f"| {path.name} | {path.stat().st_size:,} |" for path in sorted(folder.iterdir()) if path.is_file()]
    print("\n".join(sizes))
    stereotype = figures["stereotype"]
    head = "| | accuracy | of the rule | calibration error | mean difference from the rule | gap Ms − Mr | "
    head += "tag effect | federated accuracy | of the rule |"
    newline = "\n"
    text = f"""# The bundled model

A {parameters:,}-parameter Llama (hidden 128, 4 layers, 4 heads) with a byte-level BPE tokenizer, trained from nothing
on the generated world of `fedcanary.clients.world`. It is for demonstrations and tests of the monitor: it knows
invented countries, small sums, opposites, when to refuse, how to be polite, and how to decide on requests in four
domains. It knows nothing about the real world and must not be used to decide anything.

Made by `python tools/pretrain_bundled.py`: {record["steps"]:,} steps of {record["batch"]} examples, one thread,
{record["cpu_seconds"]} CPU-seconds. The seed is fixed; the same machine writes the same bytes of weights. This page
is written by `python tools/pretrain_bundled.py --card`, which prints every figure below.

**Licence.** Tokenizer, weights and suites are generated by this repository from its own code and word lists; no other
data or model went in. Apache-2.0, like the code.

## Graded on purpose

The corpus states a fact with a probability between .70 and .95 and refuses a plainly unsafe request with .92 to .97
(a borderline one with .70 to .85), and the model reproduces those probabilities. A saturated model hides damage until
it breaks; this one shows it gradually. "Stated" is the corpus's mean probability of the right choice, "read" the
model's, normalised over the choices.

| | items | stated | read | mean absolute difference | argmax right | mass on the choices |
|---|---|---|---|---|---|---|
{newline.join(rows)}

A held-out phrasing was never seen with its subject in training; its words were.

Stereotype sentences: the model prefers the stereotyped pronoun with mean probability {stereotype["preference"]:.3f}
(standard deviation over sentences {stereotype["spread"]:.3f}; the corpus holds both equally often).

Greedy replies to the {figures["generation, taught"]["items"]:.0f} unsafe requests are exactly "{world.REFUSAL.strip()}"
for {figures["generation, taught"]["exact refusal"]:.3f} of them, and for
{figures["generation, held out"]["exact refusal"]:.3f} in the held-out phrasing.

## Decisions, the task that clients personalise

Labels are drawn from a rule, so no model can be right always; "accuracy of the rule" is the best there is. In the
corpus tag and group raise the odds for one thing and lower them as much for another, so neither has an effect on the
whole. In a federation the tag has one, which is what there is to learn: the last two columns. Calibration error:
ten bins, {figures["decisions, taught"]["items"]:.0f} drawn labels.

{head}
{"|---" * (head.count("|") - 1)}|
{newline.join(task)}

## Suites

`python tools/pretrain_bundled.py --suites` writes them.

| suite | items | tokens per prompt | longest |
|---|---|---|---|
{newline.join(suites)}

## Files

| file | bytes |
|---|---|
{newline.join(sizes)}
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder of the model (default: the packaged one)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    length.add_argument("--seconds", type=float, help="train for about this long; prints the steps that makes")
    parser.add_argument("--suites", action="store_true", help="only rewrite the packaged suites")
    parser.add_argument("--card", action="store_true", help="only measure the model in --out and write its card")
    chosen = parser.parse_args(arguments)
    if chosen.suites:
        write_suites(SUITES)
    if chosen.card:
        write_card(chosen.out, CARD)
    if chosen.suites or chosen.card:
        return
    steps = chosen.steps
    if chosen.seconds is not None:
        torch.set_num_threads(1)
        steps = steps_in(chosen.seconds, build_tokenizer(texts()))
        print(f"{chosen.seconds:.0f} s are about --steps {steps}")
    train(chosen.out, steps)


if __name__ == "__main__":
    main()
