"""The command line `llm`, set up as its documentation says for servers with OpenAI's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import KEY, PATIENCE, Server, run

PROMPT = "Speak of the sea."


def llm(server: Server, folder: Path, *arguments: str) -> str:
    """What it prints."""
    models = folder / "extra-openai-models.yaml"
    models.write_text(
        f"- model_id: sea\n  model_name: {server.model}\n  api_base: {server.v1}\n  api_key_name: sluice\n"
        "  supports_schema: true\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    command = [str(Path(sys.executable).parent / "llm"), "-m", "sea", "--key", KEY, *arguments]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_text(server: Server, tmp_path: Path) -> None:
    """The same text, streamed or not."""
    want = run(PROMPT, "-n", "40", "--seed", "7")["text"]
    options = ["-o", "seed", "7", "-o", "max_tokens", "40"]
    assert llm(server, tmp_path, PROMPT, *options) == want
    assert llm(server, tmp_path, PROMPT, *options, "--no-stream") == want


def test_schema(server: Server, tmp_path: Path) -> None:
    """JSON of a schema."""
    calm = {"type": "object", "properties": {"calm": {"type": "boolean"}}, "required": ["calm"]}
    schema = json.dumps(calm | {"additionalProperties": False})
    said = llm(server, tmp_path, PROMPT, "--schema", schema, "-o", "max_tokens", "200", "-o", "temperature", "1")
    assert json.loads(said) in ({"calm": True}, {"calm": False})
