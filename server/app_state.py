"""What the routes share: made once at start-up and kept at `app.state.assent`."""

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from server.alignment_stats import ProxyCounts, TraceEntry, WorkerReader
from server.engine import (
    EngineClient,
    OpenAIServingChat,
    OpenAIServingCompletion,
    OpenAIServingModels,
    Workers,
)
from server.feedback_writer import FeedbackWriter
from server.judges import Judges
from server.learning import Learning
from server.proxies import Proxies
from server.proxy_manifest import ProxyManifest
from server.readiness import Readiness


@dataclass(frozen=True)
class AppState:
    """The parts of the server that handle requests."""

    engine: EngineClient
    workers: Workers
    chat: OpenAIServingChat | None
    """vLLM's handler; None where the model has no chat template."""
    completion: OpenAIServingCompletion | None
    """vLLM's handler; None where the model cannot complete text."""
    models: OpenAIServingModels
    proxies: Proxies
    manifest: ProxyManifest | None
    """Proxies loaded over HTTP; None = the server has no --proxy-root."""
    judges: Judges
    feedback_writer: FeedbackWriter | None
    """Writes preferences to the database; None = the server has no --feedback."""
    learning: Learning | None
    """Learns proxies from them; None = the server lacks --feedback or --proxy-root."""
    readiness: Readiness
    counts: WorkerReader[ProxyCounts]
    traces: WorkerReader[list[TraceEntry]]


def get_state(request: Request) -> AppState:
    """The state of the server that handles a request."""
    return cast(AppState, request.app.state.assent)
