"""Directories on the Hub: `org/repo` or `org/repo@revision` wherever a proxy, a reward or a judge is named.

A directory that exists wins. What is downloaded stays in the Hub's cache; without a network what is there is used. A
checkpoint's version is the hash of its content, wherever it comes from.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy.checkpoint import ProxyError

FILES = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.txt", "*.model")
"""What is downloaded: weights, settings, the tokenizer of a reward model; no code, no pickles."""
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def resolve_dir(source: str | Path) -> Path:
    """The local directory of a path or of a repository's id.

    What is neither is returned as it is, and whoever reads it says so.

    Raises:
        ProxyError: it looks like an id, and the repository cannot be had.
    """
    path = Path(source).expanduser()
    named = _ID.fullmatch(str(source))
    if path.exists() or named is None:
        return path
    return _download(str(source), named[1], named[2])


def _download(source: str, repo: str, revision: str | None) -> Path:
    # Here: it is needed only where something is on the Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _quietly():
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[*FILES]))
    except GatedRepoError:
        reason = "its terms must be accepted there, and HF_TOKEN set to a token of who did"
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private and needs a token (HF_TOKEN)"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached, and nothing of it is in the cache"
    except HfHubHTTPError as error:
        reason = f"the Hub answered {error.response.status_code}"
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise ProxyError(f"{source!r} is no directory, and cannot be had from the Hub: {reason}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the Hub's warnings of every retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
