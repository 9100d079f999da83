"""Requests: lines of JSON, in the form of OpenAI's batches or as plain prompts.

A request is known by its `custom_id`. Everything that must not depend on where and when it is answered (its seed, the ids in
its result) is derived from that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The server takes bodies of 32 MiB.
MOST_BYTES = 32 << 20
# What a `custom_id` may have, in bytes of UTF-8.
MOST_ID_BYTES = 512
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# Requests that are named in one message.
MOST_NAMED = 10


class RequestError(ValueError):
    """Lines that cannot be requests. Nothing has been asked for yet when this is raised."""


@dataclass(frozen=True)
class Request:
    """A request that can be sent."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def digest(self) -> str:
        """What tells it from another request that has the same `custom_id`."""
        text = json.dumps([self.url, self.body], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def line(self) -> str:
        """The request as a line of JSON, without its end."""
        return json.dumps({"custom_id": self.custom_id, "method": "POST", "url": self.url, "body": self.body})


@dataclass(frozen=True)
class Place:
    """Where a request is in its file."""

    custom_id: str
    digest: str
    number: int
    start: int
    length: int


def derived(custom_id: str, *what: object) -> str:
    """32 hexadecimal digits that depend on a `custom_id` and on what they are for, and on nothing else."""
    text = "\0".join(["sluice-ray", custom_id, *map(str, what)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def seed_of(custom_id: str) -> int:
    """Where the random numbers of a request start that has no seed of its own: 63 bits, since JSON's readers have signs."""
    return int(derived(custom_id, "seed")[:16], 16) >> 1


def parse(line: str | bytes, number: int | None = None) -> Request:
    """Reads a line. One without `custom_id` is called by its number, if that is given.

    Raises:
        RequestError: says what is wrong, without the number.
    """
    if len(line) > MOST_BYTES:
        raise RequestError(f"it has {len(line)} bytes; the most is {MOST_BYTES}")
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("it is JSON, but not an object")
    custom_id = _custom_id(value, number)
    url, body = _plain(value) if "prompt" in value and "body" not in value else _batched(value)
    if body.get("stream"):
        raise RequestError("its `stream` is true: results are written when they are whole, so leave `stream` out")
    body.pop("stream", None)
    body.pop("stream_options", None)
    if body.get("seed") is None:
        # The server would take any. With temperature 0, or where an API has no temperature, a seed changes nothing.
        body["seed"] = seed_of(custom_id)
    return Request(custom_id, url, body)


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _custom_id(value: dict[str, Any], number: int | None) -> str:
    custom_id = value.get("custom_id")
    if custom_id is None and number is not None:
        return f"line-{number}"
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("it needs a `custom_id`, a text that is not empty")
    try:
        length = len(custom_id.encode())
    except UnicodeEncodeError:
        raise RequestError("its `custom_id` has half of a surrogate pair") from None
    if length > MOST_ID_BYTES:
        raise RequestError(f"its `custom_id` has {length} bytes; the most is {MOST_ID_BYTES}")
    return custom_id


def _plain(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {name: field for name, field in value.items() if name != "custom_id"}


def _batched(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    url, method, body = value.get("url"), value.get("method", "POST"), value.get("body")
    if url not in ENDPOINTS:
        raise RequestError(f"its `url` is {json.dumps(url)}; it must be one of {', '.join(ENDPOINTS)}")
    if method != "POST":
        raise RequestError(f'its `method` is {json.dumps(method)}; it must be "POST"')
    if not isinstance(body, dict):
        raise RequestError("it needs a `body`, an object, or a `prompt`")
    return url, dict(body)


def read(path: Path, start: int, length: int, number: int) -> Request:
    """Reads the request that a `Place` points to.

    Raises:
        RequestError: if the file has changed since it was scanned, so that there is no request any more.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        return parse(file.read(length), number)


def scan(path: Path) -> list[Place]:
    """Looks through a file of requests, which needs memory for their names only.

    Raises:
        RequestError: names the lines that are no requests, and those that have the same `custom_id`.
        OSError: if the file cannot be read.
    """
    places: list[Place] = []
    lines: dict[str, int] = {}
    wrong: list[str] = []
    for number, start, line in _lines(path):
        try:
            request = parse(line, number)
        except RequestError as error:
            wrong.append(f"line {number}: {error}")
            continue
        custom_id = request.custom_id
        if (first := lines.setdefault(custom_id, number)) != number:
            wrong.append(f"lines {first} and {number} have the same `custom_id` {json.dumps(custom_id)}")
            continue
        places.append(Place(custom_id, request.digest, number, start, len(line)))
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMED} more"] if len(wrong) > MOST_NAMED else []
        raise RequestError("\n".join(f"{path}: {what}" for what in wrong[:MOST_NAMED] + more))
    return places


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Lines that are not empty: number from 1, offset, bytes without a byte order mark and white space around."""
    offset = 0
    with path.open("rb") as file:
        number = 0
        # A line that is too long is not read as a whole; what follows it in pieces is the same line.
        while line := file.readline(MOST_BYTES + 2):
            number += 1
            begun = offset
            offset += len(line)
            while not line.endswith(b"\n") and (piece := file.readline(MOST_BYTES)):
                offset += len(piece)
                if piece.endswith(b"\n"):
                    break
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line, begun = line[3:], begun + 3
            kept = line.lstrip()
            begun += len(line) - len(kept)
            kept = kept.rstrip()
            if kept:
                yield number, begun, kept
