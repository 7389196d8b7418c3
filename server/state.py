"""What the routes share, made once at start-up and kept at `app.state.assent`."""

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from server.engine import (
    EngineClient,
    OpenAIServingChat,
    OpenAIServingCompletion,
    OpenAIServingModels,
    Workers,
)
from server.judges import Judges
from server.keeper import Keeper
from server.learning import Learning
from server.proxies import Proxies
from server.receipts import WorkerReader
from server.remembered import Remembered


@dataclass(frozen=True)
class Served:
    engine: EngineClient
    workers: Workers
    chat: OpenAIServingChat | None
    """vLLM's handler; None where the model cannot chat."""
    completion: OpenAIServingCompletion | None
    """vLLM's handler; None where the model cannot complete text."""
    models: OpenAIServingModels
    proxies: Proxies
    remembered: Remembered | None
    """What was loaded over HTTP; None = nothing can be."""
    judges: Judges
    keeper: Keeper | None
    """Where preferences are kept; None = they are not."""
    learning: Learning | None
    """What is learned of them; None = they are not kept, or nothing can be loaded."""
    counts: WorkerReader
    traces: WorkerReader


def served(request: Request) -> Served:
    return cast(Served, request.app.state.assent)
