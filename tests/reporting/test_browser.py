"""The pages in a real browser: plots and tables are there, nothing overflows, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.reporting.benchmark_page import benchmark_page
from sparsedeploy.reporting.report import html_report
from tests.reporting.results import bench_result, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path"),
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Runs in the page's frame, of a width that the browser's own window does not go down to, and tells the page around it.
# Lengths are in CSS pixels; what leaves its picture by more than a pixel counts as cut.
SCRIPT = """
<script>
const root = document.documentElement;
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const inside = (node, box) => {
  const r = node.getBoundingClientRect();
  return r.left >= box.left - 1 && r.right <= box.right + 1 && r.top >= box.top - 1 && r.bottom <= box.bottom + 1;
};
const outside = all("main *").filter(node => !node.closest(".wide")
  && node.getBoundingClientRect().right > root.clientWidth + 1).map(node => node.tagName);
const cut = all(".chart").flatMap(svg => all("text, circle, rect, polyline", svg)
  .filter(node => !inside(node, svg.getBoundingClientRect())).map(node => node.outerHTML));
const drawn = all(".chart").map(svg => svg.getBoundingClientRect().height);
const found = {width: root.clientWidth, scroll: root.scrollWidth, outside, cut, drawn,
  headings: all("h2").map(node => node.textContent),
  tables: all("table").map(table => table.rows.length),
  commands: all("figure pre").length, figures: all("figure").length,
  background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color};
parent.document.getElementById("found").textContent = JSON.stringify(found);
</script>
"""


def look(page: str, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """What a browser of that width makes of the page."""
    path = folder / "page.html"
    framed = escape(page.replace("</body>", f"{SCRIPT}</body>"), quote=True)
    frame = f'<iframe srcdoc="{framed}" style="width: {width}px; height: 1000px; border: 0"></iframe>'
    path.write_text(f'<!doctype html><meta charset="utf-8"><pre id="found"></pre>{frame}')
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *FLAGS, profile, "--window-size=1600,1200", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [390, 1400])
def test_report(tmp_path: Path, width: int) -> None:
    found = look(html_report(report()), tmp_path, width)
    assert width - 20 <= found["width"] <= width
    assert found["scroll"] <= found["width"]
    assert found["outside"] == []
    assert found["cut"] == []
    # Perplexity and accuracy against speed, two settings, perplexity and sparsity, layers, allocations, time by layer.
    assert len(found["drawn"]) == 8
    assert min(found["drawn"]) > 100
    assert found["commands"] == found["figures"] == 8
    for heading in (
        "Quality, size and speed",
        "Perplexity against speed",
        "Mean accuracy of the tasks against speed",
        "Tasks",
        "Where weights were pruned",
        "Allocations at 65% sparsity",
        "Time by layer, decode",
        "Environment",
    ):
        assert heading in found["headings"]
    assert min(found["tables"]) >= 2


@pytest.mark.parametrize("width", [390, 1400])
def test_benchmark_page(tmp_path: Path, width: int) -> None:
    found = look(benchmark_page(bench_result()), tmp_path, width)
    assert found["scroll"] <= found["width"]
    assert found["outside"] == []
    assert found["cut"] == []
    assert len(found["drawn"]) == 3
    assert "Speed: prompt 32, then 4 tokens, 1 core, batch 1" in found["headings"]
    assert found["tables"][0] == 1 + 3 * (1 + 3)  # a heading, and for each phase its name and three candidates


def test_light_and_dark(tmp_path: Path) -> None:
    page = benchmark_page(bench_result())
    light = look(page, tmp_path, 1000, "--blink-settings=preferredColorScheme=1")
    dark = look(page, tmp_path, 1000, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["background"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["background"]) > 150


def brightness(colour: str) -> float:
    """The mean of red, green and blue, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
