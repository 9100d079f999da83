"""Results are kept: each once, whatever ends the process that keeps them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from sluice_ray.parts import Parts, PartsError
from sluice_ray.requests import LineError, parse
from sluice_ray.results import Result, answered, as_json, failed, refused


def request(name: str) -> Any:
    """A request with this name."""
    return parse(json.dumps({"custom_id": name, "prompt": name}), 1)


def result(name: str, text: str = "so") -> Result:
    """An answer to it."""
    return answered(request(name), 200, {"id": "cmpl-1", "created": 5, "choices": [{"text": text}]})


def test_results_are_there_after_each_end(tmp_path: Path) -> None:
    """A cut line is not a result, and what comes later does not follow it."""
    parts = Parts(tmp_path)
    for name in "abc":
        parts.add(result(name))
    parts.close()
    [part] = tmp_path.glob("part-*")
    whole = part.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in (0, second - 1, second, second + 20, len(whole) - 1):
        part.write_bytes(whole[:cut])
        again = Parts(tmp_path)
        kept = whole[:cut].count(b"\n")
        assert [again.state(name, request(name).digest) for name in "abc"] == [True] * kept + [None] * (3 - kept)
        for name in "abc":
            again.add(result(name))
        assert list(again.lines("cab")) == [as_json(result(name).line) for name in "cab"]
        again.close()
        for later in tmp_path.glob("part-*"):
            if later != part:
                later.unlink()


def test_a_result_is_written_once(tmp_path: Path) -> None:
    """The first final one stays; one that is not final gives way."""
    parts = Parts(tmp_path)
    parts.add(failed(request("a"), "the server died"))
    assert parts.state("a", request("a").digest) is False
    parts.add(result("a", "first"))
    parts.add(result("a", "second"))
    parts.add(failed(request("a"), "late news"))
    assert parts.state("a", request("a").digest) is True
    [line] = parts.lines(["a"])
    assert json.loads(line)["response"]["body"]["choices"][0]["text"] == "first"
    parts.close()
    assert list(Parts(tmp_path).lines(["a"])) == [line]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    """Another process, another request, another model, a damaged line."""
    parts = Parts(tmp_path)
    with pytest.raises(PartsError, match="another run writes there"):
        Parts(tmp_path)
    parts.add(result("a"))
    with pytest.raises(PartsError, match="for another request"):
        parts.state("a", "0" * 32)
    parts.identify({"name": "r1", "digest": "1"})
    parts.identify({"name": "r1", "digest": "1"})
    with pytest.raises(PartsError, match="put the same model"):
        parts.identify({"name": "r1", "digest": "2"})
    parts.close()
    [part] = tmp_path.glob("part-*")
    part.write_bytes(b"x" + part.read_bytes())
    with pytest.raises(PartsError, match="line 1 is damaged"):
        Parts(tmp_path)


def test_a_full_drive_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be made durable is no result, now or later, and the next one is whole."""
    parts = Parts(tmp_path)
    parts.add(result("a"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            parts.add(result("b"))
    assert parts.state("b", request("b").digest) is None
    parts.add(result("b", "again"))
    parts.add(result("c"))
    parts.close()
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in Parts(tmp_path).lines("abc")]
    assert texts == ["so", "again", "so"]


def test_files_have_the_results_in_the_order_of_the_requests(tmp_path: Path) -> None:
    """As JSONL and as Parquet, with errors as rows of their own."""
    parts = Parts(tmp_path / "parts")
    wrong = LineError("line-2", "invalid_json", "line 2 is not JSON")
    for one in (result("c"), refused(wrong, "0"), failed(request("b"), "the server died"), result("a", "\ud800é")):
        parts.add(one)
    order = ["a", "line-2", "b", "c"]
    assert parts.write(tmp_path / "out.jsonl", order) == 2
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == order
    assert [line["response"]["status_code"] for line in lines] == [200, 400, 500, 200]
    assert [line["error"] and line["error"]["code"] for line in lines] == [None, "invalid_json", "server_error", None]
    assert parts.write(tmp_path / "out.parquet", ["line-2", "c"]) == 1
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["custom_id"] for row in table] == ["line-2", "c"]
    assert [row["status_code"] for row in table] == [400, 200]
    assert json.loads(table[1]["body"])["choices"][0]["text"] == "so"
    assert table[1]["error"] is None
    assert not list(tmp_path.glob(".*.tmp"))


def test_answers_are_the_same_whenever_they_are_made() -> None:
    """Ids, times, and what happened to be in memory."""

    def made(tag: str, time: int, cached: int) -> Any:
        calls = [{"id": f"call_{tag}1"}, {"id": f"call_{tag}2"}]
        body = {
            "id": f"resp_{tag}",
            "created_at": time,
            "completed_at": time,
            "store": True,
            "metadata": {"id": "mine"},
            "choices": [{"message": {"tool_calls": calls}}],
            "output": [{"id": f"rs_{tag}"}, {"id": f"fc_{tag}", "call_id": f"call_{tag}"}],
            "usage": {"input_tokens_details": {"cached_tokens": cached}},
        }
        return answered(request("a"), 200, body).line["response"]["body"]

    one = made("x", 100, 0)
    assert one == made("y", 200, 64)
    ids = [one["id"], *(item["id"] for item in one["output"]), one["output"][1]["call_id"]]
    ids += [call["id"] for call in one["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids)
    assert [name.split("_")[0] for name in ids] == ["resp", "rs", "fc", "call", "call", "call"]
    assert one["metadata"] == {"id": "mine"}
