"""Every training command, run as a user runs it, at a tiny size; and its errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.models import DEMO
from proxy.checkpoint import ProxyError, identify, load
from tests.training.conftest import run_command
from tests.warm import run
from training import proxy_ppo
from training.console import TrainingError
from training.evaluate import compare
from training.metrics import read_metrics


def test_the_whole_path_makes_what_the_server_loads(work_dir: Path) -> None:
    demo = work_dir / "demo"
    base = identify(str(demo / "model"))
    for name in ("aligned", "polite"):
        proxy = load(demo / "proxies" / name, base=base)
        assert proxy.training["options"]["seed"] == 0
    generation = json.loads((demo / "model" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (1.0, 16, 0.95)


def test_a_proxy_has_less_than_1_percent_of_what_full_rlhf_trains() -> None:
    """An actor and a critic of the LLM's size, in the bundled demo."""
    with safe_open(DEMO / "model" / "model.safetensors", "pt") as weights:
        llm_size = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    proxy = load(DEMO / "proxies" / "aligned", base=identify(str(DEMO / "model")))
    assert proxy.network.num_parameters() < 0.01 * 2 * llm_size


def test_stages_that_are_done_are_skipped(work_dir: Path) -> None:
    mtimes = {path: path.stat().st_mtime_ns for path in (work_dir / "base").iterdir()}
    command = ["training.demo", "--work", work_dir, "--output", work_dir / "demo", "--scale"]
    for arguments, message in (
        (["0.005"], "holds a finished run of training.demo"),
        (["0.01", "--overwrite"], "is of a run with other options (scale)"),
    ):
        refusal = run(*command, *arguments)
        assert refusal.returncode == 2 and message in refusal.stderr, refusal.stderr
    result = run(*command, "0.005", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert "base: done already" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (work_dir / "base").iterdir()} == mtimes


def test_sft(sft: Path) -> None:
    assert read_metrics(sft)[-1]["train_loss"] > 0
    assert (sft / "model.safetensors").exists()


def test_scalar_reward_trains_a_proxy_too(
    work_dir: Path, scalar_reward: Path, tmp_path: Path
) -> None:
    run_command(
        "training.proxy_ppo", "--model", work_dir / "base", "--reward", scalar_reward, "--steps", "1",
        "--prompts", work_dir / "world/preferences.jsonl", "--output", tmp_path, "--episodes", "8",
    )  # fmt: skip
    proxy = load(tmp_path, base=identify(str(work_dir / "base")))
    assert proxy.training["options"]["steps"] == 1


def test_dpo(work_dir: Path, dpo: Path) -> None:
    assert read_metrics(dpo)[-1]["train_loss"] > 0
    assert identify(str(dpo)).fingerprint != identify(str(work_dir / "base")).fingerprint


def test_evaluate(work_dir: Path, scalar_reward: Path, evaluations: list[Path]) -> None:
    by_reference_scorer, by_rewards = (json.loads(path.read_text()) for path in evaluations)
    assert by_reference_scorer["prompts"] == by_rewards["prompts"] == 5
    assert 0 <= by_reference_scorer["gold_win_rate"] <= 1
    # The same answers were compared.
    assert by_reference_scorer["kl_nats_per_response"] == by_rewards["kl_nats_per_response"] > 0
    assert list(by_rewards["rewards"]) == [str(work_dir / "reward-aligned"), str(scalar_reward)]


def test_answers_to_be_judged_blind(work_dir: Path, evaluations: list[Path]) -> None:
    directory = evaluations[0].parent / "blind"
    lines = (directory / "answers.jsonl").read_text().splitlines()
    rows, key = [*map(json.loads, lines)], json.loads((directory / "key.json").read_text())
    prompts = (work_dir / "world/prompts_validation.jsonl").read_text().splitlines()[:5]
    asked = [row["prompt"][-1]["content"] for row in rows]
    assert sorted(asked) == sorted(json.loads(line)["prompt"][-1]["content"] for line in prompts)
    shown = [answer["number"] for row in rows for answer in row["answers"]]
    assert [*map(str, shown)] == [*key]
    for row in rows:
        methods = [method for answer in row["answers"] for method in key[str(answer["number"])]]
        assert sorted(methods) == ["frozen", "proxied"]
        assert len({answer["text"] for answer in row["answers"]}) == len(row["answers"])


def test_scores_are_compared_prompt_by_prompt() -> None:
    figures = compare(torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 2.0]))
    # wins 1, 1/2, 0, 1: variance 11/48; gains 1, 0, -1, 3: variance 35/12
    assert figures == {
        "win_rate": 0.625,
        "win_rate_se": pytest.approx((11 / 48 / 4) ** 0.5),
        "frozen": 1.25,
        "proxied": 2.0,
        "gain": 0.75,
        "gain_se": pytest.approx((35 / 12 / 4) ** 0.5),
    }


def test_one_prompt_has_no_standard_error() -> None:
    figures = compare(torch.tensor([1.0]), torch.tensor([0.0]))
    assert figures["win_rate"] == figures["gain"] == 1
    assert figures["win_rate_se"] is figures["gain_se"] is None


def test_prompts_that_are_not_toy_data_need_a_reward(work_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    result = run(
        "training.evaluate", "--model", work_dir / "base", "--proxy", work_dir / "proxy-aligned", "--prompts", prompts
    )  # fmt: skip
    assert result.returncode == 2
    assert (
        "name rewards to compare by with --reward" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_evaluate_at_strength_0_has_no_divergence(work_dir: Path, tmp_path: Path) -> None:
    result = run(
        "training.evaluate", "--model", work_dir / "base", "--proxy", work_dir / "proxy-aligned", "--strength", "0",
        "--prompts", work_dir / "world/prompts_validation.jsonl", "--num-prompts", "5",
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["acceptance_rate"] == 1
    assert figures["kl_nats_per_response"] == pytest.approx(0, abs=1e-3)


BAD_LINES = {
    '{"prompt": [': "line 2: not JSON",
    "[1, 2]": "line 2: expected a JSON object, got list",
    '{"messages": []}': "line 2: the field 'prompt' is missing",
    '{"prompt": 5}': "line 2: prompt: expected a list of chat messages",
    '{"prompt": [{"role": "user"}]}': "line 2: prompt: a message is",
    '{"prompt": [{"role": "robot", "content": "x"}]}': "role 'robot' is not one of",
}


def test_bad_input_ends_in_one_line_and_exit_code_2(work_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    good = '{"prompt": [{"role": "user", "content": "hello"}]}'
    prompts.write_text(f"{good}\n{next(iter(BAD_LINES))}\n")
    good_file = tmp_path / "fine.jsonl"
    good_file.write_text(good)
    common = ("--model", work_dir / "base", "--output", tmp_path / "out")
    reward = ("--reward", work_dir / "reward-aligned")
    result = run("training.proxy_ppo", "--prompts", prompts, *reward, *common)
    assert result.returncode == 2
    assert "line 2: not JSON" in result.stderr
    assert "Traceback" not in result.stderr
    for change, message in (
        ({"prompts": str(tmp_path / "none")}, "no such file"),
        ({"reward": str(work_dir / "world")}, "is no reward"),
        ({"model": str(tmp_path / "no")}, "neither a directory"),
    ):
        defaults = {
            "model": str(work_dir / "base"),
            "prompts": str(good_file),
            "output": tmp_path / "out",
        }
        options = proxy_ppo.Options(
            **{"reward": str(work_dir / "reward-aligned")} | defaults | change
        )
        with pytest.raises((TrainingError, ProxyError), match=message):
            proxy_ppo.main(options)
    assert not (tmp_path / "out").exists()
