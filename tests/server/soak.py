#!/usr/bin/env python3
"""Many clients at once, for a while: does each get its text, whatever others do and whenever the server dies?

    python3 tests/server/soak.py --program target/debug/sluice --model MODEL.sluice [--seconds 30] [--clients 32]
                                 [--kills 2] [--budget 96MiB] [--slack 96] [--seed N]

Starts `sluice serve` with a folder of sessions. First every request of a list is made alone, and some of those that
`sluice run` can make are compared with it. Then the clients make these requests in random order: whole and streamed,
over the APIs that there are; some go away in the middle, some read slowly, some send what makes no sense. At random
moments the server is killed (`kill -9`) and started again. Checked are:

* each answer that ends is the one it got alone, and one that is cut is the beginning of it;
* what makes no sense is refused with a 4xx, and nothing else fails while the server lives;
* memory stays within the budget and the slack (in MiB: program, tokenizer, connections);
* sessions are still there after a kill, and are used;
* in the end nothing runs, and no connection is left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "the-key-of-a-test"
# A request that takes longer hangs: the queue is served in order, and answers are short.
PATIENCE = 120.0
# Documents that many conversations begin with, so that there is something to find again.
DOCUMENTS = [
    " ".join(f"Item {i * n}: the {word} of the {place}." for i in range(40 * n))
    for n, word, place in ((1, "ship", "harbour"), (2, "king", "play"), (3, "owl", "forest"))
]
QUESTIONS = ["Speak of the sea.", "Who comes?", "Say more about item 7.", "ÄÖÜ 🌊 <|im_end|> </think>?"]
SCHEMA = {
    "type": "object",
    "properties": {"calm": {"type": "boolean"}, "ships": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["calm", "ships"],
    "additionalProperties": False,
}


class Wrong(Exception):
    """Something that must not happen."""


class Gone(Exception):
    """The server ended the connection, or could not be reached."""


@dataclass
class Request:
    """A request whose answer is known."""

    path: str
    body: dict[str, Any]
    # What `sluice run` is given to make the same, if it can.
    run: list[str] | None = None
    alone: str = ""


@dataclass
class Tally:
    """What has happened."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    most_memory: float = 0.0
    cached: int = 0
    # How often a prompt was found on the drive right after a kill.
    found_again: int = 0


def requests() -> list[Request]:
    """What clients ask for: conversations of one and of several turns, with shared beginnings, texts, forms."""
    found: list[Request] = []
    for i, document in enumerate(["", *DOCUMENTS]):
        for j, question in enumerate(QUESTIONS):
            asked = f"{document}\n\n{question}" if document else question
            seed, most = 10 * i + j, 8 + 7 * j
            sampling = {"seed": seed, "temperature": [0.0, 0.8, 1.2][(i + j) % 3]}
            options = ["--seed", str(seed), "--temperature", str(sampling["temperature"]), "-n", str(most)]
            first = {"role": "user", "content": asked}
            chat = {"messages": [first], "max_tokens": most, **sampling}
            found.append(Request("/v1/chat/completions", chat, ["--chat", "--prompt", asked, *options]))
            turns = [
                first,
                {"role": "assistant", "content": "So it is, my lord."},
                {"role": "user", "content": "Go on."},
            ]
            found.append(Request("/v1/chat/completions", {**chat, "messages": turns}))
            text = {"prompt": asked, "max_tokens": most, **sampling}
            found.append(Request("/v1/completions", text, ["--prompt", asked, *options]))
            found.append(Request("/v1/messages", {"messages": turns, "max_tokens": most, "temperature": 0.0}))
            limits = {"seed": seed, "temperature": sampling["temperature"], "num_predict": most}
            found.append(Request("/api/chat", {"messages": turns, "options": limits, "stream": False}))
    form = {"type": "json_schema", "json_schema": {"name": "sea", "schema": SCHEMA}}
    for seed in range(4):
        ask = [{"role": "user", "content": QUESTIONS[0]}]
        body = {"messages": ask, "max_tokens": 300, "seed": seed, "temperature": 1.0, "response_format": form}
        found.append(Request("/v1/chat/completions", body))
    return found


def text_of(path: str, value: Any) -> str:
    """The text of an answer that came whole."""
    if path == "/v1/chat/completions":
        return str(value["choices"][0]["message"]["content"])
    if path == "/v1/completions":
        return str(value["choices"][0]["text"])
    if path == "/v1/messages":
        return "".join(block.get("text", "") for block in value["content"])
    return str(value["message"]["content"])


