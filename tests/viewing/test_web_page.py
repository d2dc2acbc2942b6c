"""The web application's page in a browser."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.browser import find_accessibility_violations, screenshot
from support.video_fixtures import write_video
from support.web_page import load_sound, read_colors, until
from support.web_site import RATE, run_site, wait_for, wav

pytest.importorskip("uvicorn", reason="needs the extra [web]")


def mp3(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3")
    return file.getvalue()


def video(folder):
    path = folder / "video.mp4"
    write_video(path, [0.1 * number for number in range(120)])
    return path.read_bytes()


def test_the_example_is_analyzed_and_drawn(page, site):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    screenshot(page, "serve-empty")
    assert page.locator("#results").is_hidden()
    assert "1,000 objects" in page.inner_text("#network")
    assert find_accessibility_violations(page) == []
    load_sound(page, site)
    page.evaluate("document.querySelector('#media').currentTime = 6")
    until(page, "document.querySelector('#time').textContent == '6.0 / 45.0 s'")
    assert page.inner_text("#now-scenes .label >> nth=0") == "ocean"
    assert page.inner_text("#now-objects .label >> nth=0").startswith("seashore")
    until(page, "document.querySelector('#announcement').textContent.startsWith('Done, scenes: ')")
    page.set_viewport_size({"width": 1120, "height": 1268})
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    screenshot(page, "serve-demo")
    page.evaluate("document.querySelector('#media').currentTime = 23")
    until(page, "document.querySelector('#now-scenes .label').textContent == 'nursery'")
    for head, channel in (("scenes", 0), ("objects", 2)):  # red and blue
        track = read_colors(page, f"#track-{head} .strip canvas")
        row = track[12 * page.evaluate("devicePixelRatio")]
        assert len(np.unique(row, axis=0)) > 3
        assert (row.argmax(1) == channel).mean() > 0.95
        assert row[10].sum() < row[-10].sum() - 10  # more probable at the beginning
    assert read_colors(page, "#waveform").std() > 10
    before = read_colors(page, "#activations")
    page.select_option("#layer", "conv2")
    until(page, "document.querySelector('#activations-caption').textContent.includes('16 units')")
    assert (read_colors(page, "#activations") != before).any()
    rows = page.locator("#tables table").nth(0).locator("tbody tr")
    assert rows.count() == 10
    assert rows.nth(0).inner_text().split()[0] == "nursery"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_on_all_screens(page, site, scheme):
    page.emulate_media(color_scheme=scheme)
    for width in (1280, 320):
        page.set_viewport_size({"width": width, "height": 800})
        load_sound(page, site)
        assert find_accessibility_violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        screenshot(page, f"serve-{scheme}-{width}")


def test_clicks_play_and_keys_seek(page, site, example):
    load_sound(page, site, wav(example))
    time_in_page = "document.querySelector('#media').currentTime"
    for strip, fraction in (("#position", 0.25), ("#track-objects .strip", 0.5), ("#units-strip", 0.75)):
        box = page.locator(strip).bounding_box()
        page.locator(strip).click(position={"x": fraction * box["width"], "y": 10})
        assert page.evaluate(time_in_page) == pytest.approx(25 * fraction, abs=0.5)
        assert not page.evaluate("document.querySelector('#media').paused")
        page.click("#play")
        assert page.evaluate("document.querySelector('#media').paused")
    for key, seconds in (("Home", 0), ("ArrowRight", 1), ("PageUp", 11), ("ArrowDown", 10), ("End", 25)):
        page.locator("#position").press(key)
        assert page.evaluate(time_in_page) == pytest.approx(seconds, abs=0.1)
        assert page.get_attribute("#position", "aria-valuenow") == f"{page.evaluate(time_in_page):.1f}"
    assert page.get_attribute("#position", "aria-valuetext").startswith("25.0 s of 25.0 s, ")
    page.locator("#position").press("Home")
    page.keyboard.press("Space")
    until(page, f"{time_in_page} > 0.2")
    assert float(page.evaluate("document.querySelector('#timeline').style.getPropertyValue('--at')")) > 0
    page.keyboard.press("Space")


def test_results_can_be_downloaded(page, site, example):
    load_sound(page, site, wav(example[: 3 * RATE]), "a dog.wav")
    assert "so it was played 4 times in a row" in page.inner_text("#note")
    downloads = {}
    for name in ("JSON", "CSV", "PNG"):
        with page.expect_download(timeout=120_000) as download:  # matplotlib may not be imported yet
            page.get_by_role("link", name=name).click()
        downloads[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    assert json.loads(downloads["a dog.wav.json"])["repeats"] == 4
    assert downloads["a dog.wav.csv"].startswith(b"file,start,end,head,rank,")
    assert downloads["a dog.wav.png"].startswith(b"\x89PNG")


def test_the_page_describes_edge_frames_and_quiet_sounds(page, site, example):
    load_sound(page, site, wav(0.001 * example))
    note = page.inner_text("#note")
    assert "The last one covers zeros after the end; this edge frame is left out." in note
    assert "The sound is quiet" in note
    caption = "document.querySelector('#activations-caption').textContent"
    assert "edge frame" not in page.evaluate(caption)
    page.select_option("#layer", "conv7")
    until(page, f"{caption}.includes('Hatched: edge frame, left out')")


@pytest.mark.released
def test_units_of_conv7_are_visible(page, released_model, folder):
    """The scale ends at the 99.5th percentile of ordinary frames, 0.43; the edge frame's largest is 1.32."""
    with run_site(released_model) as site:
        load_sound(page, site)
        page.evaluate("document.querySelector('#media').currentTime = 23")
        page.select_option("#layer", "conv7")
        caption = "document.querySelector('#activations-caption').textContent"
        until(page, f"{caption}.startsWith('890 of 1,024 units are never active')")
        page.set_viewport_size({"width": 1120, "height": 1268})
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)
        screenshot(page, "serve")
        assert page.inner_text("#now-scenes .label >> nth=0") == "hospital"
        assert page.inner_text("#activations-caption .legend span >> nth=-1") == "≥ 0.43"
        pixels = read_colors(page, "#activations")
        differs = np.abs(pixels - np.median(pixels, (0, 1))).max(2) > 40
        assert 0.05 < differs.mean() < 0.5
        page.goto("about:blank")


