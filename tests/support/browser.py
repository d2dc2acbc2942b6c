"""Tests in a browser: any installed Chromium, driven by Playwright."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
# no connections of the browser itself, autoplay, and a generated tone as the microphone
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required
--use-fake-device-for-media-stream --use-fake-ui-for-media-stream""".split()


@pytest.fixture(scope="module")
def chromium():
    """A running browser; skips the test if none is installed.

    It ends with the module, as no asyncio loop can run in this thread while Playwright is active.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A new page. Errors in it, and requests to other hosts, fail the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    problems = []
    context.on("weberror", lambda error: problems.append(f"error: {error.error}"))
    new_page = context.new_page()
    new_page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    new_page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1:", "file://", "data:", "blob:"))
            else problems.append(f"request to another host: {request.url}")
        ),
    )
    yield new_page
    context.close()
    assert not problems


def find_accessibility_violations(page):
    """Return what axe reports for the page, a line for each violation."""
    from axe_playwright_python.sync_playwright import Axe

    # preloading would request style sheets again, which file: pages may not
    violations = Axe().run(page, options={"preload": False}).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:120]}" for violation in violations for node in violation["nodes"]
    ]


def screenshot(page, name):
    """Save a picture of the page to the folder in the environment variable SCREENSHOTS, if it is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
