"""Batches of requests over several machines, each with its own copy of a model that Sluice streams from SSD.

`run` answers a file of requests, and `answer` a data set of Ray Data. docs/BATCH.md of the project says when this pays.
"""

from .job import Placing, RunError, Summary, answer, run
from .requests import RequestError
from .server import ServerError, Serving
from .worker import Worker

__all__ = ["Placing", "RequestError", "RunError", "ServerError", "Serving", "Summary", "Worker", "answer", "run"]
