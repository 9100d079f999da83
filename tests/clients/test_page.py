"""The page in a headless Chromium, whose checks are in `tests/browser/page.mjs`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import HERE, KEY, NODE, PATIENCE, serve_script


def test_the_page(folder: Path, tmp_path: Path) -> None:
    """Send, stream, stop, reload, and all else that the page can do, against the real server."""
    script = HERE.parent / "browser" / "page.mjs"
    with serve_script(folder, "page") as server:
        command = ["node", str(script), "--modules", str(NODE), "--base", server.url, "--key", KEY]
        command += ["--shots", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*.png"))
