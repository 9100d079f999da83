"""Responses: OpenAI's client, and every event against the types of the Open Responses specification."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import openresponses_types.types as specification
import pytest
from openai.types.responses.response_reasoning_text_delta_event import ResponseReasoningTextDeltaEvent
from openai.types.responses.response_reasoning_text_done_event import ResponseReasoningTextDoneEvent
from websockets.sync.client import connect

from support import KEY, PATIENCE, Server, long_text, run, until

PROMPT = "Speak of the sea."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"calm": {"type": "boolean"}},
    "required": ["calm"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}
    for name in ("look", "wait")
]


def events_of_the_specification() -> dict[str, Any]:
    """The class of each type of event."""
    found = {}
    for name, kind in vars(specification).items():
        if name.endswith("StreamingEvent"):
            [word] = list(kind.model_fields["type"].annotation)
            found[word.value] = kind
    # OpenAI's own names for the text of thinking, which agents listen to.
    found["response.reasoning_text.delta"] = ResponseReasoningTextDeltaEvent
    found["response.reasoning_text.done"] = ResponseReasoningTextDoneEvent
    return found


EVENTS = events_of_the_specification()


def make(server: Server) -> openai.OpenAI:
    """A client of a server."""
    return openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The client."""
    with make(server) as client:
        yield client


def ask(client: openai.OpenAI, server: Server, **options: Any) -> Any:
    """A response, of the likeliest tokens."""
    settings = {"model": server.model, "input": PROMPT, "max_output_tokens": 40, "temperature": 0.0}
    create: Any = client.responses.create
    return create(**settings | options)


def checked(event: dict[str, Any]) -> dict[str, Any]:
    """An event, which must be as the specification says."""
    EVENTS[event["type"]].model_validate(event)
    return event


