"""The benchmarks are scripts and not installed: their folders go onto the path, for the modules beside this one."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "speed")]
