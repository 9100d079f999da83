"""A file of requests becomes a file of results, by way of a server on each machine of a Ray cluster.

A run makes passes. Each pass is a Ray Data pipeline over the requests that have no result yet: blocks of them are
read on the driver's machine and go to a pool of actors, one on each machine. Requests that a pass leaves, because a
machine was lost or cannot serve, are those of the next pass, on the machines that are there by then.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from . import collector as collecting
from .collector import Progress
from .requests import LineError, Place, RequestError, read, scan
from .results import refused
from .server import Serving
from .worker import Worker

# Machines that have this resource are the ones that serve; if none has it, all are.
RESOURCE = "sluice"
# Blocks that a worker has at a time. A block has half of what the server answers at once, so that it always has enough.
OVERLAP = 4
# What Ray has for objects if it is started here. A few blocks of requests and results are all that it holds.
OBJECT_BYTES = 200_000_000
# Passes one after the other that bring nothing, after which the run ends.
MOST_IDLE = 3
# Seconds that the cluster may take to find room for the workers, and between two lines about progress.
PLACING, TELLING = 120.0, 10.0


class RunError(Exception):
    """The run cannot go on. What it has is kept: the same call goes on from there."""


@dataclass(frozen=True)
class Placing:
    """Where workers are.

    Attributes:
        workers: how many; `None` means one on each machine.
        strategy: Ray's word for how they are placed. `STRICT_SPREAD` allows one on each machine.
        resource: only machines with this custom resource serve, and a worker takes one of it; `None` means `sluice`
            if any machine has that, and otherwise no resource.
        cpus: processors that a worker takes in Ray's books, which keeps other tasks away. The server uses the cores
            that there are.
    """

    workers: int | None = None
    strategy: str = "STRICT_SPREAD"
    resource: str | None = None
    cpus: float = 1.0


@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    requests: int
    # Those with an error instead of an answer.
    failures: int
    # Those whose result was there before.
    skipped: int
    passes: int


def run(
    requests: str | Path,
    results: str | Path,
    serving: Serving,
    placing: Placing | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Answers a file of requests.

    Results are kept in the folder `RESULTS.parts` as they come, and written to `results` in the order of the requests
    when all are there: as Parquet if its name ends so, otherwise as JSONL. A call that was interrupted is made again,
    and goes on. If Ray has not been initialised, `connect` does that.

    Args:
        requests: the file, on the machine where this runs.
        results: where the results go, on the same machine.
        serving: how each machine serves its copy of the model.
        placing: on which machines.
        say: gets a line about progress now and then.

    Raises:
        RequestError: two requests have the same `custom_id`. Nothing has been asked for then.
        RunError: the results cannot be written, no machine can serve, or nothing gets on.
        OSError: the requests cannot be read.
    """
    path, out = Path(requests).absolute(), Path(results).absolute()
    places = scan(path)
    if not ray.is_initialized():
        connect()
    try:
        return _Run(path, places, serving, placing or Placing(), say).until_done(out)
    except RayError as error:
        raise RunError(str(getattr(error, "cause", None) or error)) from error


def connect(address: str | None = None) -> None:
    """Connects to the cluster at an address, or to the one that this machine is in, or else makes one of it alone.

    Raises:
        ConnectionError: there is no cluster at this address.
    """
    try:
        ray.init(address=address or "auto", log_to_driver=False)
    except ConnectionError:
        if address is not None:
            raise
        ray.init(address="local", log_to_driver=False, object_store_memory=OBJECT_BYTES, include_dashboard=False)


