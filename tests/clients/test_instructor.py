"""Instructor: objects out of answers, by tools and by JSON schemas."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

from support import KEY, Server


class Ship(BaseModel):
    """A ship."""

    kind: Literal["brig", "sloop"]
    masts: int = Field(ge=1, le=9)


class Fleet(BaseModel):
    """Ships."""

    flag: Literal["red", "white"]
    ships: list[Ship] = Field(min_length=1, max_length=3)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
@pytest.mark.parametrize("seed", range(2))
def test_objects(server: Server, mode: instructor.Mode, seed: int) -> None:
    """The first answer is an object of the class: nothing has to be asked again."""
    client = instructor.from_openai(openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0), mode=mode)
    fleet = client.chat.completions.create(
        model=server.model,
        response_model=Fleet,
        max_retries=0,
        max_tokens=600,
        temperature=1.0,
        seed=seed,
        messages=[{"role": "user", "content": "Describe a fleet."}],
    )
    assert isinstance(fleet, Fleet)
