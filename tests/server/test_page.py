"""GET / and its files, and the routes that exist for the page: cards, and the number of choices."""

import http.client
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from server.routes import cards
from tests.server.conftest import ADMIN_KEY, API_KEY, LIMITED_KEY, WAIT_SECONDS

PAGE = Path(__file__).parents[2] / "server" / "page"


def get(server, path, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=WAIT_SECONDS)


def test_every_file_is_served_to_anybody_and_names_no_other_host(server):
    files = {"/": "index.html"} | {f"/page/{path.name}": path.name for path in PAGE.iterdir()}
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg"}
    with httpx.Client(base_url=server.url, timeout=WAIT_SECONDS) as client:
        responses = {name: client.get(path) for path, name in files.items()}
    for name, response in responses.items():
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")
    assert set(files.values()) >= {"index.html", "app.js", "style.css", "icon.svg"}


@pytest.mark.parametrize(
    "path", ["/page/../plugin.py", "/page/%2e%2e/plugin.py", "/page/..%2fplugin.py", "/page/"]
)
def test_nothing_else_is_served(server, path):
    address = server.url.removeprefix("http://")
    with closing(http.client.HTTPConnection(address, timeout=WAIT_SECONDS)) as connection:
        connection.request("GET", path)  # as it is: httpx would resolve it
        assert connection.getresponse().status == 404


def test_a_card_is_the_readme_beside_the_weights(http, proxy_root):
    card = proxy_root / "v3" / "README.md"
    card.write_text("# Three\n\nWhat it does – and what not.\n", encoding="utf-8")
    assert http.post("/proxies", json={"name": "three", "path": "v3"}).status_code == 201
    try:
        response = http.get("/proxies/three/card")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/markdown; charset=utf-8"
        assert response.text == card.read_text(encoding="utf-8")
        card.unlink()
        response = http.get("/proxies/three/card")
        assert response.status_code == 404
        assert "'three' has no card" in response.json()["error"]["message"]
    finally:
        http.delete("/proxies/three")
    response = http.get("/proxies/three/card")
    assert response.status_code == 404
    assert "No proxy 'three'" in response.json()["error"]["message"]


def test_what_is_no_card(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret"
    directory = root / "proxy"
    directory.mkdir(parents=True)
    outside.write_text("secret")
    card = directory / "README.md"
    assert cards.read_card(directory, root) is None
    card.symlink_to(outside)
    assert cards.read_card(directory, root) is None
    assert cards.read_card(directory, None) == "secret"  # the operator's own directory
    card.unlink()
    card.symlink_to(card)
    assert cards.read_card(directory, root) is None
    card.unlink()
    card.write_bytes(b"\xff" + b"x" * 2 * cards.MAX_BYTES)
    assert len(cards.read_card(directory, root)) == cards.MAX_BYTES


def test_the_number_of_choices_is_the_callers(feedback_server):
    def counts(key):
        return get(feedback_server, "/feedback", key).json()

    before, others_before = counts(API_KEY), counts(LIMITED_KEY)
    body = {"prompt": "Which?", "response_a": "this", "response_b": "that", "better": "a"}
    headers = {"Authorization": f"Bearer {API_KEY}"}
    httpx.post(f"{feedback_server.url}/feedback", json=body, headers=headers)
    assert counts(API_KEY) == before | {"person": before["person"] + 1}
    assert counts(LIMITED_KEY) == others_before
    assert "database" not in before
    assert counts(ADMIN_KEY)["database"] == str(feedback_server.feedback)


def test_a_server_without_feedback_says_so(server):
    assert get(server, "/feedback", API_KEY).json() == {"enabled": False, "person": 0, "judge": 0}
