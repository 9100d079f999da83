"""Servers that the checks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Server, serve, serve_script


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For logs and sessions."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    """`sluice serve`, as a user starts it."""
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="session")
def scripted(folder: Path) -> Iterator[Server]:
    """A server whose model says what `scripts/protocol.json` says."""
    with serve_script(folder, "protocol") as server:
        yield server
