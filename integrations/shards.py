#!/usr/bin/env python3
"""A file of requests as parts for several machines, and their results as one file again.

    shards.py split IN.jsonl FOLDER --parts N     FOLDER/0.in.jsonl, FOLDER/1.in.jsonl, ...
    shards.py merge IN.jsonl FOLDER OUT.jsonl     from FOLDER/0.out.jsonl, ..., in the order of IN

A part is a piece of the input, so that requests which begin alike stay together and share what is read of them.
Requests without a `custom_id` get the one that they have in the whole file. Both commands can be made again: the
parts are the same bytes each time.

Exit codes: 0 done, 1 something is missing or wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Wrong(Exception):
    """What is wrong, and what can be done."""


def requests(path: Path) -> Iterator[tuple[str, bytes]]:
    """The name of each request, and its line without its end."""
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if not line:
                continue
            name, line = named(line, number)
            if (first := lines.setdefault(name, number)) != number:
                raise Wrong(f"{path}: lines {first} and {number} have the same custom_id {json.dumps(name)}")
            yield name, line


def named(line: bytes, number: int) -> tuple[str, bytes]:
    """The name that the result of line `number` will have, and a line that has it. No request is refused here."""
    name = f"line-{number}"
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return refusal(name)
    if not isinstance(value, dict):
        return refusal(name)
    given = value.get("custom_id")
    if given is None:
        return name, json.dumps({**value, "custom_id": name}).encode()
    if not isinstance(given, str) or not 0 < len(given.encode(errors="replace")) <= 512:
        return refusal(name)
    return given, line


def refusal(name: str) -> tuple[str, bytes]:
    """A line that is refused under this name, for one that would be called by its number in the part."""
    return name, json.dumps({"custom_id": name}).encode()


def split(path: Path, folder: Path, parts: int) -> None:
    """Writes the parts, of nearly the same number of requests each."""
    names = [name for name, _ in requests(path)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = requests(path)
    for part in range(parts):
        count = len(names) * (part + 1) // parts - len(names) * part // parts
        write(folder / f"{part}.in.jsonl", (next(lines)[1] for _ in range(count)))
    # Parts of an earlier split into more would be taken for some of this one.
    for later in folder.glob("*.in.jsonl"):
        if int(later.name.split(".")[0]) >= parts:
            raise Wrong(f"{later}: it is from a split into more parts: take another folder")


def merge(path: Path, folder: Path, out: Path) -> None:
    """Writes the results in the order of the requests, each once."""
    # Where each result is: file, offset, length.
    places: dict[str, tuple[Path, int, int]] = {}
    for part in sorted(folder.glob("*.out.jsonl"), key=lambda part: int(part.name.split(".")[0])):
        start = 0
        with part.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    name = json.loads(line)["custom_id"]
                except (ValueError, TypeError, KeyError):
                    raise Wrong(f"{part}: line {number} is no result: its machine has not ended well") from None
                if name in places:
                    raise Wrong(f"{part}: line {number}: there is another result of {json.dumps(name)}")
                places[name] = (part, start, len(line))
                start += len(line)
    names = [name for name, _ in requests(path)]
    missing = [name for name in names if name not in places]
    if missing:
        raise Wrong(
            f"{folder}: {len(missing)} of {len(names)} results are missing, the first is {json.dumps(missing[0])}"
        )
    if len(names) != len(places):
        raise Wrong(f"{folder}: {len(places)} results for {len(names)} requests: it has results of another input")

    def lines() -> Iterator[bytes]:
        for name in names:
            part, start, length = places[name]
            with part.open("rb") as file:
                file.seek(start)
                yield file.read(length).rstrip(b"\n")

    write(out, lines())


def write(path: Path, lines: Iterator[bytes]) -> None:
    """Writes a file as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for line in lines:
            file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> int:
    """Parses, runs, tells."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="a file of requests becomes parts")
    merging = commands.add_parser("merge", help="results of parts become a file")
    for command in (splitting, merging):
        command.add_argument("requests", type=Path, metavar="IN")
        command.add_argument("folder", type=Path, metavar="FOLDER")
    splitting.add_argument("--parts", type=int, required=True, metavar="N")
    merging.add_argument("results", type=Path, metavar="OUT")
    options = parser.parse_args()
    try:
        if options.command == "merge":
            merge(options.requests, options.folder, options.results)
        elif options.parts < 1:
            parser.error("--parts: the least is 1")
        else:
            split(options.requests, options.folder, options.parts)
    except (Wrong, OSError) as error:
        print(f"shards: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
