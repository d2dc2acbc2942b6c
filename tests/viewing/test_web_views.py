"""What the web application's page draws of a sound: spectrogram, bars, units, on screens of any size."""

import re

import numpy as np
import pytest
import torch
from support.browser import find_accessibility_violations, screenshot
from support.web_page import choose_files, load_sound, open_page, read_colors, select, until
from support.web_site import RATE, wav

pytest.importorskip("uvicorn", reason="needs the extra [web]")


def test_the_spectrogram_shows_frequencies_over_time(page, site):
    times = np.arange(6 * RATE) / RATE
    low, high = np.sin(2 * np.pi * 500 * times), np.sin(2 * np.pi * 5000 * times)
    load_sound(page, site, wav(0.5 * np.where(times < 3, low, high)))
    until(page, "document.querySelectorAll('#frequencies span').length == 5")
    image = read_colors(page, "#spectrogram")
    loudest = np.abs(image - image[0, 0]).sum(2).argmax(0)  # the color farthest from that of nothing
    canvas = page.locator("#spectrogram").bounding_box()
    for label, columns in (("500 Hz", slice(20, -20)), ("5 kHz", slice(20, -20))):
        box = page.get_by_text(label, exact=True).bounding_box()
        expected = box["y"] + box["height"] / 2 - canvas["y"]
        half = np.array_split(loudest, 2)[label == "5 kHz"][columns]
        assert np.abs(half - expected).max() < 4  # of 112 pixels
    assert page.inner_text("#spectrogram-legend").split() == ["\N{MINUS SIGN}60", "0", "dB"]


MEASURE_BARS = """items => items.map((item) => [
    item.innerText,
    ...[".bar", ".bar i"].map((part) => item.querySelector(part).getBoundingClientRect().width),
])"""


def test_bars_have_the_stated_scale_and_2_percent_shows(page, site, example):
    load_sound(page, site, wav(example))
    for items, scale in (
        ("#now-scenes li", "#now-scale-scenes"),
        ("#tables table:nth-of-type(2) tbody tr", "#tables table:nth-of-type(2) caption .scale"),
    ):
        full = float(re.fullmatch(r"full bar: ([\d.]+) %", page.inner_text(scale))[1])
        bars = page.eval_on_selector_all(items, MEASURE_BARS)  # at once, as items are made anew
        assert bars
        for text, bar, filled in bars:
            percent = float(re.search(r"([\d.]+) %", text)[1])
            assert bar > 300
            rounding = 0.5 if percent >= 10 else 0.05  # of the number
            assert filled == pytest.approx(max(1, bar * percent / full), abs=1 + bar * rounding / full)
            assert percent <= full
    assert 0.02 * bar >= 6  # pixels of 2 % where a full bar is 100 %


def test_units_are_described_under_the_pointer_and_by_keys(page, site, network, example):
    load_sound(page, site, wav(example))
    select(page, "#layer", "pool5")
    layer = network.architecture.layer("pool5")
    assert page.inner_text("#layer-words") == "Each value hears 791 ms; there is one every 372 ms."
    frames = network.extract(torch.from_numpy(example * 256).float(), ["pool5"])["pool5"][0].numpy()
    strip = page.locator("#units-strip")
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    unit, frame = np.unravel_index(frames.argmax(), frames.shape)
    seconds = (layer.start + layer.receptive_field / 2 + frame * layer.stride) / RATE
    page.mouse.move(
        box["x"] + box["width"] * seconds / 25, box["y"] + box["height"] * (unit + 0.5) / len(frames)
    )
    text = page.inner_text("#unit")
    found = re.match(r"unit (\d+) · ([\d.]+) at ([\d.]+) s", text)
    assert int(found[1]) == unit
    assert float(found[2]) == pytest.approx(frames.max(), rel=0.01)  # eight bits of its square root
    assert float(found[3]) == pytest.approx(seconds, abs=0.1)
    page.evaluate(f"document.querySelector('#media').currentTime = {seconds}")
    strip.press("Home")
    for _ in range(unit):
        page.keyboard.press("ArrowDown")
    assert strip.get_attribute("aria-valuetext").startswith(f"unit {unit} · {found[2]} at")
    select(page, "#layer", "conv2")
    values = [strip.get_attribute(f"aria-value{name}") for name in ("text", "now", "max")]
    assert values == [None, "1", "16"]


def test_units_can_be_sorted_and_inactive_ones_are_counted(page, site, network, example):
    load_sound(page, site, wav(example))
    select(page, "#layer", "conv7")
    frames = network.extract(torch.from_numpy(example * 256).float(), ["conv7"])["conv7"][0]
    frames = frames[:, : frames.shape[1] - network.edge_frames("conv7", len(example))].numpy()
    inactive = int((frames.max(1) <= 0).sum())
    caption = page.inner_text("#activations-caption")
    if inactive:
        assert f"{inactive:,} of {len(frames):,} units are never active." in caption
    images = [read_colors(page, "#activations")]
    for order in ("similarity", "peak", "mean"):
        select(page, "#order", order)
        images.append(read_colors(page, "#activations"))
        assert all((images[-1] != other).any() for other in images[:-1])
    page.locator("#units-strip").press("Home")  # the most active one on average
    best = frames.mean(1).argmax()
    until(page, f"document.querySelector('#unit').textContent.startsWith('unit {best} ')")


def test_times_have_tenths_under_a_minute(page, site, example):
    load_sound(page, site, wav(example[: int(19.9 * RATE)]))
    assert page.inner_text("#time") == "0.0 / 19.9 s"
    assert page.inner_text("#sounds .length") == "19.9 s"
    load_sound(page, site, wav(np.tile(example[: 10 * RATE], 7)))
    assert page.inner_text("#time") == "0:00 / 1:10"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_clipped_on_a_phone(chromium, site, example, scheme):
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=scheme
    )
    page = context.new_page()
    open_page(page, site)
    choose_files(page, {"a rather long name of a sound.wav": wav(example), "no sound.wav": b"text" * 50})
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    page.wait_for_selector("#sounds .failed")
    select(page, "#layer", "conv7")
    assert page.locator("#keys").is_hidden()
    assert page.get_by_text("Tap to play from there.").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    clipped = page.evaluate(
        """() => [...document.querySelectorAll("select, .legend, #frequencies span, #axis span, button, p")]
          .filter((element) => element.offsetParent && !element.classList.contains("visually-hidden"))
          .filter((element) => {
            const { left, right } = element.getBoundingClientRect();
            return left < 0 || right > innerWidth || element.scrollWidth > element.clientWidth + 1;
          })
          .map((element) => element.outerHTML)"""
    )
    assert [html for html in clipped if 'class="entry"' not in html] == []  # names of files may be cut
    # categories have a line of their own, as wide as the page
    widths = "[...document.querySelectorAll('#tracks .names li')].map((name) => name.clientWidth)"
    assert set(page.evaluate(widths)) == {358}
    assert find_accessibility_violations(page) == []
    screenshot(page, f"serve-phone-{scheme}")
    context.close()