def stream(server: Server, **options: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are sent, each checked against the specification, and all for their order."""
    settings = {"model": server.model, "input": PROMPT, "max_output_tokens": 40, "temperature": 0.0, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps(settings | options).encode()
    request = urllib.request.Request(f"{server.v1}/responses", body, headers)
    events: list[dict[str, Any]] = []
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        blocks = answer.read().decode().split("\n\n")
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if not fields or fields["data"] == "[DONE]":
            continue
        event = json.loads(fields["data"])
        assert fields["event"] == event["type"]
        events.append(checked(event))
    check_order(events)
    return events


class Socket:
    """A connection over which responses are made, none of which is stored."""

    def __init__(self, server: Server) -> None:
        url = server.v1.replace("http:", "ws:") + "/responses"
        self.connection = connect(url, additional_headers={"Authorization": f"Bearer {KEY}"})
        self.model = server.model

    def create(self, **options: Any) -> dict[str, Any]:
        """The response, or the error, with every event checked."""
        settings = {"model": self.model, "max_output_tokens": 20, "temperature": 0.0, "store": False}
        request: Any = {"type": "response.create"} | settings | options
        specification.WebSocketResponseCreateEvent.model_validate(request)
        self.connection.send(json.dumps(request))
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in ("response.completed", "response.incomplete"):
            event = json.loads(self.connection.recv(timeout=PATIENCE))
            if event["type"] == "error":
                specification.WebSocketErrorEvent.model_validate(event)
                return event
            events.append(checked(event))
        check_order(events)
        response: dict[str, Any] = events[-1]["response"]
        specification.ResponseResource.model_validate(response)
        return response


def check_order(events: list[dict[str, Any]]) -> None:
    """The events of a response begin and end as they must, and items and parts are opened and closed in order."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    types = [event["type"] for event in events]
    assert types[0] == "response.created"
    assert types[-1] in ("response.completed", "response.incomplete")
    is_open: list[tuple[Any, ...]] = []
    said: dict[tuple[Any, ...], str] = {}
    items: list[Any] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        place = (event.get("output_index"), event.get("content_index", event.get("summary_index")))
        match kind:
            case "created" | "in_progress" | "queued" | "completed" | "incomplete":
                assert not is_open or kind in ("in_progress", "queued")
            case "output_item.added":
                assert not is_open
                assert event["output_index"] == len(items)
                items.append(event["item"])
                is_open.append(place)
            case "output_item.done":
                assert is_open == [place]
                assert event["item"]["id"] == items[-1]["id"]
                assert event["item"].get("status", "completed") in ("completed", "incomplete")
                is_open.pop()
            case "content_part.added" | "reasoning_summary_part.added":
                assert is_open == [(event["output_index"], None)]
                is_open.append(place)
            case "content_part.done" | "reasoning_summary_part.done":
                assert is_open[-1] == place
                is_open.pop()
            case _ if kind.endswith(".delta"):
                assert is_open[-1] == place
                said[place] = said.get(place, "") + event["delta"]
            case _:
                assert kind.endswith(".done")
                whole = event.get("text", event.get("arguments"))
                assert said.get(place, "") == whole
        if "item_id" in event:
            assert event["item_id"] == items[-1]["id"]
    assert not is_open
    final = events[-1]["response"]
    assert [item["id"] for item in final["output"]] == [item["id"] for item in items]


def test_text_is_that_of_run(client: openai.OpenAI, server: Server) -> None:
    """The same text, streamed or not, and the right numbers of tokens."""
    want = run(PROMPT, "-n", "40", "--temperature", "0")
    answer = ask(client, server)
    assert answer.output_text == want["text"]
    assert answer.status == {"length": "incomplete", "end_token": "completed"}[want["finish"]]
    assert answer.usage.input_tokens == want["prompt_tokens"]
    assert answer.usage.output_tokens == len(want["ids"])
    specification.ResponseResource.model_validate(answer.model_dump(mode="json"))
    events = stream(server)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == want["text"]
    final = events[-1]["response"]
    assert final["status"] == answer.status
    assert final["usage"]["output_tokens"] == len(want["ids"])
    if answer.status == "incomplete":
        assert final["incomplete_details"]["reason"] == "max_output_tokens"
    with client.responses.stream(model=server.model, input=PROMPT, max_output_tokens=40, temperature=0.0) as helper:
        said = "".join(event.delta for event in helper if event.type == "response.output_text.delta")
        assert said == want["text"]


def test_instructions_and_items(client: openai.OpenAI, server: Server) -> None:
    """Instructions, and input as items of all roles."""
    want = run(PROMPT, "-n", "30", "--system", "You are a sailor.", "--temperature", "0")["text"]
    sailor = "You are a sailor."
    parts = [{"type": "input_text", "text": PROMPT}]
    items = [{"role": "developer", "content": sailor}, {"type": "message", "role": "user", "content": parts}]
    assert ask(client, server, instructions=sailor, max_output_tokens=30).output_text == want
    assert ask(client, server, input=items, max_output_tokens=30).output_text == want


def test_stored_responses(client: openai.OpenAI, server: Server) -> None:
    """A response goes on from an earlier one, can be had again and deleted; one that was not stored cannot."""
    first = ask(client, server, store=True)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = ask(client, server, input="Go on.", previous_response_id=first.id, max_output_tokens=10)
    items = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": first.output_text}]
    items += [{"role": "user", "content": "Go on."}]
    by_hand = ask(client, server, input=items, max_output_tokens=10)
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.output_text == by_hand.output_text
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    forgotten = ask(client, server, store=False)
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        ask(client, server, previous_response_id=forgotten.id)


def test_socket(client: openai.OpenAI, server: Server) -> None:
    """One connection for many responses, which go on from the last one; others do not find it, nor is it there after a failed turn."""
    socket = Socket(server)
    first = socket.create(input=PROMPT)
    assert first["output"][0]["content"][0]["text"] == ask(client, server, max_output_tokens=20).output_text
    second = socket.create(input="Go on.", previous_response_id=first["id"])
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    for connection in (Socket(server), socket):
        refused = connection.create(input="Go on.", previous_response_id=first["id"])
        assert refused["error"]["code"] == "previous_response_not_found"
    stray = [{"type": "function_call_output", "call_id": "call_x", "output": "?"}]
    assert socket.create(input=stray, previous_response_id=second["id"])["type"] == "error"
    refused = socket.create(input="Go on.", previous_response_id=second["id"])
    assert refused["error"]["code"] == "previous_response_not_found"
    assert socket.create(input=PROMPT)["usage"]["output_tokens"] == first["usage"]["output_tokens"]


def test_compaction(client: openai.OpenAI, server: Server) -> None:
    """A summary stands for the conversation, over either transport."""
    said = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "It is calm."}]
    made: Any = client.post("/responses/compact", cast_to=object, body={"model": server.model, "input": said})
    specification.CompactResource.model_validate(made)
    [summary] = made["output"]
    assert summary["type"] == "compaction"
    items = [summary, {"type": "message", "role": "user", "content": "Go on."}]
    text = ask(client, server, input=items, max_output_tokens=20).output_text
    assert Socket(server).create(input=items)["output"][0]["content"][0]["text"] == text
    with pytest.raises(openai.BadRequestError):
        client.post("/responses/compact", cast_to=object, body={"input": said})


