"""What a run on Flower tells whoever watches it: `live.json` in its folder, and that as lines on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

NAME = "live.json"
STEP = 0.5  # seconds between two looks


def read(out: Path) -> dict[str, Any]:
    """The run's last word; empty before its first."""
    try:
        found = json.loads((out / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Screen:
    """Shows a run's words: a line that changes on a terminal, one line a round elsewhere; none to no stream."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._began = time.monotonic()
        self._last = ""

    def __call__(self, word: Mapping[str, Any], beside: str = "") -> None:
        """Show `live.json` as it is now, with what else there is to say."""
        parts = [] if "round" not in word else [f"round {word['round']}/{word.get('rounds', '?')}"]
        verdict = word.get("verdict")
        if isinstance(verdict, Mapping):
            states = verdict.get("states", {})
            alarms = [mode for mode, state in states.items() if state == "alarm"]
            parts += [f"ALARM {', '.join(alarms)}"] if alarms else []
            parts += [str(verdict["action"]).upper()] if verdict.get("action", "adopt") != "adopt" else []
        elif "step" in word:
            parts.append(f"{word['step']} {word.get('done', 0)}/{word.get('clients', '?')}")
        line = "  ".join([*parts, *([beside] if beside else [])])
        if not line or line == self._last or self._stream is None:
            return
        whole = isinstance(verdict, Mapping) or not parts
        if self._live:
            clock = f"{time.monotonic() - self._began:.0f} s"
            print(f"\r\x1b[K{line}  {clock}", end="\n" if whole else "", file=self._stream, flush=True)
        elif whole:
            print(line, file=self._stream, flush=True)
        self._last = line

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._stream is not None:
            print(("\r\x1b[K" if self._live else "") + text, file=self._stream, flush=True)
            self._last = ""
