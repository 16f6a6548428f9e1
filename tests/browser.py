"""Pages in headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(
    not _BROWSER, reason="no Chromium on the path; pages are checked without drawing them only"
)


def rendered(page: Path, *, width: int = 1000, dark: bool = False) -> tuple[str, list[str]]:
    """Return the document after its scripts have run, and what they wrote to the console."""
    done = subprocess.run(
        [
            *(_BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"),
            *(f"--window-size={width},2000", "--virtual-time-budget=5000"),
            f"--blink-settings=preferredColorScheme={int(not dark)}",
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "srcset", "data", "action", "poster")
        self.found += [value or "" for name, value in attrs if name in names]


def fetched(html: str) -> list[str]:
    """Return all that a page would fetch or lead to outside itself."""
    parser = _Links()
    parser.feed(html)
    found = [link for link in parser.found if not link.startswith(("data:", "#"))]
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    return found + re.findall(r"@import[^;]*|url\([^)]*\)", styles)
