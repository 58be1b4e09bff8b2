"""The page in a real browser: nothing overlaps, no plot is empty, nothing scrolls sideways, and the console is silent.

Needs Chromium (`apt-get install chromium`); where none is installed these are skipped, and test_page.py checks the same
places by the drawings' own estimates.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

from common.report.compare import compare
from common.report.html import comparison_page, page
from common.report.reading import read_run
from tests.support.made_up_run import MadeUp, config, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_S = 90

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt-get install chromium")

# A window has a least width, a frame has not. It writes into its title what the page in it says of itself.
FRAME = """<!doctype html><title>nothing</title><meta name="color-scheme" content="light dark">
<script>onmessage = event => document.title = event.data;</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>"""
# What the reader would see. A pixel of slack: browsers round.
CHECK = """<script>
const found = [];
const inside = (a, b) =>
  a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const covers = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
const plots = [...document.querySelectorAll("svg.plot")];
for (const svg of plots) {
  const name = svg.getAttribute("aria-label"), place = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(node => [node.textContent, node.getBoundingClientRect()]);
  texts.forEach(([text, box], index) => {
    if (!inside(box, place)) found.push(`${name}: "${text}" leaves the plot`);
    for (const [other, its] of texts.slice(0, index))
      if (covers(box, its)) found.push(`${name}: "${text}" on "${other}"`);
  });
  const ink = [...svg.querySelectorAll(".marks *")].filter(node => node.getBoundingClientRect().height > 0
    || node.getBoundingClientRect().width > 0);
  if (!ink.length) found.push(`${name}: empty`);
  if (12 * place.width / 360 < 10) found.push(`${name}: text of ${12 * place.width / 360} px`);
}
for (const node of document.querySelectorAll("h1, h2, h3, h4, p, li, td, th, figcaption, dd"))
  if (node.scrollWidth > node.clientWidth + 1) found.push(`"${node.textContent.slice(0, 40)}" is cut off`);
if (document.documentElement.scrollWidth > innerWidth) found.push("scrolls sideways");
const ground = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
parent.postMessage(JSON.stringify({found, plots: plots.length, width: innerWidth, isDark: ground[0] < 128}), "*");
</script>"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    found: list[str]
    plots: int
    width: int
    is_dark: bool
    console: list[str]  # lines that the page brought onto the browser's console


def show(text: str, folder: Path, width: int, is_dark: bool) -> Seen:
    """Renders the page with CHECK at its end, which alone may run."""
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != text
    (folder / "page.html").write_text(allowed.replace("</body>", f"{CHECK}</body>"))
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width))
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--hide-scrollbars", f"--window-size={max(width, 600)},900"]
    command += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    seen = json.loads(unescape(title[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(found=seen["found"], plots=seen["plots"], width=seen["width"], is_dark=seen["isDark"], console=console)


@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (390, True)])
def test_a_run_with_all_views_is_readable_on_a_desk_and_on_a_phone(width: int, is_dark: bool, tmp_path: Path) -> None:
    seen = show(page(read_run(write_run(tmp_path / "run"))), tmp_path, width, is_dark)
    assert (seen.found, seen.console) == ([], [])
    assert (seen.plots, seen.width, seen.is_dark) == (23, width, is_dark)


def test_runs_beside_each_other_are_readable_on_a_phone(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{seed}", MadeUp(config=config(seed=seed))) for seed in range(9)]
    seen = show(comparison_page(compare(runs)), tmp_path, 390, False)
    assert (seen.found, seen.console, seen.plots, seen.is_dark) == ([], [], 2, False)


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    text = page(read_run(write_run(tmp_path / "run")))
    moved = re.sub(r'(<text class="tick" text-anchor="end") x="[\d.]+" y="[\d.]+"', r'\1 x="30" y="80"', text)
    wide = moved.replace(
        "<header>", '<div style="width: 2000px; height: 1px"></div><script src="gone.js"></script><header>'
    )
    seen = show(wide, tmp_path, 1280, False)
    assert any('" on "' in problem for problem in seen.found) and "scrolls sideways" in seen.found and seen.console
