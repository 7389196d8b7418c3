"""The page's view "Side by side" in a browser: streams, traces, sliders, the judge, copied requests, errors."""

import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from playwright.sync_api import expect

from tests.server.conftest import ADMIN_KEY, API_KEY, SLOW_KEY, WAIT_SECONDS

QUESTION = "Can I open my kettle with a fork?"
CHAT = "/v1/chat/completions"


@pytest.fixture
def page(open_page, server):
    return open_page(server.url, key=API_KEY)


def ask(page, question=QUESTION):
    begin(page, question)
    wait_for_answers(page)


def begin(page, question=QUESTION):
    # Until the page knows the model, Enter does nothing.
    expect(page.locator("#composer [type=submit]")).to_be_enabled()
    page.fill("#prompt", question)
    page.keyboard.press("Enter")


def wait_for_answers(page):
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector(".turn:last-child .verdict, .turn:last-child .error")


def answer(page, letter):
    mark = page.locator(".letter", has_text=letter)
    return page.locator(".turn:last-child .answer", has=mark)


def text_of(page, letter):
    """The answer without what was rejected above it, and without the mark of its end."""
    script = """element => {
        const copy = element.cloneNode(true);
        for (const other of copy.querySelectorAll('rt, .end')) other.remove();
        return copy.textContent;
    }"""
    return answer(page, letter).locator(".text").evaluate(script)


def record_requests(page):
    """The bodies of the chat requests that the page sends from now on."""
    bodies = []

    def record(request):
        if request.url.endswith(CHAT):
            bodies.append(request.post_data_json)

    page.on("request", record)
    return bodies


def unstreamed(http, body):
    rest = {key: value for key, value in body.items() if not key.startswith("stream")}
    return http.post(CHAT, json=rest).json()


def set_slider(page, label, key):
    """Move it with the keyboard."""
    page.get_by_role("slider", name=label).first.focus()
    page.keyboard.press(key)


def test_both_answer_as_a_stream_what_the_api_answers(page, http):
    bodies, types = record_requests(page), []

    def record_type(response):
        if response.url.endswith(CHAT):
            types.append(response.headers["content-type"])

    page.on("response", record_type)
    page.get_by_role("button", name=QUESTION).click()
    wait_for_answers(page)
    assert len(types) == 2 and all("text/event-stream" in name for name in types)
    frozen, aligned = sorted(bodies, key=lambda body: "alignment" in body)
    assert aligned["alignment"]["proxy"] == "aligned" and frozen["seed"] == aligned["seed"]
    for letter, body in (("A", frozen), ("B", aligned)):
        expected = unstreamed(http, body)
        assert text_of(page, letter) == expected["choices"][0]["message"]["content"]
        counts = answer(page, letter).locator(".counts").inner_text()
        assert f"{expected['usage']['completion_tokens']} tokens" in counts
        assert re.search(r"\d tokens/s", counts)
    for name in ("proposed", "accepted", "rejected", "forced"):
        assert f"{expected['alignment'][name]} {name}" in counts


def test_the_trace_shows_what_was_rejected(page, http):
    bodies = record_requests(page)
    set_slider(page, "Strength", "End")
    ask(page)
    (body,) = [body for body in bodies if "alignment" in body]
    assert body["alignment"]["strength"] == 4
    (trace,) = unstreamed(http, body)["alignment"]["trace"]
    rejecting = [entry for entry in trace if entry["rejected"]]
    shown = answer(page, "B").locator("ruby")
    assert shown.count() == len(rejecting) > 0
    assert shown.locator("s").first.inner_text() == rejecting[0]["rejected"][0]["token"].strip()

    def check_details(entry):
        rows = page.locator("#token-details tbody tr")
        assert rows.count() == len(entry["rejected"]) + 1
        first = f"{round(entry['rejected'][0]['probability'] * 100)} %"
        assert rows.first.locator("td").all_inner_texts()[0] == first
        last = "forced" if entry["forced"] else "accepted"
        assert rows.last.locator("td").all_inner_texts()[-1] == last

    shown.first.hover()
    check_details(rejecting[0])
    page.mouse.move(0, 0)
    assert page.locator("#token-details").is_hidden()
    answer(page, "B").locator(".token").first.focus()
    for _ in range(trace.index(rejecting[-1])):
        page.keyboard.press("ArrowRight")
    check_details(rejecting[-1])
    assert page.locator(":focus").get_attribute("aria-describedby") == "token-details"
    page.keyboard.press("Escape")
    assert page.locator("#token-details").is_hidden()


def test_sliders_answer_again_with_the_same_seed(page):
    bodies = record_requests(page)
    ask(page)
    before = text_of(page, "A")
    set_slider(page, "Strength", "Home")
    wait_for_answers(page)
    assert len(bodies) == 3, "only the proxy's column answers again"
    assert bodies[-1]["alignment"]["strength"] == 0
    assert not any("temperature" in body for body in bodies), "the model's own"
    assert text_of(page, "B") == before, "at strength 0 a proxy is the frozen LLM"
    set_slider(page, "Temperature", "Home")
    wait_for_answers(page)
    assert [body["temperature"] for body in bodies[3:]] == [0, 0]
    assert {body["seed"] for body in bodies} == {1}
    assert page.locator(".turn").count() == 1


