"""Save a directory of files as a whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.output import claim, is_own

# Moved in this order, after all others. Nothing loads a model without its config; and by the last one `training.demo`
# knows that a stage is done.
_LAST = ("adapter_config.json", "config.json", "tokenizer_config.json", "reward.json")
_WEIGHTS = ("model*.safetensors*", "adapter_model.safetensors")
_TEMPORARY = ".saving"
MODEL_FILES = (
    *(_TEMPORARY, "config.json", "generation_config.json", "model.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors", "reward.json", "principles.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
"""What models are usually made of, as `training.output` wants to know it."""


@contextmanager
def saving(target: Path) -> Iterator[Path]:
    """A directory to save into; its files move into `target` at the end, if all went well.

    A save that is killed leaves what was in `target` before, or, in the moment of moving, a model without its config,
    which does not load. An earlier model's weights never stand beside another's config. Files that the run in `target`
    did not write are neither replaced, which is a TrainingError, nor removed.
    """
    temporary = target / _TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
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
