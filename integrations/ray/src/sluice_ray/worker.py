"""The actor that Ray Data starts on each machine: it asks the server beside it for many requests at once."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from .requests import LineError, Request, parse
from .results import Result, answered, as_json, failed, refused
from .server import Address, Server, ServerError, Serving

logger = logging.getLogger(__name__)

# Seconds before the second attempt. Each pause is twice the one before, a little more or less, so that not all come
# at once.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# Seconds between two looks whether the server is there again.
LOOK = 0.05
# Seconds to come again when the server's queue is full and it does not say when.
BUSY_PAUSE = 10.0
# Statuses that say nothing about the request.
PASSING = frozenset({408, 500, 502, 503, 504})
BUSY = 429
# What the types of errors mean that come in a response whose status was sent before it was known.
LATE_STATUS = {
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": BUSY,
    "server_error": 500,
    "not_implemented_error": 501,
}


class Gate:
    """Lets so many in at a time, or one alone."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = asyncio.Semaphore(places)
        # Two who each wait for all places would wait for each other.
        self._alone = asyncio.Lock()

    @asynccontextmanager
    async def enter(self, alone: bool) -> AsyncIterator[None]:
        """Waits for a place, or for all of them."""
        taken = 0
        try:
            if alone:
                async with self._alone:
                    for _ in range(self._places):
                        await self._free.acquire()
                        taken += 1
            else:
                await self._free.acquire()
                taken = 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()


@dataclass(frozen=True)
class _Reply:
    status: int
    body: dict[str, Any]
    # Seconds after which a full queue may have room.
    retry_after: float