def delta_of(path: str, event: Any) -> str:
    """The text of an event of a stream."""
    if "error" in event:
        raise Wrong(f"{path}: an error in a stream: {event['error']}")
    if path == "/v1/messages":
        return str(event.get("delta", {}).get("text", ""))
    if path == "/api/chat":
        return str(event["message"]["content"])
    choices = event["choices"]
    if not choices:
        return ""
    return str(choices[0]["text"] if path == "/v1/completions" else choices[0]["delta"].get("content") or "")


class Connection:
    """One request over one connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self, buffer: int | None = None) -> None:
        """Connects; with a small receive buffer, the server soon notices a reader who does not read."""
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        except OSError as error:
            connection.close()
            raise Gone(str(error)) from None
        self.reader, self.writer = await asyncio.open_connection(sock=connection, limit=1 << 22)

    async def send(self, path: str, body: bytes, headers: str = "", method: str = "POST") -> int:
        """Sends a request; the status of the response."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {KEY}\r\n"
        if "Content-Length" not in headers:
            headers += f"Content-Length: {len(body)}\r\n"
        self.writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n{headers}\r\n".encode() + body)
        try:
            await self.writer.drain()
            lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Gone(repr(error)) from None
        self.in_pieces = any(line.lower() == b"transfer-encoding: chunked" for line in lines)
        return int(lines[0].split()[1])

    async def pieces(self) -> Any:
        """The pieces of the body, as they come."""
        try:
            while self.in_pieces:
                length = int(await self.reader.readuntil(b"\r\n"), 16)
                piece = await self.reader.readexactly(length + 2)
                if length == 0:
                    return
                yield piece[:-2]
            rest = await self.reader.read()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise Gone(repr(error)) from None
        yield rest

    async def whole(self) -> bytes:
        """The body."""
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Goes away at once, as a client that is killed."""
        if hasattr(self, "writer"):
            self.writer.transport.abort()


class Server:
    """The server, which dies and comes back."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.starts = 0
        self.is_up = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        command = [
            self.options.program,
            "serve",
            self.options.model,
            "--port",
            str(self.port),
            "--api-key",
            KEY,
            "--budget",
            self.options.budget,
            "--context",
            "8192",
            "--parallel",
            "4",
            "--queue",
            "48",
            "--sessions",
            str(self.folder / "sessions"),
        ]
        self.starts += 1
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(1500):
            if self.process.poll() is not None:
                raise SystemExit(f"the server does not start:\n{(self.folder / 'log').read_text()[-3000:]}")
            try:
                await self.get("/health")
                return
            except Gone:
                await asyncio.sleep(0.02)
        raise SystemExit("the server does not answer")

    async def get(self, path: str) -> bytes:
        """What it answers to GET."""
        connection = Connection(self.port)
        try:
            await connection.open()
            status = await connection.send(path, b"", method="GET")
            body = await connection.whole()
        finally:
            connection.close()
        if status != 200:
            raise Wrong(f"GET {path}: {status}: {body[:200]!r}")
        return body

    async def sessions(self) -> set[str] | None:
        """The sessions on the drive; `None` if the server does not tell."""
        try:
            return {entry["id"] for entry in json.loads(await self.get("/sessions"))["data"]}
        except Wrong:
            return None

    def kill(self) -> None:
        """Kills it."""
        assert self.process is not None
        self.is_up.clear()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory(self) -> float:
        """MiB that the process has allocated."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        return int(found.group(1)) / 1024 if found else 0.0

    def connections(self) -> int:
        """Sockets that the process has open."""
        assert self.process is not None
        folder = Path(f"/proc/{self.process.pid}/fd")
        return sum(1 for link in folder.iterdir() if str(link.readlink()).startswith("socket:"))


async def ask(server: Server, request: Request, tally: Tally, how: str, chance: random.Random) -> str:
    """Makes a request in some way; what came of the answer. Cut or whole, it is compared by the caller."""
    connection = Connection(server.port)
    streams = how != "whole"
    try:
        await connection.open(buffer=4096 if how == "slowly" else None)
        status = await connection.send(request.path, json.dumps({**request.body, "stream": streams}).encode())
        if status == 429:
            tally.counts["told to come again"] += 1
            await asyncio.sleep(chance.random())
            return ""
        if status != 200:
            raise Wrong(f"{request.path}: {status}: {(await connection.whole())[:300]!r}")
        if not streams:
            value = json.loads(await connection.whole())
            usage = value.get("usage") or {}
            tally.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            return text_of(request.path, value)
        return await stream(connection, request, how, chance)
    finally:
        connection.close()


async def stream(connection: Connection, request: Request, how: str, chance: random.Random) -> str:
    """Reads a stream, perhaps slowly, perhaps not to its end."""
    text, rest = "", b""
    cut = chance.randrange(12) if how == "cut" else None
    async for piece in connection.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.removeprefix(b"data: ").strip()
            if line.startswith(b"{"):
                text += delta_of(request.path, json.loads(line))
        if cut is not None:
            cut -= 1
            if cut <= 0:
                break
        if how == "slowly":
            await asyncio.sleep(chance.random() / 10)
    return text


NONSENSE: list[tuple[str, str, bytes, str]] = [
    ("POST", "/v1/chat/completions", b"", ""),
    ("POST", "/v1/chat/completions", b"{", ""),
    ("POST", "/v1/chat/completions", b"\xff\xfe\x00", ""),
    ("POST", "/v1/chat/completions", b"[" * 100_000, ""),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}], "max_tokens": "x"}', ""),
    ("POST", "/v1/chat/completions", b'{"messages": [], "n": -1}', ""),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e99}', ""),
    (
        "POST",
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "x"}]}',
        "X-Long: " + "x" * 2_000_000 + "\r\n",
    ),
    ("POST", "/v1/completions", b'{"prompt": [99999999], "max_tokens": 1}', ""),
    ("POST", "/v1/completions", b'{"prompt": {"a": 1}}', ""),
    ("POST", "/v1/messages", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', ""),
    ("POST", "/api/chat", b'{"messages": "x"}', ""),
    ("GET", "/v1/chat/completions", b"", ""),
    ("POST", "/no/such/path", b"{}", ""),
    ("DELETE", "/sessions/..%2f..%2fetc%2fpasswd", b"", ""),
    ("NONSENSE", "/", b"", ""),
]


async def nonsense(server: Server, chance: random.Random) -> None:
    """Sends what makes no sense: it is refused, and nobody else notices."""
    connection = Connection(server.port)
    method, path, body, headers = chance.choice(NONSENSE)
    try:
        await connection.open()
        if chance.random() < 0.2:
            # A request that promises more than comes, whose sender then goes away.
            connection.writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
            await asyncio.sleep(chance.random() / 5)
            return
        status = await connection.send(path, body, headers, method)
        if not 400 <= status < 500:
            raise Wrong(f"{method} {path} with {body[:60]!r}: {status}, a refusal was expected")
    finally:
        connection.close()


async def client(number: int, server: Server, pool: list[Request], tally: Tally, end: float, seed: int) -> None:
    """Makes requests until the end."""
    chance = random.Random(seed * 1000 + number)
    while time.monotonic() < end:
        await server.is_up.wait()
        start = server.starts
        [how] = chance.choices(["whole", "streamed", "cut", "slowly", "nonsense"], [45, 30, 10, 5, 10])
        request = chance.choice(pool)
        what = f"{request.path} {json.dumps(request.body)[-150:]}"
        try:
            if how == "nonsense":
                await asyncio.wait_for(nonsense(server, chance), PATIENCE)
            else:
                text = await asyncio.wait_for(ask(server, request, tally, how, chance), PATIENCE)
                is_right = request.alone.startswith(text) if how == "cut" or not text else text == request.alone
                if not is_right:
                    raise Wrong(f"{what}, {how}: {text!r} instead of {request.alone!r}")
            tally.counts[how] += 1
        except Gone as error:
            if how == "nonsense":
                # Refusing may end the connection before the answer is read.
                tally.counts[how] += 1
            elif server.is_up.is_set() and server.starts == start:
                tally.wrong.append(f"{what}, {how}: the connection ended: {error}")
            else:
                tally.counts["died with the server"] += 1
        except Wrong as error:
            tally.wrong.append(str(error))
        except asyncio.TimeoutError:
            tally.wrong.append(f"{what}, {how}: no end after {PATIENCE} s")


async def alone(server: Server, options: argparse.Namespace, tally: Tally) -> list[Request]:
    """The requests that this server takes, each with what it gets alone; some are compared with `sluice run`."""
    chance = random.Random(options.seed)
    pool, missing = [], set()
    for request in requests():
        if request.path in missing:
            continue
        connection = Connection(server.port)
        await connection.open()
        status = await connection.send(request.path, json.dumps({**request.body, "stream": False}).encode())
        body = await connection.whole()
        connection.close()
        if status == 404:
            missing.add(request.path)
            continue
        if status != 200:
            tally.wrong.append(f"{request.path}, alone: {status}: {body[:300]!r}")
            missing.add(request.path)
            continue
        request.alone = text_of(request.path, json.loads(body))
        pool.append(request)
        if request.run and (len(pool) < 3 or chance.random() < 0.3):
            done = subprocess.run(
                [options.program, "run", options.model, "--json", *request.run], capture_output=True, check=True
            )
            want = json.loads(done.stdout)["text"]
            if want != request.alone:
                tally.wrong.append(f"{request.run}: {request.alone!r}, `sluice run` says {want!r}")
            tally.counts["compared with `sluice run`"] += 1
    if missing:
        print(f"left out, since the server does not take it: {', '.join(sorted(missing))}")
    return pool


async def watch(server: Server, tally: Tally, most: float) -> None:
    """Looks at the server's memory while it lives."""
    while True:
        await asyncio.sleep(0.25)
        if server.is_up.is_set():
            try:
                memory = server.memory()
            except OSError:
                continue
            tally.most_memory = max(tally.most_memory, memory)
            if memory > most:
                tally.wrong.append(f"{memory:.0f} MiB of memory, {most:.0f} are the most")
                return


