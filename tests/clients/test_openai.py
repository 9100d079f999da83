"""The client of OpenAI for Python: chat completions and completions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from support import KEY, MODEL, STATES, Server, long_text, run, serve, until

PROMPT = "Speak of the sea."
ASK: Any = [{"role": "user", "content": PROMPT}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "calm": {"type": "boolean"},
        "colour": {"type": "string", "enum": ["grey", "green", "blue"]},
        "ships": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["calm", "colour", "ships"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks at the sea", "parameters": SCHEMA, "strict": True},
    },
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The client."""
    with openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, server: Server, **options: Any) -> Any:
    """A chat completion."""
    settings = {"model": server.model, "messages": ASK, "max_tokens": 40, "seed": 7}
    return client.chat.completions.create(**settings | options)


def gather(stream: Any) -> tuple[dict[int, dict[str, Any]], list[ChatCompletionChunk]]:
    """What the deltas of each choice add up to, and the events."""
    choices: dict[int, dict[str, Any]] = {}
    events = list(stream)
    for event in events:
        for choice in event.choices:
            so_far = choices.setdefault(choice.index, {"content": "", "calls": {}, "finish": None, "logprobs": []})
            assert so_far["finish"] is None, "nothing follows the reason to finish"
            so_far["content"] += choice.delta.content or ""
            so_far["finish"] = choice.finish_reason
            if choice.logprobs and choice.logprobs.content:
                so_far["logprobs"] += choice.logprobs.content
            for part in choice.delta.tool_calls or []:
                call = so_far["calls"].setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += part.id or ""
                call["name"] += (part.function and part.function.name) or ""
                call["arguments"] += (part.function and part.function.arguments) or ""
    return choices, events


def fits(arguments: str) -> bool:
    """Whether JSON matches the schema above."""
    value = json.loads(arguments)
    return (
        list(value) == ["calm", "colour", "ships"]
        and isinstance(value["calm"], bool)
        and value["colour"] in ("grey", "green", "blue")
        and 0 <= value["ships"] <= 99
    )


def test_models(client: openai.OpenAI, server: Server) -> None:
    """One model, which is found by its name."""
    [model] = client.models.list().data
    assert model.id == server.model
    assert client.models.retrieve(server.model).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


@pytest.mark.parametrize("temperature", [None, 0.0, 1.3])
@pytest.mark.parametrize("seed", [0, 7])
def test_text_is_that_of_run(client: openai.OpenAI, server: Server, seed: int, temperature: float | None) -> None:
    """The same request, the same text, streamed or not; and the numbers of tokens are right."""
    options = [] if temperature is None else ["--temperature", str(temperature)]
    want = run(PROMPT, "-n", "40", "--seed", str(seed), *options)
    given = {} if temperature is None else {"temperature": temperature}
    answer = ask(client, server, seed=seed, **given)
    assert answer.choices[0].message.content == want["text"]
    assert answer.choices[0].finish_reason == {"length": "length", "end_token": "stop"}[want["finish"]]
    assert answer.usage.prompt_tokens == want["prompt_tokens"]
    assert answer.usage.completion_tokens == len(want["ids"])
    assert answer.usage.total_tokens == want["prompt_tokens"] + len(want["ids"])
    choices, events = gather(
        ask(client, server, seed=seed, stream=True, stream_options={"include_usage": True}, **given)
    )
    assert choices[0]["content"] == want["text"]
    assert choices[0]["finish"] == answer.choices[0].finish_reason
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == len(want["ids"])
    assert all(event.usage is None for event in events[:-1])
    assert len({event.id for event in events}) == 1


def test_system_messages(client: openai.OpenAI, server: Server) -> None:
    """System and developer messages reach the template."""
    want = run(PROMPT, "-n", "30", "--system", "You are a sailor.")
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "You are a sailor."}, *ASK]
        answer = ask(client, server, messages=messages, max_completion_tokens=30, max_tokens=None, seed=0)
        assert answer.choices[0].message.content == want["text"], role
        assert answer.usage.prompt_tokens == want["prompt_tokens"], role


def test_parts_of_text(client: openai.OpenAI, server: Server) -> None:
    """Content may come in parts."""
    parts = [{"type": "text", "text": "Speak of "}, {"type": "text", "text": "the sea."}]
    whole = ask(client, server, messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}])
    cut = ask(client, server, messages=[{"role": "user", "content": parts}])
    assert whole.choices[0].message.content == run(PROMPT, "-n", "40", "--seed", "7")["text"]
    assert cut.choices[0].message.content
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    with pytest.raises(openai.BadRequestError, match="image"):
        ask(client, server, messages=[{"role": "user", "content": image}])


