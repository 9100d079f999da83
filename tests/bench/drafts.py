#!/usr/bin/env python3
"""Do drafts ever lose? Tokens per second with them ÷ without, in pairs, for texts that repeat themselves and texts that do not, in memory and
from the drive.

    python3 tests/bench/drafts.py --scratch DIR [--sluice target/release/sluice] [--file MODEL.sluice] [--geometry bench-34x128:6]
        [--drafts lookup] [--part 35] [-n 256] [--pairs 5] [--threads N] [--json FILE]

Without --file, the first layers of a geometry are made in DIR with random weights. With a repetition penalty below 1, their most likely tokens
soon go in circles, which is a text that is copied; tokens sampled at temperature 1 are a text that never repeats itself, of which look-up
proposes nothing right. The budget from the
drive holds --part per cent of the experts. With a --file that has a layer for multi-token prediction, --drafts lookup,mtp,auto measures all
three. Each pair is one run with drafts and one without, the first of them changing from pair to pair; both give the same tokens, which is
checked. Takes less than five minutes with the defaults on two cores.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

PROMPT = ",".join(str(17 * i + 5) for i in range(16))
TEXTS = {"copied": ["--temperature", "0", "--repetition-penalty", "0.8"], "random": ["--temperature", "1", "--seed", "1"]}


def call(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"drafts: {' '.join(map(str, command))}\n{done.stderr.strip()}")
    return done.stdout


def budgets(args, model):
    """Budgets, by name: none for as much as is useful."""
    sizes = json.loads(call([args.sluice, "plan", model, "--context", args.n + 32, "--json"]))
    experts = sizes["experts"] * sizes["expert_bytes"]
    return {"memory": [], "drive": ["--budget", int(sizes["best_memory"] - experts * (1 - args.part / 100))]}


def run(args, model, text, budget, drafts):
    threads = ["--threads", args.threads] if args.threads else []
    out = json.loads(call([args.sluice, "run", model, "--prompt-ids", PROMPT, "-n", args.n, "--ignore-eos", "--forget", "--json", "--drafts",
                           drafts, "--context", args.n + 32, *TEXTS[text], *budget, *threads]))
    return out["ids"], out["profile"]


def pairs(args, model, text, budget, drafts):
    found = []
    for pair in range(args.pairs):
        ways = [drafts, "off"] if pair % 2 == 0 else ["off", drafts]
        outcome = {way: run(args, model, text, budget, way) for way in ways}
        if outcome[drafts][0] != outcome["off"][0]:
            sys.exit(f"drafts: {drafts} has changed the text ({text})")
        profiles = {"on": outcome[drafts][1], "off": outcome["off"][1]}
        rates = {way: profile["decode"]["tokens_per_second"] for way, profile in profiles.items()}
        found.append({**rates, "ratio": rates["on"] / rates["off"], **profiles["on"]["drafts"]})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target"))
    parser.add_argument("--sluice", default=os.path.join(target, "release", "sluice"))
    parser.add_argument("--file", help="a model file, instead of random weights")
    parser.add_argument("--geometry", default="bench-34x128:6", help="NAME:LAYERS")
    parser.add_argument("--drafts", default="lookup", help="of lookup, mtp, auto, separated by commas")
    parser.add_argument("--part", type=float, default=35, help="per cent of the experts that the budget from the drive holds")
    parser.add_argument("-n", type=int, default=256, help="tokens of a run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="write all outcomes to this file")
    args = parser.parse_args()
    # The model file goes away with whoever is asked to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("drafts: stopped"))
    outcomes = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        model = args.file
        if model is None:
            model = os.path.join(folder, "model.sluice")
            name, layers = args.geometry.split(":")
            call([args.sluice, "synth", name, model, "--layers", layers])
            # What is still to be written would be written while the first pair runs.
            file = os.open(model, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        print("| drafts | text | from | on ÷ off, median of pairs | tokens/s on, off | proposed | came true |")
        print("|---|---|---|---|---|---|---|")
        places = budgets(args, model)
        for drafts in args.drafts.split(","):
            for text in TEXTS:
                for place, budget in places.items():
                    found = pairs(args, model, text, budget, drafts)
                    ratios = [pair["ratio"] for pair in found]
                    median = {key: statistics.median(pair[key] for pair in found) for key in found[0]}
                    outcomes.append({"drafts": drafts, "text": text, "place": place, "pairs": found, "median": median})
                    print(f"| {drafts} | {text} | {place} | {median['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {median['on']:.1f}, "
                          f"{median['off']:.1f} | {median['proposed']:.0f} | {median['accepted']:.0f} |", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump(outcomes, out, indent=1)


if __name__ == "__main__":
    main()
