#!/usr/bin/env python3
"""Does `sluice plan` say what `sluice run` then gives? Three geometries, three budgets, in one run.

    python3 tests/bench/plan.py --scratch DIR [--sluice target/release/sluice] [--geometries bench-34x128:8,olmoe-7b:8,deepseek-v2-lite:8]
        [--parts 15,35,70] [-n 128] [--rounds 3] [--drive-seconds 12] [--threads N] [--json FILE]

Measures the machine (`bench disk`, `bench machine`; kept in DIR, not in the user's cache). For each geometry, the first so many layers with
random weights are made in DIR (1 to 3 GB); `run --trace` records the routing of a text that is sampled from fixed numbers; then for each budget,
which holds so many per cent of the experts beside everything else, `plan --trace` is asked, and `run` generates the same text, of which the median
of the rounds counts. Printed per budget: tokens per second as planned and as run, planned ÷ run, and for comparison what the plan says with
hit rates of other models (random texts of random weights repeat themselves less than real ones do), and the bound. Drive and
cores are measured again before each budget, since shared machines change within minutes: what was measured once can be off by a factor of two then, and
that would be no fault of the plan. Takes about ten minutes on two cores.
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
HEADROOM = 512 << 20


class Sluice:
    def __init__(self, program, folder, threads):
        self.program, self.folder = program, folder
        self.environment = {**os.environ, "XDG_CACHE_HOME": folder}
        self.threads = ["--threads", str(threads)] if threads else []

    def __call__(self, *arguments):
        command = [self.program, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, check=False)
        if done.returncode != 0:
            sys.exit(f"plan: {' '.join(command)}\n{done.stderr.strip()}")
        return json.loads(done.stdout) if done.stdout.lstrip().startswith(("{", "[")) else done.stdout

    def run(self, model, tokens, *more):
        return self("run", model, "--prompt-ids", PROMPT, "-n", tokens, "--ignore-eos", "--temperature", 1, "--seed", 1, "--drafts", "off", "--forget",
                    "--json", *self.threads, *more)["profile"]


def forget_pages(path):
    """Has the system forget what it keeps of a file that was just written, so that reads come from the drive."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


class Drive:
    """The drive, read as `bench disk` has found best."""

    def __init__(self, sluice, model, seconds):
        self.sluice = sluice
        report = sluice("bench", "disk", model, "--seconds", seconds, "--json")
        self.knee = report["knee"]
        if not report["saved"]:
            sys.exit("plan: the drive could not be calibrated: give more --drive-seconds")

    def measure(self, model):
        """Calibrates the drive as it is now, without looking for the knee again: rate and latency."""
        point, block = self.knee, self.knee["block_bytes"]
        report = self.sluice("bench", "disk", model, "--engine", "uring" if point["engine"].startswith("uring") else "pread", "--pattern",
                             "random", "--block", block, "--depth", f"1,{point['depth']}", "--seconds", 2, "--no-save", "--json")
        rates = {found["depth"]: found["bytes_per_second"] for found in report["points"]}
        rate = rates[point["depth"]]
        path = os.path.join(self.sluice.folder, "sluice", "io.json")
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
        kept["drives"][0].update(bytes_per_second=rate, latency=max(0, block / rates[1] - block / rate))
        with open(path, "w", encoding="utf-8") as file:
            json.dump(kept, file)
        return kept["drives"][0]


def measure(sluice, model, drive, part, args, trace):
    sizes = sluice("plan", model, "--context", args.context, "--json")
    experts = sizes["experts"] * sizes["expert_bytes"]
    budget = int(sizes["best_memory"] - experts * (1 - part / 100))
    # Of what is available, `plan` leaves a tenth, or this much, to the system.
    ram = max(budget + HEADROOM, -(-budget * 10 // 9))
    found = drive.measure(model)
    sluice("bench", "machine", model, *sluice.threads, "--save-anyway", "--json")
    plan = ["plan", model, "--context", args.context, "--ram", ram, "--json"]
    with_trace = sluice(*plan, "--trace", trace)
    others = sluice(*plan)
    runs = [sluice.run(model, args.n, "--budget", budget, "--context", args.context) for _ in range(args.rounds)]
    decode = [run["decode"] for run in runs]
    planned, rates = with_trace["forecast"], [phase["tokens_per_second"] for phase in decode]
    return {
        "part": part, "budget": budget, "slots": [with_trace["speed"]["memory"]["slots"], runs[0]["memory"]["slots"]],
        "drive": found["bytes_per_second"], "latency": found["latency"], "planned": planned["tokens_per_second"], "run": statistics.median(rates), "runs": rates,
        "ratio": planned["tokens_per_second"] / statistics.median(rates), "hit_rate": planned["hit_rate"],
        "others": others["forecast"]["tokens_per_second"], "bound": with_trace["speed"]["tokens_per_second"],
        "computing": planned["computing_seconds"], "reading": planned["drive_seconds"], "profile": decode[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target"))
    parser.add_argument("--sluice", default=os.path.join(target, "release", "sluice"))
    parser.add_argument("--geometries", default="bench-34x128:8,olmoe-7b:8,deepseek-v2-lite:8", help="NAME:LAYERS, separated by commas")
    parser.add_argument("--parts", default="15,35,70", help="per cent of the experts that the budgets hold")
    parser.add_argument("-n", type=int, default=128, help="tokens of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drive-seconds", type=float, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="write all outcomes to this file")
    args = parser.parse_args()
    args.context = args.n + 32
    # The model files go away with whoever is asked to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("plan: stopped"))
    outcomes, drive = [], None
    os.makedirs(args.scratch, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        sluice = Sluice(args.sluice, folder, args.threads)
        print("| geometry | experts in memory | drive | hits | planned | run | planned ÷ run | with other models' hits | bound |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name, layers in (geometry.split(":") for geometry in args.geometries.split(",")):
            model, trace = os.path.join(folder, "model.sluice"), os.path.join(folder, "trace.jsonl")
            sluice("synth", name, model, "--layers", layers, "--overwrite")
            forget_pages(model)
            if drive is None:
                drive = Drive(sluice, model, args.drive_seconds)
            sluice.run(model, args.n, "--trace", trace, "--context", args.context)
            for part in map(float, args.parts.split(",")):
                o = measure(sluice, model, drive, part, args, trace)
                outcomes.append({"geometry": name, "layers": int(layers), **o})
                print(f"| {name}, {layers} layers | {part:.0f} % | {o['drive'] / 1e9:.2f} GB/s | {o['hit_rate']:.0%} | {o['planned']:.1f} | "
                      f"{o['run']:.1f} ({min(o['runs']):.1f} to {max(o['runs']):.1f}) | {o['ratio']:.2f} | {o['others']:.1f} | "
                      f"{o['bound']:.1f} |", flush=True)
            os.remove(model)
    off = [abs(outcome["ratio"] - 1) for outcome in outcomes]
    print(f"\n{sum(o <= 0.1 for o in off)} of {len(off)} plans are within 10 %; the worst is off by {max(off):.0%}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump(outcomes, out, indent=1)


if __name__ == "__main__":
    main()
