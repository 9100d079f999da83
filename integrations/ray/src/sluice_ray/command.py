"""The command `sluice-ray`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ray

from .job import Placing, RunError, connect, run
from .requests import RequestError
from .server import Serving

# Exit codes; those of `sluice batch` are the same.
FINE, FAILURE, USAGE, SOME_FAILED = 0, 1, 2, 3

EPILOG = """\
The same command goes on with an interrupted run: results are in RESULTS.parts as soon as they are there.

exit codes: 0 all requests are answered, 1 the run cannot go on, 2 wrong usage, 3 some requests have an error as their
result

examples:
  sluice-ray requests.jsonl results.jsonl --model /models/r1.sluice
  sluice-ray requests.jsonl results.parquet --model /models/r1.sluice --at-once 64 -- --budget 48GiB --context 4096
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Serving(model="")
    made = argparse.ArgumentParser(
        prog="sluice-ray",
        usage="%(prog)s REQUESTS RESULTS --model FILE [OPTION...] [-- OPTION of `sluice serve`...]",
        description="Answers a file of requests (JSONL, in the form of OpenAI's batches, or bodies alone) on the "
        "machines of a Ray cluster, each of which has a copy of the model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("requests", type=Path, metavar="REQUESTS", help="file of requests, on this machine")
    made.add_argument(
        "results",
        type=Path,
        metavar="RESULTS",
        help="file for the results, on this machine: JSONL, or Parquet if it ends so",
    )
    made.add_argument("--model", required=True, metavar="FILE", help="the model file, at the same path on each machine")
    made.add_argument(
        "--program", default=usual.program, help="the sluice program on each machine [default: %(default)s]"
    )
    numbers: list[tuple[str, int | None, str]] = [
        ("--at-once", usual.at_once, "requests at a time on a machine [default: %(default)s]"),
        ("--attempts", usual.attempts, "how often a request is tried [default: %(default)s]"),
        ("--workers", None, "how many there are [default: one on each machine]"),
    ]
    for name, default, text in numbers:
        made.add_argument(name, type=int, default=default, metavar="N", help=text)
    made.add_argument(
        "--strategy",
        default="STRICT_SPREAD",
        choices=("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK"),
        help="how workers are placed; all but the default allow several on a machine [default: %(default)s]",
    )
    made.add_argument(
        "--resource",
        metavar="NAME",
        help="only machines with this resource serve [default: sluice, if any machine has it]",
    )
    made.add_argument(
        "--cpus",
        type=float,
        default=1.0,
        metavar="N",
        help="processors that a worker takes in Ray's books [default: 1]",
    )
    made.add_argument(
        "--address", help="Ray's address [default: the cluster that this machine is in, or else this machine alone]"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code."""
    made = parser()
    own = sys.argv[1:] if arguments is None else arguments
    cut = own.index("--") if "--" in own else len(own)
    own, serve = own[:cut], own[cut + 1 :]
    options = made.parse_args(own)
    if options.workers is not None and options.workers < 1:
        made.error("--workers: the least is 1")
    # Workers have folders of their own. A name on the hub is no path.
    model = options.model if options.model.startswith("hf:") else str(Path(options.model).absolute())
    try:
        serving = Serving(model, options.program, tuple(serve), options.at_once, options.attempts)
    except ValueError as error:
        made.error(str(error))
    placing = Placing(options.workers, options.strategy, options.resource, options.cpus)
    try:
        connect(options.address)
        summary = run(options.requests, options.results, serving, placing, say=_say)
    except (RequestError, RunError, OSError) as error:
        print(f"sluice-ray: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on")
        return 130
    finally:
        ray.shutdown()
    counts = f"{summary.requests} requests: {summary.failures} failed, {summary.skipped} were there already"
    _say(f"{counts}; {options.results}")
    return SOME_FAILED if summary.failures else FINE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
