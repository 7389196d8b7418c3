"""The page's other views in a browser: best of N, feedback, proxies; and what holds for all views."""

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.server.conftest import ADMIN_KEY, API_KEY, MODEL

QUESTION = "How do I look after my freezer?"
VIEWS = ("compare", "best-of", "proxies")


def play(page, samples="4", strategy="knock-out"):
    """A tournament; returns the request."""
    page.get_by_label("Samples").select_option(samples)
    page.get_by_label("Strategy").select_option(strategy)
    page.get_by_label("Prompt").fill(QUESTION)
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Draw and judge").click()
    page.locator(".winner").wait_for()
    return request.value.post_data_json


def played(page):
    """Pairs of samples (from 1) and percentages of each round."""
    rounds = []
    for column in page.locator(".round").all():
        texts = column.locator(".match").all_inner_texts()
        numbers = [[int(n) for n in re.findall(r"(?:Sample )?(\d+)", text)] for text in texts]
        rounds.append([((a, b), p) for a, p, b, _ in numbers])
    return rounds


@pytest.mark.parametrize(
    ("samples", "strategy", "sizes"),
    [("4", "knock-out", [2, 1]), ("4", "round-robin", [6]), ("8", "final-four", [4, 6])],
)
def test_the_bracket_is_the_tournaments_record(open_page, server, client, samples, strategy, sizes):
    page = open_page(server.url, "best-of", key=API_KEY)
    page.evaluate("""() => {
        window.filled = [];
        new MutationObserver(() => {
            const ready = document.querySelectorAll('.sample.ready').length;
            const matches = document.querySelectorAll('button.match').length;
            window.filled.push([ready, matches]);
        }).observe(document.getElementById('tournament'), { childList: true, subtree: true, attributes: true });
    }""")
    body = play(page, samples, strategy)
    steps = page.evaluate("window.filled")
    assert [1, 0] in steps and [int(samples), sizes[0]] in steps, "it fills step by step"
    alignment, rest = body.pop("alignment"), body | {"stream": False}
    answer = client.chat.completions.create(**rest, extra_body={"alignment": alignment})
    record = answer.alignment["judge"]
    expected = [
        [((a + 1, b + 1), round(100 * game["probability"])) for game in games for a, b in [game["pair"]]]
        for games in record["rounds"]
    ]  # fmt: skip
    shown = played(page)
    assert [len(games) for games in shown] == sizes
    for games, expected_games in zip(shown, expected, strict=True):
        assert [pair for pair, _ in games] == [pair for pair, _ in expected_games]
        for (_, p), (_, q) in zip(games, expected_games, strict=True):
            assert abs(p - q) <= 1
    winner = page.locator(".winner")
    assert f"Sample {record['winner'] + 1} wins" in winner.inner_text()
    assert winner.locator(".text").inner_text() == answer.choices[0].message.content
    flips = [
        any((first - 0.5) * (second - 0.5) <= 0 for first, second in game["orders"].values())
        for games in record["rounds"]
        for game in games
    ]
    assert page.locator(".match .badge").count() == sum(flips)


def test_nothing_can_be_sent_before_the_page_knows_the_model(open_page, server):
    page = open_page(server.url, key=API_KEY)
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    buttons = page.locator("#composer [type=submit], #tournament-form [type=submit]")
    assert [button.is_disabled() for button in buttons.all()] == [True, True]
    page.fill("#prompt", "Can I open my kettle with a fork?")
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0
    held[0].continue_()
    expect(buttons.first).to_be_enabled()
    page.keyboard.press("Enter")  # what was typed is still there
    page.wait_for_selector(".turn .verdict")
    assert buttons.last.is_enabled()


def test_a_match_a_verdict_and_the_feedback(open_page, feedback_server):
    page = open_page(feedback_server.url, "best-of", key=ADMIN_KEY)
    play(page)
    page.locator(".match").last.click()
    details = page.locator(".match-details")
    assert details.locator(".bar").count() == 3
    details.get_by_role("button", name="Why?").click()
    expect(details.locator(".rationale")).to_have_text(re.compile(".{4}"))
    summary = page.locator("#feedback-summary")
    (before,) = map(int, re.findall(r"(\d+) choice", summary.inner_text()))
    details.get_by_role("button", name="is better").first.click()
    expect(details.locator(".kept")).to_have_text("Kept.")
    expect(summary).to_contain_text(f"{before + 1} choice")
    summary.click()
    commands = page.locator("#feedback-body pre").inner_text()
    assert f"python -m training.export --feedback {feedback_server.feedback} " in commands
    assert "python -m training.proxy_dpo --model " in commands
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    kept = page.request.get(f"{feedback_server.url}/feedback", headers=headers).json()
    assert kept["person"] == before + 1


def test_an_administrator_loads_shadows_and_unloads(open_page, server, proxy_root):
    (proxy_root / "v2" / "README.md").write_text(
        "---\nlicense: mit\n---\n# Two\n\nIt is **stricter**, <script>alert(1)</script>.\n\n"
        "| prompts | wins |\n|---|---|\n| test | 73 % |\n\n- one\n- two\n"
    )
    page = open_page(server.url, "proxies", key=ADMIN_KEY)
    page.get_by_label("Name").fill("strict")
    page.get_by_label("Directory").fill("v2")
    page.get_by_label("Shadow").check()
    page.get_by_role("button", name="Load", exact=True).click()
    proxy = page.locator(".proxy", has_text="strict")
    expect(proxy.locator(".badge")).to_have_text("shadow")
    proxy.get_by_role("button", name="Card").click()
    card = page.locator("#card-body")
    expect(card.locator("h3")).to_have_text("Two")
    assert "stricter, <script>alert(1)</script>." in card.inner_text()
    assert card.locator("td").all_inner_texts() == ["test", "73 %"]
    assert card.locator("li").count() == 2 and "license: mit" in card.inner_text()
    page.get_by_role("button", name="Close").click()
    page.on("dialog", lambda dialog: dialog.accept())
    proxy.get_by_role("button", name="Unload").click()
    expect(proxy).to_have_count(0)
    (proxy_root / "v2" / "README.md").unlink()
    page.get_by_label("Shadow").uncheck()
    page.get_by_role("button", name="Load", exact=True).click()
    expect(proxy.locator(".badge")).to_have_text("serving")
    page.goto(f"{server.url}/#compare")
    assert "Proxy strict" in page.get_by_label("Column B").inner_text()
    page.goto(f"{server.url}/#proxies")
    proxy.get_by_role("button", name="Unload").click()
    expect(proxy).to_have_count(0)


