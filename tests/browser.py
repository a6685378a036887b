"""A real browser for pages that this project writes: Debian's Chromium, by Playwright.

Without it a test is skipped and says what is missing; with CI=true it fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Texts that lie over each other or stick out of their chart, each as words for the reader.
COLLISIONS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(
      (node) => [node.firstChild ? node.firstChild.textContent : "", node.getBoundingClientRect()]);
    texts.forEach(([name, box], index) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 ||
          box.top < frame.top - 1 || box.bottom > frame.bottom + 1) {
        found.push(`"${name}" sticks out of its chart`);
      }
      for (const [other, second] of texts.slice(index + 1)) {
        if (Math.min(box.right, second.right) - Math.max(box.left, second.left) > 1 &&
            Math.min(box.bottom, second.bottom) - Math.max(box.top, second.top) > 2) {
          found.push(`"${name}" and "${other}" lie over each other`);
        }
      }
      for (const mark of svg.querySelectorAll(".bar, .dot, .whisker:not(.under)")) {
        const second = mark.getBoundingClientRect();
        if (Math.min(box.right, second.right) - Math.max(box.left, second.left) > 1 &&
            Math.min(box.bottom, second.bottom) - Math.max(box.top, second.top) > 1) {
          found.push(`"${name}" lies over a mark`);
        }
      }
    });
  }
  return found;
}"""


@dataclasses.dataclass
class View:
    """A page in the browser, and what went wrong or out to the network since it was opened."""

    page: Page
    complaints: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)

    def collisions(self) -> list[str]:
        """Words in charts that cannot be read, for they meet something."""
        found: list[str] = self.page.evaluate(COLLISIONS)
        return found

    def is_scrolled_sideways(self) -> bool:
        """Whether the page as a whole is broader than the window."""
        root = "document.documentElement"
        return bool(self.page.evaluate(f"{root}.scrollWidth > {root}.clientWidth"))


def why_missing() -> str:
    """What has to be installed; empty if all is there."""
    if sys.platform == "win32" or not Path(CHROMIUM).exists():
        return "no browser: apt-get install chromium"
    try:
        import playwright  # noqa: F401 - whether it is there
    except ImportError:
        return "no playwright: pip install -r tests/requirements.txt"
    return ""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests; see `opened` for a page in it."""
    if missing := why_missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def opened(
    browser: Browser, file: Path, *, width: int = 1100, is_dark: bool = False
) -> Iterator[View]:
    """A file in a window of its own."""
    settings: dict[str, Any] = {"viewport": {"width": width, "height": 900}}
    context = browser.new_context(color_scheme="dark" if is_dark else "light", **settings)
    try:
        view = View(context.new_page())
        view.page.on("pageerror", lambda error: view.complaints.append(str(error)))
        view.page.on("console", lambda message: view.complaints.append(message.text))
        view.page.on("request", lambda request: view.requests.append(request.url))
        view.page.goto(file.absolute().as_uri())
        view.requests[:] = [url for url in view.requests if not url.startswith(("file:", "data:"))]
        yield view
    finally:
        context.close()


def main() -> int:
    """Pictures of pages, to be looked at: python -m tests.browser page.html picture.png [dark]"""
    from playwright.sync_api import sync_playwright

    if len(sys.argv) < 3 or not shutil.which(CHROMIUM):
        print(main.__doc__, file=sys.stderr)
        return 2
    width = int(os.environ.get("WIDTH", "1100"))
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with opened(running, Path(sys.argv[1]), width=width, is_dark="dark" in sys.argv) as view:
            view.page.screenshot(path=sys.argv[2], full_page=True)
            print(*view.collisions(), *view.complaints, *view.requests, sep="\n")
        running.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
