"""The model card of a run, from its options, its data and what it wrote."""

import hashlib
import shlex
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from judge.sources import SourceError, raw_rows
from proxy.checkpoint import WEIGHTS_FILE, BaseModelId, identify, load
from proxy.reward_file import REWARD_FILE, RewardFile
from training.card_texts import Kind
from training.metrics import CURVES_FILE, METRICS_FILE, read_metrics
from training.model_card import Card, DataFile
from training.output import Run
from training.trackers import EVENTS_DIRECTORY

_LORA_FILE = "adapter_config.json"  # peft's name
_NOT_SETTINGS = ("output", "resume", "overwrite", "report-to", "push-to-hub", "hub-private-repo")
_DATA = ("preferences", "held-out", "prompts", "sft")
"""Options that name rows."""


def write_card(run: Run, options: Any) -> None:
    """Write the card of a run that has saved its result; in its main process only."""
    if run.is_main:
        card_of(run, options).write(run.directory)


def card_of(run: Run, options: Any) -> Card:
    """The card of what a run's directory holds."""
    directory = run.directory
    proxy = load(directory, base=None) if (directory / WEIGHTS_FILE).is_file() else None
    is_reward = (directory / REWARD_FILE).is_file()
    reward = RewardFile.read(directory) if is_reward else None
    rows = read_metrics(directory)
    base = proxy.base if proxy else reward.base if reward else identify(options.model)
    files = [
        name
        for name in (CURVES_FILE, METRICS_FILE, EVENTS_DIRECTORY)
        if (directory / name).exists()
    ]
    data = data_files(options)
    return Card(
        name=directory.resolve().name,
        kind="proxy" if proxy else _kind(directory, reward),
        base=base,
        base_model=hub_id(options.model, base),
        datasets=[file.source.partition(":")[0] for file in data if not file.sha256],
        parameters=proxy.network.num_parameters() if proxy else None,
        data=data,
        command=command_of(run.command, options),
        settings={
            flag: pair for flag, pair in settings_that_differ(options).items() if flag not in _DATA
        },
        metrics=rows[-1] if rows else {},
        files=files,
        scores=run.scores,
        decoding=proxy.config if proxy else None,
    )


def _kind(directory: Path, reward: RewardFile | None) -> Kind:
    has_lora = (directory / _LORA_FILE).is_file()
    if reward is None:
        return "adapter" if has_lora else "model"
    if reward.kind == "probe":
        return "probe"
    if not has_lora:
        return "reward"
    return "adapter judge" if reward.kind == "judge" else "adapter reward"


def hub_id(model: str, base: BaseModelId) -> str | None:
    """The LLM's id on the Hub; None = it was read from a directory."""
    return model if base.name == model and not Path(model).exists() else None


def data_files(options: Any) -> list[DataFile]:
    """The data that the options name."""
    files = []
    for option in _DATA:
        value = getattr(options, option.replace("-", "_"), None)
        sources = value if isinstance(value, tuple) else () if value is None else (value,)
        files += [_data_file(option, str(source)) for source in sources]
    return files


def _data_file(option: str, source: str) -> DataFile:
    path = Path(source).expanduser()
    if not path.is_file():
        return DataFile(option, source)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return DataFile(option, source, sum(1 for _ in raw_rows(source)), digest)
    except SourceError:  # it has changed since the training read it
        return DataFile(option, source, None, digest)


def settings_that_differ(options: Any) -> dict[str, tuple[Any, Any]]:
    """Option -> (value, default), of those that have a default and differ from it."""
    defaults = _defaults(type(options))
    return {
        flag: (value, defaults[flag])
        for flag, value in _values(options).items()
        if flag in defaults and value != defaults[flag] and flag not in _NOT_SETTINGS
    }


def command_of(command: str, options: Any) -> str:
    """The command line that has these options; defaults are left out."""
    differing, defaults = settings_that_differ(options), _defaults(type(options))
    words = ["python", "-m", command]
    for flag, value in _values(options).items():
        if flag in differing or flag not in defaults or flag == "output":
            words += _words(flag, value)
    return shlex.join(words)


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{head}{'.' if head else ''}no-{last}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]


def _values(options: Any, prefix: str = "") -> dict[str, Any]:
    """Option, as on the command line, -> value."""
    found: dict[str, Any] = {}
    for field in fields(options):
        value, flag = getattr(options, field.name), prefix + field.name.replace("_", "-")
        found |= _values(value, f"{flag}.") if is_dataclass(value) else {flag: value}
    return found


def _defaults(options: Any) -> dict[str, Any]:
    """Option -> default, of a class of options; those without a default are left out."""
    found: dict[str, Any] = {}
    for field in fields(options):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        flag = field.name.replace("_", "-")
        if is_dataclass(default):
            found |= _values(default, f"{flag}.")
        elif default is not MISSING:
            found[flag] = default
    return found
