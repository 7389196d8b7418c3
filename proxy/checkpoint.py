"""A trained proxy on disk: a directory with `proxy.safetensors` and `config.json`. No pickles.

A proxy works with the hidden states of one LLM only; on another LLM its scores would be meaningless,
without an error. So the checkpoint has the fingerprint of its base, and `load` compares it. The file
is longer than 300 lines because it also computes fingerprints. Errors:

    ProxyError (a ValueError)
    ├── CheckpointError       a file is missing, corrupt or of another schema
    └── FingerprintMismatch   trained for another LLM; names both
"""

import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from proxy.network import ProxyConfig, ProxyNetwork

WEIGHTS_FILE = "proxy.safetensors"
CONFIG_FILE = "config.json"

_FINGERPRINT_BYTES = 4096  # of each tensor
_MAX_CONFIG_BYTES = 2**20
_MAX_WEIGHTS_HEADER_BYTES = 2**16
_MAX_WEIGHT = (
    1e4  # at the sizes that `ProxyConfig` allows, accept logits then stay finite in float32
)
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class ProxyError(ValueError):
    """A problem with a proxy; the message says what it is, where, and how to fix it."""


class CheckpointError(ProxyError):
    """A checkpoint file is missing, corrupt or of another schema."""


class FingerprintMismatch(ProxyError):
    """The proxy was trained for another LLM."""


class BaseModelId(BaseModel):
    """The LLM that a proxy was trained for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # for messages; never compared
    fingerprint: str


class ProxyCheckpoint(NamedTuple):
    """A checkpoint in memory."""

    network: ProxyNetwork
    config: ProxyConfig
    version: str  # content hash, 12 hex digits
    training: dict[str, Any]  # settings and results of the training
    base: BaseModelId


class _ConfigFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    network: ProxyConfig
    base: BaseModelId
    training: dict[str, Any]
    weights_sha256: str  # detects an interruption between the two files


def save(
    directory: str | os.PathLike[str],
    network: ProxyNetwork,
    *,
    base: BaseModelId,
    training: dict[str, Any],  # JSON values
) -> str:
    """Write the checkpoint and return its version. Each file appears whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    config = _ConfigFile(
        network=network.config,
        base=base,
        training=training,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = (json.dumps(config.model_dump(), indent=2, allow_nan=False) + "\n").encode()
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        for name, content in ((WEIGHTS_FILE, weights), (CONFIG_FILE, text)):
            path = Path(temporary) / name
            path.write_bytes(content)
            path.replace(target / name)
    return _version(weights, text)


def load(directory: str | os.PathLike[str], *, base: BaseModelId | None) -> ProxyCheckpoint:
    """Read a checkpoint onto the CPU, in eval mode.

    Args:
        directory: what `save` wrote.
        base: the LLM that the proxy is to work with; None skips the check.

    Raises:
        CheckpointError: a file is missing, corrupt or of another schema.
        FingerprintMismatch: the proxy was trained for an LLM other than `base`.
    """
    source = Path(directory)
    text = _read(source / CONFIG_FILE, _MAX_CONFIG_BYTES)
    config = _parse_config(source / CONFIG_FILE, text)
    proxy_config = _with_decoding(config)
    with torch.device("meta"):  # nothing is allocated before the file is known to hold it
        expected = ProxyNetwork(proxy_config).num_parameters() * torch.float32.itemsize
    weights = _read(source / WEIGHTS_FILE, expected + _MAX_WEIGHTS_HEADER_BYTES)
    if config.weights_sha256 != hashlib.sha256(weights).hexdigest():
        raise CheckpointError(
            f"{source / WEIGHTS_FILE} is corrupt, or does not belong to the {CONFIG_FILE} beside "
            f"it: its checksum differs. Copy both files again from where they were made."
        )
    if base is not None and base.fingerprint != config.base.fingerprint:
        raise FingerprintMismatch(
            f"The proxy in {source} was trained for {config.base.name!r} with fingerprint "
            f"{config.base.fingerprint}, but this is {base.name!r} with fingerprint "
            f"{base.fingerprint}. Serve the LLM that it was trained for, or train a proxy for "
            f"this one."
        )
    try:
        tensors = safetensors.torch.load(weights)
        network = ProxyNetwork(proxy_config)
        network.load_state_dict(tensors)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{source / WEIGHTS_FILE} does not hold the tensors that {CONFIG_FILE} describes: "
            f"{error}. Save the proxy again."
        ) from error
    for name, parameter in network.named_parameters():
        if not (parameter.abs() <= _MAX_WEIGHT).all():
            raise CheckpointError(
                f"{source / WEIGHTS_FILE}: the tensor {name} holds NaN, infinity, or a number beyond "
                f"{_MAX_WEIGHT:,.0f}. Train the proxy again."
            )
    network.eval().requires_grad_(False)
    version = _version(weights, text)
    return ProxyCheckpoint(network, network.config, version, config.training, config.base)


