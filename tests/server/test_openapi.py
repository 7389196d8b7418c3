"""The OpenAPI document is complete and says what the server sends; /docs needs nothing from elsewhere."""

import json
import re
from http.client import HTTPConnection

import httpx
import jsonschema
import pytest

from deploy.docs import http_page
from server import openapi
from server.arguments import parse
from server.openapi_examples import ERRORS, REQUESTS, TOO_LARGE
from tests.server.conftest import API_KEY, DEMO, WAIT_SECONDS

OURS = set(openapi.TAGS) - {openapi.VLLM}
PLACES = {"/proxies/{name}/learn": "/proxies/nobody/learn", "/proxies/{name}": "/proxies/nobody"}


@pytest.fixture(scope="module")
def document(http):
    return http.get("/openapi.json").raise_for_status().json()


@pytest.fixture(scope="module")
def own_operations(document):
    """By "METHOD path"."""
    return {
        f"{method.upper()} {path}": operation
        for method, path, operation in openapi.operations(document)
        if set(operation["tags"]) <= OURS
    }


def validate(document, value, schema):
    jsonschema.validate(value, schema | {"components": document["components"]})


def test_it_describes_this_server(document):
    assert document["info"]["title"] == "Assent"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", document["info"]["version"])
    assert [tag["name"] for tag in document["tags"]] == list(openapi.TAGS)
    used = {tag for *_, operation in openapi.operations(document) for tag in operation["tags"]}
    assert used == set(openapi.TAGS)


def test_every_route_of_ours_has_examples_that_fit_its_schema(document, own_operations):
    assert len(own_operations) >= 14
    for key, operation in own_operations.items():
        assert operation["summary"] and operation["description"], key
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            for example in content["examples"].values():
                validate(document, example["value"], content["schema"])
        assert "422" not in operation["responses"], key  # vLLM's handler answers 400
        for status, response in operation["responses"].items():
            if "$ref" in response:
                response = document["components"]["responses"][response["$ref"].split("/")[-1]]
            assert response["description"], (key, status)
            for media_type, content in response.get("content", {}).items():
                if media_type == "application/octet-stream":
                    continue
                assert "example" in content, (key, status, media_type)
                validate(
                    document, content["example"], content.get("schema", {})
                )  # a stream has none


def test_examples_belong_to_routes(own_operations):
    assert set(REQUESTS) <= set(own_operations)
    for key, errors in ERRORS.items():
        assert {str(status) for status in errors} <= set(own_operations[key]["responses"])


@pytest.mark.parametrize("key", sorted(REQUESTS))
def test_requests_of_the_examples(http, document, own_operations, key):
    """Each is answered, and the answer has the documented form."""
    method, path = key.split()
    for body in REQUESTS[key].values():
        if "max_tokens" not in body and "messages" in body:
            body = body | {"max_tokens": 8}
        answer = http.request(method, PLACES.get(path, path), json=body)
        if path == "/feedback" or path.endswith("/learn"):  # a server that keeps none
            assert answer.status_code == 403
            assert answer.json()["error"]["message"] == ERRORS[key][403]
            continue
        assert answer.status_code in (200, 201), answer.text
        response = own_operations[key]["responses"][str(answer.status_code)]
        media_type = answer.headers["content-type"].split(";")[0]
        assert media_type in response["content"]
        if media_type == "application/json":
            validate(document, answer.json(), response["content"][media_type]["schema"])
    if path == "/proxies":
        operation = own_operations["DELETE /proxies/{name}"]
        for body in REQUESTS[key].values():
            answer = http.delete(f"/proxies/{body['name']}")
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            validate(document, answer.json(), schema)


def test_statistics_have_the_documented_form(http, document):
    """With all that an alignment may report. The schema forbids other fields."""
    body = REQUESTS["POST /v1/chat/completions"]["the best of 4"] | {"max_tokens": 8}
    traced = {"model": "assent-demo:aligned", "messages": body["messages"], "max_tokens": 8}
    for request in (body, traced | {"alignment": {"trace": True}}):
        alignment = http.post("/v1/chat/completions", json=request).json()["alignment"]
        validate(document, alignment, {"$ref": "#/components/schemas/AlignmentStats"})
        assert ("judge" in alignment) != ("trace" in alignment)


