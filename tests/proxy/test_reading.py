"""Reading given responses from an engine's prefills, however they are split."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxy.engine import reading
from proxy.engine.reading import Reader
from proxy.positions import Positions, choices, nucleus_of
from proxy.request import ReadRequest, ScoreRequest, WorkerAlignment

HIDDEN, VOCAB, START = 8, 30, 3
SPEC = ReadRequest(start=START, temperature=0.7, top_k=0, top_p=0.9, max_candidates=5)
READ, SCORE = WorkerAlignment(read=SPEC), WorkerAlignment(read=ScoreRequest(start=START))
IDS = {f"r{i}": torch.randint(VOCAB, (12 + i,)).tolist() for i in range(3)}
HEAD = torch.randn(HIDDEN, VOCAB)
PROBE = torch.randn(HIDDEN)
STATES = {name: torch.randn(len(ids), HIDDEN) for name, ids in IDS.items()}


def step_of(
    new: Sequence[str],
    computed: dict[str, int],
    scheduled: dict[str, int],
    alignment: WorkerAlignment = READ,
) -> Any:
    """vLLM's scheduler output: new requests, and where each stands."""
    extra = alignment.to_extra_args()
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=f"{name}-01234567",
                prompt_token_ids=IDS[name],
                num_computed_tokens=computed[name],
                sampling_params=SimpleNamespace(extra_args=extra if name != "r2" else None),
            )
            for name in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[f"{name}-01234567" for name in computed if name not in new],
            num_computed_tokens=[count for name, count in computed.items() if name not in new],
        ),
        finished_req_ids=set(),
        num_scheduled_tokens={f"{name}-01234567": count for name, count in scheduled.items()},
    )


def run_step(
    reader: Reader,
    new: Sequence[str],
    computed: dict[str, int],
    scheduled: dict[str, int],
    alignment: WorkerAlignment = READ,
) -> None:
    reader.schedule(step_of(new, computed, scheduled, alignment))
    if reader.is_busy:
        hidden = [
            STATES[name][computed[name] : computed[name] + count]
            for name, count in scheduled.items()
        ]
        padding = torch.full((5, HIDDEN), torch.nan)  # as of a CUDA graph
        ids = [f"{name}-01234567" for name in scheduled]
        reader.read(ids, list(scheduled.values()), torch.cat([*hidden, padding]))


def read_whole(name: str) -> Positions:
    hidden, targets = STATES[name][START - 1 : -1], torch.tensor(IDS[name][START:])
    owners = torch.zeros_like(targets)
    return choices(hidden, nucleus_of(hidden @ HEAD, SPEC), targets, owners, 1)


def assert_read(reader: Reader, name: str) -> None:
    positions = reader.take([name])[name]
    for actual, expected in zip(positions, read_whole(name), strict=True):
        torch.testing.assert_close(actual, expected)
    assert reader.take([name]) == {}  # once


@pytest.fixture
def reader() -> Reader:
    return Reader(lambda hidden: hidden @ HEAD, reports=True)


def test_whole_and_in_parts_beside_others(reader: Reader) -> None:
    """r2 is not to be read; r0 comes in parts, one of which ends before its response."""
    run_step(reader, ["r0", "r2"], {"r0": 0, "r2": 0}, {"r0": 2, "r2": 14})
    run_step(reader, ["r1"], {"r1": 0, "r0": 2}, {"r1": 13, "r0": 6})
    run_step(reader, [], {"r0": 8}, {"r0": 4})
    assert not reader.is_busy
    assert_read(reader, "r0")
    assert_read(reader, "r1")
    assert reader.take(["r2", "never seen"]) == {}


@pytest.mark.parametrize("is_new", [False, True])  # the second model runner shows it as new
@pytest.mark.parametrize("cached", [0, 2, 6])  # tokens: none, of its prompt, of its response too
def test_a_preempted_request_is_read_once(reader: Reader, is_new: bool, cached: int) -> None:
    run_step(reader, ["r0"], {"r0": 0}, {"r0": 9})
    run_step(reader, [], {}, {})
    run_step(reader, ["r0"] if is_new else [], {"r0": cached}, {"r0": 7 - cached})
    run_step(reader, [], {"r0": 7}, {"r0": 5})
    assert_read(reader, "r0")


def test_a_rank_that_does_not_report_takes_part_and_keeps_nothing() -> None:
    num_rows = []
    reader = Reader(lambda hidden: num_rows.append(len(hidden)), reports=False)
    run_step(reader, ["r0"], {"r0": 0}, {"r0": 12})
    assert num_rows == [12 - START] and not reader.is_busy
    assert reader.take(["r0"]) == {}


def test_what_nobody_asks_for_is_forgotten(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in read_whole("r1"))
    monkeypatch.setattr(reading, "MAX_BYTES", size)
    for name in ("r0", "r1"):
        run_step(reader, [name], {name: 0}, {name: len(IDS[name])})
    assert reader.take(["r0"]) == {}
    assert_read(reader, "r1")


def test_an_aborted_request_is_forgotten(reader: Reader) -> None:
    run_step(reader, ["r0"], {"r0": 0}, {"r0": 4})
    step = step_of([], {}, {})
    step.finished_req_ids = {"r0-01234567"}
    reader.schedule(step)
    assert not reader.is_busy


def test_the_probes_scores(reader: Reader) -> None:
    """r2 is not to be scored; r0 comes in parts, of which the first two end before its response, and is preempted."""
    reader.probe = PROBE
    for _ in range(2):
        run_step(reader, ["r0", "r2"], {"r0": 0, "r2": 0}, {"r0": 2, "r2": 14}, SCORE)
        run_step(reader, ["r1"], {"r1": 0, "r0": 2}, {"r1": 13, "r0": 1}, SCORE)
        run_step(reader, [], {"r0": 3}, {"r0": 5}, SCORE)
    run_step(reader, [], {"r0": 8}, {"r0": 4}, SCORE)
    assert not reader.is_busy
    expected = {name: (STATES[name][START:].mean(0) @ PROBE).item() for name in ("r0", "r1")}
    assert reader.take_scores(["r0", "r1", "r2", "never seen"]) == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )
    assert reader.take_scores(["r0", "r1"]) == {} == reader.take(["r0", "r1"])


def test_a_score_that_nobody_takes_is_forgotten(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_SCORES", 1)
    reader.probe = PROBE
    for name in ("r0", "r1"):
        run_step(reader, [name], {name: 0}, {name: len(IDS[name])}, SCORE)
    assert list(reader.take_scores(["r0", "r1"])) == ["r1"]


def test_without_a_probe_nothing_is_scored(reader: Reader) -> None:
    run_step(reader, ["r0"], {"r0": 0}, {"r0": 12}, SCORE)
    assert not reader.is_busy and reader.take_scores(["r0"]) == {}
