"""What the page's script makes of the curves, in a browser where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from stability_callbacks.report import write_report
from tests.report.test_page import Page
from tests.report.training import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Zooms into the first chart as a mouse does, puts the pointer on it, and writes down what it sees.
PROBE = """
addEventListener("load", async () => {
  const over = document.querySelector(".u-over"), { left, top, width } = over.getBoundingClientRect();
  const mouse = (type, share) => {
    const at = { clientX: left + share * width, clientY: top + 50, movementX: 1, bubbles: true, view: window };
    over.dispatchEvent(new MouseEvent(type, at));
    return new Promise((done) => setTimeout(done, 20));
  };
  const [reset, pointer] = [".zoomable button", ".pointer"].map((name) => document.querySelector(name));
  const seen = (name) => (document.body.dataset[name] = `${reset.hidden ? "whole" : "zoomed"}: ${pointer.textContent}`);
  await mouse("mouseenter", 0.55);
  await mouse("mousemove", 0.5528); // step 3,300, before that of the spike
  seen("before");
  await mouse("mousemove", 0.54);
  await mouse("mousedown", 0.54);
  for (const share of [0.55, 0.56]) await mouse("mousemove", share);
  await mouse("mouseup", 0.56);
  await mouse("mousemove", 0.55);
  seen("zoomed");
  await mouse("dblclick", 0.55);
  seen("after");
});
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_curves_are_zoomed_and_read_under_the_pointer(tmp_path: Path) -> None:
    write_run(tmp_path / "run", every=30)
    output = write_report(tmp_path / "run", tmp_path / "page.html")
    output.write_text(output.read_text(encoding="utf-8").replace("</body>", f"<script>{PROBE}</script></body>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000", "--virtual-time-budget=10000")
    command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", output.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    page = Page(done.stdout)
    charts = page.of_class("chart")
    assert len(charts) == 3 + 2 * 2
    assert len(page.of_class("live")) >= 3 + 2  # the second close-up is not open
    [body] = [attributes for tag, attributes in page.elements if tag == "body"]
    assert body["data-before"].startswith("whole: step 3,300train_loss: 2.1")
    assert "at incidents: 9.7" in body["data-before"]
    assert "spike, step 3,307" in body["data-before"]
    assert body["data-zoomed"].startswith("zoomed: step 3,300train_loss: 2.1")
    assert "spike" not in body["data-zoomed"]
    assert body["data-after"].startswith("whole: ")