class Worker:
    """A class for `ray.data.Dataset.map_batches`, with `batch_format="pyarrow"` and one actor on each machine.

    The column `request` has requests as JSON, in the form of OpenAI's batches, each with a `custom_id`. The result
    has the columns `custom_id`, `failed` and `result`, the last one as JSON in the same form. Calls may overlap: what
    counts is how many requests the server has at a time.
    """

    def __init__(self, serving: Serving, collector: ActorHandle | None = None) -> None:
        """Starts the server.

        Args:
            serving: how the model is served.
            collector: keeps results, and knows which requests have one already.

        Raises:
            ServerError: the server does not start.
        """
        self._serving = serving
        self._collector = collector
        self._node = "" if collector is None else ray.get_runtime_context().get_node_id()
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate: Gate | None = None
        # How many are finding out whether the server is still there.
        self._looks = 0
        self._server = Server(serving)
        try:
            self._server.start()
            if collector is not None:
                ray.get(collector.join.remote(self._node, self._server.model()))
        except ServerError as error:
            if collector is not None:
                ray.get(collector.leave.remote(self._node, str(error)))
            raise
        except BaseException:
            self._server.close()
            raise

    async def close(self) -> None:
        """Ends the server."""
        if self._session is not None:
            await self._session.close()
        self._server.close()

    def __del__(self) -> None:
        # Ray Data drops its actors, and says nothing to what is in them.
        if hasattr(self, "_server"):
            self._server.close()
        loop = getattr(self, "_loop", None)
        if loop is not None and loop.is_running():
            asyncio.run_coroutine_threadsafe(self.close(), loop)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answers a block of requests. Those that have a final result already are left out.

        Raises:
            ServerError: the server cannot run here any more.
        """
        requests: list[Request] = []
        results: list[Result] = []
        for number, line in enumerate(batch.column("request").to_pylist(), 1):
            try:
                requests.append(parse(line, number))
            except LineError as error:
                results.append(refused(error, ""))
        if self._collector is not None:
            names = [(request.custom_id, request.digest) for request in requests]
            wanted = await self._collector.unsettled.remote(names)
            requests = [request for request, is_wanted in zip(requests, wanted, strict=True) if is_wanted]
        tasks = [asyncio.create_task(self._settle(request)) for request in requests]
        try:
            results += await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        return pa.table(
            {
                "custom_id": pa.array([result.custom_id for result in results], pa.string()),
                "failed": pa.array([result.failed for result in results], pa.bool_()),
                "result": pa.array([as_json(result.line) for result in results], pa.string()),
            }
        )

    async def _settle(self, request: Request) -> Result:
        try:
            result = await self._ask(request)
        except ServerError as error:
            if self._collector is not None:
                await self._collector.leave.remote(self._node, str(error))
            raise
        if self._collector is not None:
            await self._collector.add.remote(result)
        return result

    async def _ask(self, request: Request) -> Result:
        """Asks until there is an answer, a refusal, or no attempt left.

        A request can kill the server, and with it all that are being answered. So the last attempt is made with
        nothing else running, where it can only harm itself.
        """
        if self._gate is None:
            self._gate = Gate(self._serving.at_once)
        attempts, attempt, trouble = self._serving.attempts, 1, ""
        while attempt <= attempts:
            alone = attempt == attempts > 1
            async with self._gate.enter(alone):
                address = await self._address()
                try:
                    reply = await self._post(address, request)
                except aiohttp.ClientConnectorError as error:
                    # There was nobody to try it.
                    self._server.kill(address)
                    trouble, pause, attempt = f"no connection: {error!r}", 0.0, attempt - 1
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    trouble, pause = f"no answer: {error!r}", _pause(attempt)
                    if isinstance(error, TimeoutError | asyncio.TimeoutError):
                        self._server.kill(address)
                    else:
                        await self._look(address)
                else:
                    if reply.status != BUSY and reply.status not in PASSING:
                        self._server.note_success()
                        return answered(request, reply.status, reply.body)
                    trouble, pause = f"status {reply.status}: {as_json(reply.body)}", _pause(attempt)
                    if reply.status == BUSY:
                        # It was not tried: this is no attempt.
                        attempt, pause = attempt - 1, reply.retry_after
            logger.warning("request %s: %s", request.custom_id, trouble)
            attempt += 1
            if attempt <= attempts:
                await asyncio.sleep(pause)
        return failed(request, f"{trouble}, in the last of {attempts} attempts")

    async def _address(self) -> Address:
        # No thread waits for the server: it would keep the process from ending.
        while self._looks > 0 or (address := self._server.address_now()) is None:
            await asyncio.sleep(LOOK)
        return address

    async def _look(self, address: Address) -> None:
        """Finds out whether the server is there, after a connection has ended without an answer.

        A process that dies takes connections for a moment after it has ended others. Nobody is sent there meanwhile:
        it would count as an attempt, though nobody tried it.
        """
        self._looks += 1
        try:
            async with self._connections().get(address.url + "/health"):
                pass
        except (aiohttp.ClientError, OSError):
            self._server.kill(address)
        finally:
            self._looks -= 1

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Long answers are no fault; silence is one. How many connections there are is up to the gate.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self._serving.silence)
            connector = aiohttp.TCPConnector(limit=0)
            self._loop = asyncio.get_running_loop()
            headers = {"Authorization": f"Bearer {self._server.key}"}
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=connector, headers=headers, trust_env=False
            )
        return self._session

    async def _post(self, address: Address, request: Request) -> _Reply:
        async with self._connections().post(address.url + request.url, json=request.body) as response:
            body = json.loads(await response.read())
            if not isinstance(body, dict):
                raise ValueError(f"the answer is no object: {str(body)[:200]}")
            return _Reply(_status(response.status, body), body, _seconds(response.headers.get("retry-after")))


def _status(status: int, body: dict[str, Any]) -> int:
    """The status of a response. One that takes long begins before it is known, with 200, and may end with an error."""
    error = body.get("error")
    if status != 200 or not isinstance(error, dict):
        return status
    if "type" in error:
        return LATE_STATUS.get(error["type"], 400)
    # A response of the Responses API that has failed.
    return {"server_error": 500, "rate_limit_exceeded": BUSY}.get(error.get("code", ""), 400)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else BUSY_PAUSE


def _pause(attempt: int) -> float:
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1)) * random.uniform(0.8, 1.2)
