#!/usr/bin/env python3
"""How well reading and computing overlap, on drives that are only simulated: the table in docs/notes/2026-11-30-benchmarks.md, in one run.

    python3 tests/bench/simulated_drive.py --scratch DIR [--sluice target/release/sluice] [--geometry bench-34x128] [--layers N]
        [--drives 3GB/s,7GB/s] [--hits 40,60,80] [--sequences 1,8,32,128] [--json FILE]

Makes a model file without experts in DIR (a gigabyte for bench-34x128), finds the numbers of expert slots with which one sequence
has the given hit rates, without prefetch, and measures every combination of drive, slots and sequences there. Needs memory for
the slots: 6 GB for 80 % hits of bench-34x128. Takes about twenty minutes on two cores that do nothing else.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile

# Parts of all experts that are tried to find the hit rates.
PARTS = [0.03, 0.07, 0.13, 0.22, 0.35, 0.55]
# A drive for which nobody waits.
UNLIMITED = "1000000GB/s,0us"
# Steps that are measured and steps before them, by sequences: about as many tokens' worth of experts each.
STEPS = {1: (64, 64), 8: (24, 16), 32: (16, 8), 128: (8, 4)}


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"simulated_drive: {' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


class Bench:
    def __init__(self, sluice, model):
        self.sluice, self.model, self.fixed = sluice, model, {}

    def decode(self, budget, drive, sequences, steps=None, more=()):
        measured, before = steps or STEPS.get(sequences, (16, 8))
        command = [self.sluice, "bench", "decode", self.model, "--drive", drive, "--budget", str(budget), "--forget", "--json",
                   "-n", str(measured), "--warm-up", str(before), "--sequences", str(sequences), *more]
        return json.loads(run(command))[0]

    def with_slots(self, slots, drive, sequences, more=()):
        """Measures with that many slots: what else the budget has to hold depends on the number of sequences."""
        if sequences not in self.fixed:
            # Enough for everything but most of the slots.
            needs = json.loads(run([self.sluice, "inspect", self.model, "--json"]))
            budget = 3 * 1024**3 + needs["least_budget"]
            tried = self.decode(budget, UNLIMITED, sequences, steps=(1, 0))
            self.fixed[sequences] = tried["memory_used"] - tried["slots"] * tried["expert_bytes"], tried
        rest, tried = self.fixed[sequences]
        # With fewer slots than two layers use, the memory plan would rather stream dense parts.
        slots = max(slots, 32)
        # Half a slot more, against rounding.
        return self.decode(rest + int((slots + 0.5) * tried["expert_bytes"]), drive, sequences, more=more)

    def experts(self):
        self.with_slots(64, UNLIMITED, 1)
        return self.fixed[1][1]["experts"]


def slots_for(bench, experts, wanted):
    """Numbers of slots with which one sequence finds these parts of its experts in memory: on lines between what was measured,
    over the logarithm of the slots."""
    points = []
    for part in PARTS:
        outcome = bench.with_slots(int(part * experts), UNLIMITED, 1, more=["--no-prefetch"])
        points.append((math.log(outcome["slots"]), outcome["hit_rate"]))
        print(f"{outcome['slots']} slots: {outcome['hit_rate']:.1%} hits without prefetch", file=sys.stderr)
    found = []
    for rate in wanted:
        pairs = list(zip(points, points[1:]))
        (x0, y0), (x1, y1) = next((p for p in pairs if p[0][1] <= rate <= p[1][1]), pairs[0] if rate < points[0][1] else pairs[-1])
        at = x0 + (x1 - x0) * (rate - y0) / max(y1 - y0, 1e-9)
        found.append(min(int(math.exp(at)), experts))
    return found


def processor():
    """The machine, as its own files describe it."""
    model, flags = platform.machine(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            lines = dict(line.split(":", 1) for line in info if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    except OSError:
        pass
    isa = next((name for name, flag in [("AVX-512 with VNNI", "avx512_vnni"), ("AVX-512", "avx512f"), ("AVX2", "avx2")] if flag in flags), "")
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, {model}, {isa}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target"))
    parser.add_argument("--sluice", default=os.path.join(target, "release", "sluice"))
    parser.add_argument("--geometry", default="bench-34x128")
    parser.add_argument("--layers")
    parser.add_argument("--drives", default="3GB/s,7GB/s", help="separated by commas; each with the usual latency")
    parser.add_argument("--hits", default="40,60,80", help="per cent, of one sequence without prefetch")
    parser.add_argument("--sequences", default="1,8,32,128")
    parser.add_argument("--json", help="write all outcomes to this file")
    args = parser.parse_args()
    # The model file goes away with whoever is asked to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("simulated_drive: stopped"))
    hits = [float(rate) / 100 for rate in args.hits.split(",")]
    outcomes = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        model = os.path.join(folder, "shape.sluice")
        layers = ["--layers", args.layers] if args.layers else []
        run([args.sluice, "synth", args.geometry, model, "--dense-type", "int4", "--no-experts", *layers])
        bench = Bench(args.sluice, model)
        experts = bench.experts()
        slots = slots_for(bench, experts, hits)
        print(f"{processor()}; {args.geometry}{' of ' + args.layers + ' layers' if args.layers else ''}\n")
        print("| sequences | drive | experts in memory | hits, prefetched ones included | missed per token | tokens/s | ms per step | computing alone "
              "| drive alone | ÷ the longer | memory, arithmetic | drive reached |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for sequences in map(int, args.sequences.split(",")):
            for drive in args.drives.split(","):
                for count in slots:
                    o = bench.with_slots(count, drive, sequences)
                    outcomes.append(o)
                    reached = o["drive"]["reached_bytes_per_second"]
                    cells = [
                        str(sequences), drive, f"{o['slots'] / o['experts']:.0%}", f"{o['hit_rate']:.0%}",
                        f"{o['bytes_missed_per_token'] / 1e6:.0f} MB", f"{o['tokens_per_second']:.1f}",
                        f"{o['milliseconds_per_step']:.1f}", f"{o['computing_milliseconds']:.1f}",
                        f"{o['drive_milliseconds']:.1f}", f"{o['time_over_longer']:.2f}",
                        f"{o['bounds']['memory']:.0f}, {o['bounds']['arithmetic']:.0f} ms",
                        "never read" if reached is None else f"{reached / 1e9:.1f} GB/s",
                    ]
                    print("| " + " | ".join(cells) + " |", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump(outcomes, out, indent=1)


if __name__ == "__main__":
    main()
