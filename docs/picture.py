"""Take the README's picture of a report with a headless browser.

Without an argument it is the newest report of the demo under `runs/`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
TARGET = DOCS / "report.png"


def newest() -> Path:
    """The demo's report that was written last."""
    found = (DOCS.parent / "runs").glob("comparison-minilm-questions-*/report.html")
    reports = sorted(found, key=lambda path: path.stat().st_mtime)
    if not reports:
        sys.exit("there is no report of the demo: run `make demo`, or name a report.html")
    return reports[-1]


def main(report: Path, target: Path = TARGET) -> None:
    """Write the upper part of a report, light, 1200 pixels wide."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        size = {"width": 1200, "height": 1000}
        page = browser.new_page(viewport=size, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else newest())
