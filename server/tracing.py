"""A span of OpenTelemetry's for each HTTP request, with what the proxy and the judge did.

With `--otlp-traces-endpoint URL` vLLM exports a span for each request to its engine, `llm_request`. Ours is their
parent: its context travels to vLLM in the request's `traceparent` header. So the samples and the judge's requests of a
best-of-N request are siblings in one trace, which continues the client's where the client sent a `traceparent`.

The span is never made the current one: vLLM's output handler, a task that lives on, would take it for its own parent.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import extract, inject
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

TRACE_HEADERS: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""For requests to the engine that are our own; None = the request is not traced."""
_ATTRIBUTES = ("caller", "request_id", "complete", "model", "best_of", "judge")
_GROUPS = ("tokens", "proxy_counts")


def begin_span(scope: Scope) -> Span:
    """Begin the span of a request, and make it the parent of vLLM's spans: changes the request's headers."""
    headers = Headers(scope=scope)
    span = trace.get_tracer("assent").start_span(
        f"{scope['method']} {scope['path']}", context=extract(headers), kind=SpanKind.SERVER
    )
    carrier: dict[str, str] = {}
    inject(carrier, context=trace.set_span_in_context(span))
    changed = MutableHeaders(raw=list(headers.raw))
    changed.update(carrier)
    scope["headers"] = changed.raw
    TRACE_HEADERS.set(carrier)
    return span


def end_span(span: Span, line: Mapping[str, Any], end: int) -> None:
    """
    Args:
        line: of the request log, whose fields become attributes.
        end: of the response, in nanoseconds since the epoch.
    """
    attributes = {f"assent.{key}": line[key] for key in _ATTRIBUTES if line.get(key) is not None}
    for group in _GROUPS:
        attributes |= {f"assent.{group}.{key}": value for key, value in line.get(group, {}).items()}
    if "proxy" in line:
        name, _, version = line["proxy"].rpartition("@")
        attributes |= {"assent.proxy": name, "assent.version": version}
    attributes |= {"http.request.method": line["method"], "url.path": line["path"]}
    if line["status"] is not None:
        attributes["http.response.status_code"] = line["status"]
        if line["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
    span.set_attributes(attributes)
    span.end(end)
