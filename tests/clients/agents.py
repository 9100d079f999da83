"""What the checks of agents' command lines share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support import NODE, PATIENCE

TASK = "Write the word sluice into proof.txt"
ANSWER = "The file is written, and says sluice 42."


def start(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs an agent in a folder, with a home of its own and nothing of this machine's settings; what it prints."""
    home = folder / "home"
    project = folder / "project"
    home.mkdir()
    project.mkdir()
    own = {"PATH": f"{NODE / 'node_modules/.bin'}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8"}
    # Prompts of agents are long, and the first of them is read by a build without optimisation.
    done = subprocess.run(
        command,
        cwd=project,
        env=own | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "proof.txt").read_text() == "sluice 42", "the tool was called, by the shell"
    return done.stdout
