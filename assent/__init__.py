"""Assent's Python interface, and the command `assent` (`assent.__main__`).

    from assent import Alignment, Client        # a running server; needs httpx alone
    from assent import Judge, load_proxy        # a transformers model in this process, without a server

Importing this package imports nothing else: names are loaded when they are first used. `docs/python.md` shows each.

- `client`     - the clients, synchronous and asynchronous.
- `calls`      - the server's routes, each written once for both.
- `streams`    - puts a streamed answer together.
- `results`    - what the clients return.
- `local`      - a proxy or a judge on a transformers model.
- `completion` - completion of the command in shells.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assent.client import AsyncChatStream, AsyncClient, ChatStream, Client
    from assent.local import AlignedModel, Judge, load_proxy
    from assent.results import (
        Alignment,
        AlignmentReport,
        Answer,
        AssentError,
        Candidate,
        Choice,
        JudgeOptions,
        PairVerdict,
        Piece,
        ProxyInfo,
        Ranking,
        TraceEntry,
        Verdict,
    )

__all__ = [
    "AlignedModel", "Alignment", "AlignmentReport", "Answer", "AssentError", "AsyncChatStream", "AsyncClient",
    "Candidate", "ChatStream", "Choice", "Client", "Judge", "JudgeOptions", "PairVerdict", "Piece", "ProxyInfo",
    "Ranking", "TraceEntry", "Verdict", "load_proxy",
]  # fmt: skip

_MODULES = {
    "assent.client": ("AsyncChatStream", "AsyncClient", "ChatStream", "Client"),
    "assent.local": ("AlignedModel", "Judge", "load_proxy"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'assent' has no attribute {name!r}")
    module = next((each for each, names in _MODULES.items() if name in names), "assent.results")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__]
