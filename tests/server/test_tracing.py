"""Spans in an OpenTelemetry collector: ours, and vLLM's below them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.conftest import WAIT_SECONDS, proxy_flags, serving, wait_until

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Collector(HTTPServer):
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        request = ExportTraceServiceRequest.FromString(content)
        scopes = [scope for part in request.resource_spans for scope in part.scope_spans]
        assert isinstance(self.server, Collector)
        self.server.spans += [span for scope in scopes for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    values = {entry.key: entry.value for entry in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_a_best_of_n_request_is_one_trace(collector, tmp_path):
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds
    }
    flags = ["--otlp-traces-endpoint", endpoint, "--no-request-log", *proxy_flags()]
    body = {
        "model": "assent-demo:aligned",
        "messages": [{"role": "user", "content": "How do I look after my rose?"}],
        "max_tokens": 16,
        "seed": 1,
        "alignment": {"best_of": 3},
    }

    def spans() -> list[Any]:
        return [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]

    with serving(tmp_path / "log", *flags, environment=environment) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body,
            headers={"traceparent": TRACEPARENT},
            timeout=WAIT_SECONDS,
        )
        alignment = answer.json()["alignment"]
        comparisons = sum(map(len, alignment["judge"]["rounds"]))
        wait_until(lambda: len(spans()) == 1 + 3 + 2 * comparisons)
    (ours,) = [span for span in spans() if span.name == "POST /v1/chat/completions"]
    assert ours.parent_span_id.hex() == PARENT_ID
    found = attributes(ours)
    assert (found["assent.proxy"], found["assent.version"]) == ("aligned", alignment["version"])
    assert (found["assent.best_of"], found["assent.judge"]) == (3, "pairwise")
    assert found["assent.proxy_counts.rejected"] == alignment["rejected"] > 0
    assert found["assent.tokens.judge_prompt"] == alignment["judge"]["usage"]["prompt_tokens"]
    assert found["http.response.status_code"] == 200
    engine = [span for span in spans() if span.name == "llm_request"]
    assert len(engine) == 3 + 2 * comparisons
    assert {span.parent_span_id for span in engine} == {ours.span_id}
    assert all(ours.start_time_unix_nano <= span.start_time_unix_nano for span in engine)
