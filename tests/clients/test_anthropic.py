"""The client of Anthropic for Python: messages and the counting of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from support import KEY, PATIENCE, Server, long_text, run, until, without_thinking

PROMPT = "Speak of the sea."
# In this API, models think only if they are told to.
ASKED = without_thinking(PROMPT)
GREEDY = {"temperature": 0.0}
ASK: Any = [{"role": "user", "content": PROMPT}]
LOOK: dict[str, Any] = {
    "name": "look",
    "description": "Looks at the sea",
    "input_schema": {
        "type": "object",
        "properties": {"calm": {"type": "boolean"}, "colour": {"type": "string", "enum": ["grey", "green"]}},
        "required": ["calm", "colour"],
        "additionalProperties": False,
    },
    "strict": True,
}
WAIT: dict[str, Any] = {"name": "wait", "input_schema": {"type": "object", "properties": {}}}


def make(server: Server) -> anthropic.Anthropic:
    """A client of a server."""
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    """The client."""
    with make(server) as client:
        yield client


def ask(client: anthropic.Anthropic, server: Server, **options: Any) -> Any:
    """A message. There is no seed in this API, so the likeliest tokens are asked for."""
    temperature = options.pop("temperature", 0.0)
    settings = {"model": server.model, "messages": ASK, "max_tokens": 40}
    create: Any = client.messages.create
    # The client's newest models take no temperature, so that it has no argument for it.
    return create(**settings | options, extra_body={"temperature": temperature})


def events(client: anthropic.Anthropic, server: Server, **options: Any) -> list[Any]:
    """The events of a message, whose order is checked."""
    found = [event for event in ask(client, server, stream=True, **options) if event.type != "ping"]
    assert found[0].type == "message_start"
    assert found[0].message.content == []
    assert [event.type for event in found[-2:]] == ["message_delta", "message_stop"]
    block = -1
    is_open = False
    for event in found[1:-2]:
        match event.type:
            case "content_block_start":
                assert not is_open
                block, is_open = block + 1, True
            case "content_block_stop":
                assert is_open
                is_open = False
            case other:
                assert other == "content_block_delta"
                assert is_open
        assert event.index == block
    assert not is_open
    return found


def test_text_is_that_of_run(client: anthropic.Anthropic, server: Server) -> None:
    """The same text, streamed or not, and the right numbers of tokens."""
    want = run(ASKED, "-n", "40", "--temperature", "0", chat=False)
    answer = ask(client, server)
    assert "".join(block.text for block in answer.content) == want["text"]
    assert answer.role == "assistant"
    assert answer.stop_reason == {"length": "max_tokens", "end_token": "end_turn"}[want["finish"]]
    usage = answer.usage
    cached = usage.cache_read_input_tokens or 0
    assert usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0) == want["prompt_tokens"]
    assert usage.output_tokens == len(want["ids"])
    found = events(client, server)
    assert "".join(e.delta.text for e in found if e.type == "content_block_delta") == want["text"]
    assert found[-2].usage.output_tokens == len(want["ids"])
    assert found[-2].delta.stop_reason == answer.stop_reason
    with client.messages.stream(model=server.model, messages=ASK, max_tokens=40, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == want["text"]
        assert stream.get_final_message().stop_reason == answer.stop_reason


def test_system_and_parts(client: anthropic.Anthropic, server: Server) -> None:
    """System prompts as text and as blocks, with marks of what to cache."""
    want = run(without_thinking(PROMPT, "You are a sailor."), "-n", "30", "--temperature", "0", chat=False)
    blocks = [{"type": "text", "text": "You are a sailor.", "cache_control": {"type": "ephemeral"}}]
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT, "cache_control": {"type": "ephemeral"}}]}]
    for options in ({"system": "You are a sailor."}, {"system": blocks}, {"system": blocks, "messages": parts}):
        answer = ask(client, server, max_tokens=30, **options)
        assert "".join(block.text for block in answer.content) == want["text"]


def test_count_tokens(client: anthropic.Anthropic, server: Server) -> None:
    """As many tokens as the message has."""
    count = client.messages.count_tokens(model=server.model, messages=ASK)
    assert count.input_tokens == run(ASKED, "-n", "1", chat=False)["prompt_tokens"]
    more = client.messages.count_tokens(model=server.model, messages=ASK, tools=[LOOK, WAIT])  # type: ignore[list-item]
    assert more.input_tokens > count.input_tokens


def test_stop_sequences(client: anthropic.Anthropic, server: Server) -> None:
    """Which one it was is said."""
    text = run(ASKED, "-n", "40", "--temperature", "0", chat=False)["text"]
    stop = text[12:16]
    answer = ask(client, server, stop_sequences=["never said", stop])
    assert "".join(block.text for block in answer.content) == text[: text.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "look"}, {"type": "any", "disable_parallel_tool_use": True}]
)
def test_forced_tools(client: anthropic.Anthropic, server: Server, choice: Any) -> None:
    """A tool that must be called is called, with arguments of its schema."""
    options = {"tools": [LOOK], "tool_choice": choice, "max_tokens": 400}
    answer = ask(client, server, **options)
    assert answer.stop_reason == "tool_use"
    [call] = [block for block in answer.content if block.type == "tool_use"]
    assert call.name == "look"
    assert set(call.input) == {"calm", "colour"}
    assert call.input["colour"] in ("grey", "green")
    found = events(client, server, **options)
    deltas = [e.delta for e in found if e.type == "content_block_delta"]
    assert json.loads("".join(d.partial_json for d in deltas if d.type == "input_json_delta")) == call.input


def test_scripted_tools_and_thinking(scripted: Server) -> None:
    """Thinking, text, two calls and their results."""
    client = make(scripted)
    tools = [LOOK, WAIT]
    messages: Any = [{"role": "user", "content": "Two calls, please."}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    options = {"tools": tools, "messages": messages, "max_tokens": 2000, "thinking": thinking, "temperature": 1.0}
    answer = ask(client, scripted, **options)
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, text, look, wait = answer.content
    assert thought.thinking.strip() == "The sea first, then patience."
    assert text.text.strip() == "I look."
    assert (look.name, wait.name) == ("look", "wait")
    assert look.input == {"calm": True, "colour": "grey", "ships": 10.0, "note": 'ä </think> "x"'}
    assert wait.input == {}
    assert answer.stop_reason == "tool_use"
    found = events(client, scripted, **options)
    starts = [event.content_block.type for event in found if event.type == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    parts = [e.delta.thinking for e in found if e.type == "content_block_delta" and e.delta.type == "thinking_delta"]
    assert "".join(parts) == thought.thinking
    results = [{"type": "tool_result", "tool_use_id": c.id, "content": f"ship {i}"} for i, c in enumerate((look, wait))]
    content = [block.model_dump(exclude_none=True) for block in answer.content]
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
    done = ask(client, scripted, **options)
    assert [block.text for block in done.content if block.type == "text"] == ["Both are done: <b>äöü</b> & 🌊."]
    assert done.stop_reason == "end_turn"


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "system", "content": 5}]},
        {"max_tokens": 0},
        {"temperature": -1},
        {"tools": [{"name": "x"}]},
        {"tool_choice": {"type": "tool", "name": "swim"}, "tools": [LOOK]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/"}}]}]},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_impossible_values(client: anthropic.Anthropic, server: Server, wrong: Any) -> None:
    """Impossible values get Anthropic's error object."""
    body = {"model": server.model, "messages": ASK, "max_tokens": 4} | wrong
    with pytest.raises(anthropic.BadRequestError) as error:
        client.post("/v1/messages", cast_to=object, body=body)
    found: Any = error.value.body
    assert found["type"] == "error"
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["message"]


def test_wrong_key(server: Server) -> None:
    """401, in Anthropic's own form."""
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        ask(wrong, server)
    body: Any = refused.value.body
    assert body["error"]["type"] == "authentication_error"


def test_waiting_is_visible(server: Server) -> None:
    """While a long prompt is read, pings come."""
    body = {"model": server.model, "max_tokens": 4, "stream": True}
    body["messages"] = [{"role": "user", "content": long_text(2)}]
    with httpx.stream(
        "POST", f"{server.url}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=PATIENCE
    ) as answer:
        names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert names[0] == "message_start"
    assert names[1] == "ping"
    assert names[-1] == "message_stop"


def test_cancelling(client: anthropic.Anthropic, server: Server) -> None:
    """A client that goes away frees its place."""
    until(lambda: server.running() == 0, "nothing runs")
    stream = ask(client, server, max_tokens=20_000, temperature=1.0, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: server.running() == 0, "its place is free", 2)
