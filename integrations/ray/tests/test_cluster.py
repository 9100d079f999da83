"""The whole way, on a cluster of processes: the small chat model, 100 requests, machines and servers that are lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from ray.cluster_utils import Cluster

import http_processor
from cluster import MODEL, PROGRAM, cluster, machine
from sluice_ray import Placing, RunError, Serving, answer, run
from sluice_ray.requests import seed_of
from sluice_ray.server import Server

FAKE = str(Path(__file__).with_name("fake_sluice.py"))
MACHINES = 3
PROMPTS = ("The sea", "JULIET:", "Who comes", "O, speak", "Farewell")


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster of three machines, besides the driver's."""
    with cluster(MACHINES) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For requests and results, and a name of the model that no other process has."""
    made = tmp_path_factory.mktemp("batch")
    (made / "chat-model.sluice").symlink_to(MODEL)
    return made


@pytest.fixture(scope="module")
def requests(folder: Path) -> Path:
    """100 requests of all kinds; one is refused by the server, and one is not even JSON."""
    chance = random.Random(20)
    lines: list[Any] = []
    for number in range(98):
        settings: dict[str, Any] = {"max_tokens": chance.randint(8, 48)}
        settings |= chance.choice([{}, {"temperature": 0}, {"temperature": 0.9}, {"temperature": 1.1, "seed": number}])
        prompt = f"{chance.choice(PROMPTS)} {number % 10}"
        messages = [{"role": "user", "content": prompt}]
        kind = number % 4
        if kind == 0:
            lines.append({"custom_id": f"r{number}", "prompt": prompt, **settings})
        elif kind == 3:
            settings["max_output_tokens"] = settings.pop("max_tokens")
            body = {"input": prompt, **settings}
            lines.append({"custom_id": f"r{number}", "method": "POST", "url": "/v1/responses", "body": body})
        else:
            settings |= {"n": 2} if number % 8 == 1 else {}
            body = {"messages": messages, **settings}
            lines.append({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    lines.insert(40, {"custom_id": "refused", "url": "/v1/chat/completions", "body": {"messages": []}})
    text = "\n".join(json.dumps(line) for line in lines)
    path = folder / "requests.jsonl"
    path.write_text(f"{text}\nnonsense\n")
    return path


def serving(folder: Path) -> Serving:
    """The small chat model, as each machine serves it."""
    return Serving(str(folder / "chat-model.sluice"), PROGRAM, ("--budget", "96MiB", "--context", "2048"), at_once=8)


@pytest.fixture(scope="module")
def alone(machines: Any, folder: Path, requests: Path) -> bytes:
    """What a single machine makes of the requests."""
    out = folder / "alone.jsonl"
    summary = run(requests, out, serving(folder), Placing(workers=1))
    assert (summary.requests, summary.failures, summary.skipped) == (100, 2, 0)
    return out.read_bytes()


def servers(folder: Path) -> list[int]:
    """Processes that serve the model of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:1] == [PROGRAM.encode()] and str(folder / "chat-model.sluice").encode() in words:
            found.append(int(path.parent.name))
    return found


def once(out: Path, results: int, act: Callable[[], Any]) -> threading.Thread:
    """Does something once there are so many results."""

    def watch() -> None:
        parts = out.with_name(out.name + ".parts")
        while sum(part.read_bytes().count(b"\n") for part in parts.glob("part-*")) < results:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_single_machine_answers_as_the_program_does(folder: Path, requests: Path, alone: bytes) -> None:
    """Each request once, in their order, and some of them compared with `sluice run`."""
    asked = [json.loads(line) for line in requests.read_text().splitlines()[:-1]]
    lines = [json.loads(line) for line in alone.splitlines()]
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in asked] + ["line-100"]
    failures = {line["custom_id"]: line["error"]["code"] for line in lines if line["error"]}
    assert failures == {"refused": "invalid_request_error", "line-100": "invalid_json"}
    results = {line["custom_id"]: line["response"]["body"] for line in lines}
    for line in [line for line in asked if "prompt" in line and line.get("temperature", 0) > 0][:4]:
        seed = line.get("seed", seed_of(line["custom_id"])) % 2**64
        command = [PROGRAM, "run", MODEL, "--json", "--prompt", line["prompt"], "--seed", str(seed)]
        command += ["--temperature", str(line["temperature"]), "-n", str(line["max_tokens"])]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        assert results[line["custom_id"]]["choices"][0]["text"] == json.loads(done.stdout)["text"]


def test_the_same_call_again_does_nothing(folder: Path, requests: Path, alone: bytes) -> None:
    """And writes the same file."""
    summary = run(requests, folder / "alone.jsonl", serving(folder), Placing(workers=1))
    assert (summary.skipped, summary.passes) == (100, 0)
    assert (folder / "alone.jsonl").read_bytes() == alone


def test_two_machines_and_a_server_that_dies(folder: Path, requests: Path, alone: bytes) -> None:
    """One server is killed midway, and the results are those of a single machine."""
    out = folder / "two.jsonl"
    killed = once(out, 30, lambda: os.kill(servers(folder)[0], signal.SIGKILL))
    summary = run(requests, out, replace(serving(folder), at_once=4), Placing(workers=2))
    killed.join(1)
    assert not killed.is_alive(), "nothing was killed"
    assert (summary.failures, summary.skipped) == (2, 0)
    assert out.read_bytes() == alone


