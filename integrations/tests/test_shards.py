"""Parts for several machines, and the scripts that answer one. `sluice` and `scontrol` are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

INTEGRATIONS = Path(__file__).parent.parent
# Answers each request with its name, dies where it is told to, and goes on: with what OUT has.
SLUICE = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
_, command, model, requests, results, *options = sys.argv
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
out = pathlib.Path(results)
done = {{json.loads(line)["custom_id"] for line in out.read_text().splitlines()}} if out.exists() else set()
for line in open(requests):
    name = json.loads(line)["custom_id"]
    if name not in done:
        with out.open("a") as file:
            print(json.dumps({{"custom_id": name, "options": options}}), file=file)
        if name == os.environ.get("WAIT_AT"):
            pathlib.Path(results + ".waits").touch()
            time.sleep(60)
sys.exit(int(os.environ.get("EXIT", "0")))
"""


def shards(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the script."""
    command = [sys.executable, str(INTEGRATIONS / "shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Ten requests, some without a name, one that is not JSON, and one whose name is none."""
    lines = [json.dumps({"custom_id": f"r{number}", "prompt": "é"}) for number in range(6)]
    lines[2:2] = ['{"prompt": "unnamed"}', "", "nonsense", '{"custom_id": 5, "prompt": "x"}', '{"prompt": "also"}']
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


NAMES = ["r0", "r1", "line-3", "line-5", "line-6", "line-7", "r2", "r3", "r4", "r5"]


def answer(folder: Path) -> None:
    """What machines make of the parts: results in an order of their own."""
    for part in folder.glob("*.in.jsonl"):
        names = [json.loads(line)["custom_id"] for line in part.read_text().splitlines()]
        results = [json.dumps({"custom_id": name, "n": NAMES.index(name)}) + "\n" for name in reversed(names)]
        (folder / part.name.replace(".in.", ".out.")).write_text("".join(results))


@pytest.mark.parametrize("parts", [1, 3, 10, 13])
def test_parts_have_all_requests_and_make_one_file_again(requests: Path, tmp_path: Path, parts: int) -> None:
    """In their order, each once, whatever the number of parts; a second time gives the same bytes."""
    folder, out = tmp_path / "parts", tmp_path / "out.jsonl"
    assert shards("split", requests, folder, "--parts", parts).returncode == 0
    files = [folder / f"{part}.in.jsonl" for part in range(parts)]
    first = [file.read_bytes() for file in files]
    counts = [data.count(b"\n") for data in first]
    assert sum(counts) == 10
    assert max(counts) - min(counts) <= 1
    assert [json.loads(line)["custom_id"] for data in first for line in data.splitlines()] == NAMES
    assert shards("split", requests, folder, "--parts", parts).returncode == 0
    assert [file.read_bytes() for file in files] == first
    answer(folder)
    assert shards("merge", requests, folder, out).returncode == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"custom_id": name, "n": number} for number, name in enumerate(NAMES)
    ]


def test_what_is_missing_or_twice_is_said(requests: Path, tmp_path: Path) -> None:
    """And nothing is written then."""
    folder, out = tmp_path / "parts", tmp_path / "out.jsonl"
    shards("split", requests, folder, "--parts", 2)
    answer(folder)
    part = folder / "1.out.jsonl"
    whole = part.read_text()
    for text, message in [
        (whole[: whole.index("\n") + 1], "4 of 10 results are missing"),
        (whole[:-4], "is no result"),
        (whole + whole, "there is another result"),
        (whole + '{"custom_id": "r99"}\n', "results of another input"),
    ]:
        part.write_text(text)
        done = shards("merge", requests, folder, out)
        assert done.returncode == 1
        assert message in done.stderr
        assert not out.exists()
    requests.write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n')
    assert "lines 1 and 2 have the same custom_id" in shards("split", requests, tmp_path / "x", "--parts", 2).stderr
    assert shards("split", requests, tmp_path / "x", "--parts", 0).returncode == 2


def test_an_earlier_split_into_more_parts_is_noticed(requests: Path, tmp_path: Path) -> None:
    """Its parts would be answered, too."""
    shards("split", requests, tmp_path / "parts", "--parts", 3)
    assert "take another folder" in shards("split", requests, tmp_path / "parts", "--parts", 2).stderr


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """The stand-ins."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "sluice").write_text(SLUICE)
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return folder


def environment(tools: Path, folder: Path, **more: str) -> dict[str, str]:
    """What a task of an array, or an indexed pod, finds."""
    found = {"PATH": f"{tools}:{os.environ['PATH']}", "MODEL": "/models/r1.sluice", "PARTS": str(folder)}
    return found | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77", "JOB_COMPLETION_INDEX": "1", **more}


def kubernetes(folder: Path) -> list[str]:
    """The command of the pods, with the folders of this test."""
    text = (INTEGRATIONS / "kubernetes" / "batch.yaml").read_text()
    found = re.search(r"args:\n +- \|\n((?: {14}.*\n)+)", text)
    assert found is not None
    return ["/bin/sh", "-c", re.sub(r"(?m)^ {14}", "", found[1]).replace("/parts/", f"{folder}/")]


def slurm(_: Path) -> list[str]:
    """The command of the tasks."""
    return ["bash", str(INTEGRATIONS / "slurm" / "batch.sbatch"), "--budget", "48GiB"]


@pytest.mark.parametrize("scheduler", [slurm, kubernetes])
def test_a_part_is_answered_and_goes_on_after_a_kill(
    requests: Path, tools: Path, tmp_path: Path, scheduler: Callable[[Path], list[str]]
) -> None:
    """Told to end, it saves, and Slurm queues it again; then all is there. Failed requests are no failed part."""
    folder = tmp_path / "parts"
    shards("split", requests, folder, "--parts", 2)
    command = scheduler(folder)
    task = subprocess.Popen(command, env=environment(tools, folder, WAIT_AT="r3"))
    end = time.monotonic() + 30
    while not (folder / "1.out.jsonl.waits").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    assert task.wait(30) == (0 if scheduler is slurm else 130)
    if scheduler is slurm:
        assert (tools / "requeued").read_text() == "requeue 77_1\n"
    for code, want in [("3", 0), ("0", 0), ("1", 1), ("2", 2)]:
        assert subprocess.run(command, env=environment(tools, folder, EXIT=code)).returncode == want
    results = [json.loads(line) for line in (folder / "1.out.jsonl").read_text().splitlines()]
    assert [result["custom_id"] for result in results] == NAMES[5:]
    assert results[0]["options"] == ["--budget", "48GiB"]
