"""Writes the page of the docs site about our HTTP routes, from the server's OpenAPI document.

python -m deploy.docs.http_page docs/reference/http.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from server import openapi
from server.plugin import ROUTES

Json = dict[str, Any]

INTRODUCTION = """# HTTP API

Our routes. vLLM's others keep vLLM's form; a running server shows all of them at `/docs`, and gives the whole document
at `/openapi.json`. This page is made from that document.

Errors have OpenAI's shape: `{"error": {"message": ..., "type": ..., "param": ..., "code": 400}}`. Where the server has
keys, every route but `/health`, `/ready` and the page at `/` needs `Authorization: Bearer <key>`, `/docs` too.
"""
VLLM_SCHEMAS = ("ChatRequest", "TextRequest", "ResponseRequest")
"""Long ones, of which only our field is shown."""
MAX_LINE = 110
"""Characters of an example on one line."""


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(make_document()), encoding="utf-8")


def make_document() -> Json:
    """The document of our routes, without an engine."""
    app = FastAPI()
    for module in ROUTES:
        app.include_router(module.router)
    openapi.describe(app)
    return app.openapi()


def make_page(document: Json) -> str:
    """All operations by tag, and the schemas that their requests share."""
    parts = [INTRODUCTION, _middleware_errors(document)]
    for tag, description in openapi.TAGS.items():
        if tag == openapi.VLLM:
            continue
        found = [item for item in openapi.operations(document) if item[2]["tags"] == [tag]]
        parts.append(f"## {tag}\n\n{description}\n")
        parts += [_operation(*item, document["components"]["schemas"]) for item in found]
    return "\n".join(parts)


def _middleware_errors(document: Json) -> str:
    rows = [
        f"| {openapi.MIDDLEWARE_ERRORS[name].status} | {_cell(response['description'])} |"
        for name, response in document["components"]["responses"].items()
    ]
    return (
        "Any route may answer with these:\n\n| status | message |\n|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _operation(method: str, path: str, operation: Json, schemas: Json) -> str:
    parts = [f"### {method.upper()} {path}\n", operation["description"] + "\n"]
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        parts += _fields(content["schema"], schemas)
        for name, example in content["examples"].items():
            parts.append(f"A request, {name}:\n\n{_json(example['value'])}")
    errors = []
    for status, response in operation["responses"].items():
        if "$ref" in response:
            continue
        example = response.get("content", {}).get("application/json", {}).get("example")
        if status < "400" and example is not None:
            parts.append(
                f"Response {status}. {_sentence(response['description'])}\n\n{_json(example)}"
            )
        elif status >= "400":
            # A pattern's [a-z][0-9] is no link.
            message = _cell(example["error"]["message"]).replace("[", "\\[")
            meaning = _cell(response["description"])
            errors.append(f"| {status} | {meaning} | {message} |")
    if errors:
        parts.append(
            "| status | meaning | for example |\n|---|---|---|\n" + "\n".join(errors) + "\n"
        )
    return "\n".join(parts)


def _fields(schema: Json, schemas: Json) -> list[str]:
    """A table of the fields of a request, and of the objects in it."""
    tables: list[str] = []
    waiting, seen = _references(schema), set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in seen or name not in schemas:
            continue
        seen.add(name)
        fields = schemas[name].get("properties", {})
        if name in VLLM_SCHEMAS:
            fields = {"alignment": fields["alignment"]}
        rows = [
            f"| `{field}` | {_cell(_type(value))} | {_cell(value.get('description', ''))} | {_default(value)} |"
            for field, value in fields.items()
        ]
        title = "" if not tables else f"`{name}`:\n\n"
        tables.append(
            f"{title}| field | type | meaning | default |\n|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
        waiting += _references(fields)
    return tables


def _references(schema: Any) -> list[str]:
    """Names of the schemas that a schema refers to, in order."""
    if isinstance(schema, list):
        return [name for item in schema for name in _references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
    return own + [name for value in schema.values() for name in _references(value)]


def _type(schema: Json) -> str:
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema:
        kinds = [_type(item) for item in schema["anyOf"] if item.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _default(schema: Json) -> str:
    default = schema.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def _json(value: Any) -> str:
    text = json.dumps(value)
    if len(text) > MAX_LINE:
        text = json.dumps(value, indent=2)
    return f"```json\n{text}\n```\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _sentence(text: str) -> str:
    return "" if text == "Successful Response" else text


if __name__ == "__main__":
    main()
