"""Requests: lines of JSON, in the form of OpenAI's batches or as bodies alone, read as `sluice batch` reads them.

A request is known by its `custom_id`. Everything that must not depend on where and when it is answered (its seed, the
ids in its result) is derived from that, in the way of `sluice batch`, so that both give the same answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

# The server takes bodies of 32 MiB.
MOST_BYTES = 32 << 20
# What a `custom_id` may have, in bytes of UTF-8.
MOST_ID_BYTES = 512
# What bodies alone ask for, by the field that they have.
PLAIN = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
# Tokens that a `prompt` alone generates unless it says how many.
USUAL_TOKENS = 256


class RequestError(ValueError):
    """A file that cannot be a file of requests. Nothing has been asked for when this is raised."""


@dataclass
class LineError(Exception):
    """A line that is no request. Its result is this error."""

    custom_id: str
    code: str
    message: str


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
    """Where a line is in its file."""

    custom_id: str
    digest: str
    number: int
    start: int
    length: int
    # Why it is no request, if it is none.
    error: LineError | None = None


def id_of(custom_id: str, what: str) -> str:
    """32 hexadecimal digits that follow from a request's name and from what they are for."""
    return xxhash.xxh3_128_hexdigest(_named(custom_id, what))


def seed_of(custom_id: str) -> int:
    """Where the random numbers of a request start that has no seed of its own: 64 bits, as a number with a sign."""
    number = xxhash.xxh3_128_intdigest(_named(custom_id, "seed")) & (2**64 - 1)
    return number - 2**64 if number >= 2**63 else number


def _named(custom_id: str, what: str) -> bytes:
    return what.encode() + b"\0" + custom_id.encode()


def parse(line: str | bytes, number: int) -> Request:
    """Reads line `number`, counted from 1. A request without `custom_id` is called `line-NUMBER`.

    Raises:
        LineError: it is no request.
    """
    name = f"line-{number}"
    if len(line) > MOST_BYTES:
        raise LineError(name, "invalid_line", f"line {number} has {len(line)} bytes, {MOST_BYTES} are the most")
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise LineError(name, "invalid_json", f"line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineError(name, "invalid_line", f"line {number} is no JSON object")
    custom_id = _custom_id(value.pop("custom_id", None), number)
    try:
        url, body = _request(value)
    except _Refusal as refusal:
        raise LineError(custom_id, refusal.code, f"line {number}: {refusal.message}") from None
    # Results are written when they are whole.
    body.pop("stream", None)
    body.pop("stream_options", None)
    if body.get("seed") is None:
        # The server would take any. With temperature 0 a seed changes nothing.
        body["seed"] = seed_of(custom_id)
    return Request(custom_id, url, body)


@dataclass
class _Refusal(Exception):
    code: str
    message: str


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _custom_id(value: Any, number: int) -> str:
    if value is None:
        return f"line-{number}"
    try:
        if isinstance(value, str) and 0 < len(value.encode()) <= MOST_ID_BYTES:
            return value
    except UnicodeEncodeError:
        # Half of a surrogate pair.
        pass
    message = f"line {number}: `custom_id` must be a text of 1 to {MOST_ID_BYTES} bytes, or be left out"
    raise LineError(f"line-{number}", "invalid_custom_id", message)


def _request(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a line."""
    method, url, body = value.pop("method", None), value.pop("url", None), value.pop("body", None)
    if method not in (None, "POST"):
        raise _Refusal("invalid_method", f'`method` is {json.dumps(method)}, it must be "POST"')
    if url is None and body is None:
        plain = next((url for field, url in PLAIN.items() if field in value), None)
        if plain is None:
            raise _Refusal("invalid_line", "it has neither `url` and `body`, nor a `prompt`, `messages` or `input`")
        if "prompt" in value:
            value.setdefault("max_tokens", USUAL_TOKENS)
        return plain, value
    if url not in PLAIN.values():
        raise _Refusal("invalid_url", f"`url` is {json.dumps(url)}, it must be one of {', '.join(PLAIN.values())}")
    if not isinstance(body, dict):
        raise _Refusal("invalid_body", "`body` must be a JSON object")
    if body.get("previous_response_id") is not None:
        message = (
            "`previous_response_id`: requests of a batch continue no response, give the whole conversation as `input`"
        )
        raise _Refusal("unsupported_parameter", message)
    return url, body


def read(path: Path, start: int, length: int, number: int) -> Request:
    """Reads the request that a `Place` points to.

    Raises:
        LineError: the file has changed since it was scanned, and there is no request any more.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        return parse(file.read(length), number)


def scan(path: Path) -> list[Place]:
    """Looks through a file of requests, which needs memory for their names only.

    Raises:
        RequestError: two requests have the same `custom_id`.
        OSError: the file cannot be read.
    """
    places: list[Place] = []
    numbers: dict[str, int] = {}
    for number, start, line in _lines(path):
        error = None
        try:
            request = parse(line, number)
            custom_id, digest = request.custom_id, request.digest
        except LineError as wrong:
            error, custom_id, digest = wrong, wrong.custom_id, hashlib.sha256(line).hexdigest()[:32]
        if (first := numbers.setdefault(custom_id, number)) != number:
            raise RequestError(
                f"{path}: lines {first} and {number} have the same custom_id {json.dumps(custom_id)}: results could "
                "not be told apart. Give each its own"
            )
        places.append(Place(custom_id, digest, number, start, len(line), error))
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
