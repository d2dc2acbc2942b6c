"""The web application's page in a browser: opening sounds, waiting, and reading canvases."""

import base64
import io

import numpy as np
from matplotlib.image import imread

from support.web_site import wait_for


def until(page, condition):
    """Wait for a condition in the page, whose policy forbids the eval of Playwright's `wait_for_function`."""
    wait_for(lambda: page.evaluate(condition) or page.wait_for_timeout(20))


def open_page(page, site, fragment=""):
    """Open the page and wait until it can be used."""
    page.goto(site.url + fragment)
    page.wait_for_selector("#track-scenes, #track-classes", state="attached")


def choose_files(page, files):
    """Choose files, contents by their names."""
    kinds = [{"name": name, "mimeType": "audio/wav", "buffer": content} for name, content in files.items()]
    page.set_input_files("#file", kinds)


def load_sound(page, site, content=None, name="clip.wav", media_type="audio/wav"):
    """Open a sound in the page, by default the example, and wait for its results."""
    if not page.url.startswith(site.url):
        open_page(page, site)
    if content is None:
        page.click("#example")
    else:
        page.set_input_files("#file", {"name": name, "mimeType": media_type, "buffer": content})
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    until(page, "document.querySelector('#media').readyState > 0")


def read_colors(page, canvas):
    """Return the pixels of a canvas, `(rows, columns, 3)`, 0 to 255."""
    url = page.evaluate("(name) => document.querySelector(name).toDataURL()", canvas)
    image = imread(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.round(255 * image[..., :3])


def select(page, what, value):
    """Choose from a list, and wait until its results are drawn."""
    with page.expect_response(lambda response: "/activations?" in response.url):
        page.select_option(what, value)
    page.wait_for_timeout(50)
