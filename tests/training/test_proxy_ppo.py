"""Proxy training as it is run: killed and resumed, in two processes, with every kind of reward, and what stops it."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import run_command, run_on_two_processes
from tests.warm import Command, run
from training.console import TrainingError
from training.metrics import CURVES_FILE, read_metrics
from training.policy import Decoding
from training.ppo_trainer import PATIENCE, refuse_constant_reward
from training.proxy_ppo import Options, main, refuse_idle_proxy
from training.run_marker import MARKER
from training.state import STATE_FILE
from training.trackers import EVENTS_DIRECTORY


def arguments_of(work_dir: Path, output: Path, *extra: str | Path) -> list[str]:
    """The arguments of a short run on the tiny base model."""
    common = (
        "--model", work_dir / "base", "--reward", work_dir / "reward-aligned", "--prompts",
        work_dir / "world/prompts.jsonl",
        "--episodes", "8", "--decoding.max-new-tokens", "12", "--output", output, *extra,
    )  # fmt: skip
    return ["training.proxy_ppo", *map(str, common)]


@pytest.fixture
def arguments(work_dir: Path) -> Callable[..., list[str]]:
    return partial(arguments_of, work_dir)


@pytest.fixture
def options(work_dir: Path, tmp_path: Path) -> Callable[..., Options]:
    """The same run, in this process."""
    defaults = {
        "model": str(work_dir / "base"),
        "reward": str(work_dir / "reward-aligned"),
        "prompts": str(work_dir / "world/prompts.jsonl"),
        "output": tmp_path / "proxy",
        "episodes": 8,
        "decoding": Decoding(max_new_tokens=12),
    }
    return lambda **settings: Options(**defaults | settings)


def test_a_run_killed_at_any_moment_ends_with_the_weights_of_an_unbroken_one(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    steps = ("--steps", "5", "--save-every", "2")
    unbroken = run(*arguments(tmp_path / "unbroken", *steps))
    assert unbroken.returncode == 0, unbroken.stderr
    broken = tmp_path / "broken"
    # Before the first state, and after it.
    for rows, stop_signal, code in ((1, signal.SIGKILL, -9), (3, signal.SIGINT, 130)):
        process = Command(*arguments(broken, *steps, "--resume"))
        while len(read_metrics(broken)) < rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(stop_signal)
        _, errors = process.communicate()
        assert process.wait() == code, errors
        assert not (broken / "proxy.safetensors").exists()
    assert errors.endswith(
        f"interrupted: saved up to update 2 of 5 in {broken}; the same command continues with --resume\n"
    )
    assert "Traceback" not in errors
    assert (broken / STATE_FILE).exists()
    resumed = run(*arguments(broken, *steps, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update 2" in resumed.stdout
    resumed_weights, expected_weights = (
        load_file(tmp_path / name / "proxy.safetensors") for name in ("broken", "unbroken")
    )
    assert resumed_weights.keys() == expected_weights.keys()
    assert all(
        torch.equal(resumed_weights[name], expected_weights[name]) for name in resumed_weights
    )
    logs = [read_metrics(tmp_path / name) for name in ("broken", "unbroken")]
    timeless = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in log]
        for log in logs
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 5
    assert (broken / CURVES_FILE).stat().st_size > 10_000
    assert list((broken / EVENTS_DIRECTORY).iterdir())
    refusal = run(*arguments(broken, *steps, "--resume", "--learning-rate", "0.1"))
    assert refusal.returncode == 2
    assert "other options (learning_rate)" in refusal.stderr


def test_a_damaged_state_is_named(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    first_run = run(*arguments(tmp_path, "--steps", "1"))
    assert first_run.returncode == 0, first_run.stderr
    marker = tmp_path / MARKER  # as if it had been killed before its end
    marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
    (tmp_path / STATE_FILE).write_bytes(b"not safetensors")
    result = run(*arguments(tmp_path, "--steps", "1", "--resume"))
    assert result.returncode == 2
    assert f"{STATE_FILE} is damaged" in result.stderr


# In float32, where no decision depends on the batch of a response. 7 responses cannot be halved.
COMMON = ("--steps", "3", "--dtype", "float32", "--episodes", "7")


@pytest.fixture(scope="module")
def single_process_run(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process with these options, with transformers."""
    output = tmp_path_factory.mktemp("one")
    run_command(*arguments_of(work_dir, output, *COMMON))
    return output


@pytest.mark.parametrize(
    "rollout",
    [pytest.param("transformers", marks=pytest.mark.slow), "vllm"],  # torchrun: 20 s of imports
)
def test_two_processes_give_the_result_of_one(
    arguments: Callable[..., list[str]], single_process_run: Path, tmp_path: Path, rollout: str
) -> None:
    command = arguments(tmp_path, *COMMON, "--rollout", rollout)
    if rollout == "transformers":  # as a user starts them
        # On a CPU `accelerate launch` starts one process, whatever number is given.
        run_command(
            "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *command
        )
    else:
        run_on_two_processes(*command)
    assert_trained_alike(tmp_path, single_process_run)


