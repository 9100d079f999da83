#!/usr/bin/env python3
"""Something that looks like `sluice serve`, and does what a prompt says.

    fake_sluice.py serve MODEL ... --notes FOLDER

* `poison` kills it.
* `fault` is a fault of the server, each time.
* `full` finds the queue full, the first time.
* `late` is refused after the response has begun.
* `silent` gets nothing, until the server is started again.

A model called `missing` does not load. Each request is noted in the folder, with how many others are being answered.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = sys.argv[2]
NOTES = Path(sys.argv[sys.argv.index("--notes") + 1])
# Long enough that requests which are sent together are answered together.
ANSWERING = 0.05


class State:
    """What the server knows of its requests."""

    lock = threading.Lock()
    going = 0


def note(prompt: str, others: int) -> int:
    """Notes a request; how often it has been noted before."""
    path = NOTES / prompt
    with State.lock:
        before = path.read_text().splitlines() if path.exists() else []
        with path.open("a") as file:
            print(others, file=file)
    return len(before)


class Handler(BaseHTTPRequestHandler):
    """The paths that a worker uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def reply(self, status: int, value: Any, **headers: str) -> None:
        """Sends JSON."""
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Names the model."""
        self.reply(200, {"models": [{"name": Path(MODEL).stem, "digest": "0"}]})

    def do_POST(self) -> None:
        """Answers."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with State.lock:
            others = State.going
            State.going += 1
        try:
            self.answer(body["prompt"], others, body)
        finally:
            with State.lock:
                State.going -= 1

    def answer(self, prompt: str, others: int, body: dict[str, Any]) -> None:
        """Does what the prompt says."""
        before = note(prompt, others)
        kind = prompt.split()[0]
        wrong = {"message": f"it is {kind}", "type": "server_error", "param": None, "code": None}
        if MODEL.endswith("missing"):
            self.reply(500, {"error": {**wrong, "message": "the budget is too small"}})
            return
        time.sleep(ANSWERING)
        if kind == "poison":
            os._exit(9)
        elif kind == "silent" and before == 0:
            time.sleep(60)
        elif kind == "fault":
            self.reply(500, {"error": wrong})
        elif kind == "full" and before == 0:
            self.reply(429, {"error": {**wrong, "type": "rate_limit_error"}}, retry_after="0")
        elif kind == "late":
            self.reply(200, {"error": {**wrong, "type": "invalid_request_error", "message": "the prompt is too long"}})
        else:
            usage = {"prompt_tokens_details": {"cached_tokens": before}}
            choices = [{"index": 0, "text": f"{prompt}, with {body.get('seed')}"}]
            answer = {
                "id": f"cmpl-{os.urandom(4).hex()}",
                "created": int(time.time()),
                "choices": choices,
                "usage": usage,
            }
            self.reply(200, answer)


def main() -> None:
    """Serves until it is killed."""
    if MODEL.endswith("nowhere"):
        sys.exit("error: nowhere: no such file")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"listening at http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
