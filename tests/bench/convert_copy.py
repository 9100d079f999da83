#!/usr/bin/env python3
"""Conversion against a plain copy of the same bytes on the same drive, both from cold files.

    tests/bench/convert_copy.py SLUICE CHECKPOINT SCRATCH [--type T] [--rounds N]

Each round copies the checkpoint's safetensors files (reads of 1 MiB, buffered, synced at the end) and converts it, in turns, so
that both meet the same other load. Before each, the files are dropped from the page cache. The figure is bytes read and
written per second, and the ratio of the two.
"""

import argparse
import os
import pathlib
import subprocess
import time


def drop(folder):
    """Drops a folder's files from the page cache; what is not written yet is written first."""
    for path in pathlib.Path(folder).iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def copy(files, target):
    start = time.monotonic()
    total = 0
    with open(target, "wb", buffering=0) as out:
        for path in files:
            with open(path, "rb", buffering=0) as source:
                while piece := source.read(1 << 20):
                    out.write(piece)
                    total += len(piece)
        os.fsync(out.fileno())
    return total, time.monotonic() - start


def convert(sluice, checkpoint, target, types):
    command = [sluice, "convert", str(checkpoint), str(target), "--overwrite", "--json", *types]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sluice")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("scratch", type=pathlib.Path)
    parser.add_argument("--type", help="type of all weights; default: as they are")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    files = sorted(args.checkpoint.glob("*.safetensors"))
    target = args.scratch / "copied"
    types = ["--type", args.type, "--dense-type", args.type] if args.type else []
    ratios = []
    for round_ in range(args.rounds):
        drop(args.checkpoint)
        size, plain = copy(files, target)
        target.unlink()
        drop(args.checkpoint)
        took = convert(args.sluice, args.checkpoint, args.scratch / "converted.sluice", types)
        (args.scratch / "converted.sluice").unlink()
        ratios.append(plain / took)
        print(
            f"round {round_ + 1}: copied {size / 1e6 / plain:.0f} MB/s, converted {size / 1e6 / took:.0f} MB/s, "
            f"ratio {plain / took:.2f}",
            flush=True,
        )
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