async def killer(server: Server, pool: list[Request], tally: Tally, end: float, kills: int) -> None:
    """Kills the server and starts it again; sessions that were there are still there, and are used."""
    chance = random.Random(server.options.seed)
    longest = max(pool, key=lambda request: len(json.dumps(request.body)) if "/chat/comp" in request.path else 0)
    for left in range(kills, 0, -1):
        await asyncio.sleep(max(0.0, end - time.monotonic()) / (left + 1) * (0.6 + 0.8 * chance.random()))
        before = await server.sessions()
        server.kill()
        await server.start()
        after = await server.sessions()
        if before is not None and after is not None:
            tally.counts["sessions found after a kill"] += len(before & after)
            # A longer one may have taken the place of one, in the moment before the kill.
            if len(before - after) > 2:
                tally.wrong.append(f"{len(before - after)} of {len(before)} sessions are gone after a kill")
        cached = tally.cached
        if await ask(server, longest, tally, "whole", chance) != longest.alone:
            tally.wrong.append("after a kill, the longest prompt has another answer")
        tally.found_again += tally.cached > cached
        tally.counts["kills"] += 1
        server.is_up.set()


async def at_rest(server: Server, tally: Tally) -> None:
    """Waits until nothing runs."""
    status: Any = None
    for _ in range(200):
        status = json.loads(await server.get("/status"))
        [model] = status["models"]
        state = model["status"] or {}
        busy = status["answers"] + sum(state.get(name, 0) for name in ("queued", "reading", "decoding", "saved"))
        # One of them is this one's own, the other listens.
        if busy == 0 and server.connections() <= 4:
            return
        await asyncio.sleep(0.05)
    tally.wrong.append(f"10 s after the last client: {server.connections()} sockets, {status}")


