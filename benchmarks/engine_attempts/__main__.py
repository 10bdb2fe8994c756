"""Run the attempts; see the package."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import engine_attempts  # noqa: E402, I001  # first: it puts the other folders onto the path
import prepare  # noqa: E402
import torch  # noqa: E402
from engine_attempts.arithmetic import attention, compiled, lean_parts, no_mask, optimizer, picked  # noqa: E402
from engine_attempts.floor import products  # noqa: E402
from engine_attempts.page import Part, Row, page  # noqa: E402
from engine_attempts.passes import allocator, lower_layers, shared_prompts, stacks, threads  # noqa: E402
from engine_attempts.precision import half, readings  # noqa: E402

from fedcanary.engines.stacking import keep_memory  # noqa: E402


PARTS: tuple[Callable[[Path], Part], ...] = (
    allocator,
    stacks,
    lean_parts,
    no_mask,
    picked,
    optimizer,
    lower_layers,
    shared_prompts,
    compiled,
    half,
    readings,
    attention,
    threads,
    products,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=engine_attempts.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"some of {','.join(part.__name__ for part in PARTS)}; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE.parent / "speed" / "engine_attempts.md")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [part.__name__ for part in PARTS]
    if unknown := set(chosen) - {part.__name__ for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    keep_memory()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    remarks: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as home:
        prepare.main(Path(home))
        for part in PARTS:
            if part.__name__ in chosen:
                began = time.process_time()
                found, said = part(Path(home))
                rows += found
                remarks += said
                print("\n".join([*(row.line() for row in found), *said]), flush=True)
                print(f"{part.__name__}: {time.process_time() - began:.0f} CPU-s", file=sys.stderr, flush=True)
    if not options.only:
        used = sum(os.times()[:4])
        options.out.write_text(page(rows, remarks, (load, os.getloadavg()[0]), used), encoding="utf-8")


if __name__ == "__main__":
    main()
