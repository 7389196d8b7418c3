"""The rows that the hook sees, in the real engine, under many architectures; against transformers.

All engines run one after another in one other process (tests/proxy/architectures.py); here are the expectations.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.architectures import ARCHITECTURES
from tests.warm import Command

TIMEOUT_SECONDS = 1500  # a busy machine; an idle one takes 50

# float32 through other kernels: 4e-6 is seen for the head, 1e-4 for all layers; a wrong row is off by 2 or more.
TOLERANCE = 1e-3
WRONG = 0.5

# Heads that do more than multiply by their weights.
BIASED, SCALED, CAPPED = {"gptj", "phi"}, {"granite", "cohere"}, {"gemma2"}


# One of every sort of head; the others are slow.
FAST = {"llama", "llama, tied", "gemma2", "phi", "granite"}
PARAMETERS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES
]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of `examine` for each architecture that is to be tested."""
    items: list[Any] = request.session.items
    chosen = {item.callspec.params["result"] for item in items if uses_result(item)}
    names = [name for name in ARCHITECTURES if name in chosen]
    directory = tmp_path_factory.mktemp("architectures")
    results_file, log = directory / "results.jsonl", directory / "log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the test looks into the engine
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    process = Command(
        "tests.proxy.architectures", results_file, *names, environment=environment, log=log
    )
    code = process.wait(TIMEOUT_SECONDS)
    lines = results_file.read_text().splitlines() if results_file.exists() else []
    answers = {answer.pop("architecture"): answer for answer in map(json.loads, lines)}
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    missing = {
        "error": f"The process ended with {code} before its turn. The end of its log:\n{tail}"
    }
    return {name: answers.get(name, missing) for name in names}


def uses_result(item: Any) -> bool:
    return "result" in item.fixturenames and item.path == Path(__file__)


@pytest.fixture(params=PARAMETERS)
def result(request: pytest.FixtureRequest, results: dict[str, Any]) -> dict[str, Any]:
    answer = results[request.param] | {"name": request.param}
    assert "error" not in answer, answer["error"]
    return answer


def test_the_head_makes_the_logits_of_the_rows_that_the_hook_sees(result):
    assert result["tapped_steps"] == result["steps"] > 40
    assert result["mixed_steps"] >= 3
    assert result["head_error"] < TOLERANCE
    # The control: with every row replaced by its neighbour, no step passes.
    assert result["rolled_error"] > WRONG
    # Nor does the test pass without the bias, scale or cap, where the head has one.
    assert (result["bare_error"] > WRONG) == (result["name"] in BIASED | SCALED | CAPPED)


def test_server_and_trainer_see_the_same(result):
    """The trainer reads transformers: its lm_head's input and its embedding's weights."""
    assert result["hidden_error"] < TOLERANCE
    assert result["logits_error"] < TOLERANCE
    assert result["table_error"] < TOLERANCE
