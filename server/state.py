"""What the routes share, made once at start-up and kept at `app.state.assent`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import Request

from server.engine import EngineClient, OpenAIServingChat, OpenAIServingModels
from server.receipts import CountsReader


@dataclass(frozen=True)
class ServedProxy:
    name: str
    version: str
    directory: Path
    training: dict[str, Any]
    """How it was trained and what it scored."""


@dataclass(frozen=True)
class Served:
    engine: EngineClient
    chat: OpenAIServingChat | None
    """vLLM's handler; None where the model cannot chat."""
    models: OpenAIServingModels
    proxies: dict[str, ServedProxy]
    counts: CountsReader


def served(request: Request) -> Served:
    return cast(Served, request.app.state.assent)
