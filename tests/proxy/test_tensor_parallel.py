"""Two tensor-parallel ranks on the CPU: each samples by itself, and all must sample the same tokens.

The engine runs in a process group of its own (tests/proxy/tensor_parallel.py); here are the expectations.
"""

import json
import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

import pytest

from tests.warm import Command

TIMEOUT_SECONDS = 1500  # a busy machine; an idle one takes 25
NUM_TOKENS = 24
WITHOUT_PROXY, WITH_PROXY = range(4), range(4, 12)  # requests, in their order
UNSEEDED = [0, 3, 4, 5, 8]  # and random
MAX_REJECTIONS_0 = 10


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tensor_parallel")
    result, log = directory / "observed.json", directory / "log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default vLLM needs a NUMA node for each rank
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    process = Command(
        "tests.proxy.tensor_parallel",
        result,
        environment=environment,
        new_session=True,  # a group of its own: no rank outlives the tests
        log=log,
    )
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    assert result.exists(), f"It ended with {process.returncode}. The end of its log:\n{tail}"
    return json.loads(result.read_text())


def drawn_texts(run: dict[str, Any], rank: int) -> list[list[int]]:
    """A rank's tokens for each request, without those of unfinished prefills."""
    texts: dict[str, list[int]] = {}
    for req_ids, is_unfinished, tokens in run["drawn"][rank]:
        for req_id, unfinished, token in zip(req_ids, is_unfinished, tokens, strict=True):
            if not unfinished:
                texts.setdefault(req_id.rsplit("-", 1)[0], []).append(token)
    return [texts[req_id] for req_id in run["ids"]]


@pytest.mark.parametrize("run", ["together", "after_failures"])
def test_all_ranks_draw_the_same(observed, run):
    ranks = observed[run]["drawn"]
    assert len(ranks) == 2 and len(ranks[0]) > NUM_TOKENS
    assert any(any(is_unfinished) for _, is_unfinished, _ in ranks[0])
    assert ranks[0] == ranks[1]
    texts = observed[run]["texts"]
    assert drawn_texts(observed[run], 0) == drawn_texts(observed[run], 1) == texts
    assert [len(text) for text in texts] == [NUM_TOKENS] * 12


def test_ranks_whose_dice_differ_would_be_noticed(observed):
    """The control: with different generators the unseeded rows differ, and no others."""
    run = observed["apart"]
    pairs = zip(drawn_texts(run, 0), drawn_texts(run, 1), strict=True)
    assert [i for i, (first, second) in enumerate(pairs) if first != second] == UNSEEDED


@pytest.mark.parametrize("run", ["together", "after_failures"])
def test_only_the_first_rank_counts(observed, run):
    first, second = observed[run]["counts"]
    assert second == {}
    ids = [req_id.rsplit("-", 1)[0] for req_id in first]
    assert ids == [observed[run]["ids"][i] for i in WITH_PROXY]
    for counts in first.values():
        assert counts["accepted"] + counts["forced"] == NUM_TOKENS
    rejected = [counts["rejected"] for counts in first.values()]
    assert rejected.pop(MAX_REJECTIONS_0 - len(WITHOUT_PROXY)) == 0 < min(rejected)


def test_every_rank_has_the_whole_candidate_table(observed):
    """Embeddings are shared out over the ranks, and an odd vocabulary is padded."""
    assert max(observed["table_errors"]) < 1e-5
    assert observed["loaded"][0] == observed["loaded"][1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("finds no checkpoint", "proxy/config.json cannot be read"),
        ("has no room: read", "no room"),
        ("has no room: table", "no room"),
    ],
)
def test_a_load_that_fails_on_one_rank_fails_on_all(observed, rank, case, message):
    """The answers to later calls belong to those calls."""
    failure = observed["failures"][f"rank {rank} {case}"]
    assert message in failure["load"] and f"tensor-parallel rank {rank}" in failure["load"]
    names = [[entry["name"] for entry in entries] for entries in failure["list"]]
    assert names == [["one", "two"], ["one", "two"]]
    assert "No proxy 'half' is loaded" in failure["unload"]