class _Run:
    def __init__(
        self, path: Path, places: list[Place], serving: Serving, placing: Placing, say: Callable[[str], None]
    ) -> None:
        self._path, self._places = path, places
        self._serving, self._placing = serving, placing
        self._say = say
        self._told = time.monotonic()

    def until_done(self, out: Path) -> Summary:
        collector = collecting.start(out.with_name(out.name + ".parts"))
        try:
            left = self._left(collector)
            skipped = len(self._places) - len(left)
            for place in left:
                if place.error is not None:
                    ray.get(collector.add.remote(refused(place.error, place.digest)))
            left = [place for place in left if place.error is None]
            passes = idle = 0
            while left:
                before: Progress = ray.get(collector.progress.remote())
                trouble = self._pass(collector, left, before)
                after: Progress = ray.get(collector.progress.remote())
                self._check(after, trouble)
                passes += 1
                idle = 0 if after[:2] != before[:2] else idle + 1
                if idle == MOST_IDLE:
                    raise RunError(f"{MOST_IDLE} passes brought nothing, the last one because of: {trouble}")
                left = self._left(collector)
            failures = ray.get(collector.write.remote(str(out), [place.custom_id for place in self._places]))
            return Summary(len(self._places), failures, skipped, passes)
        finally:
            ray.kill(collector)

    def _left(self, collector: ActorHandle) -> list[Place]:
        names = [(place.custom_id, place.digest) for place in self._places]
        wanted = ray.get(collector.unsettled.remote(names))
        return [place for place, is_wanted in zip(self._places, wanted, strict=True) if is_wanted]

    def _check(self, progress: Progress, trouble: str) -> None:
        if progress.trouble is not None:
            raise RunError(progress.trouble)
        for node, why in progress.broken.items():
            self._say(f"machine {node} is left out: {why}")
        if trouble:
            self._say(f"a pass ended early: {trouble}")

    def _pass(self, collector: ActorHandle, left: list[Place], progress: Progress) -> str:
        """One pass; why it ended early, if it did."""
        group, resource, count = self._place(progress.broken)
        self._say(f"{len(left)} of {len(self._places)} requests to do, {count} workers")
        try:
            for _ in self._pipeline(collector, left, group, resource, count).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                self._tell(collector)
        except RayError as error:
            return str(getattr(error, "cause", None) or error)
        finally:
            # Ends the workers that are left, too.
            remove_placement_group(group)
        return ""

    def _place(self, broken: dict[str, str]) -> tuple[PlacementGroup, dict[str, float], int]:
        """Room for workers on the machines that are there and not broken; what each takes; how many there are."""
        end = time.monotonic() + PLACING
        while True:
            resource, machines = _machines(self._placing, set(broken))
            if not machines:
                why = "\n".join(f"machine {node}: {why}" for node, why in broken.items())
                raise RunError(f"no machine can serve\n{why}" if broken else "no machine has what a worker needs")
            count = self._placing.workers or len(machines)
            if self._placing.strategy == "STRICT_SPREAD":
                count = min(count, len(machines))
            group = _group(self._placing, resource, machines, count)
            # A machine that is lost is still counted for some seconds. Nobody should wait for it longer than that.
            while not group.wait(1):
                if time.monotonic() > end:
                    remove_placement_group(group)
                    raise RunError(f"the cluster had no room for {count} workers within {PLACING:.0f} s")
                if _machines(self._placing, set(broken))[1] != machines:
                    remove_placement_group(group)
                    break
            else:
                return group, resource, count

    def _tell(self, collector: ActorHandle) -> None:
        if time.monotonic() - self._told > TELLING:
            self._told = time.monotonic()
            progress: Progress = ray.get(collector.progress.remote())
            self._say(f"{progress.settled} of {len(self._places)} requests done")

    def _pipeline(
        self, collector: ActorHandle, left: list[Place], group: PlacementGroup, resource: dict[str, float], count: int
    ) -> ray.data.Dataset:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        rows = min(math.ceil(self._serving.at_once / 2), math.ceil(len(left) / (2 * count)))
        blocks = [_block(left[at : at + rows]) for at in range(0, len(left), rows)]
        data = ray.data.from_items(blocks, override_num_blocks=len(blocks))
        context = data.context
        # What a pass leaves is done by the next one, so a lost block does not end this one.
        context.max_errored_blocks = -1
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        with warnings.catch_warnings():
            # There is no other way yet to say where actors are and that their blocks are not tried again;
            # pyproject.toml has the version that takes this one away.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            lines = data.flat_map(_read_block, fn_args=(str(self._path),), num_cpus=0, scheduling_strategy=here)
            return answer(
                lines,
                self._serving,
                workers=count,
                collector=collector,
                num_cpus=self._placing.cpus,
                resources=resource or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
                # A worker comes back where a machine does. Its blocks do not wait for that.
                max_restarts=-1,
                max_task_retries=0,
            )


def answer(
    requests: ray.data.Dataset,
    serving: Serving,
    workers: int,
    collector: ActorHandle | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Answers a data set of requests, for pipelines of your own.

    Args:
        requests: has a column `request` with JSON in the form of OpenAI's batches. Blocks of about half of
            `serving.at_once` rows keep the servers busy: `repartition(target_num_rows_per_block=...)`.
        serving: how each machine serves its copy of the model.
        workers: how many there are.
        collector: where results are kept besides, if anywhere.
        options: for `map_batches`. Without any, a worker takes one of the custom resource `sluice`: give each machine
            with the model one (`ray start --resources '{"sluice": 1}'`).

    Returns:
        A data set with the columns `custom_id`, `failed` and `result` (JSON).
    """
    if not options:
        options = {"num_cpus": 1, "resources": {RESOURCE: 1}}
    return requests.map_batches(
        Worker,
        fn_constructor_kwargs={"serving": serving, "collector": collector},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_tasks_in_flight_per_actor=OVERLAP, max_concurrent_calls_per_actor=OVERLAP
        ),
        **options,
    )


def _block(places: list[Place]) -> dict[str, list[Any]]:
    return {
        "start": [place.start for place in places],
        "length": [place.length for place in places],
        "number": [place.number for place in places],
        "digest": [place.digest for place in places],
    }


def _read_block(block: dict[str, list[Any]], path: str) -> Iterator[dict[str, str]]:
    """The requests of a block, each as a line.

    Raises:
        RequestError: the file is not as it was when the run began.
    """
    for start, length, number, digest in zip(
        block["start"], block["length"], block["number"], block["digest"], strict=True
    ):
        try:
            request = read(Path(path), int(start), int(length), int(number))
        except LineError:
            request = None
        if request is None or request.digest != digest:
            raise RequestError(f"{path}: line {number} has changed since the run began")
        yield {"request": request.line()}


def _machines(placing: Placing, broken: set[str]) -> tuple[dict[str, float], list[str]]:
    """The resource that a worker takes, and the ids of the machines that have what it needs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    name = placing.resource
    if name is None and any(node["Resources"].get(RESOURCE) for node in alive):
        name = RESOURCE
    resource = {name: 1.0} if name else {}
    needed = {"CPU": placing.cpus, **resource}
    fitting = [
        node["NodeID"]
        for node in alive
        if all(node["Resources"].get(what, 0) >= amount for what, amount in needed.items())
    ]
    return resource, [node for node in fitting if node not in broken]


def _group(placing: Placing, resource: dict[str, float], machines: list[str], count: int) -> PlacementGroup:
    """Room for workers on these machines."""
    selector = {"ray.io/node-id": f"in({','.join(machines)})"}
    return placement_group(
        [{"CPU": placing.cpus, **resource}] * count,
        strategy=placing.strategy,
        bundle_label_selector=[selector] * count,
    )
