"""lm-evaluation-harness against completions: what it is told of a text is what `sluice logits` computes."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import CHECKPOINT, KEY, MODEL, PATIENCE, PROGRAM, Server, tokens

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY}

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The sea is", "choices": [" calm and blue", " a loud neighbour", " far"], "answer": 1},
    {"question": "A king", "choices": [" sleeps", " must speak to the citizens"], "answer": 0},
    {"question": "Night:", "choices": [" stars", " lanterns and thieves", " the moon", " owls"], "answer": 2},
]


def log_probabilities(ids: list[int], folder: Path) -> list[float]:
    """Of each token but the first, given those before it, from the logits that `sluice logits` writes."""
    out = folder / "logits.npy"
    command = [str(PROGRAM), "logits", str(MODEL), "--ids", ",".join(map(str, ids)), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    data = out.read_bytes()
    begin = 10 + struct.unpack("<H", data[8:10])[0]
    width = (len(data) - begin) // 4 // len(ids)
    values = struct.unpack(f"<{len(ids) * width}f", data[begin:])
    found = []
    for position, token in enumerate(ids[1:]):
        row = values[position * width : (position + 1) * width]
        most = max(row)
        found.append(row[token] - most - math.log(sum(math.exp(value - most) for value in row)))
    return found


def wanted(question: str, choice: str, folder: Path) -> float:
    """The log likelihood of a choice behind a question."""
    whole = tokens(question + choice)
    context = len(tokens(question))
    assert whole[:context] == tokens(question), "no token lies across the border"
    return sum(log_probabilities(whole, folder)[context - 1 :])


@pytest.fixture
def options(server: Server) -> dict[str, Any]:
    """How lm-eval finds the server."""
    return {
        "model": server.model,
        "base_url": f"{server.v1}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(CHECKPOINT),
        "max_length": 2048,
        "num_concurrent": 4,
        "batch_size": 3,
    }


@pytest.mark.parametrize("tokenized", [True, False])
def test_a_task(options: dict[str, Any], tmp_path: Path, tokenized: bool) -> None:
    """A task of several choices, with prompts as tokens and as text: likelihoods and accuracy are right."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    model = LocalCompletionsAPI(**options, tokenized_requests=tokenized)
    results = simple_evaluate(model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    samples = sorted(results["samples"]["questions"], key=lambda sample: sample["doc_id"])
    right = 0
    for question, sample in zip(QUESTIONS, samples, strict=True):
        want = [wanted(question["question"], choice, tmp_path) for choice in question["choices"]]
        found = [float(response[0]) for response in sample["filtered_resps"]]
        assert found == pytest.approx(want, abs=1e-3)
        right += want.index(max(want)) == question["answer"]
    assert results["results"]["questions"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
