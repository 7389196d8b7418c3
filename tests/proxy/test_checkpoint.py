"""Proxies on disk, and the fingerprint that ties them to their LLM."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from proxy.checkpoint import (
    BaseModelId,
    CheckpointError,
    FingerprintMismatch,
    ProxyError,
    fingerprint,
    identify,
    load,
    resolve_model_dir,
    save,
)
from proxy.network import ProxyConfig, ProxyNetwork

BASE = BaseModelId(name="some-llm", fingerprint="f" * 64)


@pytest.fixture
def network() -> ProxyNetwork:
    torch.manual_seed(0)
    return ProxyNetwork(ProxyConfig(hidden_size=8, vocab_size=20, width=4, max_candidates=5))


@pytest.fixture
def checkpoint_dir(network: ProxyNetwork, tmp_path: Path) -> Path:
    save(tmp_path / "proxy", network, base=BASE, training={"steps": 60, "win_rate": 0.78})
    return tmp_path / "proxy"


def test_round_trip(network, checkpoint_dir):
    checkpoint = load(checkpoint_dir, base=BASE)
    assert checkpoint.config == network.config
    assert checkpoint.training == {"steps": 60, "win_rate": 0.78}
    assert checkpoint.base == BASE
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint.network.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in checkpoint.network.parameters())
    assert sorted(path.name for path in checkpoint_dir.iterdir()) == [
        "config.json",
        "proxy.safetensors",
    ]


def test_version_is_the_content(network, checkpoint_dir, tmp_path):
    version = load(checkpoint_dir, base=None).version
    assert len(version) == 12 and int(version, 16) >= 0
    second_version = save(
        tmp_path / "again", network, base=BASE, training={"steps": 60, "win_rate": 0.78}
    )
    assert version == second_version
    with torch.no_grad():
        network.score.bias.add_(1)
    assert save(checkpoint_dir, network, base=BASE, training={}) != version
    assert load(checkpoint_dir, base=BASE).version != version


def test_saving_keeps_what_else_is_in_the_directory(network, checkpoint_dir):
    (checkpoint_dir / "README.md").write_text("a card")
    save(checkpoint_dir, network, base=BASE, training={})
    assert (checkpoint_dir / "README.md").read_text() == "a card"


def test_another_llm_is_refused_and_both_are_named(checkpoint_dir):
    other_base = BaseModelId(name="other-llm", fingerprint="0" * 64)
    with pytest.raises(FingerprintMismatch) as error:
        load(checkpoint_dir, base=other_base)
    for part in ("some-llm", "f" * 64, "other-llm", "0" * 64):
        assert part in str(error.value)
    # The name is for people: the same LLM under another name is the same LLM.
    load(checkpoint_dir, base=BaseModelId(name="renamed", fingerprint=BASE.fingerprint))


@pytest.mark.parametrize("missing", ["config.json", "proxy.safetensors"])
def test_missing_file_is_named(checkpoint_dir, missing):
    (checkpoint_dir / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        load(checkpoint_dir, base=None)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere", base=None)


@pytest.mark.parametrize("damage", ["truncate", "flip", "replace"])
def test_damaged_weights(checkpoint_dir, damage):
    path = checkpoint_dir / "proxy.safetensors"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-10])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="proxy.safetensors"):
        load(checkpoint_dir, base=None)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"surprise": 1},
        {"weights_sha256": None},
        {"network": {"hidden_size": 8}},
        {"network": {"hidden_size": 8, "vocab_size": 20, "surprise": 1}},
    ],
)
def test_config_of_another_schema(checkpoint_dir, change):
    path = checkpoint_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="config.json"):
        load(checkpoint_dir, base=None)


def test_config_that_is_no_json(checkpoint_dir):
    (checkpoint_dir / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        load(checkpoint_dir, base=None)


def test_tensors_that_the_config_does_not_describe(checkpoint_dir):
    path = checkpoint_dir / "config.json"
    config = json.loads(path.read_text())
    config["network"]["width"] = 6
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="state_half.weight"):
        load(checkpoint_dir, base=None)


@pytest.mark.parametrize(
    "change",
    [
        {"max_rejections": 2**63 - 1},
        {"max_candidates": 10**30},
        {"width": 10**9},
        {"hidden_size": 2**40},
        {"vocab_size": 2**40},
        {"top_k": 2**63},
        {"temperature": 1e-300},
        {"accept_bias": 1e30},
    ],
    ids=str,
)
def test_numbers_beyond_all_measure_are_refused(checkpoint_dir, change):
    path = checkpoint_dir / "config.json"
    config = json.loads(path.read_text())
    config["network"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        load(checkpoint_dir, base=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_weights_must_be_finite(network, tmp_path, value):
    with torch.no_grad():
        network.score.weight[0, 1] = value
    save(tmp_path, network, base=BASE, training={})
    with pytest.raises(CheckpointError, match=r"score\.weight holds NaN, infinity"):
        load(tmp_path, base=None)


@pytest.mark.parametrize(
    "notes", ['{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}"]
)
def test_notes_that_are_no_json_are_refused(checkpoint_dir, notes):
    path = checkpoint_dir / "config.json"
    text = path.read_text()
    start = text.index('"training": ') + len('"training": ')
    path.write_text(text[:start] + notes + text[text.index("}", start) + 1 :])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(checkpoint_dir, base=None)


@pytest.mark.parametrize("name", ["config.json", "proxy.safetensors"])
def test_a_file_that_is_no_regular_one_is_not_waited_for(checkpoint_dir, name):
    (checkpoint_dir / name).unlink()
    os.mkfifo(checkpoint_dir / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is no regular file"):
        load(checkpoint_dir, base=None)


@pytest.mark.parametrize("name", ["config.json", "proxy.safetensors"])
def test_a_file_larger_than_it_can_be_is_not_read(checkpoint_dir, name):
    os.truncate(checkpoint_dir / name, 2**40)  # sparse: it takes no room on the disk
    with pytest.raises(
        CheckpointError, match=f"{name} cannot be read: it has 1,099,511,627,776 bytes"
    ):
        load(checkpoint_dir, base=None)


def test_training_notes_must_be_json(network, tmp_path):
    with pytest.raises(ValueError):
        save(tmp_path, network, base=BASE, training={"win_rate": float("nan")})
    assert list(tmp_path.iterdir()) == []


def write_model(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    directory.mkdir()
    names = sorted(tensors)
    if shards == 1:
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.torch.save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer.{i}": torch.randn(50, 40) for i in range(4)}


def test_fingerprint_does_not_depend_on_sharding(tensors, tmp_path):
    unsharded = write_model(tmp_path / "whole", tensors)
    sharded = write_model(tmp_path / "sharded", tensors, shards=3)
    assert fingerprint(unsharded) == fingerprint(sharded)
    assert len(fingerprint(unsharded)) == 64
    # Other files of a repository do not belong to the model.
    shutil.copy(unsharded / "model.safetensors", unsharded / "consolidated.safetensors")
    assert fingerprint(unsharded) == fingerprint(sharded)


def test_fingerprint_tells_models_apart(tensors, tmp_path):
    def fingerprint_of(name: str, weights: dict[str, torch.Tensor]) -> str:
        return fingerprint(write_model(tmp_path / name, weights))

    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["layer.3"][0, 0] += 1
    renamed = {name.replace("3", "5"): tensor for name, tensor in tensors.items()}
    fingerprints = {
        fingerprint_of("same", tensors),
        fingerprint_of("value", changed),
        fingerprint_of("name", renamed),
        fingerprint_of("shape", {name: tensor.reshape(40, 50) for name, tensor in tensors.items()}),
        fingerprint_of("dtype", {name: tensor.bfloat16() for name, tensor in tensors.items()}),
        fingerprint_of("fewer", dict(list(tensors.items())[:3])),
    }
    assert len(fingerprints) == 6


def test_fingerprint_of_nothing(tmp_path):
    with pytest.raises(ProxyError, match="No \\*.safetensors"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ProxyError, match="model.safetensors"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ProxyError, match="index.json"):
        fingerprint(tmp_path)


def test_identify_names_a_directory(tensors, tmp_path):
    directory = write_model(tmp_path / "my-llm", tensors)
    assert identify(str(directory)) == BaseModelId(
        name="my-llm", fingerprint=fingerprint(directory)
    )
    assert resolve_model_dir(str(directory)) == directory


def test_unknown_model_is_an_error_of_ours(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ProxyError, match="no-such-org/no-such-model"):
        resolve_model_dir("no-such-org/no-such-model")
    with pytest.raises(ProxyError, match="not a model name"):
        resolve_model_dir("not a model name")
