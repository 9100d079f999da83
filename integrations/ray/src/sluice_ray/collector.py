"""The one place where results are written: an actor on the machine where the results are to be.

Workers need no filesystem that all machines see. Each sends a result when it has it, and goes on once the result is
on the drive.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .parts import Parts, PartsError
from .results import Result

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a run is."""

    # Requests that this run, or an earlier one, has results for.
    settled: int
    # Machines that cannot serve, by their ids, with what their server said.
    broken: dict[str, str]
    # Why results cannot be written, if they cannot.
    trouble: str | None


class Collector:
    """Keeps the results, each once."""

    def __init__(self, folder: str) -> None:
        self._parts = Parts(Path(folder))
        # Requests that this run does not ask for again, by what earlier runs or this one have found out.
        self._settled: set[str] = set()
        self._broken: dict[str, str] = {}
        self._trouble: str | None = None

    def unsettled(self, requests: list[tuple[str, str]]) -> list[bool]:
        """For each request, given as `custom_id` and digest, whether it is still to be asked.

        Raises:
            PartsError: there is a result of another request with that `custom_id`.
            OSError: results could not be written lately, so that asking for more is in vain.
        """
        if self._trouble is not None:
            raise OSError(self._trouble)
        wanted = []
        for custom_id, digest in requests:
            if self._parts.state(custom_id, digest):
                self._settled.add(custom_id)
            wanted.append(custom_id not in self._settled)
        return wanted

    def add(self, result: Result) -> None:
        """Writes a result, which is on the drive when this returns.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._parts.add(result)
        except OSError as error:
            self._trouble = f"results cannot be written: {error}"
            raise
        self._trouble = None
        self._settled.add(result.custom_id)

    def join(self, node: str, model: dict[str, Any]) -> None:
        """Says which model a machine serves.

        Raises:
            PartsError: it is not the one of the other results.
        """
        try:
            self._parts.identify(model)
        except PartsError as error:
            self._trouble = f"machine {node}: {error}"
            raise

    def leave(self, node: str, why: str) -> None:
        """Says that a machine cannot serve."""
        self._broken[node] = why

    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(len(self._settled), dict(self._broken), self._trouble)

    def write(self, path: str, custom_ids: list[str]) -> int:
        """Writes the results of these requests to a file; how many of them are errors."""
        return self._parts.write(Path(path), custom_ids)


def start(folder: Path) -> ActorHandle:
    """Starts the actor on this machine. If it dies, it comes back and reads what it has written."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Collector).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return actor.remote(str(folder.absolute()))
