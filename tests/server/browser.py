"""The page in Chromium: every test fails on an error of the page's, and on a request to anywhere else."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.conftest import WAIT_SECONDS

OpenPage = Callable[..., Page]


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Debian's Chromium; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no `chromium` on the PATH (Debian: apt-get install chromium)")
    expect.set_options(timeout=WAIT_SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened_pages(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages, each with a browser profile of its own, and checks in the end what they did."""
    problems: list[str] = []
    contexts = []

    def open_page(
        url: str, view: str = "", key: str | None = None, *, failing: bool = False, **options: Any
    ) -> Page:
        """
        Args:
            url: the server's.
            key: a person's API key, as if it had been typed.
            failing: the test makes requests fail, which the browser reports in the console.
        """
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(WAIT_SECONDS * 1000)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('assent-api-key', '{key}')")
        page = context.new_page()

        def on_console(message: Any) -> None:
            expected = failing and "Failed to load resource" in message.text
            if message.type in ("error", "warning") and not expected:
                problems.append(f"{message.type}: {message.text}")

        def on_request(request: Any) -> None:
            if not request.url.startswith(url):
                problems.append(f"a request to {request.url}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", on_request)
        page.goto(f"{url}/#{view}")
        return page

    try:
        yield open_page
    finally:
        for context in contexts:
            context.close()
    assert problems == []
