"""The pages in a real browser: plots and tables are there, nothing overflows, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
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
const shown = node => node.getBoundingClientRect().height > 0;
const drawn = all(".chart").filter(shown).map(svg => svg.getBoundingClientRect().height);
const found = {width: root.clientWidth, scroll: root.scrollWidth, outside, cut, drawn,
  headings: all("h2").map(node => node.textContent),
  tables: all("table").map(table => table.rows.length),
  commands: all("figure pre").length, figures: all("figure").length,
  levels: all(".model").map(level => [level.dataset.name, shown(level)]),
  marks: all("mark").map(mark => mark.textContent),
  background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color};
parent.document.getElementById("found").textContent = JSON.stringify(found);
</script>
"""


def look(page: str, folder: Path, width: int, *flags: str, more: str = "") -> dict[str, Any]:
    """What a browser of that width makes of the page; ``more`` is JavaScript for further values."""
    path = folder / "page.html"
    script = SCRIPT.replace("const found = {", f"const found = {{{more}{',' if more else ''} ")
    framed = escape(page.replace("</body>", f"{script}</body>"), quote=True)
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
    # Two heat maps of the level that is shown, what was tried, perplexity and accuracy against speed, two settings,
    # perplexity and sparsity, layers, allocations, time by layer.
    assert len(found["drawn"]) == 11
    assert min(found["drawn"]) > 50
    assert (found["commands"], found["figures"]) == (8, 13)
    assert found["levels"] == [["dense", False], ["sparse-50", False], ["sparse-80", True]]
    assert found["marks"] == [" word1", " word2"]
    for heading in (
        "Quality, size and speed",
        "By sparsity",
        "Rates that were tried",
        "Sample generations",
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


ACT = """
<script>
const range = document.querySelector(".levels input");
const before = [range.getAttribute("aria-valuetext"), document.querySelector(`label[for="${range.id}"]`).textContent];
range.value = 0;
range.dispatchEvent(new Event("input"));
const table = document.querySelector("table.sortable");
const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === "perplexity");
const cells = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
const head = table.tHead.rows[0].cells[column];
const orders = [cells()];
for (const click of [1, 2]) {
  head.querySelector("button").click();
  orders.push(cells(), head.getAttribute("aria-sort"));
}
const grouped = [...document.querySelectorAll("table.sortable")].find(one => one.querySelector("tr.group"));
grouped.tHead.rows[0].cells[2].querySelector("button").click();
const kinds = [...grouped.tBodies[0].rows].map(row => row.classList.contains("group"));
window.acted = {before, orders, kinds, level: [...document.querySelectorAll(".model")].filter(one => !one.hidden)
  .map(one => one.dataset.name)};
</script>
"""


def test_slider_and_sorting(tmp_path: Path) -> None:
    page = html_report(report()).replace("</body>", f"{ACT}</body>")
    found = look(page, tmp_path, 1000, more="acted: window.acted")["acted"]
    assert found["before"] == ["sparse-80", "Model, by sparsity"]
    assert found["level"] == ["dense"]
    orders = found["orders"]
    assert orders[:2] == [["10.00", "13.00", "16.00"]] * 2
    assert orders[2:] == ["ascending", ["16.00", "13.00", "10.00"], "descending"]
    assert found["kinds"] == [True, False, False, False] * 3  # rows stay below the heading of their phase


def test_everything_is_there_without_scripts(tmp_path: Path) -> None:
    """The page's own script taken out: all levels are shown below each other, and nothing is cut."""
    page = re.sub(r"<script>.*?</script>", "", html_report(report()), flags=re.DOTALL)
    found = look(page, tmp_path, 1000)
    assert [shown for _, shown in found["levels"]] == [True, True, True]
    assert found["cut"] == found["outside"] == []
    assert len(found["drawn"]) == 13


def axe() -> Path | None:
    """axe-core, where it was fetched (``npm pack axe-core``): the variable AXE_CORE names its ``axe.min.js``."""
    path = os.environ.get("AXE_CORE")
    return Path(path) if path else None


@pytest.mark.skipif(axe() is None, reason="AXE_CORE does not name axe.min.js")
@pytest.mark.parametrize("dark", [0, 1])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("make", [lambda: html_report(report()), lambda: benchmark_page(bench_result())])
def test_accessibility(tmp_path: Path, make: Callable[[], str], width: int, dark: int) -> None:
    """No violation of any rule, best practices included."""
    source = axe()
    assert source is not None
    run = """
    axe.run().then(found => {
      const told = found.violations.map(({id, nodes}) => [id, nodes.length, nodes[0].html, nodes[0].failureSummary]);
      document.body.append(Object.assign(document.createElement("pre"),
        {id: "axe", textContent: JSON.stringify({passes: found.passes.length, told})}));
    });
    """
    page = make().replace("</body>", f"<script>{source.read_text()}</script><script>{run}</script></body>")
    path = tmp_path / "page.html"
    path.write_text(page)
    flags = [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500)},1200",
        "--virtual-time-budget=60000",
    ]
    scheme = f"--blink-settings=preferredColorScheme={1 - dark}"
    command = [str(BROWSER), *FLAGS, *flags, scheme, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    match = re.search(r'<pre id="axe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    found = json.loads(unescape(match[1]))
    assert found["told"] == []
    assert found["passes"] > 20


def test_light_and_dark(tmp_path: Path) -> None:
    page = benchmark_page(bench_result())
    light = look(page, tmp_path, 1000, "--blink-settings=preferredColorScheme=1")
    dark = look(page, tmp_path, 1000, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["background"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["background"]) > 150


def brightness(colour: str) -> float:
    """The mean of red, green and blue, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
