"""Results: what a request came to, as the same bytes whichever machine answered, and when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .requests import Request, derived


@dataclass(frozen=True)
class Result:
    """What a request came to.

    `line` is an object in the form of OpenAI's batches: `custom_id`, `response` (`status_code`, `request_id`, `body`), `error`.
    """

    custom_id: str
    # Of the request, so that a result is never taken for that of another request with the same `custom_id`.
    digest: str
    line: dict[str, Any]
    # Whether asking again would bring the same. If not, another run asks again.
    final: bool = True

    @property
    def failed(self) -> bool:
        """Whether there is an error instead of an answer."""
        return is_failure(self.line)


def is_failure(line: dict[str, Any]) -> bool:
    """Whether a result is an error."""
    response = line["response"]
    return response is None or response["status_code"] != 200


def answered(request: Request, status: int, body: dict[str, Any]) -> Result:
    """What the server said, be it an answer or a refusal."""
    if status == 200:
        _settle(body, request.custom_id)
    response = {"status_code": status, "request_id": f"req_{derived(request.custom_id, 'request')}", "body": body}
    return Result(request.custom_id, request.digest, _line(request, response, None))


def failed(request: Request, code: str, message: str) -> Result:
    """No answer, and no refusal either: something broke, as often as it was tried."""
    error = {"code": code, "message": message}
    return Result(request.custom_id, request.digest, _line(request, None, error), final=False)


def _line(request: Request, response: Any, error: Any) -> dict[str, Any]:
    name = f"batch_req_{derived(request.custom_id)}"
    return {"id": name, "custom_id": request.custom_id, "response": response, "error": error}


def _settle(body: dict[str, Any], custom_id: str) -> None:
    """Takes out of an answer what differs from run to run.

    Ids become ones that depend on the `custom_id`. Times become 0, and stay `null` where they are. How many tokens of the prompt
    were remembered from other requests depends on which ones this machine had before, so it is left out.
    """
    _rename(body, "id", custom_id)
    for name in ("created", "created_at", "completed_at"):
        if isinstance(body.get(name), int):
            body[name] = 0
    usage = body.get("usage") or {}
    usage.pop("prompt_tokens_details", None)
    usage.pop("input_tokens_details", None)
    for at, choice in enumerate(body.get("choices", [])):
        for call_at, call in enumerate(choice.get("message", {}).get("tool_calls") or []):
            _rename(call, "id", custom_id, at, call_at)
    for at, item in enumerate(body.get("output", [])):
        _rename(item, "id", custom_id, "item", at)
        _rename(item, "call_id", custom_id, "call", at)


def _rename(value: dict[str, Any], name: str, custom_id: str, *where: object) -> None:
    """Gives a new id, which begins as the old one: `chatcmpl-`, `call_`, `msg_`, ...."""
    if isinstance(old := value.get(name), str):
        cut = max(old.rfind("_"), old.rfind("-")) + 1
        value[name] = old[:cut] + derived(custom_id, name, *where)


def as_json(line: dict[str, Any]) -> str:
    """A result as a line of a file, without its end."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))