def test_json_schema(client: openai.OpenAI, server: Server) -> None:
    """The text matches the schema."""
    text = {"format": {"type": "json_schema", "name": "sea", "schema": SCHEMA, "strict": True}}
    answer = ask(client, server, text=text, temperature=1.0, max_output_tokens=200)
    assert json.loads(answer.output_text) in ({"calm": True}, {"calm": False})
    assert answer.status == "completed"


def test_forced_tools(client: openai.OpenAI, server: Server) -> None:
    """A tool that must be called is called."""
    tools: Any = [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}]
    for choice in ("required", {"type": "function", "name": "look"}):
        answer = ask(client, server, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=300)
        [call] = [item for item in answer.output if item.type == "function_call"]
        assert call.name == "look"
        assert json.loads(call.arguments) in ({"calm": True}, {"calm": False})


def test_scripted_tools_and_thinking(scripted: Server) -> None:
    """Thinking, text, two calls and what follows their results."""
    client = make(scripted)
    options: Any = {"tools": TOOLS, "max_output_tokens": 800, "temperature": 1.0}
    answer = ask(client, scripted, input="Two calls, please.", **options)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    _, message, look, wait = answer.output
    assert message.content[0].text.strip() == "I look."
    assert look.arguments == '{"calm":  true, "colour": "grey", "ships": 1e1, "note": "\\u00e4 </think> \\"x\\""}'
    assert (look.name, wait.name, wait.arguments) == ("look", "wait", "{}")
    assert answer.status == "completed"
    events = stream(scripted, input="Two calls, please.", **options)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    assert done[2]["arguments"] == look.arguments
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"ship {i}"}
        for i, call in enumerate((look, wait))
    ]
    whole = [{"role": "user", "content": "Two calls, please."}]
    whole += [item.model_dump(exclude_none=True) for item in answer.output] + results
    for given in ({"input": results, "previous_response_id": answer.id}, {"input": whole, "store": False}):
        said = ask(client, scripted, **options | given)
        assert said.output_text == "Both are done: <b>äöü</b> & 🌊."


def test_tools_of_others_are_left_out(client: openai.OpenAI, server: Server) -> None:
    """Agents offer tools that only the provider's own service has: they are not the model's to call."""
    space = {"type": "namespace", "name": "agents", "description": "Agents", "tools": TOOLS}
    answer = ask(client, server, tools=[*TOOLS, {"type": "web_search"}, space], max_output_tokens=4)
    assert answer.output_text


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": 5},
        {"input": [{"type": "poem"}]},
        {"temperature": 9},
        {"max_output_tokens": -1},
        {"text": {"format": {"type": "poem"}}},
        {"input": [{"type": "function_call_output", "call_id": "call_x", "output": {"a": 1}}]},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_impossible_values(client: openai.OpenAI, server: Server, wrong: Any) -> None:
    """Impossible values are refused."""
    body = {"model": server.model, "input": PROMPT, "max_output_tokens": 4} | wrong
    with pytest.raises(openai.BadRequestError):
        client.post("/responses", cast_to=object, body=body)


def test_waiting_is_visible(server: Server) -> None:
    """While a long prompt is read, the response is said to be in progress."""
    events = stream(server, input=long_text(3), max_output_tokens=4)
    types = [event["type"] for event in events]
    assert types.count("response.in_progress") > 1
    assert types.index("response.output_item.added") > 2


def test_cancelling(client: openai.OpenAI, server: Server) -> None:
    """A client that goes away frees its place."""
    until(lambda: server.running() == 0, "nothing runs")
    events = ask(client, server, max_output_tokens=20_000, temperature=1.0, stream=True)
    next(iter(events))
    events.close()
    until(lambda: server.running() == 0, "its place is free", 2)