def test_cached_tokens(client: openai.OpenAI, server: Server) -> None:
    """A prefix that was read is not read again."""
    long = " ".join(f"{i} ships sail." for i in range(200))
    messages = [{"role": "user", "content": long}]
    first = ask(client, server, messages=messages, max_tokens=4)
    assert first.usage.prompt_tokens > 800
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *ASK]
    second = ask(client, server, messages=messages, max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens > 0.9 * first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens


def test_stop(client: openai.OpenAI, server: Server) -> None:
    """The text ends before a stop string, wherever tokens end."""
    text = run(PROMPT, "-n", "40", "--seed", "7")["text"]
    for begin in (5, 17, 30):
        stop = text[begin : begin + 4]
        want = text[: text.index(stop)]
        answer = ask(client, server, stop=[stop, "never said"])
        assert answer.choices[0].message.content == want
        assert answer.choices[0].finish_reason == "stop"
        choices, _ = gather(ask(client, server, stop=stop, stream=True))
        assert choices[0]["content"] == want


def test_several_choices(client: openai.OpenAI, server: Server) -> None:
    """Choices differ, the same request gives the same ones, and the first is the only one of n=1."""
    answer = ask(client, server, n=3, temperature=1.0)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == run(PROMPT, "-n", "40", "--seed", "7", "--temperature", "1")["text"]
    choices, events = gather(
        ask(client, server, n=3, temperature=1.0, stream=True, stream_options={"include_usage": True})
    )
    assert [choices[i]["content"] for i in range(3)] == texts
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_logprobs(client: openai.OpenAI, server: Server) -> None:
    """Logarithms of probabilities: of each token and of the likeliest ones, in order."""
    answer = ask(client, server, temperature=0.0, logprobs=True, top_logprobs=20, max_tokens=30)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    said = bytes(byte for entry in entries for byte in entry.bytes or [])
    assert said.decode(errors="replace") == answer.choices[0].message.content
    # Some tokens are parts of characters: their bytes are their own, not those of a replacement.
    likeliest = [top.bytes for entry in entries for top in entry.top_logprobs]
    assert all("\ufffd".encode() not in bytes(top or []) for top in likeliest)
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0], "greedy takes the likeliest"
        assert entry.token == entry.top_logprobs[0].token
        assert sum(map(math.exp, values)) <= 1.0 + 1e-6
    choices, _ = gather(
        ask(client, server, temperature=0.0, logprobs=True, top_logprobs=20, max_tokens=30, stream=True)
    )
    assert [e.logprob for e in choices[0]["logprobs"]] == [e.logprob for e in entries]


def test_logit_bias(client: openai.OpenAI, server: Server) -> None:
    """A token can be forbidden, and forced."""
    first = run(PROMPT, "-n", "1", "--temperature", "0")["ids"][0]
    answer = ask(client, server, temperature=0.0, max_tokens=1, logit_bias={str(first): -100})
    assert answer.choices[0].message.content != run(PROMPT, "-n", "1", "--temperature", "0")["text"]
    answer = ask(client, server, max_tokens=3, logit_bias={str(first): 100})
    assert answer.choices[0].message.content == 3 * run(PROMPT, "-n", "1", "--temperature", "0")["text"]


@pytest.mark.parametrize("seed", range(4))
def test_json_schema(client: openai.OpenAI, server: Server, seed: int) -> None:
    """The text matches the schema and ends by itself."""
    response_format = {"type": "json_schema", "json_schema": {"name": "sea", "strict": True, "schema": SCHEMA}}
    answer = ask(client, server, seed=seed, temperature=1.0, max_tokens=200, response_format=response_format)
    assert fits(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    stream = ask(
        client, server, seed=seed, temperature=1.0, max_tokens=200, response_format=response_format, stream=True
    )
    assert gather(stream)[0][0]["content"] == answer.choices[0].message.content


def test_unsupported_schema(client: openai.OpenAI, server: Server) -> None:
    """What cannot be kept is refused by name, not ignored."""
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema.json"}}}
    with pytest.raises(openai.BadRequestError, match="ref"):
        ask(client, server, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "look"}}, "required"])
