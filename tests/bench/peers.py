#!/usr/bin/env python3
"""Programs that stream weights from a drive, side by side: the same weights, the same memory, in turns.

    python3 tests/bench/peers.py --gguf MODEL.gguf --scratch DIR --memory 4GiB [--sluice target/release/sluice] [--rounds 3]
        [--prompt 128] [--tokens 64] [--threads 2] [--llama PYTHON] [--peer NAME=COMMAND]...

Sluice converts the GGUF file into DIR once, with its bits as they are. Each program runs in a control group of --memory, page cache
included (Linux, as root), with an empty page cache at the start of each turn, and answers --tokens tokens behind a prompt of --prompt
tokens. Medians of --rounds are printed, with ranges, the bytes that each program read from drives, and the ratio to Sluice.

--llama is a Python with llama-cpp-python, such as the one in the scratch folder of `llama_cpp.py`: llama.cpp maps the file.

--peer adds a program, as a command line in which {gguf}, {prompt} (token ids with commas), {tokens}, {threads} and {memory} (bytes) are
filled in. It must print its tokens per second as `decode=NUMBER`, and may print `prompt=NUMBER`. A script of three lines around a peer
does that, and may read a conversion of its own of the same weights:

    --peer 'other=./other.sh {prompt} {tokens}'
"""

import argparse
import json
import os
import pathlib
import random
import re
import shlex
import statistics
import subprocess
import sys

from control_group import limited, size

HERE = pathlib.Path(__file__).resolve().parent


def forget(path):
    """Drops the pages of a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def measured(command, enter):
    """Runs a program in the group: its standard output, and the bytes that it read from drives."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
    out, errors = process.stdout.read(), process.stderr.read()
    # Waits like `wait`, and says what the process and its children used. Blocks are of 512 bytes.
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"peers: {' '.join(command)} failed ({process.returncode})\n{errors[-2000:]}")
    return out, used.ru_inblock * 512


def sluice(args, ids, enter):
    """One turn of Sluice: tokens per second of the prompt and of the answer, and bytes read."""
    command = [args.sluice, "run", str(args.model), "--prompt-ids", ids, "-n", str(args.tokens), "--ignore-eos", "--temperature", "0",
               "--json", "--forget", "--drafts", "off", "--threads", str(args.threads), "--budget", str(args.memory * 9 // 10)]
    out, read = measured(command, enter)
    profile = json.loads(out)["profile"]
    return profile["prefill"]["tokens_per_second"], profile["decode"]["tokens_per_second"], read


def llama(args, ids, enter):
    """One turn of llama.cpp, which maps the file."""
    inside = ["time_streamed", str(args.gguf), str(args.threads), ids, str(args.tokens)]
    out, read = measured([args.llama, str(HERE / "llama_cpp.py"), "--inside", *inside], enter)
    report = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    return report["prefill"], report["decode"], read


def peer(command):
    """One turn of another program."""
    def turn(args, ids, enter):
        words = {"gguf": args.gguf, "prompt": ids, "tokens": args.tokens, "threads": args.threads, "memory": args.memory}
        out, read = measured([word.format(**words) for word in shlex.split(command)], enter)
        found = dict(re.findall(r"\b(decode|prompt)=([0-9.]+)", out))
        if "decode" not in found:
            sys.exit(f"peers: {command} has not printed decode=NUMBER")
        return float(found.get("prompt", "nan")), float(found["decode"]), read
    return turn


def show(results):
    """The table: medians, ranges, and ratios to Sluice."""
    reference = statistics.median(decode for _, decode, _ in results["sluice"])
    for name, turns in results.items():
        prompt, decode, read = (sorted(column) for column in zip(*turns))
        middle = statistics.median(decode)
        print(f"{name:12} decode {middle:7.2f} tokens/s ({decode[0]:.2f} to {decode[-1]:.2f}), {middle / reference:.2f} of Sluice;  "
              f"prompt {statistics.median(prompt):7.2f} tokens/s;  {statistics.median(read) / 1e9:.2f} GB read", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--memory", type=size, required=True)
    parser.add_argument("--sluice", default="target/release/sluice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--vocabulary", type=int, default=30000, help="ids of prompts are below this")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.model = args.scratch / f"{args.gguf.stem}.sluice"
    if not args.model.exists():
        subprocess.run([args.sluice, "convert", args.gguf, args.model], check=True, stdout=subprocess.DEVNULL)
    programs = {"sluice": sluice}
    if args.llama:
        programs["llama.cpp"] = llama
    for text in args.peer:
        name, _, command = text.partition("=")
        programs[name] = peer(command)
    choose, results = random.Random(1), {name: [] for name in programs}
    ids = ",".join(str(choose.randrange(10, args.vocabulary)) for _ in range(args.prompt))
    with limited(args.memory) as enter:
        for turn in range(args.rounds):
            # Whoever is first in one turn is last in the next.
            for name in sorted(programs, reverse=turn % 2 == 1):
                forget(args.gguf)
                forget(args.model)
                results[name].append(programs[name](args, ids, enter))
    show(results)


if __name__ == "__main__":
    main()