def assert_trained_alike(actual: Path, expected: Path) -> None:
    """Up to rounding, which Adam may enlarge; a learning rate of 2e-3 moves a weight by much more."""
    actual_weights, expected_weights = (
        load_file(directory / "proxy.safetensors") for directory in (actual, expected)
    )
    assert actual_weights.keys() == expected_weights.keys()
    for name, value in actual_weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=1e-4, atol=1e-4)
    for actual_row, expected_row in zip(read_metrics(actual), read_metrics(expected), strict=True):
        assert actual_row["decisions"] == expected_row["decisions"] > 20
        assert actual_row["reward"] == pytest.approx(expected_row["reward"], abs=1e-6)


def test_rollouts_in_vllm_train_alike_and_leave_nothing_behind(
    arguments: Callable[..., list[str]], single_process_run: Path, tmp_path: Path
) -> None:
    """The run is killed after its first update, and goes on."""
    output = tmp_path / "vllm"
    command = arguments(output, *COMMON, "--save-every", "1", "--resume", "--rollout", "vllm")
    # It may be killed beside a temporary file.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = Command(*command, environment=environment, new_session=True)
    while not (output / STATE_FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update" in resumed.stdout
    assert_trained_alike(output, single_process_run)
    with pytest.raises(ProcessLookupError):  # its child processes are gone, too
        os.killpg(process.pid, 0)


REWARD = """
def short(prompts, completions):
    assert prompts[0][-1]["role"] == "user" and isinstance(completions[0], str)
    return [-len(text) for text in completions]

def broken(prompts, completions):
    return [float("nan")] * len(completions)

def few(prompts, completions):
    return [1.0]

def same(prompts, completions):
    return [3.0] * len(completions)
"""


@pytest.mark.parametrize("reward", ["my_reward:short", "self-judge"])
def test_rewards(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # In bfloat16 an LLM that has learned so little may judge all answers equal.
    output = tmp_path / "proxy"
    run_command(*arguments(output, "--steps", "1", "--reward", reward, "--dtype", "float32"))
    (row,) = read_metrics(output)
    assert row["reward_std"] > 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("my_reward:broken", "8 of 8 responses is not a finite number"),
        ("my_reward:few", "returned 1 scores for 8 completions"),
        ("my_reward:same", "every response the same score"),
        ("my_reward:none", "cannot load the reward"),
        ("no_such_model", "is no reward"),
    ],
)
def test_rewards_that_cannot_be_learned_from(
    options: Callable[..., Options],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
    message: str,
) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=message):
        main(options(steps=1, reward=reward))


def test_long_prompts_are_left_out_and_counted(
    options: Callable[..., Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ("is my dog worth keeping", "is my dog " * 200)
    rows = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in texts]
    prompts.write_text("\n".join(rows))
    run_options = options(steps=1, prompts=str(prompts), max_prompt_tokens=100)
    main(run_options)
    assert "left out 1 of 2 prompts of over 100 tokens" in capsys.readouterr().out
    prompts.write_text(rows[1])
    with pytest.raises(TrainingError, match="no prompt is within"):
        main(replace(run_options, overwrite=True))
    assert (
        run_options.output / "proxy.safetensors"
    ).exists()  # a mistake in the data keeps the earlier proxy


def rows_with(**values: list[float]) -> list[dict[str, Any]]:
    defaults = {"reward_std": 1.0, "decisions": 9, "acceptance_rate": 0.8}
    count = len(next(iter(values.values())))
    return [defaults | {name: value[i] for name, value in values.items()} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_with(reward_std=[0.0]), "same score"),
        (rows_with(reward_std=[1.0, 0, 0, 0]), "same score"),
        (rows_with(decisions=[0, 0, 0]), "single candidate"),
        (rows_with(acceptance_rate=[0.5, 0, 0, 0]), "rejects everything"),
        (rows_with(acceptance_rate=[1, 1, 1]), "rejects nothing"),
        (rows_with(acceptance_rate=[1, 1]), None),
        (rows_with(acceptance_rate=[0, 0.1, 0, 0]), None),
        (rows_with(reward_std=[1.0, 0, 0]), None),
    ],
)
def test_a_run_with_nothing_left_to_learn_stops(
    rows: list[dict[str, Any]], message: str | None
) -> None:
    def check() -> None:
        refuse_constant_reward(rows)
        refuse_idle_proxy(rows[-PATIENCE:])

    if message is None:
        check()
    else:
        with pytest.raises(TrainingError, match=message):
            check()
