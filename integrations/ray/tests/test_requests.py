"""Lines become requests, or say why they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice_ray.requests import MOST_BYTES, LineError, RequestError, id_of, parse, read, scan, seed_of

CHAT = "/v1/chat/completions"


def batched(custom_id: str = "a", **body: object) -> str:
    """A line in the form of OpenAI's batches."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def test_requests_and_bodies_alone_are_read() -> None:
    """Both forms, and what bodies alone ask for."""
    request = parse(batched(messages=[], stream=True, stream_options={}), 1)
    assert (request.custom_id, request.url) == ("a", CHAT)
    assert request.body == {"messages": [], "seed": seed_of("a")}
    for line, url in [
        ('{"prompt": "x"}', "/v1/completions"),
        ('{"messages": []}', CHAT),
        ('{"input": "x"}', "/v1/responses"),
    ]:
        plain = parse(line, 7)
        assert (plain.custom_id, plain.url) == ("line-7", url)
    assert parse('{"prompt": "x"}', 1).body["max_tokens"] == 256
    assert parse('{"prompt": "x", "max_tokens": 3}', 1).body["max_tokens"] == 3


def test_seeds_follow_from_names_unless_they_are_given() -> None:
    """No two alike, none that is not a number with a sign of 64 bits, and a given one stays."""
    assert parse(batched(seed=0), 1).body["seed"] == 0
    assert parse(batched(seed=None), 1).body["seed"] == parse(batched(), 2).body["seed"] == seed_of("a")
    seeds = {seed_of(f"r{number}") for number in range(200)}
    assert len(seeds) == 200
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert len({id_of("a", "x"), id_of("a", "y"), id_of("b", "x"), id_of("xa", "")}) == 4


def test_a_request_is_known_again_by_its_digest() -> None:
    """Whatever the order of its fields; another request has another one."""
    one, same = parse(batched(a=1, b=[2]), 1), parse(batched(b=[2], a=1), 9)
    assert one.digest == same.digest == parse(one.line(), 5).digest
    assert one.digest != parse(batched(a=1, b=[3]), 1).digest


@pytest.mark.parametrize(
    ("line", "custom_id", "code"),
    [
        ("nonsense", "line-7", "invalid_json"),
        ('{"prompt": NaN}', "line-7", "invalid_json"),
        ("[" * 200_000, "line-7", "invalid_json"),
        (b'{"prompt": "\xff"}', "line-7", "invalid_json"),
        ("[]", "line-7", "invalid_line"),
        ("{}", "line-7", "invalid_line"),
        ('{"prompt": "' + "x" * MOST_BYTES + '"}', "line-7", "invalid_line"),
        ('{"custom_id": 5, "prompt": "x"}', "line-7", "invalid_custom_id"),
        ('{"custom_id": "", "prompt": "x"}', "line-7", "invalid_custom_id"),
        (r'{"custom_id": "\ud800", "prompt": "x"}', "line-7", "invalid_custom_id"),
        (json.dumps({"custom_id": "é" * 257, "prompt": "x"}), "line-7", "invalid_custom_id"),
        ('{"custom_id": "a"}', "a", "invalid_line"),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "a", "invalid_method"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "a", "invalid_url"),
        ('{"custom_id": "a", "body": {"prompt": "x"}}', "a", "invalid_url"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": []}', "a", "invalid_body"),
        (
            '{"custom_id": "a", "url": "/v1/responses", "body": {"previous_response_id": "resp_1"}}',
            "a",
            "unsupported_parameter",
        ),
    ],
)
def test_what_is_wrong_is_said_under_the_name_of_the_request(line: str | bytes, custom_id: str, code: str) -> None:
    """Nothing of it is a crash."""
    with pytest.raises(LineError) as caught:
        parse(line, 7)
    assert (caught.value.custom_id, caught.value.code) == (custom_id, code)
    assert "line 7" in caught.value.message


def test_a_file_is_scanned_whatever_its_lines_end_with(tmp_path: Path) -> None:
    """A byte order mark, both ends of lines, empty lines, a line that is too long, and no end of the last one."""
    path = tmp_path / "in.jsonl"
    too_long = b'{"prompt": "' + b"x" * (2 * MOST_BYTES + 10) + b'"}\n'
    lines = [b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n', b"\n", b"  \r\n", too_long, b'  {"prompt": "b"} \n']
    path.write_bytes(b"".join(lines) + b'nonsense\n{"custom_id": "z", "prompt": "c"}')
    places = scan(path)
    assert [place.custom_id for place in places] == ["line-1", "line-4", "line-5", "line-6", "z"]
    assert [place.error is not None and place.error.code for place in places] == [
        False,
        "invalid_line",
        False,
        "invalid_json",
        False,
    ]
    for place in places:
        if place.error is None:
            assert read(path, place.start, place.length, place.number).digest == place.digest


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Also one that was made up for a line without one."""
    path = tmp_path / "in.jsonl"
    for text in [
        f"{batched()}\n{batched('b')}\n{batched()}\n",
        '{"custom_id": "line-3", "prompt": ""}\n\n{"prompt": ""}\n',
    ]:
        path.write_text(text)
        with pytest.raises(RequestError, match="lines 1 and 3 have the same custom_id"):
            scan(path)
