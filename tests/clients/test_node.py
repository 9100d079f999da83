"""The clients for Node.js, whose checks are in `*.mjs`."""

from __future__ import annotations

import os
import subprocess

import pytest

from support import HERE, KEY, NODE, PATIENCE, Server, run, without_thinking


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_node(server: Server, scripted: Server, name: str) -> None:
    """Runs a file of checks."""
    environment = {
        "BASE_URL": server.url,
        "MODEL": server.model,
        "KEY": KEY,
        "SCRIPTED_URL": scripted.url,
        "SCRIPTED_MODEL": scripted.model,
        "TEXT": run("Speak of the sea.", "-n", "40", "--seed", "7")["text"],
        "GREEDY": run(without_thinking("Speak of the sea."), "-n", "40", "--temperature", "0", chat=False)["text"],
    }
    # Node looks for packages beside the script.
    script = NODE / f"{name}.mjs"
    script.write_bytes((HERE / f"{name}.mjs").read_bytes())
    command = ["node", "--test", "--test-reporter=spec", str(script)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
