"""One `sluice serve` process beside a copy of the model: started, watched, started again, and ended with the actor."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Deaths without one answered request between them after which the server is not started any more.
MOST_DEATHS = 16
# The longest wait before it is started again, in seconds. The first is one second, and each is twice the one before.
LONGEST_PAUSE = 60.0
# Lines of the server's messages that an error shows.
SHOWN_LINES = 12
# Seconds that it has to end when it is told to.
GRACE = 5.0
# Options of `sluice serve` that can change a text. Others, such as `--budget`, only change how long it takes.
TEXT_OPTIONS = (
    "--context",
    "--exact",
    "--expert-preference",
    "--kv-type",
    "--normalise-agents",
    "--prompt-attention",
    "--top-k-experts",
)
_LISTENING = re.compile(r"listening at (http://\S+)")


class ServerError(Exception):
    """The server does not start, or does not stay; the message has its last words."""


@dataclass(frozen=True)
class Serving:
    """How a machine serves its copy of the model.

    Attributes:
        model: path of the model file, the same on all machines.
        program: the `sluice` program, as a path or as a name that is found on each machine.
        arguments: more for `sluice serve`, such as `("--budget", "48GiB")`.
        at_once: requests that the server has at a time. More of them share each read of an expert, and take more
            memory.
        attempts: how often a request is tried before its result is an error. The last time, nothing else runs.
        silence: seconds without a byte of an answer after which the server is taken for dead; a living one sends
            white space every five seconds.
        patience: seconds that the server may take to start and to load the model.
    """

    model: str
    program: str = "sluice"
    arguments: tuple[str, ...] = ()
    at_once: int = 32
    attempts: int = 3
    silence: float = 120.0
    patience: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("at_once", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; the least is 1")

    def command(self) -> list[str]:
        """The command that starts the server. Those that wait in its queue may ask for several answers each."""
        queue = max(256, 4 * self.at_once)
        return [self.program, "serve", self.model, "--port", "0", "--queue", str(queue), *self.arguments]

    def text_options(self) -> list[str]:
        """Those of the arguments that can change a text, with their values, in order of their names."""
        found: dict[str, str] = {}
        name = ""
        for argument in self.arguments:
            if argument.startswith("--"):
                name, _, value = argument.partition("=")
                found[name] = value
            else:
                found[name] = argument
        return [f"{name}={found[name]}" for name in TEXT_OPTIONS if name in found]


@dataclass(frozen=True)
class Address:
    """Where a server is; `start` counts how often it was started."""

    url: str
    start: int


class Server:
    """The process. One thread starts it and waits for its end, since it dies with the thread that started it."""

    def __init__(self, serving: Serving) -> None:
        self.key = secrets.token_urlsafe(24)
        self._serving = serving
        self._changed = threading.Condition()
        self._address: Address | None = None
        self._broken: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._words: deque[str] = deque(maxlen=SHOWN_LINES)
        self._starts = 0
        self._deaths = 0
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="sluice-serve")

    def start(self) -> None:
        """Starts it, and waits until it has loaded the model and answered once.

        Raises:
            ServerError: it does not.
        """
        self._keeper.start()
        self.address()

    def address(self) -> Address:
        """Where it is, once it is there.

        Raises:
            ServerError: it will not be there any more.
        """
        with self._changed:
            while (address := self.address_now()) is None:
                self._changed.wait()
            return address

    def address_now(self) -> Address | None:
        """Where it is, if it is there.

        Raises:
            ServerError: it will not be there any more.
        """
        with self._changed:
            if self._address is None and self._broken is not None:
                raise ServerError(self._broken)
            return self._address

    def note_success(self) -> None:
        """Says that a request was answered: what kills it then is not that it cannot run at all."""
        self._deaths = 0

    def kill(self, address: Address) -> None:
        """Ends a server that does not answer any more, unless it has been started again since. Nobody is sent there."""
        with self._changed:
            if self._address == address and self._process is not None:
                self._process.kill()
                self._address = None

    def close(self) -> None:
        """Ends it for good."""
        self._closed.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._set(None, "the server was closed")

    def model(self) -> dict[str, Any]:
        """What tells this model, as it is served, from others: name, digest, and the options that can change a text.

        Raises:
            ServerError: the server does not say.
        """
        try:
            [model] = self._get(self.address().url, "/api/tags")["models"]
            return {"name": model["name"], "digest": model["digest"], "options": self._serving.text_options()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"the server does not name its model: {error!r}") from None

    def _set(self, address: Address | None, broken: str | None = None) -> None:
        with self._changed:
            self._address = address
            self._broken = broken or self._broken
            self._changed.notify_all()

    def _keep(self) -> None:
        try:
            while not self._closed.is_set():
                code = self._run()
                self._set(None)
                if self._closed.is_set():
                    return
                self._deaths += 1
                words = self._message(code)
                if self._starts == 0 or self._deaths >= MOST_DEATHS:
                    self._set(None, words)
                    return
                # Nothing is said if this process ends, too.
                if not self._closed.wait(min(LONGEST_PAUSE, 2.0 ** (self._deaths - 1))):
                    logger.warning("%s; it is started again", words)
        except Exception as error:
            # Whoever waits for the server should not wait for ever.
            self._set(None, f"the server cannot be started: {error!r}")

    def _message(self, code: int) -> str:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        times = f", {self._deaths} times in a row" if self._deaths > 1 else ""
        words = "\n".join(["", *self._words])
        return f"`sluice serve {self._serving.model}` {how}{times}{words}"

    def _run(self) -> int:
        """One life of the process; how it ended."""
        tether = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tether.py")), str(os.getpid())]
        environment = os.environ | {"SLUICE_API_KEY": self.key}
        # A line for each request is too much of a batch.
        environment.setdefault("RUST_LOG", "sluice_server=warn")
        process = subprocess.Popen(
            [*tether, *self._serving.command()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        self._process = process
        if self._closed.is_set():
            process.kill()
        assert process.stderr is not None
        warming: threading.Thread | None = None
        with process.stderr as messages:
            for line in messages:
                self._words.append(line.rstrip())
                logger.info("%s", line.rstrip())
                if warming is None and (found := _LISTENING.search(line)):
                    warming = threading.Thread(target=self._warm, args=(process, found[1]), daemon=True)
                    warming.start()
        code = process.wait()
        if warming is not None:
            # It finds out at once that nobody answers. Later, it would take the place of the next start.
            warming.join()
        return code

    def _warm(self, process: subprocess.Popen[str], url: str) -> None:
        """Asks for one token, so that the model is loaded, and what prevents that is known before all else."""
        body = {"prompt": "a", "max_tokens": 1, "temperature": 0, "cache_prompt": False}
        try:
            answer = self._get(url, "/v1/completions", body)
            if "choices" not in answer:
                raise ValueError(answer.get("error", {}).get("message", str(answer)))
        except urllib.error.HTTPError as error:
            self._words.append(error.read().decode(errors="replace"))
            process.kill()
        except (OSError, ValueError) as error:
            self._words.append(str(error))
            process.kill()
        else:
            self._starts += 1
            self._set(Address(url, self._starts))

    def _get(self, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(request, timeout=self._serving.patience) as answer:
            value: dict[str, Any] = json.loads(answer.read())
            return value
