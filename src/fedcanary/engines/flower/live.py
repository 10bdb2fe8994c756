"""What a run on Flower tells whoever watches it: `live.json` in its folder, and that as lines on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
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


def line(word: Mapping[str, Any]) -> str:
    """What is under way."""
    parts = [f"round {word['round']}/{word.get('rounds', '?')}"] if "round" in word else []
    if "step" in word:
        parts.append(word["step"] + (f" {word.get('done', 0)}/{word['clients']}" if "clients" in word else ""))
    return "  ".join(parts)


def decision(word: Mapping[str, Any]) -> str:
    """What the last round that is over came to; empty before the first."""
    decided = word.get("decided")
    if not isinstance(decided, Mapping):
        return ""
    states = list(decided.get("states", {}).items())
    parts = [f"round {decided.get('round')}/{word.get('rounds', '?')}"]
    parts += [f"{state.upper()} {', '.join(found)}" for state in ("alarm", "clear") if (found := _of(states, state))]
    parts += [f"{count} unknown"] if (count := len(_of(states, "unknown"))) else []
    parts += [str(decided["action"]).upper()] if decided.get("action", "adopt") != "adopt" else []
    return "  ".join(parts)


def _of(states: Sequence[tuple[str, str]], wanted: str) -> list[str]:
    return [mode for mode, state in states if state == wanted]


class Screen:
    """Shows a run's words: a line for each round, and on a terminal one below that changes; none to no stream."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._began = time.monotonic()
        self._last = self._decided = ""

    def __call__(self, word: Mapping[str, Any], beside: str = "") -> None:
        """Show `live.json` as it is now, with what else there is to say."""
        if (decided := decision(word)) not in ("", self._decided):
            self._decided = decided
            self.say(decided)
        now = "  ".join(part for part in ("" if "ended" in word else line(word), beside) if part)
        if not self._live or now == self._last:
            return
        clock = f"  {time.monotonic() - self._began:.0f} s" if now else ""  # the line is left clear for what follows
        print(f"\r\x1b[K{now}{clock}", end="", file=self._stream, flush=True)
        self._last = now

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._stream is not None:
            print(("\r\x1b[K" if self._live else "") + text, file=self._stream, flush=True)
            self._last = ""
