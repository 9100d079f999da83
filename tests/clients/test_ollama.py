"""The client of Ollama for Python."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest

from support import KEY, Server, run

PROMPT = "Speak of the sea."
ASK = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    """The client."""
    return ollama.Client(host=server.url, headers={"Authorization": f"Bearer {KEY}"})


def test_models(client: ollama.Client, server: Server) -> None:
    """Lists, and describes."""
    [model] = client.list().models
    assert model.model is not None
    assert model.model.removesuffix(":latest") == server.model
    shown = client.show(model.model)
    assert shown.template or shown.modelinfo


def test_chat(client: ollama.Client, server: Server) -> None:
    """The same text, streamed or not."""
    want = run(PROMPT, "-n", "40", "--seed", "7")
    options = {"seed": 7, "num_predict": 40}
    answer = client.chat(server.model, ASK, options=options)
    assert answer.message.content == want["text"]
    assert answer.done
    assert answer.done_reason == {"length": "length", "end_token": "stop"}[want["finish"]]
    assert (answer.prompt_eval_count, answer.eval_count) == (want["prompt_tokens"], len(want["ids"]))
    events = list(client.chat(server.model, ASK, options=options, stream=True))
    assert "".join(event.message.content or "" for event in events) == want["text"]
    assert [event.done for event in events] == [False] * (len(events) - 1) + [True]


def test_generate(client: ollama.Client, server: Server) -> None:
    """A prompt in the template, and one as it is."""
    options = {"seed": 7, "num_predict": 40}
    assert (
        client.generate(server.model, PROMPT, options=options).response
        == run(PROMPT, "-n", "40", "--seed", "7")["text"]
    )
    raw = client.generate(server.model, PROMPT, options=options, raw=True)
    assert raw.response == run(PROMPT, "-n", "40", "--seed", "7", chat=False)["text"]


def test_format(client: ollama.Client, server: Server) -> None:
    """JSON of a schema."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"calm": {"type": "boolean"}},
        "required": ["calm"],
        "additionalProperties": False,
    }
    answer = client.chat(server.model, ASK, format=schema, options={"num_predict": 200, "temperature": 1.0})
    assert answer.message.content is not None
    assert json.loads(answer.message.content) in ({"calm": True}, {"calm": False})


def test_tools(scripted: Server) -> None:
    """Calls and thinking of a known answer."""
    client = ollama.Client(host=scripted.url, headers={"Authorization": f"Bearer {KEY}"})
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in ("look", "wait")
    ]
    messages: list[Any] = [{"role": "user", "content": "Two calls, please."}]
    answer = client.chat(scripted.model, messages, tools=tools, think=True)
    assert answer.message.thinking is not None
    assert answer.message.thinking.strip() == "The sea first, then patience."
    assert answer.message.tool_calls is not None
    assert [call.function.name for call in answer.message.tool_calls] == ["look", "wait"]
    assert answer.message.tool_calls[0].function.arguments["note"] == 'ä </think> "x"'
    messages += [answer.message]
    messages += [{"role": "tool", "tool_name": name, "content": f"ship {i}"} for i, name in enumerate(("look", "wait"))]
    assert client.chat(scripted.model, messages, tools=tools).message.content == "Both are done: <b>äöü</b> & 🌊."


def test_errors(client: ollama.Client) -> None:
    """Impossible values are refused."""
    with pytest.raises(ollama.ResponseError) as error:
        client.chat("no-such-model:1b", [{"role": "sailor", "content": "x"}])
    assert error.value.status_code == 400
