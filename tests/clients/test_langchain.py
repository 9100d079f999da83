"""LangChain's ChatOpenAI."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from support import KEY, Server, run

PROMPT = "Speak of the sea."


class Sea(BaseModel):
    """What the sea is like."""

    calm: bool
    colour: Literal["grey", "green", "blue"]
    ships: int = Field(ge=0, le=99)


def make(server: Server, **options: Any) -> ChatOpenAI:
    """A model of LangChain."""
    key = SecretStr(KEY)
    return ChatOpenAI(base_url=server.v1, api_key=key, model=server.model, max_retries=0, seed=7, **options)


def test_text(server: Server) -> None:
    """The same text, streamed or not, and its numbers of tokens."""
    want = run(PROMPT, "-n", "40", "--seed", "7")
    model = make(server, max_completion_tokens=40)
    answer = model.invoke(PROMPT)
    assert answer.content == want["text"]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == len(want["ids"])
    assert "".join(str(piece.content) for piece in model.stream(PROMPT)) == want["text"]
    assert [a.content for a in model.batch([PROMPT, PROMPT])] == 2 * [want["text"]]


def test_structured_output(server: Server) -> None:
    """An object of a class."""
    model = make(server, max_completion_tokens=400, temperature=1.0)
    assert isinstance(model.with_structured_output(Sea, method="json_schema").invoke(PROMPT), Sea)
    assert isinstance(model.with_structured_output(Sea, method="function_calling").invoke(PROMPT), Sea)


def test_tools(scripted: Server) -> None:
    """Calls of a known answer, and what follows their results."""

    @tool
    def look(calm: bool, colour: str, ships: float, note: str) -> str:
        """Looks at the sea."""
        return f"ship 0: {calm} {colour} {ships} {note}"

    @tool
    def wait() -> str:
        """Waits."""
        return "ship 1"

    model = make(scripted).bind_tools([look, wait])
    messages: list[Any] = [HumanMessage("Two calls, please.")]
    answer: Any = model.invoke(messages)
    assert [call["name"] for call in answer.tool_calls] == ["look", "wait"]
    assert answer.tool_calls[0]["args"] == {"calm": True, "colour": "grey", "ships": 10.0, "note": 'ä </think> "x"'}
    messages.append(answer)
    for call, function in zip(answer.tool_calls, (look, wait), strict=True):
        messages.append(ToolMessage(function.invoke(call["args"]), tool_call_id=call["id"]))
    assert model.invoke(messages).content == "Both are done: <b>äöü</b> & 🌊."