def _parse_config(path: Path, text: bytes) -> _ConfigFile:
    try:
        config = _ConfigFile.model_validate_json(text)
        json.dumps(config.training, allow_nan=False)
        return config
    except ValidationError as error:
        problem = _first_problem(error)
    except ValueError:
        problem = "training: NaN and infinity are no JSON"
    except RecursionError:
        problem = "training: it is nested too deeply"
    raise CheckpointError(
        f"{path} is not the config of a proxy checkpoint of schema 1: {problem}. "
        f"Save the proxy again with this version of Assent."
    )


def _with_decoding(config: _ConfigFile) -> ProxyConfig:
    """The network's configuration; older ones have their decoding in the training's options."""
    network = config.network
    names = ("temperature", "top_k", "top_p")
    if network.model_fields_set.intersection(names):
        return network
    options = config.training.get("options")
    decoding = options.get("decoding") if isinstance(options, dict) else None
    if not isinstance(decoding, dict):
        return network
    recorded = {name: decoding[name] for name in names if name in decoding}
    try:
        return ProxyConfig.model_validate(network.model_dump() | recorded)
    except ValidationError:
        return network


def identify(
    model: str, revision: str | None = None, *, cache_dir: str | None = None
) -> BaseModelId:
    """The identity of an LLM, given as a directory or a hub id."""
    directory = resolve_model_dir(model, revision, cache_dir=cache_dir)
    name = Path(model).resolve().name if Path(model).is_dir() else model
    return BaseModelId(name=name, fingerprint=fingerprint(directory))


def resolve_model_dir(
    model: str, revision: str | None = None, *, cache_dir: str | None = None
) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a hub id's weights, config and tokenizer.

    Raises:
        ProxyError: there is no such directory, and no such model on the hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"],
        )
    except (OSError, ValueError) as error:
        raise ProxyError(
            f"{model!r} is neither a directory nor a model that can be had from the hub: {error}"
        ) from error
    return Path(snapshot)


def fingerprint(model_dir: str | os.PathLike[str]) -> str:
    """A sha256 that identifies an LLM's weights without reading all of them.

    Covers name, dtype, shape and the first 4 KiB of every tensor, by tensor name: quick even for a
    large model, and independent of how the weights are split into files.

    Raises:
        ProxyError: no safetensors in the directory, or a damaged file.
    """
    directory = Path(model_dir)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for path in _weight_files(directory):
        for name, dtype, shape, head in _tensor_heads(path):
            tensors[name] = (dtype, shape, head)
    digest = hashlib.sha256()
    for name, (dtype, shape, head) in sorted(tensors.items()):
        digest.update(json.dumps([name, dtype, shape, len(head)]).encode())
        digest.update(head)
    return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """The model's files; repositories may contain the same weights a second time."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProxyError(f"{index} is not a safetensors index: copy it again.") from None
        return [directory / name for name in sorted(names)]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ProxyError(
            f"No *.safetensors in {directory}: the fingerprint of an LLM is taken from them. "
            f"Save the model with save_pretrained(..., safe_serialization=True)."
        )
    return files


def _tensor_heads(path: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    """(name, dtype, shape, first bytes) of each tensor, read by offset."""
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_size} bytes")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            size = 8 + header_size + max((e["data_offsets"][1] for e in header.values()), default=0)
            if path.stat().st_size < size:
                raise ValueError(f"it has {path.stat().st_size} bytes of {size}")
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(8 + header_size + begin)
                head = file.read(min(end - begin, _FINGERPRINT_BYTES))
                yield name, entry["dtype"], entry["shape"], head
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ProxyError(f"{path} cannot be read as safetensors: {error}. Copy it again.") from None


def _read(path: Path, max_bytes: int) -> bytes:
    """A regular file of at most so many bytes."""
    try:
        # Without waiting: opening a FIFO would wait for somebody who writes to it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                problem = "it is no regular file"
            elif status.st_size > max_bytes:
                problem = (
                    f"it has {status.st_size:,} bytes, more than the {max_bytes:,} that it can need"
                )
            else:
                return file.read(max_bytes)
    except OSError as error:
        problem = str(error.strerror)
    raise CheckpointError(
        f"{path} cannot be read: {problem}. A proxy checkpoint is a directory with "
        f"{WEIGHTS_FILE} and {CONFIG_FILE}, as the training commands write it."
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _version(weights: bytes, config: bytes) -> str:
    return hashlib.sha256(weights + config).hexdigest()[:12]
