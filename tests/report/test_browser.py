"""The page in a real browser: it draws something, and the headline is in what it drew."""

from __future__ import annotations

import html
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from fedcanary.report.html import render
from fedcanary.report.summary import summarise

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no headless browser on PATH (looked for {', '.join(NAMES)})")
    return found


@pytest.fixture
def show(browser, tmp_path):
    def run(*arguments: str) -> str:
        flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
        return subprocess.run(
            [browser, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return run


def pixels(path: Path) -> np.ndarray:
    """(height, width, channels) of an 8-bit, non-interlaced PNG (W3C PNG, section 9)."""
    data, at, packed = path.read_bytes(), 8, b""
    width = height = channels = 0
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    stride = width * channels
    raw = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(height, stride + 1)
    rows = np.zeros((height + 1, stride), dtype=np.int64)
    for y in range(height):
        method, line, above = raw[y, 0], raw[y, 1:].astype(np.int64), rows[y]
        if method == 0:
            rows[y + 1] = line
        elif method == 2:
            rows[y + 1] = (line + above) % 256
        else:
            rows[y + 1] = _unfilter(int(method), line, above, channels)
    return rows[1:].reshape(height, width, channels)


def _unfilter(method: int, line: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    row = [0] * len(line)
    given, up = line.tolist(), above.tolist()
    for i, value in enumerate(given):
        left, corner = (row[i - step], up[i - step]) if i >= step else (0, 0)
        if method == 1:
            guess = left
        elif method == 3:
            guess = (left + up[i]) // 2
        else:
            p = left + up[i] - corner
            guess = min((abs(p - left), 0, left), (abs(p - up[i]), 1, up[i]), (abs(p - corner), 2, corner))[2]
        row[i] = (value + guess) % 256
    return np.array(row)


@pytest.mark.parametrize("name", ["mixed", "zero_rounds"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)], ids=["wide-light", "phone-dark"])
def test_it_draws(show, make, tmp_path, name, width, scheme):
    page = tmp_path / "report.html"
    page.write_text(render(summarise(make(name))), encoding="utf-8")
    picture = tmp_path / "report.png"
    show(
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={picture}",
        f"--window-size={width},900",
        page.as_uri(),
    )
    image = pixels(picture)[:, :, :3]
    assert image.shape[:2] == (900, width)
    shades = np.unique(image.reshape(-1, 3), axis=0)
    assert len(shades) > 50, "the picture is blank"
    paper = image[2, 2]
    assert (paper.mean() > 200) == bool(scheme), "light or dark is not what was asked for"
    inked = np.abs(image - paper).sum(axis=2) > 60
    assert inked.mean() > 0.01
    assert not inked[:, -6:].any(), "something runs out of the page on the right"


def test_the_headline_is_in_the_page(show, make, tmp_path):
    summary = summarise(make("mixed"))
    page = tmp_path / "report.html"
    page.write_text(render(summary), encoding="utf-8")
    drawn = html.unescape(show("--dump-dom", page.as_uri()))
    assert summary["headline"][0] in drawn
    assert drawn.count('role="img"') == 12
