"""The OpenAPI document at /openapi.json, and the page /docs that shows it without the internet.

FastAPI derives the document from the routes. Added here: titles, what the middleware answers, examples
(`openapi_examples`), and `alignment` in the requests of vLLM's own routes. FastAPI's 422 is taken out of our routes,
because vLLM's handler answers 400.
"""

import asyncio
from collections.abc import Iterator
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from starlette.routing import Route

from server.admission import GENERATING
from server.middleware.access import NO_ADMIN, OPEN_PATHS, UNAUTHORIZED, UNKNOWN_HOST, needs_admin
from server.middleware.drain import STOPPING
from server.openapi_examples import ERRORS, REQUESTS, RESPONSES, TOO_LARGE, TOO_MANY
from server.schemas.generation import ALIGNMENT

Json = dict[str, Any]

DESCRIPTION = (
    "vLLM's OpenAI-compatible API, with proxies that align a frozen LLM token by token, and a judge that compares "
    "finished responses. `alignment` is an optional object in the requests of every route that generates text; the "
    "model name `<model>:<proxy>` selects a proxy too. Errors have OpenAI's shape."
)
VLLM = "vLLM"
TAGS = {
    "Generation": "Chat, completions and models: vLLM's, with `alignment`.",
    "Judge": "Which of several responses is best.",
    "Proxies": "The loaded proxies, changed while serving, and learned from feedback.",
    "Feedback": "What people chose. Needs `--feedback`.",
    "Operation": "For load balancers.",
    VLLM: "vLLM's other routes, as vLLM describes them.",
}
MIDDLEWARE_ERRORS = {
    "Unauthorized": UNAUTHORIZED,
    "NoAdministrator": NO_ADMIN,
    "TooLarge": TOO_LARGE,
    "UnknownHost": UNKNOWN_HOST,
    "TooManyRequests": TOO_MANY,
    "Stopping": STOPPING,
}
"""By the name of their component in the document."""

page = APIRouter()


def describe(app: FastAPI) -> None:
    """Have the app's document describe this server; call it when all routes are there."""
    app.title, app.version, app.description = "Assent", version("assent"), DESCRIPTION
    app.openapi_tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    app.include_router(page)
    derive = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(derive())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    _derive_in_a_thread(app)


def _derive_in_a_thread(app: FastAPI) -> None:
    """Deriving the document takes seconds, once: FastAPI's route would hold up all other responses meanwhile."""
    assert app.openapi_url is not None, "there is a document"
    (route,) = (route for route in app.routes if getattr(route, "path", None) == app.openapi_url)
    assert isinstance(route, Route)
    send, lock = route.endpoint, asyncio.Lock()

    async def send_document(request: Request) -> Response:
        async with lock:
            await asyncio.to_thread(app.openapi)
        return await send(request)

    app.routes.remove(route)
    app.add_route(app.openapi_url, send_document, include_in_schema=False)


@page.get("/docs", include_in_schema=False)
async def show_docs(request: Request) -> HTMLResponse:
    """Swagger UI with the files that vLLM serves at /static: FastAPI's own page loads its files from elsewhere."""
    root = request.scope.get("root_path", "").rstrip("/")
    return get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title="Assent",
        swagger_js_url=f"{root}/static/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/static/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """(method in lower case, path, operation) of each."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def _complete(document: Json) -> Json:
    """Add to the derived document, in place."""
    components = document["components"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["responses"] = {
        name: {
            "description": error.message,
            "content": _error_content(error.status, error.message, error.kind),
        }
        for name, error in MIDDLEWARE_ERRORS.items()
    }
    for method, path, operation in operations(document):
        if path in GENERATING:
            _align(operation, components["schemas"])
        if "tags" not in operation:
            operation["tags"] = [VLLM]
            continue
        operation["responses"].pop("422", None)
        _add_middleware(method, path, operation)
        _add_examples(f"{method.upper()} {path}", operation)
    return document


def _align(operation: Json, schemas: Json) -> None:
    """The requests of a route that generates text may have `alignment`, and its responses name the proxy."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if reference := body.get("schema", {}).get("$ref"):
        field = {"$ref": "#/components/schemas/AlignmentOptions", "description": ALIGNMENT}
        schemas[reference.rpartition("/")[2]]["properties"].setdefault("alignment", field)
    operation["responses"]["200"].setdefault("headers", {})["Assent-Proxy"] = {
        "description": "`name@version` of the proxy; absent without one.",
        "schema": {"type": "string"},
    }


def _add_middleware(method: str, path: str, operation: Json) -> None:
    """What the middleware may answer instead of the route."""
    names = [] if path in OPEN_PATHS else ["Unauthorized", "UnknownHost"]
    if needs_admin(method.upper(), path.replace("{name}", "name")):
        names.append("NoAdministrator")
    if method == "post":
        names += ["TooLarge", "TooManyRequests"]
    if path not in OPEN_PATHS:
        operation["security"] = [{"key": []}, {}]  # a server without keys takes none
    responses = operation["responses"]
    for name in [*names, "Stopping"]:
        reference = {"$ref": f"#/components/responses/{name}"}
        responses.setdefault(str(MIDDLEWARE_ERRORS[name].status), reference)
    operation["responses"] = dict(sorted(responses.items()))


def _add_examples(key: str, operation: Json) -> None:
    """Examples of the request and of every response that the route itself gives."""
    if examples := REQUESTS.get(key):
        content = operation["requestBody"]["content"]["application/json"]
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    for status, response in operation["responses"].items():
        if "$ref" in response:
            continue
        if (message := ERRORS.get(key, {}).get(int(status))) is not None:
            response["content"] = _error_content(int(status), message)
        for media_type, example in RESPONSES.get((key, int(status)), {}).items():
            content = response["content"][media_type]
            content["example"] = example
            if "$ref" in (schema := content.get("schema", {})):
                content["schema"] = {"$ref": schema["$ref"]}  # without what FastAPI adds for dict


def _error_content(status: int, message: str, kind: str | None = None) -> Json:
    kind = kind or HTTPStatus(status).phrase
    error = {"message": message, "type": kind, "param": None, "code": status}
    schema = {"$ref": "#/components/schemas/ErrorResponse"}
    return {"application/json": {"schema": schema, "example": {"error": error}}}
