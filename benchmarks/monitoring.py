"""What monitoring adds to a round: CPU time of training and of the readings; writes benchmarks/speed/monitoring.md.

    OMP_NUM_THREADS=1 python benchmarks/monitoring.py [--runs 3]

One round of the demonstration and, where its data was made ready (make example-hatecheck), of the HateCheck example,
with all six modes, as they are, with more local epochs, and with further clients who train and do not answer
(`clients.also_train`). Training is what a round without any monitoring would cost: the clients' examples as tokens,
the layers below the first adapter, the fit. The door is what the update needs on its way, with readings or without:
consent, masks, the sum, the record. Monitoring is the rest: questions, readings, tests.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import fedcanary
from fedcanary import pipeline, study
from fedcanary.engines import local
from fedcanary.engines.clients import Work
from fedcanary.engines.local import LocalClients
from fedcanary.engines.setup import cache, prepare

ROOT = Path(__file__).resolve().parents[1]
HATECHECK = ROOT / "examples" / "hatecheck" / "study.toml"
ONE = ["rounds=1", "engine.threads=1"]
PARTS = ("training", "door", "public", "own", "base", "tests")
Times = dict[str, float]


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """CPU seconds by part while open; what a part does inside another counts for the inner one."""
    spent: Counter[str] = Counter()
    inner: list[float] = []

    def timed(owner: Any, name: str, part: Callable[..., str]) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        def work(*args: Any, **how: Any) -> Any:
            inner.append(0.0)
            began = time.process_time()
            try:
                return original(*args, **how)
            finally:
                took = time.process_time() - began
                spent[part(*args)] += took - inner.pop()
                if inner:
                    inner[-1] += took

        setattr(owner, name, work)
        return owner, name, original

    def asked(clients: LocalClients, held: Any, rows: Sequence[Any], *rest: Any) -> str:
        return "public" if rows[0].shape == clients._public.shape else "own"

    replaced = [
        timed(local, "fit", lambda *args: "training"),
        timed(LocalClients, "_train_rows", lambda *args: "training"),
        timed(
            LocalClients,
            "_below",
            # the training rows of a stack are those whose rows have one answer each
            lambda clients, rows, *rest: "training" if all(len(t) == 1 for t in rows[0].targets) else "own",
        ),
        timed(LocalClients, "_base_local", lambda *args: "base"),
        timed(LocalClients, "_score", asked),
        timed(LocalClients, "_read", lambda *args: "tests"),
        timed(LocalClients, "_asked", lambda *args: "tests"),
        timed(LocalClients, "_eval", lambda *args: "own"),
        timed(pipeline.monitor, "step", lambda *args: "tests"),
        timed(pipeline, "judge", lambda *args: "tests"),
    ]
    try:
        yield spent
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def once(path: Path, overrides: Sequence[str]) -> tuple[Times, int]:
    """Milliseconds per client of one round, by part; and how many clients."""
    setup = prepare(study.load(path, [*ONE, *overrides]), cache())
    with tempfile.TemporaryDirectory() as folder:
        began: list[float] = []
        original = LocalClients.work

        def work(self: LocalClients, asked: Work) -> Any:
            began.append(time.process_time())  # from here on it is the round's
            spent.clear()
            return original(self, asked)

        with watched() as spent:
            LocalClients.work = work  # type: ignore[method-assign]
            try:
                record = pipeline.run(setup, Path(folder) / "run")
            finally:
                LocalClients.work = original  # type: ignore[method-assign]
            whole = time.process_time() - began[0]
    body = next(iter(record.of("round")))
    clients = int(body["clients"]) + int(body.get("also_trained", 0))
    spent["door"] = whole - sum(spent.values())
    return {part: 1000 * spent[part] / clients for part in PARTS}, clients


def row(name: str, path: Path, overrides: Sequence[str], runs: int) -> str:
    """A line of the table."""
    measured = [once(path, overrides) for _ in range(runs)]
    parts = {part: median(times[part] for times, _ in measured) for part in PARTS}
    without = [times["training"] + times["door"] for times, _ in measured]
    shares = [100 * (sum(times.values()) - bare) / bare for (times, _), bare in zip(measured, without, strict=True)]
    cells = " | ".join(f"{parts[part]:.0f}" for part in PARTS)
    line = (
        f"| {name} | {measured[0][1]} | {cells} | **{median(shares):.0f}** ({min(shares):.0f} to {max(shares):.0f}) |"
    )
    print(line, flush=True)
    return line


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    demonstration = Path(fedcanary.__file__).parent / "demonstration.toml"
    own = ["clients.count=25"]
    lines = [row("demonstration, 1 epoch", demonstration, own, runs)]
    lines += [
        row(f"demonstration, {e} epochs", demonstration, [*own, f"personalize.epochs={e}"], runs) for e in (4, 16, 48)
    ]
    lines += [
        row(
            f"demonstration, 1 epoch, {n} also train",
            demonstration,
            [f"clients.count={25 + n}", "clients.per_round=25", f"clients.also_train={n}"],
            1,
        )
        for n in (100, 600)
    ]
    if (ROOT / "runs" / "hatecheck-prepared").is_dir():
        lines += [
            row(
                f"HateCheck, {e} epochs",
                HATECHECK,
                [f"personalize.epochs={e}", "engine.stack=8", "clients.per_round=16"],
                runs,
            )
            for e in (2, 16, 48)
        ]
    else:
        print("HateCheck is left out: make example-hatecheck makes its data ready")
    table = "\n".join(lines)
    page = f"""# What monitoring adds to a round

`OMP_NUM_THREADS=1 python benchmarks/monitoring.py --runs {runs}` on {platform.machine()}, {os.cpu_count()} cores,
Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}: one round, CPU
milliseconds per client of the round, medians of {runs} runs (one run where others also train). The first line of each
study has its own number of epochs. `door`: consent, secure aggregation of the update, the record, which a round needs
with readings or without. `public`: public items, asked of the personalized model; `own`: the client's held-out items,
asked of the received and the personalized model; `base`: the same of the base, once in a run; `tests`: the probes, the
tests, the verdict. `added` is the last four in percent of the first two, with the least and the most.

| study | clients | training | door | public | own | base | tests | added, % |
|---|---|---|---|---|---|---|---|---|
{table}
"""
    (ROOT / "benchmarks" / "speed" / "monitoring.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
