#!/usr/bin/env python3
"""What a batch gains: tokens per second of many answers at a time beside one at a time, and beside what the drive allows.

    tests/bench/batch.py SLUICE MODEL SCRATCH [--memory 4GiB] [--requests 32] [--alone 2] [--prompts 16,64] [--answers 32] [--seconds 120]
    tests/bench/batch.py SLUICE MODEL SCRATCH --prompt-tokens 16,256 ...

Prompts are token ids, so models of `sluice synth` will do. For each length of prompts and answers, `sluice batch` answers --alone requests
one at a time, and then --requests all at a time. Each run is printed when it is done, with the time that it took, opening included, and that
`--dry-run` expects. A run that takes longer than --seconds is ended there, and its rate is that of what it has done, prompts included: so a
pair of lengths takes little more than 2 × --seconds on any machine. BATCH.md's table comes from --requests 64 --alone 4 --prompts 16
--answers 32,128 --seconds 600. With --prompt-tokens, the requests of one run have prompts of these lengths in turn, so that long prompts are
read while short ones are answered. With --memory, both run in a control group of that size, page cache included (Linux, as root), and with a
budget of 9/10 of it.

The bound is computed from outside the program: bytes that the process has read (`/proc/PID/io`) ÷ what this script reads from the same file
with direct I/O in 1 MiB pieces on 8 threads, before and after the run; it counts from the first progress event, when the model is open, to
the end. `bound/time` is that time over the time that the run took; 1 is a drive that never waits. Where the plan (`--dry-run`) says that
memory or arithmetic bounds a step instead, the figure is small and says nothing.
"""

import argparse
import json
import mmap
import os
import pathlib
import random
import signal
import statistics
import subprocess
import threading
import time

from control_group import limited, size

PIECE = 1 << 20
THREADS = 8


def drive_rate(path, seconds=2.0):
    """Bytes per second of random reads with direct I/O."""
    pieces = os.path.getsize(path) // PIECE
    done = [0] * THREADS
    end = time.monotonic() + seconds

    def read(thread):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        # Of huge pages where there are any: in small ones, a virtual drive takes twice as long.
        buffer = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.write(bytes(len(buffer)))
        into = memoryview(buffer)[2 << 20 : (2 << 20) + PIECE]
        choose = random.Random(thread)
        while time.monotonic() < end:
            done[thread] += os.preadv(handle, [into], choose.randrange(pieces) * PIECE)
        os.close(handle)

    threads = [threading.Thread(target=read, args=(thread,)) for thread in range(THREADS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - began)


def read_bytes(pid):
    """Bytes that a process has read from drives."""
    lines = pathlib.Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def run(args, enter, prompts, answer, requests, at_a_time):
    """Tokens, seconds and bytes read of a run, from when the model was open; the seconds of the whole run, none if it was ended before it was
    done; and the seconds that it was expected to take."""
    choose = random.Random(prompts[0] * 1000 + answer)
    source, target = args.scratch / "in.jsonl", args.scratch / "out.jsonl"
    with source.open("w") as out:
        for number in range(requests):
            ids = [choose.randrange(10, 500) for _ in range(prompts[number % len(prompts)])]
            request = {"custom_id": str(number), "prompt": ids, "max_tokens": answer, "temperature": 1.0}
            out.write(json.dumps(request) + "\n")
    for path in (target, pathlib.Path(f"{target}.journal")):
        path.unlink(missing_ok=True)
    command = [args.sluice, "batch", args.model, source, target, "--json", "--forget", "--sequences", str(at_a_time)]
    command += ["--save-sequences", "never"]
    command += ["--context", str(max(prompts) + answer)]
    command += ["--budget", str(args.memory * 9 // 10)] if args.memory else []
    dry = [*map(str, command), "--dry-run"]
    plan = subprocess.run(dry, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    expected = json.loads(plan.stdout)["expected_seconds"]
    started = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    began = before = after = None
    generated, cut = 0, False
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and not cut:
            generated = event["progress"]["generated"]
            after = read_bytes(process.pid)
            if began is None:
                began, before = time.monotonic(), after
            ended = time.monotonic()
            if ended - began > args.seconds:
                cut = True
                process.send_signal(signal.SIGINT)
    # It may have been done by itself before it heard.
    if process.wait() not in ((0, 130) if cut else (0,)):
        raise SystemExit("the batch failed")
    now = time.monotonic()
    return generated, (ended if cut else now) - began, after - before, None if cut else now - started, expected


def say(prompts, answer, requests, outcome):
    """Prints a run that is done."""
    generated, seconds, read, whole, expected = outcome
    how = f"took {whole:.1f} s" if whole else f"ended after {seconds:.1f} s"
    print(f"  prompt {'/'.join(map(str, prompts))}, answer {answer}, {requests} at a time: {generated} tokens, {how}, expected {expected:.1f}; "
          f"read {read / 1e9:.1f} GB", flush=True)


def case(args, enter, prompts, answer):
    """One line of the table."""
    rates = [drive_rate(args.model)]
    alone = run(args, enter, prompts, answer, args.alone, 1)
    say(prompts, answer, 1, alone)
    together = run(args, enter, prompts, answer, args.requests, args.requests)
    say(prompts, answer, args.requests, together)
    rates.append(drive_rate(args.model))
    if not (alone[0] and together[0]):
        print("  nothing was generated in that time: give more --seconds", flush=True)
        return
    single, many = alone[0] / alone[1], together[0] / together[1]
    bound = together[2] / statistics.mean(rates) / together[1]
    prompt = "/".join(map(str, prompts))
    print(f"prompt {prompt:>5}, answer {answer:4}: {single:8.2f} tokens/s alone, {many:8.2f} with {args.requests} ({many / single:.1f} times); "
          f"drive {statistics.mean(rates) / 1e9:.2f} GB/s, {together[2] / together[0] / 1e6:.1f} MB per token, bound/time {bound:.2f}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sluice")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("scratch", type=pathlib.Path)
    parser.add_argument("--memory", type=size, default=0)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--alone", type=int, default=2)
    parser.add_argument("--prompts", default="16,64")
    parser.add_argument("--prompt-tokens", help="lengths of prompts that one run mixes, in place of --prompts")
    parser.add_argument("--answers", default="32")
    parser.add_argument("--seconds", type=float, default=120, help="most seconds of a run")
    args = parser.parse_args()
    with limited(args.memory) as enter:
        lengths = [[length] for length in args.prompts.split(",")]
        if args.prompt_tokens:
            lengths = [args.prompt_tokens.split(",")]
        for prompts in lengths:
            for answer in map(int, args.answers.split(",")):
                case(args, enter, [int(length) for length in prompts], answer)


if __name__ == "__main__":
    main()
