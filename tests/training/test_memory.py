"""The memory that training needs by count, against tensors of real steps; a machine's free memory; and their use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.training.memory import TensorBytes
from tests.training.models import data_rows, save_model
from training import dpo, machine, memory, proxy_ppo, reward_model, sft
from training.adapters import lora_config
from training.console import TrainingError
from training.logprobs import add_logprobs
from training.machine import Machine, cgroup_free
from training.memory import Need, Plan, Work, fit, need, responses_at_once
from training.models import load_model
from training.sizes import sizes_of

# Of the count: the backward pass's temporary tensors are estimated, which matters with so few layers.
LOWER, UPPER = 0.7, 1.2
GB = 10**9


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model so wide that the count covers nearly all tensors."""
    directory = tmp_path / "model"
    save_model("llama", directory)  # for its tokenizer
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=2, vocab_size=300
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("lora_rank", "bf16", "checkpointing"),
    [(0, True, False), (0, False, False), (0, True, True), (4, True, False), (4, True, True)],
)
def test_the_tensors_of_a_step(
    model_dir: Path, lora_rank: int, bf16: bool, checkpointing: bool
) -> None:
    rows, tokens = 8, 128
    work = Work(
        model=str(model_dir),
        longest=tokens,
        lora_rank=lora_rank,
        bf16=bf16,
        checkpointing=checkpointing,
    )
    needed = need(work)
    model: Any = load_model(str(model_dir), dtype=torch.bfloat16 if lora_rank else torch.float32)[0]
    add_logprobs(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if lora_rank:
        model = get_peft_model(model, lora_config(lora_rank))
        if checkpointing:
            model.enable_input_require_grads()
    model.train()
    num_trained = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    frozen = sum(
        parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad
    )
    assert needed.staying == frozen + 16 * num_trained
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()
    inputs = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long), "attention_mask": mask}
    positions = torch.arange(8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logprobs = model(**inputs, places=positions, targets=positions)
        logprobs.sum().backward()

    step()  # makes the gradients
    with TensorBytes() as tensor_bytes:
        step()
    head = 12 * min(2**25, 300 * tokens)  # the count's, for all positions of a sequence
    counted = needed.fixed - head + needed.per_token * rows * tokens
    assert LOWER * counted < tensor_bytes.peak < UPPER * counted


def test_what_a_container_leaves(tmp_path: Path) -> None:
    cgroup_file, root = tmp_path / "cgroup", tmp_path / "fs"

    def write(directory: str, **files: Any) -> None:
        (root / directory).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / directory / name.replace("__", ".")).write_text(f"{text}\n")

    cgroup_file.write_text("0::/a/b\n")
    assert cgroup_free(cgroup_file, root) is None
    write("a/b", memory__max="max", memory__current=5 * GB, memory__stat="inactive_file 0")
    assert cgroup_free(cgroup_file, root) is None
    write(
        "a", memory__max=16 * GB, memory__current=6 * GB, memory__stat=f"anon 3\ninactive_file {GB}"
    )
    assert cgroup_free(cgroup_file, root) == 11 * GB
    write("a/b", memory__max=8 * GB)
    assert cgroup_free(cgroup_file, root) == 3 * GB
    # version 1, as docker mounts it: the path inside is not there, its root is the container's
    cgroup_file.write_text("9:cpu:/x\n4:memory:/docker/1234\n")
    write(
        "memory",
        memory__limit_in_bytes=4 * GB,
        memory__usage_in_bytes=GB,
        memory__stat="total_inactive_file 0",
    )
    assert cgroup_free(cgroup_file, root) == 3 * GB
    write("memory", memory__limit_in_bytes=2**63 - 4096)
    assert cgroup_free(cgroup_file, root) is None


def test_processes_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 8e9}))
    monkeypatch.setattr(machine, "cgroup_free", lambda *paths: None)
    single = machine.machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = machine.machine()
    assert single.free - shared.free == pytest.approx(6e9, abs=1e8)
    assert shared.what == "of memory free, shared by 4 processes"


def test_tokens_at_once(model_dir: Path) -> None:
    work = Work(model=str(model_dir), longest=100, least=200)
    needed = need(work)

    def fits(tokens: float) -> tuple[Plan | None, Need]:
        return fit(work, Machine("cpu", needed.of(int(tokens)) / machine.USED, ""))

    planned, _ = fits(700)
    assert planned == Plan(700, False) or planned == Plan(699, False)
    # Fewer than are needed: activations are computed again.
    planned, needed_with_checkpointing = fits(150)
    assert planned is not None and planned.checkpointing and planned.tokens >= 200
    assert needed_with_checkpointing.of(planned.tokens) <= needed.of(150)
    assert fit(work, Machine("cpu", 1e8, ""))[0] is None
    generous, _ = fit(work, Machine("cpu", 1e12, ""))
    assert generous is not None
    assert generous.tokens == max(2048, int(1e9 / needed.per_token))


def test_responses_at_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(str(model_dir))

    def rows(free: float) -> int:
        monkeypatch.setattr(memory, "machine", lambda: Machine("cpu", free, "free"))
        return responses_at_once(sizes, 64, prompt=512, response=64, size=2, other_bytes=0)

    assert rows(1e12) == 64
    assert rows(0.7e9) in (4, 8, 16, 32)
    with pytest.raises(TrainingError, match=r"one response take .* of 0\.3 GB free a tenth"):
        rows(3e8)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    names = {}
    for kind in ("sft", "preferences", "prompts"):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data_rows(kind)))
        names[kind] = str(path)
    return names


def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    model_dir: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine", lambda: Machine("cpu", 2e8, "of memory free"))

    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    for module in ("dpo", "supervised", "on_policy"):
        monkeypatch.setattr(f"training.{module}.load_model", load)
    monkeypatch.setattr(reward_model, "_scorer", load)
    common = {"model": str(model_dir), "output": tmp_path / "out"}
    pairs, rows = data["preferences"], data["sft"]
    for main, options, flag in (
        (dpo.main, dpo.Options(**common, preferences=pairs), "lora-rank"),
        (reward_model.main, reward_model.Options(**common, preferences=pairs), "lora-rank"),
        (
            reward_model.main,
            reward_model.Options(**common, preferences=pairs, kind="scalar"),
            "max-length",
        ),
        (sft.main, sft.Options(**common, sft=rows), "max-length"),
        (
            proxy_ppo.main,
            proxy_ppo.Options(
                **common, prompts=data["prompts"], reward="tests.training.models:length"
            ),
            "max-prompt-tokens",
        ),
    ):
        with pytest.raises(TrainingError, match=f"(?s)not enough memory: .* GB .*{flag}"):
            main(options)
    assert not (tmp_path / "out").exists()


def test_a_run_says_what_it_takes_and_keeps_its_plan(
    model_dir: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = Work(model=str(model_dir), longest=100)
    monkeypatch.setattr(memory, "machine", lambda: Machine("cpu", 7e9, "of memory free"))
    plan = memory.plan(work, "")
    assert f"7.0 GB of memory free; {plan.tokens} tokens at once" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    plan.record(tmp_path).on_train_begin(None, type("", (), {"is_world_process_zero": True}), None)
    monkeypatch.setattr(memory, "machine", lambda: Machine("cpu", 1e9, "of memory free"))
    assert memory.plan(work, "").tokens != plan.tokens
    assert memory.plan(work, "", tmp_path) == plan  # or it would round differently
