#!/usr/bin/env python3
"""What the server costs: tokens per second beside `sluice run`, and the first token behind a prefix that is on the drive.

    python3 tests/bench/server.py --sluice target/release/sluice --file MODEL.sluice [--budget 8GiB] [--tokens 128] [--pairs 8]
                                  [--prefix 4000] [--folder DIR]

Prompts are token ids, so models of `sluice synth` will do. In each pair, `sluice run` and the server decode the same tokens in
turns, the first of a pair changing from pair to pair; the ratio of a pair is server / run in tokens per second. The server's time is
that of a request for all tokens less that of a request for one, with the prompt in its memory.

For the prefix, a request reads the prompt, the server is ended and started again, and the same request asks for one token. The
drive's own time is that of reading the stored files alone, from a cold page cache like the server's. Files are kept in --folder,
which should lie on the drive in question.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

BLOCK = 4 << 20


class Server:
    """A server on a free port."""

    def __init__(self, args, *more):
        command = [args.sluice, "serve", args.file, "--port", "0", "--context", str(args.prefix + 512), "--parallel", "1", *more]
        command += ["--budget", args.budget] if args.budget else []
        self.process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
        line = self.process.stderr.readline()
        while "listening at" not in line:
            if not line:
                raise SystemExit("the server did not start")
            line = self.process.stderr.readline()
        self.port = int(line.strip().rsplit(":", 1)[1])

    def post(self, path, body):
        """The answer, and the seconds until it was whole."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        began = time.perf_counter()
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        seconds = time.perf_counter() - began
        if response.status != 200 or "error" in answer:
            raise SystemExit(f"{path}: {answer}")
        return answer, seconds

    def complete(self, prompt, tokens):
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": tokens, "temperature": 0})

    def end(self):
        self.process.terminate()
        self.process.wait()


def by_server(args, prompt, tokens):
    """Tokens per second of a server that has just started, as `sluice run` has: both have only the prompt's experts in memory."""
    server = Server(args)
    server.complete(prompt, 1)
    one = server.complete(prompt, 1)[1]
    answer, seconds = server.complete(prompt, tokens + 1)
    server.end()
    generated = answer["usage"]["completion_tokens"]
    return (generated - 1) / (seconds - one)


def by_run(args, prompt, tokens):
    """Tokens per second."""
    command = [args.sluice, "run", args.file, "--prompt-ids", ",".join(map(str, prompt)), "-n", str(tokens + 1), "--temperature", "0",
               "--drafts", "off", "--json", "--context", str(args.prefix + 512)]
    command += ["--budget", args.budget] if args.budget else []
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["profile"]["decode"]["tokens_per_second"]


def decode(args, prompt):
    ratios, rates = [], {"run": [], "server": []}
    for pair in range(args.pairs):
        measures = {"run": lambda: by_run(args, prompt, args.tokens), "server": lambda: by_server(args, prompt, args.tokens)}
        for name in sorted(measures, reverse=pair % 2 == 1):
            rates[name].append(measures[name]())
        ratios.append(rates["server"][-1] / rates["run"][-1])
    print(f"decode: server / run {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
          f"{statistics.median(rates['server']):.1f} and {statistics.median(rates['run']):.1f} tokens/s")


def forget(files):
    """Takes files out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(files):
    """Seconds of reading files, and their bytes."""
    forget(files)
    began, total = time.perf_counter(), 0
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while block := handle.read(BLOCK):
                total += len(block)
    return time.perf_counter() - began, total


def prefix(args, folder):
    prompt = random.Random(1).choices(range(10, 500), k=args.prefix)
    server = Server(args, "--sessions", folder)
    _, cold = server.complete(prompt, 1)
    server.end()
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 65536]
    ratios = []
    for _ in range(args.pairs):
        drive, total = read(files)
        server = Server(args, "--sessions", folder)
        server.complete(prompt[:8], 1)
        _, one = server.complete(prompt[:8] + [11], 1)
        forget(files)
        answer, seconds = server.complete(prompt, 1)
        server.end()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        allowed = 1.5 * drive + one + 0.02
        ratios.append(seconds / allowed)
        print(f"prefix: {cached} of {args.prefix} tokens from {total / 1e6:.0f} MB in {seconds * 1e3:.0f} ms; the drive alone "
              f"{drive * 1e3:.0f} ms, a token {one * 1e3:.0f} ms; read anew {cold:.1f} s")
    print(f"prefix: time / (1.5 x drive + a token + 20 ms): {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sluice", type=Path, required=True, help="the program, built for release")
    parser.add_argument("--file", type=Path, required=True, help="model file")
    parser.add_argument("--budget", help="memory for both")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens of the prefix; 0 leaves that out")
    parser.add_argument("--folder", type=Path, help="where sessions are kept meanwhile")
    args = parser.parse_args()
    decode(args, random.Random(0).choices(range(10, 500), k=16))
    if args.prefix:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            prefix(args, folder)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
