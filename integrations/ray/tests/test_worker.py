"""A worker and its server, which dies, lies and hangs. The server is `fake_sluice.py`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import sluice_ray.worker
from sluice_ray.requests import seed_of
from sluice_ray.server import Server, ServerError, Serving
from sluice_ray.worker import Worker

FAKE = str(Path(__file__).with_name("fake_sluice.py"))


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """The fake server. Pauses are short; they are no part of what is tested."""
    monkeypatch.setattr(sluice_ray.worker, "FIRST_PAUSE", 0.05)
    return Serving("model", FAKE, ("--notes", str(tmp_path)), at_once=4, silence=2.0)


def ask(serving: Serving, *prompts: str) -> dict[str, dict[str, Any]]:
    """What a worker makes of these prompts, by their texts."""
    worker = Worker(serving)
    lines = [json.dumps({"custom_id": prompt, "prompt": prompt}) for prompt in prompts]

    async def answers() -> pa.Table:
        try:
            return await worker(pa.table({"request": lines}))
        finally:
            await worker.close()

    table = asyncio.run(answers())
    assert sorted(table.column("custom_id").to_pylist()) == sorted(prompts)
    return {line["custom_id"]: line for line in map(json.loads, table.column("result").to_pylist())}


def status(line: dict[str, Any]) -> int:
    """The status of a result."""
    code: int = line["response"]["status_code"]
    return code


def others(tmp_path: Path, prompt: str) -> list[int]:
    """For each time that a prompt was asked, how many others were being answered."""
    return [int(line) for line in (tmp_path / prompt).read_text().splitlines()]


def test_requests_are_answered_together(serving: Serving, tmp_path: Path) -> None:
    """As many at once as the machine is told, and no more, each with its own seed."""
    prompts = [f"word {number}" for number in range(20)]
    lines = ask(serving, *prompts)
    for prompt in prompts:
        assert lines[prompt]["response"]["body"]["choices"][0]["text"] == f"{prompt}, with {seed_of(prompt)}"
    most = max(others(tmp_path, prompt)[0] for prompt in prompts)
    assert most == serving.at_once - 1


def test_errors_are_results_of_their_own(serving: Serving, tmp_path: Path) -> None:
    """A late refusal is a refusal, a full queue is no attempt, and a fault is tried as often as it may be."""
    lines = ask(serving, "late one", "full one", "fault one", "word")
    assert {name: status(line) for name, line in lines.items()} == {
        "late one": 400,
        "full one": 200,
        "fault one": 500,
        "word": 200,
    }
    assert lines["late one"]["error"]["message"] == "the prompt is too long"
    assert "it is fault" in lines["fault one"]["error"]["message"]
    counts = {name: len(others(tmp_path, name)) for name in lines}
    assert counts == {"late one": 1, "full one": 2, "fault one": serving.attempts, "word": 1}


def test_a_request_that_kills_the_server_harms_itself_only(serving: Serving, tmp_path: Path) -> None:
    """The others are answered, and its last attempt is made alone."""
    words = [f"word {number}" for number in range(8)]
    lines = ask(serving, "poison", *words)
    assert status(lines["poison"]) == 500
    assert all(status(lines[word]) == 200 for word in words)
    attempts = others(tmp_path, "poison")
    assert len(attempts) == serving.attempts
    assert attempts[-1] == 0


def test_a_server_that_says_nothing_is_started_again(serving: Serving, tmp_path: Path) -> None:
    """Its requests are asked again."""
    lines = ask(serving, "silent", "word")
    assert status(lines["silent"]) == status(lines["word"]) == 200
    assert len(others(tmp_path, "silent")) == 2


@pytest.mark.parametrize(
    ("model", "why"), [("nowhere", "no such file"), ("missing", "the budget is too small"), ("model", "not-there")]
)
def test_a_server_that_cannot_start_says_why(serving: Serving, model: str, why: str) -> None:
    """No file, a model that does not load, no program."""
    program = "/not-there/sluice" if why == "not-there" else FAKE
    with pytest.raises(ServerError, match=why):
        Server(Serving(model, program, serving.arguments)).start()


def test_the_server_dies_with_its_actor(serving: Serving, tmp_path: Path) -> None:
    """Even if the actor is killed in a way that leaves it no time."""
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from sluice_ray.server import Server, Serving
server = Server(Serving("model", {FAKE!r}, ("--notes", {str(tmp_path)!r})))
server.start()
print(server._process.pid, flush=True)
time.sleep(600)
"""
    actor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    with actor.stdout as output:
        server = int(output.readline())
    assert is_alive(server)
    actor.send_signal(signal.SIGKILL)
    actor.wait()
    end = time.monotonic() + 30
    while is_alive(server):
        assert time.monotonic() < end, "the server outlives its actor"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_only_options_that_change_a_text_name_the_model() -> None:
    """The budget may change from run to run, the context may not."""
    serving = Serving("m", arguments=("--budget", "1GiB", "--kv-type=q8", "--context", "4096", "--exact"))
    assert serving.text_options() == ["--context=4096", "--exact=", "--kv-type=q8"]
