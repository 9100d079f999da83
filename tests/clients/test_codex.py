"""Codex's command line completes a scripted task: thinking, a call of its shell, the result, the answer."""

from __future__ import annotations

import json
from pathlib import Path

from agents import ANSWER, TASK, start
from support import KEY, serve_script

CONFIG = """\
model = "{model}"
model_provider = "sluice"
check_for_update_on_startup = false

[model_providers.sluice]
name = "Sluice"
base_url = "{base}"
wire_api = "responses"
env_key = "SLUICE_API_KEY"
stream_idle_timeout_ms = 600000

[analytics]
enabled = false
"""


def test_a_task(folder: Path, tmp_path: Path) -> None:
    """The file is there, and the last word is the script's."""
    with serve_script(folder, "codex") as server:
        settings = tmp_path / "settings"
        settings.mkdir()
        (settings / "config.toml").write_text(CONFIG.format(model=server.model, base=server.v1))
        environment = {"CODEX_HOME": str(settings), "SLUICE_API_KEY": KEY}
        # The sandbox of its own needs rights that a container may lack; the command is the script's.
        command = [
            "codex",
            "exec",
            "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox",
            "--json",
            TASK,
        ]
        events = [
            json.loads(line) for line in start(command, tmp_path, environment).splitlines() if line.startswith("{")
        ]
        said = [e["item"]["text"] for e in events if e.get("item", {}).get("type") == "agent_message"]
        assert said[-1] == ANSWER
        assert [event["type"] for event in events][-1] == "turn.completed"
        usage = events[-1]["usage"]
        assert usage["cached_input_tokens"] > 0
        assert server.running() == 0
