"""Judges that are added to the LLM: the directories of `--judge DIR`, and the options of vLLM that serve them.

`training.jsft --lora-rank` makes a pairwise judge, `training.reward_model --lora-rank` a likelihood-ratio judge: both
are LoRAs. `training.reward_model --kind probe` makes a probe. The file `reward.json` of a directory says which it is,
and which LLM it was trained on.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from judge.principles import Principle, principles_of
from proxy.checkpoint import BaseModelId
from proxy.probe import load_weight
from proxy.reward_file import ProbeInfo, RewardFile

JudgeKind = Literal["pairwise", "likelihood", "proxy", "probe", "reward", "endpoint"]
"""`pairwise` and `endpoint` read both responses: the LLM or a LoRA, or another server's LLM. The others score each: a
LoRA, a proxy, a probe, or another server's reward model."""

_KINDS: dict[str, JudgeKind] = {"judge": "pairwise", "implicit": "likelihood"}  # of LoRAs
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed by vLLM
_FIRST_ID = 1_000_000  # vLLM numbers adapters of its own options from 1


class AdapterError(ValueError):
    """The directory is no judge for this LLM; the message says why."""


@dataclass(frozen=True)
class Adapter:
    """A judge on disk."""

    kind: JudgeKind
    directory: Path
    beta: float
    rank: int
    """Of the LoRA; 0 = a probe, which has none."""
    principles: Mapping[str, Principle]
    lora_id: int
    """Unique among the engine's adapters."""
    end_ids: Sequence[int] = ()
    """Of a probe: the tokens that end a response."""


def read_adapters(directories: Sequence[Path], base: BaseModelId) -> dict[JudgeKind, Adapter]:
    """The judges in these directories, by kind.

    Raises:
        AdapterError: one of them is no judge, not for this LLM, or there are two of a kind.
        CheckpointError: a probe's weights are damaged.
        PrincipleError: a judge's principles are damaged.
    """
    adapters: dict[JudgeKind, Adapter] = {}
    for number, directory in enumerate(directories):
        adapter = _read(directory, base, _FIRST_ID + number)
        if adapter.kind in adapters:
            raise AdapterError(
                f"{directory} and {adapters[adapter.kind].directory} are both {adapter.kind} judges: name one of them"
            )
        adapters[adapter.kind] = adapter
    return adapters


def _read(directory: Path, base: BaseModelId, lora_id: int) -> Adapter:
    try:
        reward = RewardFile.read(directory)
    except (OSError, ValidationError):
        raise AdapterError(
            f"{directory} has no reward.json that says what it is: it is written by "
            "training.jsft --lora-rank and by training.reward_model --lora-rank or --kind probe"
        ) from None
    if reward.base.fingerprint != base.fingerprint:
        raise AdapterError(
            f"the judge in {directory} was trained on {reward.base.name!r} ({reward.base.fingerprint}), but this is "
            f"{base.name!r} ({base.fingerprint})"
        )
    if reward.probe is not None:
        return _read_probe(directory, reward.probe)
    return _read_lora(directory, reward, lora_id)


def _read_probe(directory: Path, probe: ProbeInfo) -> Adapter:
    if probe.layer != probe.num_layers:
        raise AdapterError(
            f"the probe in {directory} reads layer {probe.layer}, and a server reads only the last of the LLM's "
            f"{probe.num_layers}: train it without --layers"
        )
    load_weight(directory)  # what is damaged shows before the engine starts
    return Adapter("probe", directory, 1.0, 0, {}, 0, probe.end_ids)


def _read_lora(directory: Path, reward: RewardFile, lora_id: int) -> Adapter:
    try:
        lora: dict[str, Any] = json.loads((directory / "adapter_config.json").read_bytes())
        rank, targets, kept = lora["r"], lora["target_modules"], lora.get("modules_to_save")
        rank, targets = int(rank), set(targets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(
            f"{directory} is not a LoRA: train the judge with --lora-rank, so that the LLM stays as it is"
        ) from None
    if kept or {"lm_head", "embed_tokens"} & targets:
        raise AdapterError(
            f"the LoRA in {directory} changes the head or the embedding: leave them out"
        )
    if rank > _RANKS[-1]:
        raise AdapterError(f"the LoRA in {directory} has rank {rank}; vLLM's limit is {_RANKS[-1]}")
    kind = _KINDS[reward.kind]
    return Adapter(kind, directory, reward.beta, rank, principles_of(directory), lora_id)


def enable_adapters(args: Namespace, adapters: Mapping[JudgeKind, Adapter]) -> None:
    """Raise vLLM's limits of adapters by the judges that are LoRAs."""
    ranks = [adapter.rank for adapter in adapters.values() if adapter.rank]
    if not ranks:
        return
    other_loras = args.max_loras if args.enable_lora else 0
    args.enable_lora = True
    args.max_loras = other_loras + len(ranks)
    needed = max(args.max_lora_rank if other_loras else 1, *ranks)
    args.max_lora_rank = min(rank for rank in _RANKS if rank >= needed)
