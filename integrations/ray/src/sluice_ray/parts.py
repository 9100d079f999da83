"""Results as they come: a folder of parts, to which one process appends, and which survives it.

A part is a file of lines, each with a result and whether it is final. A process begins a part of its own, so that the
last line of an older part, which may have been cut by a crash, stays alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .results import Result, as_json, is_failure

# A part that has as many bytes is closed, and another one begun.
PART_BYTES = 64 << 20
# What the folder has besides parts.
LOCK, IDENTITY = "lock", "model.json"


class PartsError(Exception):
    """A folder that cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class _Entry:
    """Where a result is."""

    part: Path
    start: int
    length: int
    digest: str
    final: bool


class Parts:
    """The results so far, each once."""

    def __init__(self, folder: Path) -> None:
        """Opens a folder, which is made if it is not there.

        Raises:
            PartsError: another process has it open, or a part is damaged.
            OSError: it cannot be made, read or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        self._file: IO[bytes] | None = None
        self._lock = (folder / LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise PartsError(f"{folder}: another run writes there: wait for it, or take another folder") from None
        parts = sorted(folder.glob("part-*.jsonl"))
        self._next = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 1
        for part in parts:
            self._load(part)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Gives the folder free."""
        self._end_part()
        self._lock.close()

    def _load(self, part: Path) -> None:
        start = 0
        with part.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    # Cut by a crash: it was never confirmed, so its request is asked again.
                    return
                try:
                    value = json.loads(line)
                    custom_id, digest, final = value["result"]["custom_id"], value["digest"], value["final"]
                except (ValueError, TypeError, KeyError):
                    message = f"{part}: line {number} is damaged: take the line out, and its request is asked again"
                    raise PartsError(message) from None
                self._note(custom_id, _Entry(part, start, len(line), digest, final))
                start += len(line)

    def _note(self, custom_id: str, entry: _Entry) -> None:
        known = self._entries.get(custom_id)
        if known is None or not known.final:
            self._entries[custom_id] = entry

    def identify(self, model: dict[str, Any]) -> None:
        """Says with which model the results are made. The first time decides, for this run and for later ones.

        Raises:
            PartsError: it is another model.
            OSError: this cannot be written.
        """
        path = self._folder / IDENTITY
        if not path.exists():
            _replace(path, [as_json(model) + "\n"])
        known = json.loads(path.read_text())
        if known != model:
            raise PartsError(
                f"{self._folder}: its results are made with {as_json(known)}, and this is {as_json(model)}: put the "
                "same model file on all machines and use the same options, or take another folder"
            )

    def state(self, custom_id: str, digest: str) -> bool | None:
        """Whether the result that is there is final; `None` if there is none.

        Raises:
            PartsError: the result is that of another request with this `custom_id`.
        """
        entry = self._entries.get(custom_id)
        if entry is None:
            return None
        if entry.digest != digest:
            raise PartsError(
                f"{self._folder}: it has a result of `custom_id` {json.dumps(custom_id)} for another request: "
                "give the request another `custom_id`, or take another folder"
            )
        return entry.final

    def add(self, result: Result) -> None:
        """Writes a result, which is on the drive when this returns. A second final one for a request is left out.

        Raises:
            OSError: it cannot be written; the folder is as it was, and it can be tried again.
        """
        known = self._entries.get(result.custom_id)
        if known is not None and known.final:
            return
        value = {"digest": result.digest, "final": result.final, "result": result.line}
        line = (as_json(value) + "\n").encode(errors="surrogatepass")
        file = self._part()
        start = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            # The line, or part of it, may be there. If it cannot be taken out, at least nothing follows it.
            with suppress(OSError):
                file.truncate(start)
            self._end_part()
            raise
        part = self._folder / Path(file.name).name
        self._note(result.custom_id, _Entry(part, start, len(line), result.digest, result.final))
        if start + len(line) >= PART_BYTES:
            self._end_part()

    def _part(self) -> IO[bytes]:
        if self._file is None:
            path = self._folder / f"part-{self._next:06}.jsonl"
            # Unbuffered, so that what a failed write has left does not come later.
            self._file = path.open("xb", buffering=0)
            self._next += 1
            _sync_folder(self._folder)
        return self._file

    def _end_part(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def lines(self, custom_ids: Iterable[str]) -> Iterator[str]:
        """The results of these requests, in this order, as lines of JSON.

        Raises:
            KeyError: one has no result.
            OSError: a part cannot be read.
        """
        opened: dict[Path, IO[bytes]] = {}
        try:
            for custom_id in custom_ids:
                entry = self._entries[custom_id]
                if entry.part not in opened:
                    opened[entry.part] = entry.part.open("rb")
                file = opened[entry.part]
                file.seek(entry.start)
                yield as_json(json.loads(file.read(entry.length))["result"])
        finally:
            for file in opened.values():
                file.close()

    def write(self, path: Path, custom_ids: Iterable[str]) -> int:
        """Writes the results of these requests to a file, as a whole or not at all: Parquet if called so, else JSONL.

        Returns:
            How many of them are errors.

        Raises:
            OSError: the file cannot be written.
        """
        failures = 0

        def counted() -> Iterator[str]:
            nonlocal failures
            for line in self.lines(custom_ids):
                failures += is_failure(json.loads(line))
                yield line

        if path.suffix == ".parquet":
            _write_parquet(path, counted())
        else:
            _replace(path, (line + "\n" for line in counted()))
        return failures


def _write_parquet(path: Path, lines: Iterator[str]) -> None:
    """One row a result. Bodies have many forms, so they are columns of JSON."""
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.int32()
    schema = pa.schema([("custom_id", text), ("status_code", number), ("body", text), ("error", text)])

    def row(line: str) -> dict[str, Any]:
        value = json.loads(line)
        response, error = value["response"], value["error"]
        return {
            "custom_id": value["custom_id"],
            "status_code": response["status_code"],
            "body": as_json(response["body"]),
            "error": error and as_json(error),
        }

    temporary = _temporary(path)
    with parquet.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, Any]] = []
        for line in lines:
            rows.append(row(line))
            if len(rows) == 1024:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _replace(path: Path, lines: Iterable[str]) -> None:
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        for line in lines:
            file.write(line.encode(errors="surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