def mebibytes(text: str) -> float:
    """A size with a binary unit, in MiB."""
    number, unit = re.fullmatch(r"(\d+)(MiB|GiB)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"MiB": 1, "GiB": 1024}[unit]


async def soak(options: argparse.Namespace, folder: Path) -> Tally:
    """The whole test."""
    tally, server = Tally(), Server(options, folder)
    try:
        await server.start()
        pool = await alone(server, options, tally)
        server.is_up.set()
        end = time.monotonic() + options.seconds
        looking = asyncio.create_task(watch(server, tally, mebibytes(options.budget) + options.slack))
        clients = [client(n, server, pool, tally, end, options.seed) for n in range(options.clients)]
        await asyncio.gather(killer(server, pool, tally, end, options.kills), *clients)
        if options.kills and await server.sessions() and not tally.found_again:
            tally.wrong.append("no prompt was found on the drive after a kill")
        await at_rest(server, tally)
        looking.cancel()
        assert server.process is not None
        server.process.terminate()
        if server.process.wait(60) != 0:
            tally.wrong.append(f"SIGTERM ended the server with {server.process.returncode}")
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.kill()
    return tally


def main() -> None:
    """Parses, runs, tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--budget", default="96MiB")
    parser.add_argument("--slack", type=float, default=96, metavar="MIB")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = asyncio.run(soak(options, Path(folder)))
        log = (Path(folder) / "log").read_text(errors="replace")
    if "panicked" in log:
        tally.wrong.append(
            "the log has a panic:\n" + "\n".join(line for line in log.splitlines() if "panicked" in line)
        )
    for what, count in sorted(tally.counts.items()):
        print(f"{count:7}  {what}")
    print(f"{tally.found_again:7}  times that the longest prompt was found on the drive after a kill")
    print(f"{tally.cached:7}  tokens of prompts that were not read again")
    print(f"{tally.most_memory:7.0f}  MiB of memory at most, with a budget of {options.budget}")
    for wrong in tally.wrong[:20]:
        print(f"wrong: {wrong}", file=sys.stderr)
    print(f"soak: {sum(tally.counts.values())} passed, {len(tally.wrong)} failed")
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
