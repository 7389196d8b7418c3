"""The benchmarks that need no server, run at a tiny size. Their measurements are not checked here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import dial, hook, literal_loop, throughput
from benchmarks.models import DEMO
from training.policy import Decoding


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_hook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "hook.json"
    hook.main(
        hook.Options(
            rows=(1, 5), vocab_sizes=(40, 300), hidden_size=16, max_candidates=4, width=8,
            proxies=2, seeded=True, seconds=0.01, output=output, samplings=tuple(hook.SAMPLINGS),
        )
    )  # fmt: skip
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == 2 * 2 * 5
    assert {(case["vocab_size"], case["rows"]) for case in cases} == {
        (40, 1), (40, 5), (300, 1), (300, 5)
    }  # fmt: skip
    assert all(0 < case["share_of_step"] < 1 for case in cases)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + len(cases)


def test_the_plain_draw_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(200, 1)
    scratch, half = torch.empty_like(logits), torch.full((200,), 0.5)
    torch.manual_seed(0)
    # softmax: 0.03, 0.64, 0.09, 0.24
    assert {*hook.plain_draw(logits, None, half, scratch).tolist()} == {1}
    top_k = torch.full((200,), 2)
    # All 200 draws are equal with probability 0.73 ** 200 < 1e-27.
    assert {*hook.plain_draw(logits, top_k, torch.ones(200), scratch).tolist()} == {1, 3}


def test_literal_loop(tmp_path: Path) -> None:
    output = tmp_path / "literal.json"
    literal_loop.main(literal_loop.Options(strengths=(8.0,), num_prompts=3, output=output))
    (row,) = json.loads(output.read_text())
    literal, one_pass = row["literal"], row["one_pass"]
    assert literal["rejected"] > 0
    assert one_pass["rejected"] > 0
    # One forward for the prompt and one per candidate. The last token's forward serves only the decision about it.
    assert literal["forwards"] == 3 + literal["tokens"] + literal["rejected"]
    assert one_pass["forwards"] == one_pass["tokens"]


def test_dial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = DEMO / "proxies" / "aligned"
    dial.main(
        dial.Options(
            proxies=(proxy,),
            strengths=(0.0, 1.0),
            temperatures=(0.0, 1.0),
            num_prompts=3,
            decoding=Decoding(max_new_tokens=4),
            output=tmp_path,
        )
    )
    figures = json.loads((tmp_path / "dial.json").read_text())
    *greedy, frozen, aligned = figures["points"]
    assert [point["temperature"] for point in (*greedy, frozen, aligned)] == [0, 0, 1, 1]
    assert not any("kl" in point for point in greedy)
    assert frozen["kl"] == pytest.approx(0.0, abs=1e-5)
    assert aligned["kl"] > 0.01
    assert len(capsys.readouterr().out.strip().splitlines()) == (2 + 2) + 1 + (2 + 2) + 2
    for name in ("dial", "temperature"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # tests/training compares the same rollouts
def test_rollout(tmp_path: Path) -> None:
    """In a process of its own: an engine changes the one that it runs in."""
    output = tmp_path / "rollout.json"
    command = [sys.executable, "-m", "benchmarks.rollout", "--dtype", "float32"]
    command += ["--episodes", "5", "--rounds", "2", "--decoding.max-new-tokens", "4"]
    result = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    assert len(figures["rounds"]) == 2
    for round_figures in figures["rounds"]:
        assert round_figures["same_responses"] == 1
        assert 5 <= round_figures["tokens"] <= 20
    assert len(result.stdout.strip().splitlines()) == 3


def test_ratios() -> None:
    ratios = throughput.compare([2.0, 3.0, 4.0], [1.0, 2.0, 4.0])
    assert ratios["ratio"] == 1.5  # of the medians
    assert ratios["paired_median"] == 1.5  # of 2, 1.5 and 1
    assert (ratios["paired_min"], ratios["paired_max"]) == (1.0, 2.0)
    assert (ratios["paired_quartile_low"], ratios["paired_quartile_high"]) == (1.25, 1.75)