def test_others_cannot_change_proxies(open_page, server):
    page = open_page(server.url, "proxies", key=API_KEY, failing=True)
    expect(page.locator("#load-hint")).to_have_text("This needs an administrator's key.")
    page.get_by_label("Name").fill("strict")
    page.get_by_label("Directory").fill("v2")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#load-result .error")).to_contain_text("needs an administrator's key")
    page.on("dialog", lambda dialog: dialog.accept())
    aligned = page.locator(".proxy[data-name=aligned]")
    aligned.get_by_role("button", name="Unload").click()
    expect(aligned.locator(".error")).to_contain_text("needs an administrator's key")


def test_what_a_model_says_is_text(open_page, server):
    """Whatever a stream has: the page shows it and runs nothing."""
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"

    def answer(route):
        choice = {"index": 0, "delta": {"content": hostile}, "finish_reason": None}
        usage = {"completion_tokens": 1}
        chunks = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(body=events + "data: [DONE]\n\n", content_type="text/event-stream")

    page = open_page(server.url, key=API_KEY)
    page.route("**/v1/chat/completions", answer)
    page.locator("#examples .example").first.click()
    page.locator(".verdict").wait_for()
    assert page.locator(".answer .text").all_inner_texts() == [hostile, hostile]
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Assent"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_and_width(open_page, server, theme):
    """No serious finding of axe's, and nothing wider than a phone, in a view that is in full use."""
    page = open_page(server.url, key=ADMIN_KEY, color_scheme=theme)
    page.locator("#examples .example").first.click()
    page.get_by_role("button", name="Ask the judge").click()
    page.locator(".bar").first.wait_for()
    page.goto(f"{server.url}/#best-of")
    play(page)
    page.locator(".match").last.click()
    for view in VIEWS:
        page.goto(f"{server.url}/#{view}")
        if view == "proxies":
            page.locator(".proxy").first.wait_for()
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(overflow) == 0, f"{view} is wider than {width} pixels"
        findings = Axe().run(page).response["violations"]
        serious = [finding for finding in findings if finding["impact"] in ("serious", "critical")]
        assert [(finding["id"], finding["nodes"][0]["html"]) for finding in serious] == []
    assert page.locator("h1:visible").count() == 1
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(250, 249, 246)", "dark": "rgb(20, 21, 19)"}[theme]


def test_a_theme_of_ones_own(open_page, server):
    page = open_page(server.url, key=API_KEY, color_scheme="light")
    page.get_by_label("Theme").select_option("dark")
    page.reload()
    expect(page.locator("#status")).to_have_text(MODEL)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 21, 19)"


def test_tokens_that_are_no_whole_characters(open_page, server):
    """A character of several tokens arrives with its last one; the end of the turn has no text."""
    page = open_page(server.url, key=API_KEY)
    script = """async () => {
        const { Pairing } = await import('./page/trace.js');
        const entry = (token) => ({ token });
        const pairing = new Pairing();
        const pairs = [
            ...pairing.push('', [entry('Hi')]),
            ...pairing.push('Hi', []),
            ...pairing.push('', [entry('\\ufffd'), entry('\\ufffd')]),
            ...pairing.push('\\u{1F600} yes', [entry(' yes')]),
            ...pairing.push('', [entry('<end>')]),
            ...pairing.finish(),
        ];
        return pairs.map(([text, entry]) => [text, entry.token]);
    }"""
    assert page.evaluate(script) == [
        ["Hi", "Hi"], ["", "\ufffd"], ["\U0001f600", "\ufffd"], [" yes", " yes"], ["", "<end>"],
    ]  # fmt: skip


def test_no_line_breaks_within_a_word(open_page, server):
    """Not beside a token with something above it either; text of a script without spaces does break."""
    page = open_page(server.url, key=API_KEY)
    script = """async (tokens) => {
        const { TraceView } = await import('./page/trace.js');
        const view = new TraceView();
        view.element.style.width = '130px';
        document.body.append(view.element);
        const entries = tokens.map((token) => ({ token, rejected: [{ token }], accept_probability: 0.5 }));
        view.push(tokens.join(''), entries);
        view.finish();
        const shown = [...view.element.querySelectorAll('.token')];
        return [view.element.scrollWidth <= 130, shown.map((token) => Math.round(token.getBoundingClientRect().top))];
    }"""
    words = ["To", "make", "a", "harmless", "vaccine,", "it", "is", "tested", "again."]
    tokens = [part for word in words for part in (f" {word[0]}", word[1:-1], word[1:][-1:]) if part]
    fits, tops = page.evaluate(script, tokens)
    starts = [i for i, token in enumerate(tokens) if token.startswith(" ")]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        assert len({*tops[start:end]}) == 1, tokens[start:end]
    assert len({*tops}) > 2 and fits
    fits, tops = page.evaluate(script, [*"天空为什么是蓝色的因为阳光"])
    assert len({*tops}) > 1 and fits