def test_mp3_and_videos_are_played_and_analyzed(page, site, example, tmp_path):
    load_sound(page, site, mp3(example[: 12 * RATE]), "clip.mp3", "audio/mpeg")
    assert page.locator("#media").is_hidden()
    assert page.inner_text("#time") == "0.0 / 12.0 s"
    assert page.inner_text("#now-objects .label >> nth=0").startswith("seashore")
    load_sound(page, site, video(tmp_path), "video.mp4", "video/mp4")
    page.wait_for_selector("#media", state="visible")
    screenshot(page, "serve-video")
    assert page.evaluate("document.querySelector('#media').videoWidth") == 64
    assert page.inner_text("#now-objects .label >> nth=0")


def test_sounds_that_the_browser_cannot_play_are_played_decoded(page, site, example):
    file = io.BytesIO()
    soundfile.write(file, example[: 11 * RATE], RATE, format="AIFF")
    load_sound(page, site, file.getvalue(), "clip.aiff", "audio/aiff")
    until(page, "document.querySelector('#media').src.endsWith('/sound.wav')")
    until(page, "document.querySelector('#media').duration > 10.9")
    page.click("#play")
    until(page, "document.querySelector('#media').currentTime > 0.1")


def test_an_invalid_file_shows_an_error_and_the_next_one_works(page, site, example, tmp_path):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    malicious = "<img src=x onerror=document.title='got-in'>.wav"
    page.set_input_files("#file", {"name": malicious, "mimeType": "audio/wav", "buffer": b"no sound"})
    until(page, "document.querySelector('#error').textContent.includes('cannot be decoded')")
    assert page.inner_text("#error").startswith(f"{malicious}: ")
    assert page.locator("#results").is_hidden()
    load_sound(page, site, wav(example[:RATE]), malicious)
    assert page.locator("#error").is_hidden()
    assert page.inner_text("#name") == malicious
    assert "got-in" not in page.title()
    assert page.locator("main img").count() == 0
    (tmp_path / "big.wav").write_bytes(bytes(30_000_001))
    page.set_input_files("#file", tmp_path / "big.wav")
    until(page, "document.querySelector('#error').textContent.includes('larger than 30 MB')")


def test_a_long_sound_is_shown_while_it_is_analyzed(page, site, example, resume, tmp_path):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    soundfile.write(tmp_path / "long.wav", np.tile(example, 8), RATE)
    page.set_input_files("#file", tmp_path / "long.wav")
    until(page, "document.querySelector('#progress-text').textContent == 'Analyzed 0:23 of 3:20'")
    until(page, "document.querySelectorAll('#track-scenes .names li').length >= 5")
    assert 0 < page.evaluate("document.querySelector('#progress').value") < 0.2
    assert page.locator("#downloads").is_hidden()
    resume.set()
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    assert page.inner_text("#time") == "0:00 / 3:20"
    assert page.locator("#status").is_hidden()


def test_the_microphone_is_recorded(page, site):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    # a second click while permission is asked for opens no second microphone, which would stay on
    opened = page.evaluate(
        """() => {
          const [devices, open] = [navigator.mediaDevices, navigator.mediaDevices.getUserMedia];
          let count = 0;
          devices.getUserMedia = (wanted) => ((count += 1), open.call(devices, wanted));
          for (const button of ["record", "record", "listen"]) document.getElementById(button).click();
          return count;
        }"""
    )
    assert opened == 1
    until(page, "document.querySelector('#record').textContent == 'Stop (0:01)'")
    assert page.locator("#live").is_hidden()
    page.click("#record")
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    assert page.inner_text("#name") == "recording.webm"
    assert page.inner_text("#record") == "Record"
    until(page, "document.querySelector('#media').duration > 0.9")  # so it can be sought


def test_leaving_the_page_deletes_its_sound(page, site, folder, example):
    before = set(folder.rglob("*"))
    load_sound(page, site, wav(example[: 2 * RATE]))
    page.goto("about:blank")
    wait_for(lambda: set(folder.rglob("*")) <= before)