@pytest.mark.parametrize("path", ["/feedback", "/proxies", "/v1/models"])
def test_lists_have_the_documented_form(http, document, own_operations, path):
    responses = own_operations[f"GET {path}"]["responses"]
    validate(
        document,
        http.get(path).json(),
        responses["200"]["content"]["application/json"]["schema"],
    )


MESSAGES = REQUESTS["POST /v1/chat/completions"]["a proxy"]["messages"]
CHAT = {"model": "assent-demo", "messages": MESSAGES, "max_tokens": 2}
PAIR = REQUESTS["POST /judge"]["a pair"]


@pytest.mark.parametrize(
    ("key", "status", "body"),
    [
        ("POST /v1/chat/completions", 400, CHAT | {"alignment": {"strenght": 1}}),
        ("POST /v1/chat/completions", 404, CHAT | {"model": "assent-demo:nobody"}),
        ("POST /v1/completions", 400, {"prompt": "Once", "alignment": {"best_of": 2}}),
        ("POST /v1/completions", 404, {"model": "assent-demo:nobody", "prompt": "Once"}),
        ("POST /judge", 400, PAIR | {"principles": ["honesty"]}),
        ("POST /judge", 404, PAIR | {"kind": "proxy", "proxy": "nobody"}),
        ("POST /judge/rank", 400, {"prompt": "a", "responses": ["b"], "principles": ["honesty"]}),
        ("DELETE /feedback", 403, None),
        ("POST /proxies", 400, {"name": "mine", "path": "nowhere"}),
        ("POST /proxies", 409, {"name": "aligned", "path": "v1", "shadow": True}),
        ("POST /positions", 400, {"responses": [{"prompt": [1], "response": [99999]}]}),
        ("GET /proxies/{name}/learn", 403, None),
    ],
)
def test_errors_are_worded_as_documented(http, key, status, body):
    method, path = key.split()
    answer = http.request(method, PLACES.get(path, path), json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"] == ERRORS[key][status]


def test_errors_of_the_middleware(server, document):
    responses = document["components"]["responses"]

    def example(name):
        return responses[name]["content"]["application/json"]["example"]

    user = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=server.url, timeout=WAIT_SECONDS) as client:
        assert client.get("/proxies").json() == example("Unauthorized")
        load = {"name": "mine", "path": "v1"}
        refused = client.post("/proxies", json=load, headers=user)
        assert refused.json() == example("NoAdministrator")
    connection = HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/judge", headers=user | {"Content-Length": str(2**25 + 1)})
    large = connection.getresponse()  # nothing of the body has been sent
    assert (large.status, json.load(large)) == (413, example("TooLarge"))
    connection.close()
    assert example("TooLarge")["error"]["message"] == TOO_LARGE.message


def test_alignment_is_documented_on_every_route_that_generates(document):
    schemas = document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        alignment = str(schemas[body.split("/")[-1]]["properties"]["alignment"])
        assert "AlignmentOptions" in alignment
        assert "Assent-Proxy" in operation["responses"]["200"]["headers"]


def test_the_page_of_the_docs_has_every_route(document, own_operations):
    page = http_page.make_page(document)
    titles = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert sorted(titles) == sorted(own_operations)
    assert page.count("```") % 2 == 0 and "| `best_of` | integer |" in page


# --- /docs ---


def test_the_page_loads_nothing_from_elsewhere(http):
    page = http.get("/docs").raise_for_status().text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)
    assert addresses == ["/static/swagger-ui.css", "data:,", "/static/swagger-ui-bundle.js"]
    assert "http" not in re.sub(r"oauth2RedirectUrl.*", "", page).replace("http-equiv", "")
    assert '"validatorUrl": null' in page
    for address in (addresses[0], addresses[2], "/openapi.json"):
        assert http.get(address).status_code == 200


def test_it_needs_a_key_as_every_other_route_does(server):
    for path in ("/docs", "/openapi.json", "/static/swagger-ui.css"):
        assert httpx.get(f"{server.url}{path}", timeout=WAIT_SECONDS).status_code == 401
        headers = {"Authorization": f"Bearer {API_KEY}"}
        answer = httpx.get(f"{server.url}{path}", headers=headers, timeout=WAIT_SECONDS)
        assert answer.status_code == 200


def test_both_can_be_switched_off():
    model = ["--model", str(DEMO / "model")]
    assert parse(model).enable_offline_docs
    options = parse([*model, "--disable-fastapi-docs"])
    assert options.disable_fastapi_docs and not options.enable_offline_docs
