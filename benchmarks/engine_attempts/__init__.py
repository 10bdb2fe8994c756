"""What was tried to train and ask stacked adapters faster, with each thing and without; see speed/engine_attempts.md.

    OMP_NUM_THREADS=1 python benchmarks/engine_attempts [--only compiled,lean_parts] [--out FILE]    7 CPU-minutes

Both ways of a thing take turns in one process, and what is judged are the ratios of neighbours: whatever else the
machine does then falls on both. `--only` prints some parts, named as their functions, and writes nothing.

measuring.py: turns and gains · work.py: the cells · passes.py, arithmetic.py, precision.py: the attempts ·
floor.py: what none of them can go below · page.py
"""

import sys
from pathlib import Path

# the attempts use the job of the side-by-side benchmark, which is scripts: its folders go onto the path first
sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "speed")]
