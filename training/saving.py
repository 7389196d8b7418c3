"""Save a directory of files as a whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.output import claim, is_own

# Moved in this order, after all other files. A model without its config does not load, and `training.demo` uses the
# last file to recognise a finished stage.
_LAST = ("adapter_config.json", "config.json", "tokenizer_config.json", "reward.json")
_WEIGHTS = ("model*.safetensors*", "adapter_model.safetensors", "probe.safetensors")
_TEMPORARY = ".saving"
MODEL_FILES = (
    *(_TEMPORARY, "config.json", "generation_config.json", "model.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors", "reward.json", "principles.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
"""The usual files of a model, as `training.output` expects them."""


@contextmanager
def saving(target: Path) -> Iterator[Path]:
    """A temporary directory; its files move into `target` at the end, if there was no error.

    A save that is killed leaves the previous files of `target` or, during the move, a model without its config, which
    does not load. Weights of an earlier model never appear with another model's config. Files that the run in `target`
    did not write are neither replaced (which is a TrainingError) nor removed.
    """
    temporary = target / _TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed save
    temporary.mkdir(parents=True)
    try:
        yield temporary
        claim(target, sorted(path.name for path in temporary.iterdir()))
        for pattern in (*reversed(_LAST), *_WEIGHTS):
            for path in target.glob(pattern):
                if is_own(path):
                    path.unlink()
        for path in sorted(temporary.iterdir(), key=_order):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _order(path: Path) -> int:
    return _LAST.index(path.name) if path.name in _LAST else -1
