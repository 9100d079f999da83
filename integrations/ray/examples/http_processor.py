#!/usr/bin/env python3
"""The second way: Ray's own HTTP processor (`ray.data.llm`) in front of a server that runs already.

    sluice serve r1.sluice &
    pip install 'sluice-ray[llm]'
    python examples/http_processor.py prompts.txt answers/ --url http://127.0.0.1:8080/v1/chat/completions

It suits one server, or several behind one address, and a pipeline that is built on `ray.data.llm` anyway. What
`sluice-ray` has and this does not: a server on each machine, results that are kept one by one, and a bad request that
is an error of its own; here it ends the run, or a whole batch is lost to it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import aiohttp
import ray
import ray.data
from ray.data.llm import HttpRequestProcessorConfig, build_processor

from sluice_ray.requests import seed_of


def session() -> aiohttp.ClientSession:
    """A client that waits for long answers; without it, five minutes are the most."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_read=120))


def payload(row: dict[str, Any], most: int) -> dict[str, Any]:
    """What is asked for a line of the input. The seed follows from the text, so that each run answers the same."""
    text = row["text"]
    return {
        "payload": {
            "messages": [{"role": "user", "content": text}],
            "max_completion_tokens": most,
            "seed": seed_of(text),
        },
        "prompt": text,
    }


def text_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a response. One that took long begins with status 200 and may still hold an error."""
    response = row["http_response"]
    if response.get("error"):
        raise RuntimeError(f"{row['prompt']!r}: {response['error']}")
    return {"prompt": row["prompt"], "answer": response["choices"][0]["message"]["content"]}


def answers(prompts: ray.data.Dataset, url: str, key: str, at_once: int, most: int) -> ray.data.Dataset:
    """The answers to a data set of prompts, which has a column `text`."""
    config = HttpRequestProcessorConfig(
        url=url,
        headers={"Authorization": f"Bearer {key}"},
        # The processor sends the requests of a batch one after the other, so what the server has at a time is the
        # number of workers.
        batch_size=1,
        concurrency=at_once,
        max_retries=5,
        session_factory=session,
    )
    return build_processor(config, preprocess=lambda row: payload(row, most), postprocess=text_of)(prompts)


def main() -> None:
    """Parses, runs, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="a text file with a prompt on each line")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the answers go, as Parquet")
    parser.add_argument("--url", required=True)
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="requests at a time [default: %(default)s]")
    parser.add_argument("--most", type=int, default=300, metavar="N", help="tokens of an answer [default: %(default)s]")
    options = parser.parse_args()
    prompts = ray.data.read_text(str(options.prompts))
    # One request is a block, so that the workers have something to divide.
    prompts = prompts.repartition(target_num_rows_per_block=1)
    key = os.environ.get("SLUICE_API_KEY", "none")
    answers(prompts, options.url, key, options.at_once, options.most).write_parquet(str(options.folder.absolute()))


if __name__ == "__main__":
    main()
