"""Schemathesis: requests made up from `/openapi.json`, valid ones and wrong ones, are answered as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import KEY, Server

# Which tools, schemas and texts a model takes is more than a schema can say: a request that fits it may be refused.
EXCLUDED = "positive_data_acceptance"


def test_made_up_requests(server: Server, tmp_path: Path) -> None:
    """No crash, no undocumented status, no answer that differs from its schema; wrong requests are refused."""
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(server.get("/openapi.json")))
    command = [str(Path(sys.executable).parent / "st"), "run", str(document), "--url", server.url]
    command += ["-H", f"Authorization: Bearer {KEY}", "--checks", "all", "--exclude-checks", EXCLUDED]
    # What is documented as not implemented has a status of its own.
    missing = "^/v1/(files|batches)|^/api/(pull|push|create|copy|delete|blobs|embed|embeddings)(/|$)"
    command += ["--exclude-path-regex", missing]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--seed", "1"]
    command += ["--generation-database", "none", "--request-timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert server.process.poll() is None
    assert "panicked" not in server.log.read_text()
