"""Files that are cut short or do not belong together end a command in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.models import DEMO
from proxy.checkpoint import identify
from training import evaluate, sft
from training.console import TrainingError, main_guard
from training.models import load_model, refuse_unknown
from training.policy import Decoding
from training.reward_loading import load_reward
from training.rewards import Frozen
from training.sizes import sizes_of

MODEL = DEMO / "model"
Change = Callable[[Path], object]


def truncate(name: str) -> Change:
    """Cut a file to half its size."""

    def change(model: Path) -> None:
        path = model / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def write(name: str, text: str) -> Change:
    return lambda model: (model / name).write_text(text)


def update(name: str, **fields: object) -> Change:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text()) | fields
        (model / name).write_text(json.dumps(content))

    return change


CHANGES = {
    "weights": truncate("model.safetensors"),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "tokenizer": truncate("tokenizer.json"),
    "tokenizer config": truncate("tokenizer_config.json"),
    "config": truncate("config.json"),
    "a list for a config": write("config.json", "[]"),
    "an empty config": write("config.json", ""),
    "binary config": lambda model: (model / "config.json").write_bytes(b"\xff\xfe\x00"),
    "other sizes": update("config.json", hidden_size=128),
    "no such activation": update("config.json", hidden_act="none such"),
    "a head too many": update("config.json", tie_word_embeddings=False),
    "another layer": update("config.json", num_hidden_layers=5),
    "generation config": truncate("generation_config.json"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_model(
    change: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[change](model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    with pytest.raises(SystemExit) as exit_info, main_guard():
        sft.main(sft.Options(model=str(model), sft=str(rows), output=tmp_path / "out"))
    assert exit_info.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ") and str(model) in last_line
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_loaded(model: Path) -> None:
    assert load_model(str(model))[0].num_parameters() > 1e6


@pytest.mark.parametrize("change", ["config", "a list for a config", "no such activation"])
def test_a_damaged_config_alone(change: str, model: Path) -> None:
    CHANGES[change](model)
    with pytest.raises(TrainingError, match="cannot read the config"):
        sizes_of(str(model))


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    model, tokenizer = load_model(str(MODEL), dtype=torch.bfloat16)
    return Frozen(model, tokenizer, identify(str(MODEL)), Decoding(max_new_tokens=4), {1}, 8)


@pytest.mark.parametrize("change", ["weights", "tokenizer", "config", "binary config"])
def test_a_damaged_classifier(change: str, model: Path, frozen: Frozen) -> None:
    CHANGES[change](model)
    with pytest.raises(TrainingError, match="is no reward"):
        load_reward(str(model), frozen)


def test_a_reward_file_that_is_no_text(model: Path, frozen: Frozen) -> None:
    (model / "reward.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TrainingError, match="reward.json is damaged"):
        load_reward(str(model), frozen)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(:", "f", "cannot load the reward 'bad_reward:f': SyntaxError"),
        ("1 / 0", "f", "cannot load the reward 'bad_reward:f': ZeroDivisionError"),
        ("f = 3", "f", "is no function: 3"),
        ("", "f", "has no attribute 'f'"),
    ],
)
def test_a_module_that_is_no_reward(
    text: str,
    name: str,
    message: str,
    frozen: Frozen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "bad_reward", raising=False)
    (tmp_path / "bad_reward.py").write_text(text)
    with pytest.raises(TrainingError, match=message):
        load_reward(f"bad_reward:{name}", frozen)


def add_token(model: Path, role: str | None) -> int:
    """A token that is not among the embeddings; returns its id."""
    content = json.loads((model / "tokenizer.json").read_text())
    token_id = json.loads((model / "config.json").read_text())["vocab_size"]
    token = {"id": token_id, "content": "<|new|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(token | flags)
    (model / "tokenizer.json").write_text(json.dumps(content))
    if role:
        update("tokenizer_config.json", **{f"{role}_token": "<|new|>"})(model)
    return token_id


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_a_pad_token_beyond_the_embeddings(role: str, model: Path) -> None:
    token_id = add_token(model, role)
    message = (
        rf"the token '<\|new\|>' \({token_id}\) of the model's tokenizer is beyond its {token_id}"
    )
    with pytest.raises(TrainingError, match=message):
        load_model(str(model))


def test_an_added_token_beyond_the_embeddings(model: Path, tmp_path: Path) -> None:
    """It is refused where the data has it: a model may have one that nobody uses."""
    token_id = add_token(model, None)
    loaded_model, tokenizer = load_model(str(model))
    refuse_unknown(loaded_model, tokenizer, [[token_id - 1], []])
    rows = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": "what is <|new|>?"}
    answer = {"role": "assistant", "content": "b"}
    rows.write_text(json.dumps({"messages": [user, answer], "prompt": [user]}))
    with pytest.raises(TrainingError, match="is beyond its"):
        sft.main(sft.Options(model=str(model), sft=str(rows), output=tmp_path / "out"))
    proxy = DEMO / "proxies" / "aligned"
    with pytest.raises(TrainingError, match="is beyond its"):
        evaluate.main(evaluate.Options(model=str(model), proxy=proxy, prompts=str(rows)))