def test_the_next_turn_goes_on_with_the_better_answer(page):
    bodies = record_requests(page)
    ask(page)
    page.get_by_role("button", name="A is better").click()
    assert "--feedback" in page.locator(".kept").inner_text()
    chosen = text_of(page, "A")
    page.get_by_role("button", name="Add a column").click()
    expect(page.locator(".answer")).to_have_count(3)
    wait_for_answers(page)
    ask(page, "And with <b>a spoon</b>?")
    assert len(bodies) == 6
    for body in bodies[-3:]:
        roles = [(message["role"], message["content"]) for message in body["messages"]]
        assert roles == [
            ("user", QUESTION), ("assistant", chosen), ("user", "And with <b>a spoon</b>?"),
        ]  # fmt: skip
    assert page.locator(".prompt").last.inner_text() == "And with <b>a spoon</b>?"
    assert bodies[-1]["alignment"]["proxy"] == "polite"


def test_a_stream_is_shown_as_it_comes_and_can_be_stopped(page):
    def make_long(route):
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 900}
        route.continue_(post_data=json.dumps(body))

    page.route(f"**{CHAT}", make_long)
    # A minute's stream, however slow the click is.
    page.context.new_cdp_session(page).send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": 4096, "uploadThroughput": -1},
    )
    begin(page)
    expect(answer(page, "A").locator(".text")).to_have_text(re.compile(".{20}"))
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#stop", state="hidden")
    assert page.locator(".counts").all_inner_texts() == ["Stopped.", "Stopped."]
    length = len(text_of(page, "A"))
    assert 20 <= length < 2000
    page.unroute(f"**{CHAT}")
    ask(page)  # the page goes on


def test_the_judge_compares_in_both_orders_and_says_why(page, http):
    ask(page)
    page.get_by_role("button", name="Ask the judge").click()
    panel = page.locator(".pair")
    panel.locator(".bar").first.wait_for()
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "response_a": text_of(page, "A"),
        "response_b": text_of(page, "B"),
    }
    expected = http.post("/judge", json=body).json()
    bars = [bar.get_attribute("aria-label") for bar in panel.locator(".bar").all()]
    for label, p in zip(bars, [*expected["orders"], expected["probability"]], strict=True):
        (shown,) = map(int, re.findall(r"(\d+) %", label))
        assert abs(shown - 100 * p) < 0.6
    assert panel.locator(".badge").count() == (not expected["consistent"])
    panel.get_by_role("button", name="Why?").click()
    expect(panel.locator(".rationale")).to_have_text(re.compile(".{4}"))


def test_a_copied_request_gives_the_same_answer(page, server):
    ask(page, 'Can\'t I open my "kettle" with a fork?')
    answer(page, "B").get_by_role("button", name="Copy request").click()
    dialog = page.get_by_role("dialog")
    code = {}
    for language in ("curl", "Python", "JavaScript"):
        dialog.get_by_role("button", name=language).click()
        code[language] = dialog.locator("#snippet").inner_text()
        assert API_KEY not in code[language]
    environment = os.environ | {"ASSENT_API_KEY": API_KEY}

    def run(*command):
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    expected = text_of(page, "B")
    response = json.loads(run("bash", "-c", code["curl"]))
    assert response["choices"][0]["message"]["content"] == expected
    assert response["alignment"]["proxy"] == "aligned"
    assert run(sys.executable, "-c", code["Python"]).decode() == expected + "\n"
    script = f"""async () => {{
        const process = {{ env: {{ ASSENT_API_KEY: "{API_KEY}" }} }}, lines = [];
        const console = {{ log: (line) => lines.push(line) }};
        {code["JavaScript"]}
        return lines;
    }}"""
    assert page.evaluate(script) == [expected]
    dialog.get_by_role("button", name="Close").click()


def test_a_key_is_asked_for(open_page, server):
    page = open_page(server.url, failing=True)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Use it").click()
    assert "needs an API key" in page.locator("#page-error .error").inner_text()
    dialog.get_by_label("Key").fill(API_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("assent-demo")
    assert page.locator("#page-error").inner_text() == ""
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


def error_of(page, letter):
    return answer(page, letter).locator(".error").inner_text()


def test_what_does_not_fit_into_the_context(open_page, server):
    page = open_page(server.url, key=API_KEY, failing=True)
    page.get_by_label("New tokens").first.fill("4000")
    ask(page)
    assert "1024" in error_of(page, "A") and "fewer new tokens" in error_of(page, "A")
    page.get_by_label("New tokens").first.fill("50")
    answer(page, "A").get_by_role("button", name="Try again").click()
    page.wait_for_selector(".turn .counts b")


def test_too_many_requests(open_page, server):
    page = open_page(server.url, key=SLOW_KEY, failing=True)
    ask(page)
    messages = page.locator(".error").all_inner_texts()
    assert messages and "requests_per_minute" in messages[-1]
    assert re.search(r"Try again in \d+ s", messages[-1])


def test_the_server_is_gone(open_page, server):
    page = open_page(server.url, key=API_KEY, failing=True)
    page.wait_for_selector("#examples .example")
    page.context.set_offline(True)
    ask(page)
    assert "does not answer" in error_of(page, "A")
    assert page.locator("#status").inner_text() == "No answer from the server"
    page.context.set_offline(False)
    for letter in "AB":
        answer(page, letter).get_by_role("button", name="Try again").click()
    page.wait_for_selector(".turn .verdict")
    assert page.locator("#status").inner_text() == "assent-demo"


def test_a_proxy_that_was_unloaded_meanwhile(open_page, server):
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=WAIT_SECONDS) as admin:
        admin.post("/proxies", json={"name": "brief", "path": "v1"}).raise_for_status()
        page = open_page(server.url, key=API_KEY, failing=True)
        page.get_by_label("Column B").select_option("brief")
        admin.delete("/proxies/brief").raise_for_status()
    ask(page)
    assert "'brief' is not loaded" in error_of(page, "B")
    option = page.get_by_label("Column B").locator("option:checked")
    expect(option).to_have_text("Proxy brief (not loaded)")
