"""Claude Code's command line completes a scripted task: thinking, a call of its shell, the result, the answer."""

from __future__ import annotations

import json
from pathlib import Path

from agents import ANSWER, TASK, start
from support import KEY, serve_script


def test_a_task(folder: Path, tmp_path: Path) -> None:
    """The file is there, and the last word is the script's."""
    with serve_script(folder, "claude_code") as server:
        environment = {
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": KEY,
            "ANTHROPIC_SMALL_FAST_MODEL": server.model,
            # Nothing but the server is asked.
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "API_TIMEOUT_MS": "600000",
        }
        command = ["claude", "-p", TASK, "--model", server.model, "--allowedTools", "Bash", "--output-format", "json"]
        result = json.loads(start(command, tmp_path, environment))
        assert result["subtype"] == "success"
        assert not result["is_error"]
        assert result["result"] == ANSWER
        assert result["num_turns"] == 2
        usage = result["usage"]
        # The second turn reads what it adds, not the 20,000 tokens of the first.
        assert usage["cache_read_input_tokens"] > 10_000
        assert usage["cache_read_input_tokens"] > 0.9 * usage["input_tokens"]
        assert server.running() == 0