@pytest.mark.thorough
def test_one_two_and_four_workers_give_the_same_answers(
    machines: Any, folder: Path, requests: Path, alone: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the requests are divided, and whatever they share their reads with."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "wait_for_min_actors_s", 120)
    some = folder / "some.jsonl"
    some.write_text("\n".join(requests.read_text().splitlines()[:48]) + "\n")
    made, _ = machines
    fourth = made.add_node(**machine(resources={"sluice": 1}))
    try:
        for workers in (1, 2, 4):
            out = folder / f"workers-{workers}.jsonl"
            summary = run(some, out, replace(serving(folder), at_once=3), Placing(workers=workers))
            assert (summary.requests, summary.failures, summary.skipped) == (48, 1, 0)
            assert out.read_bytes().splitlines() == alone.splitlines()[:48], f"{workers} workers"
    finally:
        made.remove_node(fourth)


@pytest.mark.thorough
def test_a_run_that_is_interrupted_goes_on(machines: Any, folder: Path, requests: Path, alone: bytes) -> None:
    """By the same command, with half of the results, of which the last one is cut."""
    out, parts = folder / "again.jsonl", folder / "again.jsonl.parts"
    parts.mkdir()
    [part] = (folder / "alone.jsonl.parts").glob("part-*")
    whole = part.read_bytes().splitlines(keepends=True)
    (parts / part.name).write_bytes(b"".join(whole[:50]) + whole[50][:-7])
    settings = serving(folder)
    command = [sys.executable, "-m", "sluice_ray.command", str(requests), str(out), "--model", settings.model]
    command += ["--program", PROGRAM, "--at-once", "8", "--workers", "1", "--address", machines[0].address]
    done = subprocess.run([*command, "--", *settings.arguments], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "100 requests: 2 failed, 50 were there already" in done.stderr
    assert out.read_bytes() == alone


@pytest.mark.thorough
def test_a_data_set_is_answered(machines: Any, folder: Path, requests: Path, alone: bytes) -> None:
    """Without the command, as a part of somebody's pipeline."""
    lines = requests.read_text().splitlines()[:12]
    data = ray.data.from_items([{"request": line} for line in lines], override_num_blocks=3)
    rows = answer(data, serving(folder), workers=2).take_all()
    want = {json.loads(line)["custom_id"]: json.loads(line) for line in alone.splitlines()}
    assert len(rows) == 12
    assert all(json.loads(row["result"]) == want[row["custom_id"]] for row in rows)


@pytest.mark.thorough
def test_the_http_processor_asks_a_server_that_runs(machines: Any, folder: Path) -> None:
    """The example of the second way."""
    server = Server(serving(folder))
    server.start()
    try:
        prompts = ray.data.from_items([{"text": f"Speak of the sea, part {number}."} for number in range(6)])
        url = f"{server.address().url}/v1/chat/completions"
        rows = http_processor.answers(prompts, url, server.key, at_once=1, most=8).take_all()
    finally:
        server.close()
    assert len({row["prompt"] for row in rows}) == 6
    assert all(isinstance(row["answer"], str) for row in rows)


@pytest.mark.thorough
def test_machines_that_cannot_serve_end_the_run(machines: Any, folder: Path) -> None:
    """And the error says which, and why."""
    path = folder / "few.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(RunError, match="no such file"):
        run(path, folder / "few.out", Serving("nowhere", FAKE, ("--notes", str(folder))))


def test_three_machines_of_which_one_is_lost(
    machines: Any, folder: Path, requests: Path, alone: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is answered, each once, and the results are those of a single machine. No server is left."""
    # None begins before all are ready, so that each has requests when one is lost.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "wait_for_min_actors_s", 120)
    made, nodes = machines
    out = folder / "three.jsonl"
    done: list[int] = []

    def lose() -> None:
        done.append(sum(part.read_bytes().count(b"\n") for part in out.with_name(out.name + ".parts").glob("part-*")))
        made.remove_node(nodes[-1], allow_graceful=False)

    lost = once(out, 30, lose)
    summary = run(requests, out, replace(serving(folder), at_once=4))
    lost.join(60)
    assert not lost.is_alive(), "no machine was lost"
    assert done[0] < 80, "the machine was lost too late to matter"
    assert summary.passes > 1, "what the machine had was not done again"
    assert (summary.requests, summary.failures, summary.skipped) == (100, 2, 0)
    assert out.read_bytes() == alone
    end = time.monotonic() + 60
    while left := servers(folder):
        assert time.monotonic() < end, f"servers that nobody needs: {left}"
        time.sleep(0.05)


@pytest.mark.thorough
def test_the_answers_are_those_of_sluice_batch(folder: Path, requests: Path, alone: bytes) -> None:
    """Whoever moves from one machine to several gets the same texts, seeds and ids."""
    if subprocess.run([PROGRAM, "batch", "--help"], capture_output=True).returncode != 0:
        pytest.skip("this version of the program has no `sluice batch`")
    out = folder / "batch.jsonl"
    command = [PROGRAM, "batch", str(folder / "chat-model.sluice"), str(requests), str(out), "--context", "2048"]
    # The number that pays is found by measuring, for which the model is too small.
    command += ["--sequences", "8"]
    assert subprocess.run(command, capture_output=True).returncode == 3
    ours = {line["custom_id"]: line for line in map(json.loads, alone.splitlines())}
    theirs = {line["custom_id"]: line for line in map(json.loads, out.read_bytes().splitlines())}
    # Two parsers of JSON word their complaints differently.
    assert ours.pop("line-100")["error"]["code"] == theirs.pop("line-100")["error"]["code"]
    assert ours == theirs
