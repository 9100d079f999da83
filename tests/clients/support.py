"""Servers for the checks of clients, and what their answers are compared with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# `.ci/clients` builds these, and says where they are.
PROGRAM = Path(os.environ["SLUICE"])
SCRIPTED = Path(os.environ["SLUICE_SCRIPTED"])
MODEL = Path(os.environ["SLUICE_MODEL"])
STATES = Path(os.environ["SLUICE_STATES"])
CHECKPOINT = Path(os.environ["SLUICE_CHECKPOINT"])
# Where npm has put packages, for the checks that need some.
NODE = Path(os.environ.get("SLUICE_NODE", "."))
KEY = "the-key-of-a-test"
# Builds without optimisation on a busy machine are slow; a check that hangs should still end.
PATIENCE = 120.0


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def v1(self) -> str:
        """Where OpenAI's clients find it."""
        return f"{self.url}/v1"

    def get(self, path: str) -> Any:
        """What it answers to GET, as JSON."""
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        """What it answers to GET."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON that it answers to POST."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def running(self) -> int:
        """Generations that are queued, read or decoded."""
        [model] = self.get("/status")["models"]
        status = model["status"]
        return sum(status[state] for state in ("queued", "reading", "decoding")) if status else 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(holds: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s, still not: {what}")
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Whether a server says that it is well."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def start(command: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Starts a server, waits until it answers, and ends it."""
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | (environment or {}))
    try:

        def ready() -> bool:
            assert process.poll() is None, f"the server ended:\n{log.read_text()}"
            return answers(url)

        until(ready, "the server answers")
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            model = json.loads(answer.read())["data"][0]["id"]
        yield Server(url, model, process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"SIGTERM did not end the server within 30 s:\n{log.read_text()}") from None


@contextmanager
def serve(folder: Path, *options: str, models: tuple[Path, ...] = (MODEL,)) -> Iterator[Server]:
    """`sluice serve` on the chat model, or on others; the first of them is the one whose name is told."""
    port = free_port()
    command = [str(PROGRAM), "serve", *map(str, models), "--port", str(port), "--api-key", KEY]
    command += options if "--context" in options else ("--context", "16384", *options)
    with start(command, port, folder / f"server-{port}.log") as server:
        yield server


@contextmanager
def serve_script(folder: Path, script: str) -> Iterator[Server]:
    """The server with answers from a script in `scripts/`."""
    port = free_port()
    command = [str(SCRIPTED), str(MODEL), str(HERE / "scripts" / f"{script}.json"), str(port), KEY]
    with start(command, port, folder / f"{script}-{port}.log") as server:
        yield server


@cache
def run(prompt: str, *options: str, chat: bool = True, model: Path = MODEL) -> dict[str, Any]:
    """What `sluice run` says: `text`, `ids`, `finish`, `prompt_tokens`."""
    command = [str(PROGRAM), "run", str(model), "--json", "--prompt", prompt, *options]
    done = subprocess.run(command + (["--chat"] if chat else []), capture_output=True, check=True, timeout=PATIENCE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def without_thinking(prompt: str, system: str = "") -> str:
    """A user's message in the model's template, for an answer without thinking. `run` takes it with `chat=False`."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def long_text(number: int) -> str:
    """A text of some 14,000 tokens, which take seconds to read; another one for each number."""
    return " ".join(f"{i} of {number} ships sail." for i in range(1050))


@cache
def tokens(text: str) -> list[int]:
    """The token ids of a text."""
    done = subprocess.run(
        [str(PROGRAM), "tokenize", str(MODEL), "--json", "--text", text], capture_output=True, check=True
    )
    ids: list[int] = json.loads(done.stdout)["ids"]
    return ids
