"""LiteLLM, by the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import os
from typing import Any

import litellm
import pytest

from support import KEY, Server, run, without_thinking

# It would fetch prices of models.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm.telemetry = False

PROMPT = "Speak of the sea."
ASK = [{"role": "user", "content": PROMPT}]


def options(server: Server, provider: str) -> dict[str, Any]:
    """How LiteLLM reaches the server."""
    base = {"openai": server.v1, "anthropic": server.url, "ollama_chat": server.url}[provider]
    return {"model": f"{provider}/{server.model}", "api_base": base, "api_key": KEY, "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama_chat"])
def test_text(server: Server, provider: str) -> None:
    """The same text by all APIs, streamed or not."""
    options_of_run = ("-n", "40", "--temperature", "0")
    # By Anthropic's API, models think only if they are told to.
    if provider == "anthropic":
        want = run(without_thinking(PROMPT), *options_of_run, chat=False)
    else:
        want = run(PROMPT, *options_of_run)
    settings = options(server, provider) | {"messages": ASK, "max_tokens": 40, "temperature": 0.0}
    answer: Any = litellm.completion(**settings)
    assert answer.choices[0].message.content == want["text"]
    assert answer.usage.prompt_tokens == want["prompt_tokens"]
    assert answer.usage.completion_tokens == len(want["ids"])
    stream: Any = litellm.completion(**settings, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == want["text"]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_tools(scripted: Server, provider: str) -> None:
    """Calls and thinking of a known answer."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in ("look", "wait")
    ]
    messages = [{"role": "user", "content": "Two calls, please."}]
    answer: Any = litellm.completion(**options(scripted, provider), messages=messages, tools=tools, max_tokens=800)
    message = answer.choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["look", "wait"]
    assert message.reasoning_content.strip() == "The sea first, then patience."
    assert answer.choices[0].finish_reason == "tool_calls"


def test_errors(server: Server) -> None:
    """Errors arrive as what they are."""
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**options(server, "openai") | {"api_key": "wrong"}, messages=ASK)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options(server, "openai"), messages=[{"role": "user", "content": "x y " * 50_000}])
