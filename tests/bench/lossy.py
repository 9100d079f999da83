#!/usr/bin/env python3
"""What the lossy options cost and gain: the table in docs/PERFORMANCE.md, in one run.

    python3 tests/bench/lossy.py --scratch DIR [--sluice target/release/sluice] [--file MODEL.sluice] [--text F] [--part 33]
        [--drive 200MB/s] [--preferences 0.02,0.05,0.1,0.2] [--top-k 3,2] [-n 128] [--rounds 3] [--json FILE]

Without --file, the demo's model is converted into DIR: 5 million weights, which have read nothing but Shakespeare. The budget holds --part per cent
of the experts beside everything else. For each option, `compare` says how far the predictions on --text (the demo's own, by default) are from the
model's own, with that budget, because --expert-preference prefers what is in memory; and `bench decode --drive` says how fast tokens come from a
simulated drive of this speed, which should be so slow that the model waits for it. Rounds go through all options in turns, and their medians count.
Takes about a minute on two cores.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "tests", "fixtures", "demo-model")
# Tokens of a window of the text, and of the steps before the measurement.
WINDOW, WARM_UP = 256, 64


def call(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"lossy: {' '.join(map(str, command))}\n{done.stderr.strip()}")
    return done.stdout


def budget(args, model, context):
    """Holds so many per cent of the experts, and everything else."""
    sizes = json.loads(call(args.sluice, "plan", model, "--context", context, "--json"))
    experts = sizes["experts"] * sizes["expert_bytes"]
    return int(sizes["best_memory"] - experts * (1 - args.part / 100))


def quality(args, model, option):
    # Both models have half of the budget; the reference is exact whatever it has.
    return json.loads(call(args.sluice, "compare", model, model, "--text", args.text, "--window", WINDOW, "--budget",
                           2 * budget(args, model, WINDOW), "--forget", "--json", *option))


def speed(args, model, option):
    context = WARM_UP + 2 * args.n
    return json.loads(call(args.sluice, "bench", "decode", model, "--drive", args.drive, "--budget", budget(args, model, context), "-n", args.n,
                           "--warm-up", WARM_UP, "--forget", "--json", *option))[0]


def options(args):
    def numbers(text):
        return [part for part in text.split(",") if part]
    preferences = [["--expert-preference", number] for number in numbers(args.preferences)]
    return [[], *preferences, *(["--top-k-experts", number] for number in numbers(args.top_k))]


def table(outcomes):
    """A column for each option."""
    def median(outcome, field):
        return statistics.median(found[field] for found in outcome["rounds"])
    usual = median(outcomes[0], "tokens_per_second")
    rows = [
        ("", lambda o: f"`{' '.join(o['option'])}`" if o["option"] else "the model's own choice"),
        ("perplexity", lambda o: f"{o['quality']['perplexity'][1]:.2f}"),
        ("divergence, nats", lambda o: f"{o['quality']['divergence']:.4f}"),
        ("same first choice", lambda o: f"{100 * o['quality']['agreement']:.1f} %"),
        ("experts found in memory", lambda o: f"{100 * median(o, 'hit_rate'):.0f} %"),
        ("tokens/s", lambda o: f"{median(o, 'tokens_per_second'):.0f}"),
        ("times as fast", lambda o: f"{median(o, 'tokens_per_second') / usual:.2f}"),
    ]
    for number, (name, cell) in enumerate(rows):
        print("| " + " | ".join([name, *map(cell, outcomes)]) + " |")
        if number == 0:
            print("|---" * (len(outcomes) + 1) + "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    parser.add_argument("--sluice", default=os.path.join(target, "release", "sluice"))
    parser.add_argument("--file", help="a model file, instead of the demo's model")
    parser.add_argument("--text", default=os.path.join(DEMO, "eval.txt"))
    parser.add_argument("--part", type=float, default=33, help="per cent of the experts that the budget holds")
    parser.add_argument("--drive", default="200MB/s", help="speed, or SPEED,LATENCY, of the simulated drive")
    parser.add_argument("--preferences", default="0.02,0.05,0.1,0.2", help="values of --expert-preference")
    parser.add_argument("--top-k", default="3,2", help="values of --top-k-experts")
    parser.add_argument("-n", type=int, default=128, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write all outcomes to this file")
    args = parser.parse_args()
    # The model file goes away with whoever is asked to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("lossy: stopped"))
    outcomes = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        model = args.file or os.path.join(folder, "demo.sluice")
        if not args.file:
            call(args.sluice, "convert", DEMO, model)
        all_options = options(args)
        rounds = [[speed(args, model, option) for option in all_options] for _ in range(args.rounds)]
        for option, *measured in zip(all_options, *rounds):
            outcomes.append({"option": option, "quality": quality(args, model, option), "rounds": measured})
    table(outcomes)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(outcomes, file, indent=1)


if __name__ == "__main__":
    main()
