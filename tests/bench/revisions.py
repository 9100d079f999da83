#!/usr/bin/env python3
"""Two builds of Sluice on the same model file, in turns: is the new one as fast as the old one?

    python3 tests/bench/revisions.py --old OTHER/target/release --new target/release --file MODEL.sluice [--budget 2GiB]
                                     [--pairs 8] [--series 2] [--prompts 512,2048] [--decode 64] [--threads 2]

Builds nothing: in each of the two checkouts run `cargo build --release -p sluice` and build the example `throughput` of the
crate that has it. Measured are, with all experts in memory, each prompt and the decoding behind it (the example), and, streamed
within --budget, decoding (`sluice bench decode`). In each pair the two builds take turns, the first of a pair changing from
pair to pair; the ratio of a pair is new ÷ old in tokens per second. Printed per series: the median ratio with the range of all
pairs, and the median rates. The file must be one that both builds can open, and fit into memory.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def in_memory(folder, args, prompt):
    """Tokens per second of a prompt and of the decoding behind it."""
    figures = run([folder / "examples" / "throughput", args.file, args.threads, prompt, args.decode, 1])
    return {f"prompt of {prompt}, in memory": figures["prefill"],
            f"decode behind {prompt}, in memory": figures["decode"]}


def streamed(folder, args):
    """Tokens per second of decoding within the budget; without what earlier runs have learned."""
    [outcome] = run([folder / "sluice", "bench", "decode", args.file, "--budget", args.budget, "-n", args.decode, "--threads",
                     args.threads, "--forget", "--json"])
    return {f"decode within {args.budget}": outcome["tokens_per_second"]}


def measure(folder, args):
    figures = {}
    for prompt in args.prompts:
        figures |= in_memory(folder, args, prompt)
    if args.budget:
        figures |= streamed(folder, args)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, metavar="DIR", help="folder of the old build's programs")
    parser.add_argument("--new", type=Path, required=True, metavar="DIR", help="folder of the new build's programs")
    parser.add_argument("--file", type=Path, required=True, help="model file")
    parser.add_argument("--budget", help="memory for streamed decoding; without it that is not measured")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--series", type=int, default=2)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[512])
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    for series in range(args.series):
        pairs = []
        for pair in range(args.pairs):
            order = ["old", "new"] if pair % 2 == 0 else ["new", "old"]
            pairs.append({which: measure(getattr(args, which), args) for which in order})
        print(f"series {series + 1}, {args.pairs} pairs: new ÷ old")
        for name in pairs[0]["old"]:
            ratios = [pair["new"][name] / pair["old"][name] for pair in pairs]
            rates = {which: statistics.median(pair[which][name] for pair in pairs) for which in ("old", "new")}
            print(f"  {name:28} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
                  f"{rates['old']:.1f} and {rates['new']:.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