@pytest.mark.parametrize("seed", range(2))
def test_forced_tools(client: openai.OpenAI, server: Server, choice: Any, seed: int) -> None:
    """A tool that must be called is called, with arguments of its schema, streamed or not."""
    options = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "temperature": 1.0, "max_tokens": 400}
    answer = ask(client, server, parallel_tool_calls=False, **options).choices[0]
    [call] = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    if choice != "required":
        assert call.function.name == "look"
    if call.function.name == "look":
        assert fits(call.function.arguments)
    else:
        assert json.loads(call.function.arguments) == {}
    choices, _ = gather(ask(client, server, parallel_tool_calls=False, stream=True, **options))
    [streamed] = choices[0]["calls"].values()
    assert (streamed["name"], streamed["arguments"]) == (call.function.name, call.function.arguments)
    assert streamed["id"].startswith("call_")
    assert choices[0]["finish"] == answer.finish_reason
    messages = [
        *ASK,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Seen."},
    ]
    assert ask(client, server, messages=messages, tools=TOOLS, max_tokens=4).choices[0].message.content


def test_no_tools(client: openai.OpenAI, server: Server) -> None:
    """With `none`, no tool is called."""
    answer = ask(client, server, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert not answer.choices[0].message.tool_calls
    with pytest.raises(openai.BadRequestError, match="swim"):
        ask(client, server, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "swim"}})


def test_scripted_tools_and_thinking(scripted: Server) -> None:
    """Thinking, text and two calls of a known answer arrive to the byte."""
    client = openai.OpenAI(base_url=scripted.v1, api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": "Two calls, please."}]
    settings: Any = {"model": scripted.model, "messages": messages, "tools": TOOLS, "max_tokens": 800}
    answer = client.chat.completions.create(**settings).choices[0]
    message: Any = answer.message
    assert message.reasoning_content.strip() == "The sea first, then patience."
    assert (message.content or "").strip() == "I look."
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    look = '{"calm":  true, "colour": "grey", "ships": 1e1, "note": "\\u00e4 </think> \\"x\\""}'
    assert calls == [("look", look), ("wait", "{}")]
    assert answer.finish_reason == "tool_calls"
    assert len({call.id for call in message.tool_calls}) == 2
    choices, events = gather(client.chat.completions.create(stream=True, **settings))
    assert [(c["name"], c["arguments"]) for c in choices[0]["calls"].values()] == calls
    assert choices[0]["content"] == (message.content or "")
    thinking = "".join(getattr(c.delta, "reasoning_content", None) or "" for e in events for c in e.choices)
    assert thinking == message.reasoning_content
    messages += [message.model_dump(exclude_none=True)]
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"ship {i}"} for i, call in enumerate(message.tool_calls)
    ]
    done = client.chat.completions.create(**settings).choices[0]
    assert done.message.content == "Both are done: <b>äöü</b> & 🌊."
    assert done.finish_reason == "stop"


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "sailor", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": "Hello"},
        {"temperature": -1},
        {"temperature": 9},
        {"top_p": 2},
        {"n": 0},
        {"n": 100000},
        {"max_tokens": -5},
        {"max_tokens": "many"},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 100},
        {"stop": ["x"] * 1000},
        {"logit_bias": {"no number": 1}},
        {"logit_bias": {"99999999": 1}},
        {"response_format": {"type": "poem"}},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_impossible_values(client: openai.OpenAI, server: Server, wrong: Any) -> None:
    """Impossible values get OpenAI's error object, which says what is wrong."""
    body = {"model": server.model, "messages": ASK, "max_tokens": 4} | wrong
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", cast_to=object, body=body)
    found: Any = error.value.body
    assert found["type"] == "invalid_request_error"
    assert found["message"]
    assert {"param", "code"} <= set(found)


def test_unknown_fields(client: openai.OpenAI, server: Server) -> None:
    """What other servers know is accepted."""
    extra = {"min_p": 0.0, "top_k": 20, "user": "me", "store": False, "metadata": {}, "service_tier": "auto", "x": [1]}
    answer = ask(client, server, extra_body=extra)
    assert answer.choices[0].message.content == run(PROMPT, "-n", "40", "--seed", "7")["text"]


def test_wrong_key(server: Server) -> None:
    """Whoever has no key learns nothing."""
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.v1, api_key="wrong", max_retries=0).models.list()


def test_two_models(folder: Path) -> None:
    """Each answers under its name, whichever was loaded before, and others are not found."""
    with serve(folder, models=(MODEL, STATES)) as server, openai.OpenAI(base_url=server.v1, api_key=KEY) as client:
        names = [model.id for model in client.models.list()]
        assert names == [MODEL.stem, STATES.stem]
        for _ in range(2):
            for model in (MODEL, STATES):
                answer = ask(client, server, model=model.stem)
                assert answer.choices[0].message.content == run(PROMPT, "-n", "40", "--seed", "7", model=model)["text"]
                assert answer.model == model.stem
        with pytest.raises(openai.NotFoundError) as error:
            ask(client, server, model="no-such-model")
        body: Any = error.value.body
        assert body["code"] == "model_not_found"


