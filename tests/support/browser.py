"""A real browser for pages: Debian's or any other Chromium, driven by Playwright."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
# no connection of its own, a page plays without a click, and the microphone is a generated tone
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required
--use-fake-device-for-media-stream --use-fake-ui-for-media-stream""".split()


@pytest.fixture(scope="module")
def chromium():
    """A running browser; the test is skipped where there is none.

    It ends with the module: while Playwright is there, no server can run in this thread.
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
    """A page of its own. Whatever goes wrong in it, or is asked of another host, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    troubles = []
    context.on("weberror", lambda error: troubles.append(f"error: {error.error}"))
    opened = context.new_page()
    opened.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1:", "file://", "data:", "blob:"))
            else troubles.append(f"asked another host: {request.url}")
        ),
    )
    opened.troubles = troubles  # a test that expects one takes it out
    yield opened
    context.close()
    assert not troubles


def inaccessible(page):
    """What axe finds wrong with the page, a line each; [] is accessible."""
    from axe_playwright_python.sync_playwright import Axe

    # it would ask for the style sheets again, which a page of a file may not
    found = Axe().run(page, options={"preload": False}).response["violations"]
    return [f"{each['id']}: {node['html'][:120]}" for each in found for node in each["nodes"]]


def screenshot(page, name):
    """Keeps a picture of the page where SCREENSHOTS says; for the documentation, and to look at."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
