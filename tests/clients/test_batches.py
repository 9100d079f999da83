"""The client of OpenAI for Python: files and batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from support import KEY, Server, serve, until

PROMPTS = ["Speak of the sea.", "Speak of ships.", "Speak of the wind."]
FINAL = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def server_with_batches(folder: Path) -> Iterator[Server]:
    """A server that keeps files and batches."""
    with serve(folder, "--batches", str(folder / "batches")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server_with_batches: Server) -> Iterator[openai.OpenAI]:
    """The client."""
    with openai.OpenAI(base_url=server_with_batches.v1, api_key=KEY, max_retries=0) as client:
        yield client


def chat(number: int, model: str, **more: Any) -> dict[str, Any]:
    """A request of a batch."""
    message = {"role": "user", "content": PROMPTS[number % len(PROMPTS)]}
    body = {"model": model, "messages": [message], "max_completion_tokens": 24, "seed": 7} | more
    return {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def upload(client: openai.OpenAI, requests: list[dict[str, Any]]) -> Any:
    """A file of requests."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    return client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")


def finish(client: openai.OpenAI, batch: Any) -> Any:
    """The batch, once it has ended."""
    until(lambda: client.batches.retrieve(batch.id).status in FINAL, "the batch ends")
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, file: str | None) -> dict[str, Any]:
    """Results by name."""
    if file is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file).text.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_a_batch_gives_what_single_requests_give(client: openai.OpenAI, server_with_batches: Server) -> None:
    """Results are those of the same requests by themselves; what fails is in a file of its own."""
    model = server_with_batches.model
    requests = [chat(number, model) for number in range(6)] + [chat(6, model, temperature=9)]
    file = upload(client, requests)
    assert file.status == "processed" and file.filename == "in.jsonl"
    assert file.id in [listed.id for listed in client.files.list(purpose="batch")]
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"who": "me"}
    )
    batch = finish(client, batch)
    assert batch.status == "completed" and batch.metadata == {"who": "me"}
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (7, 6, 1)
    answered = results(client, batch.output_file_id)
    assert set(answered) == {f"q{number}" for number in range(6)}
    for number in range(3):
        alone = client.chat.completions.create(**requests[number]["body"])
        body = answered[f"q{number}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == alone.choices[0].message.content
    failed = results(client, batch.error_file_id)["q6"]
    assert failed["response"]["status_code"] == 400 and failed["error"]["message"]
    assert batch.id in [listed.id for listed in client.batches.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_what_cannot_be_a_batch_is_refused(client: openai.OpenAI, server_with_batches: Server) -> None:
    """By the request that asks for it, or by the batch, which says why."""
    model = server_with_batches.model
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("in.jsonl", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-none", endpoint="/v1/completions", completion_window="24h")
    file = upload(client, [chat(0, model), chat(0, model)])
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = finish(client, batch)
    assert batch.status == "failed"
    assert batch.errors is not None and batch.errors.data is not None
    assert batch.errors.data[0].code == "duplicate_custom_id" and batch.errors.data[0].line == 2


def test_cancelled_and_restarted(folder: Path) -> None:
    """A batch survives the server, and can be cancelled."""
    place = folder / "survives"
    with serve(folder, "--batches", str(place)) as server:
        client = openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)
        many = [chat(number, server.model, max_completion_tokens=400, temperature=1.0) for number in range(40)]
        file = upload(client, many)
        ask: Any = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        first, second = client.batches.create(**ask), client.batches.create(**ask)
        until(lambda: client.batches.retrieve(first.id).status == "in_progress", "the batch begins")
        server.process.kill()
        server.process.wait()
    with serve(folder, "--batches", str(place)) as server:
        client = openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)
        assert client.batches.cancel(second.id).status in ("cancelling", "cancelled")
        done = finish(client, first)
        assert done.status == "completed"
        assert len(results(client, done.output_file_id)) == 40
        assert finish(client, second).status == "cancelled"