def test_any_name_means_the_only_model(client: openai.OpenAI, server: Server) -> None:
    """Many clients send the name of somebody else's model."""
    assert ask(client, server, model="gpt-4o-mini").model == server.model


def test_too_much(client: openai.OpenAI, server: Server) -> None:
    """A prompt beyond the context, and a body beyond all bounds."""
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, server, messages=[{"role": "user", "content": "x y " * 120_000}])
    body: Any = error.value.body
    assert body["code"] == "context_length_exceeded"
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)) as refused:
        ask(client, server, messages=[{"role": "user", "content": "x" * (200 << 20)}])
    if isinstance(refused.value, openai.APIStatusError):
        assert refused.value.status_code == 413


def test_many_at_once(server: Server) -> None:
    """Requests that are served together get what each gets alone."""
    seeds = list(range(12))

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=KEY, max_retries=0) as client:
            calls = [
                client.chat.completions.create(model=server.model, messages=ASK, max_tokens=40, seed=seed)
                for seed in seeds
            ]
            return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_of_them()) == [run(PROMPT, "-n", "40", "--seed", str(seed))["text"] for seed in seeds]


def test_cancelling(client: openai.OpenAI, server: Server) -> None:
    """A client that goes away frees its place."""
    until(lambda: server.running() == 0, "nothing runs")
    stream = ask(client, server, max_tokens=20_000, logit_bias={"1538": -100}, stream=True)
    next(iter(stream))
    until(lambda: server.running() == 1, "it runs")
    stream.close()
    until(lambda: server.running() == 0, "its place is free", 2)


def test_waiting_is_visible(folder: Path) -> None:
    """While a long prompt is read, events say how far it is; a client that goes away meanwhile finds it read as far."""
    # With little memory, which takes few tokens at a time: a fast machine would have read the text before two events.
    options = ("--budget", "26MiB", "--parallel", "1")
    with serve(folder, *options) as server, openai.OpenAI(base_url=server.v1, api_key=KEY) as client:
        messages = [{"role": "user", "content": long_text(1)}]
        stream = ask(client, server, messages=messages, max_tokens=4, stream=True)
        read = []
        for event in stream:
            progress = (event.model_extra or {}).get("progress")
            if progress and progress["state"] == "reading":
                read.append(progress["read"])
                # Events come by the clock: on a slow machine, two of them can have the same number.
                if len(set(read)) == 2:
                    break
        stream.close()
        assert read == sorted(read)
        assert len(set(read)) == 2
        until(lambda: server.running() == 0, "its place is free", 2)
        answer = ask(client, server, messages=messages, max_tokens=4)
        assert answer.usage.prompt_tokens_details.cached_tokens >= read[0]


def test_a_full_queue(folder: Path) -> None:
    """429 with the time after which to try again."""
    with serve(folder, "--parallel", "1", "--queue", "1") as server:

        async def flood() -> list[BaseException | Any]:
            async with openai.AsyncOpenAI(base_url=server.v1, api_key=KEY, max_retries=0) as client:
                calls = [
                    client.chat.completions.create(model=server.model, messages=ASK, max_tokens=200, seed=seed)
                    for seed in range(8)
                ]
                return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = asyncio.run(flood())
        refused = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
        assert 1 <= len(refused) < 8
        assert all(float(error.response.headers["retry-after"]) > 0 for error in refused)
        assert not [o for o in outcomes if isinstance(o, BaseException) and not isinstance(o, openai.RateLimitError)]


def test_completions(client: openai.OpenAI, server: Server) -> None:
    """Text completions: the prompt as it is, several of them, echo and logprobs."""
    prompts = ["The sea is", "A ship"]
    want = [run(prompt, "-n", "20", "--seed", "7", chat=False) for prompt in prompts]
    answer = client.completions.create(model=server.model, prompt=prompts, max_tokens=20, seed=7)
    assert [choice.text for choice in answer.choices] == [w["text"] for w in want]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(w["prompt_tokens"] for w in want)
    echo = client.completions.create(model=server.model, prompt=prompts[0], max_tokens=20, seed=7, echo=True)
    assert echo.choices[0].text == prompts[0] + want[0]["text"]
    stream = client.completions.create(model=server.model, prompt=prompts[0], max_tokens=20, seed=7, stream=True)
    assert "".join(event.choices[0].text for event in stream if event.choices) == want[0]["text"]
    scored = client.completions.create(model=server.model, prompt=prompts[0], max_tokens=0, echo=True, logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == prompts[0]
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == prompts[0]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
