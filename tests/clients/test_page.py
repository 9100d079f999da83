"""The page in a headless Chromium, whose checks are in `tests/browser/page.mjs`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import HERE, KEY, NODE, PATIENCE, serve_script


def test_the_page(folder: Path, tmp_path: Path) -> None:
    """Send, stream, stop, reload, and all else that the page can do, against the real server."""
    with serve_script(folder, "page") as server:
        look("--base", server.url, "--key", KEY, "--shots", str(tmp_path))
    assert list(tmp_path.glob("*.png"))


def test_the_page_with_answers_of_a_stand_in() -> None:
    """What the model of the tests does not write: markup, scripts, thinking, errors."""
    look()


def look(*arguments: str) -> None:
    """Runs the checks in the browser."""
    script = HERE.parent / "browser" / "page.mjs"
    command = ["node", str(script), "--modules", str(NODE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
