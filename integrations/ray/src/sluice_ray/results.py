"""Results: what a request came to, as the same bytes whichever machine answered, and when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .requests import LineError, Request, id_of


@dataclass(frozen=True)
class Result:
    """What a request came to.

    `line` is an object in the form of OpenAI's batches: `custom_id`, `response` (`status_code`, `request_id`,
    `body`), `error`.
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
    return line["error"] is not None


def answered(request: Request, status: int, body: dict[str, Any]) -> Result:
    """What the server said, be it an answer or a refusal."""
    error = None
    if status == 200:
        make_repeatable(body, request.custom_id)
    else:
        said = body.get("error")
        said = said if isinstance(said, dict) else {}
        error = {"code": said.get("code") or said.get("type") or "", "message": said.get("message") or ""}
    return Result(request.custom_id, request.digest, _line(request.custom_id, status, body, error))


def refused(error: LineError, digest: str) -> Result:
    """A line that is no request."""
    body = {"message": error.message, "type": "invalid_request_error", "param": None, "code": error.code}
    line = _line(error.custom_id, 400, {"error": body}, {"code": error.code, "message": error.message})
    return Result(error.custom_id, digest, line)


def failed(request: Request, message: str) -> Result:
    """No answer, and no refusal either: something broke, as often as it was tried."""
    code = "server_error"
    body = {"message": message, "type": code, "param": None, "code": None}
    line = _line(request.custom_id, 500, {"error": body}, {"code": code, "message": message})
    return Result(request.custom_id, request.digest, line, final=False)


def _line(custom_id: str, status: int, body: dict[str, Any], error: dict[str, str] | None) -> dict[str, Any]:
    return {
        "id": f"batch_req_{id_of(custom_id, 'result')}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{id_of(custom_id, 'request')}", "body": body},
        "error": error,
    }


def make_repeatable(body: dict[str, Any], custom_id: str) -> None:
    """Makes an answer the same whenever it is made.

    Ids become ones that follow from the request's name, and times 0. How many tokens of the prompt were remembered
    from other requests depends on which ones this machine had before, and becomes 0 too.
    """
    _rename(body, "id", custom_id, "answer")
    for name in ("created", "created_at", "completed_at"):
        if isinstance(body.get(name), int):
            body[name] = 0
    if "store" in body:
        # Nobody can ask for it any more.
        body["store"] = False
    for name in ("prompt_tokens_details", "input_tokens_details"):
        details = (body.get("usage") or {}).get(name)
        if details and "cached_tokens" in details:
            details["cached_tokens"] = 0
    for at, choice in enumerate(body.get("choices", [])):
        for call_at, call in enumerate((choice.get("message") or {}).get("tool_calls") or []):
            _rename(call, "id", custom_id, f"call {at} {call_at}")
    for at, item in enumerate(body.get("output", [])):
        _rename(item, "id", custom_id, f"item {at}")
        _rename(item, "call_id", custom_id, f"call {at}")


def _rename(value: dict[str, Any], name: str, custom_id: str, what: str) -> None:
    """Gives a new id, which begins as the old one: `chatcmpl-`, `call_`, `msg_`, ...."""
    if isinstance(old := value.get(name), str):
        cut = next((at + 1 for at, letter in enumerate(old) if letter in "-_"), 0)
        value[name] = old[:cut] + id_of(custom_id, what)


def as_json(line: dict[str, Any]) -> str:
    """A result as a line of a file, without its end."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))
