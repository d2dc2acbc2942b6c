"""The microphone live: sessions, their API over HTTP, and the page with a file as the microphone."""

import base64
import json
import socket

import numpy as np
import pytest
import soundfile
import torch
from support.browser import CHROMIUM, FLAGS, find_accessibility_violations, screenshot
from support.web_site import RATE, run_site, wait_for

import soundnet_port as sp
from soundnet_port.audio.examples import example as example_path

pytest.importorskip("uvicorn", reason="needs the extra [web]")

from soundnet_port.viewing import live, live_routes
from soundnet_port.viewing.live import LiveSession, list_windows

# blocks of other sizes are summed up in another order; the largest values are some 10 in the demo network
STREAM_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PAGE_TOLERANCE = 6e-5  # four digits


def to_pcm(samples):
    """Samples within +-1 as the page sends them."""
    return np.round(32_767 * samples).astype("<i2")


def decode(columns):
    levels = np.frombuffer(base64.b64decode(columns["levels"]), np.uint8)
    return levels.reshape(columns["units"], columns["columns"])


@pytest.fixture(scope="module")
def sound():
    """6 s at 22,050 Hz: waves, then a baby; a 16-bit file has exactly these numbers."""
    waves, baby = (sp.load_audio(example_path(name)).numpy() / 256 for name in ("waves", "baby"))
    return to_pcm(np.concatenate([waves[: 2 * RATE], baby[: 4 * RATE]])).astype(np.float32) / 32_768


# ---- sessions


def push_in_pieces(session, samples, lengths):
    position = 0
    while position < len(samples):
        length = lengths[position % len(lengths)]
        session.push(samples[position : position + length])
        position += length


@pytest.mark.parametrize("lengths", [[1, 700, 2300], [5512], [50_000]])
def test_layers_are_maxima_of_what_extract_gives(network, sound, lengths):
    session = LiveSession(network, RATE)
    push_in_pieces(session, sound, lengths)
    layers = [name for name, layer in network.architecture.layers.items() if layer.kind != "head"]
    expected = network.extract(torch.from_numpy(sound * 256), layers)
    for name in layers:
        columns = session.get_units(name, 0)
        stride = network.architecture.layer(name).stride
        width = round(columns["step"] * RATE / stride)
        assert width == max(1, 1024 // stride)
        count = columns["columns"]
        # the last frames see zeros after the end, which has not come yet
        frames = expected[name][0, :, : count * width].numpy()
        maxima = frames.reshape(len(frames), count, width).max(2)
        assert columns["largest"] == pytest.approx(float(maxima.max()), rel=1e-4)
        values = columns["largest"] * (decode(columns) / 255.0) ** 2
        np.testing.assert_allclose(values, maxima, atol=columns["largest"] / 200)  # half a step of 255
        field = network.architecture.layer(name).receptive_field / RATE
        assert columns["start"] + count * columns["step"] > len(sound) / RATE - field - columns["step"] - 0.1
        center = float(network.frame_times(name, 1)[0, 1])
        if width == 1:
            assert columns["start"] + columns["step"] / 2 == pytest.approx(center)


def test_columns_are_counted_and_bounded(network, sound, monkeypatch):
    monkeypatch.setattr(live, "KEPT_SECONDS", 2.0)
    session, whole = LiveSession(network, RATE), LiveSession(network, RATE)
    push_in_pieces(session, sound, [4000])
    whole.push(sound)
    last, all_columns = session.get_units("conv4", 0), whole.get_units("conv4", 0)
    assert last["columns"] == all_columns["columns"] == 44  # of 46 ms
    assert last["first"] == all_columns["first"] > 80
    np.testing.assert_array_equal(decode(last), decode(all_columns))
    update = session.get_units("conv4", last["first"] + 40)
    assert (update["first"], update["columns"]) == (last["first"] + 40, 4)
    assert session.get_units("conv4", 10_000)["columns"] == 0
    spectrogram = session.get_spectrogram(0)
    assert (spectrogram["units"], spectrogram["columns"]) == (112, 44)
    session.push(sound)
    assert len(session._last) == round(10.99 * RATE)


def test_a_tone_is_in_its_band(network):
    session = LiveSession(network, RATE)
    session.push(np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32))
    levels = decode(session.get_spectrogram(0))[:, 5:-1].mean(1)
    mel = 2595 * np.log10(1 + np.array([50, 1000, RATE / 2]) / 700)
    expected = 111 * (mel[2] - mel[1]) / (mel[2] - mel[0])  # the highest is band 0
    assert abs(levels.argmax() - expected) < 2
    assert levels.max() > 230  # a full-scale tone is bright


@pytest.mark.parametrize(("seconds", "heard"), [(2.0, 2.0), (3.0, 3.0), (5.0, 5.0), (10.99, 6.0)])
def test_the_answer_is_that_of_predict(network, sound, seconds, heard):
    """For a clip of 5 s after 5 s it is the clip's answer, and so for what has been heard so far."""
    session = LiveSession(network, RATE)
    push_in_pieces(session, sound, [5512])
    answer = session.answer(seconds)
    clip = torch.from_numpy(sound[-round(heard * RATE) :] * 256)
    expected = sp.predict(network, clip, top=10)
    assert (answer["seconds"], answer["repeats"]) == (pytest.approx(heard), expected.repeats)
    assert answer["level"] == pytest.approx(expected.level, abs=1e-4)
    assert not answer["quiet"]
    for name, head in expected.heads.items():
        described = answer["heads"][name]
        assert [index for index, _ in described["top"]] == [category.index for category in head.top]
        np.testing.assert_allclose(
            [p for _, p in described["top"]], [c.probability for c in head.top], atol=PAGE_TOLERANCE
        )
        levels = np.frombuffer(base64.b64decode(described["levels"]), np.uint8)
        np.testing.assert_allclose(levels / 255, head.probabilities.mean(1).sqrt(), atol=0.5 / 255 + 1e-4)


def test_other_sample_rates_are_resampled_as_in_files(network, sound, tmp_path):
    """The chunks of a live sound give the same samples as its file."""
    import soxr

    rate = 48_000
    samples = to_pcm(np.clip(soxr.resample(sound, RATE, rate), -1, 1))
    session = LiveSession(network, rate)
    push_in_pieces(session, samples.astype(np.float32) / 32_768, [12_000, 1024])
    assert 0 < session.state["delay"] < 0.06
    soundfile.write(tmp_path / "a.wav", samples, rate)
    loaded = sp.load_audio(tmp_path / "a.wav")[: round(session.state["seconds"] * RATE)]
    np.testing.assert_allclose(session._last, loaded, atol=1e-3)  # of 256: how soxr rounds


def test_silence_and_quiet_sounds_are_flagged_and_warn_nobody(network, sound, recwarn):
    answers = []
    for gain in (0, 0.001, 1):
        session = LiveSession(network, RATE)
        session.push(gain * sound)
        answers.append(session.answer(5.0))
    assert [answer["quiet"] for answer in answers] == [True, True, False]
    assert answers[0]["level"] is None
    assert answers[1]["level"] < -60
    session = LiveSession(network, RATE)
    session.push(0.001 * sound)
    raised, loud = (answer["heads"]["scenes"]["top"][0] for answer in (session.answer(5.0, True), answers[2]))
    assert raised[0] == loud[0]
    assert not [warning for warning in recwarn if "waveform" in str(warning.message)]


def test_networks_with_custom_classes_and_without_heads(sound):
    torch.manual_seed(0)
    narrow = sp.SOUNDNET8.resized([2, 2, 2, 2, 4, 4, 4], {})
    custom = sp.SoundNet(narrow.with_classes(3, "pool5"), {"classes": ["a", "b", "c"]}).eval()
    assert list_windows(custom) == [2.0, 3.0, 5.0]
    session = LiveSession(custom, RATE)
    session.push(sound)
    top = session.answer(2.0)["heads"]["classes"]
    expected = sp.predict(custom, torch.from_numpy(sound[-2 * RATE :] * 256))
    assert [index for index, _ in top["top"]] == [category.index for category in expected.classes]
    levels = np.frombuffer(base64.b64decode(top["levels"]), np.uint8)
    order = [category.index for category in expected.classes]
    np.testing.assert_allclose(
        levels[order] / 255, np.sqrt([category.probability for category in expected.classes]), atol=0.003
    )
    trunk = LiveSession(sp.SoundNet(narrow).eval(), RATE)
    trunk.push(sound)
    assert trunk.answer(2.0) is None
    assert trunk.get_units("conv7", 0)["columns"] == 3


def test_invalid_samples_and_rates_are_refused(network):
    for rate in (0, 2999, 384_001):
        with pytest.raises(ValueError, match="sample rate must be 3,000 to 384,000 Hz"):
            LiveSession(network, rate)
    with pytest.raises(ValueError, match="NaN or infinite"):
        LiveSession(network, RATE).push(np.array([0, np.nan], np.float32))


# ---- over HTTP


def begin(site, rate=RATE):
    status, _, body = site.request(f"/live?rate={rate}", "POST")
    assert status == 201, body
    return json.loads(body)


def push(site, session, samples, query=""):
    status, _, body = site.request(f"/live/{session['id']}?{query}", "POST", to_pcm(samples).tobytes())
    assert status == 200, body
    return json.loads(body)


def test_chunks_get_what_is_new(site, network, sound):
    session = begin(site)
    assert session["windows"] == [2.0, 3.0, 5.0, 10.99]
    assert session["window"] == 3.0
    assert (session["quiet"], session["normalized"]) == (-40.0, -17.0)
    response = push(site, session, sound[: RATE // 2])
    assert response["answer"] is None  # too little
    assert response["seconds"] == 0.5
    assert response["delay"] == 0
    assert response.keys() == {"seconds", "delay", "answer", "computed"}
    response = push(site, session, sound[RATE // 2 :], "window=3&layer=pool5&units=3&spectrogram=10")
    expected = sp.predict(network, torch.from_numpy(sound[-3 * RATE :] * 256))
    # it was rounded to 16 bits twice
    assert response["answer"]["heads"]["scenes"]["top"][0][0] == expected.scenes[0].index
    assert (response["units"]["layer"], response["units"]["first"]) == ("pool5", 3)
    assert response["spectrogram"]["first"] == 10
    assert push(site, session, sound[:0])["seconds"] == 6.0
    assert site.request(f"/live/{session['id']}", "DELETE")[0] == 204
    for method in ("POST", "DELETE"):
        status, _, body = site.request(f"/live/{session['id']}", method)
        assert (status, json.loads(body)["error"]) == (404, "This live sound is no longer on the server.")


def test_invalid_requests_are_refused(site):
    for rate in ("", "rate=", "rate=22050.5", "rate=-1", "rate=2999", "rate=9999999999", "rate=x"):
        assert site.request(f"/live?{rate}", "POST")[0] == 400, rate
    assert site.request("/live", "GET")[0] == 405
    path = f"/live/{begin(site, 8000)['id']}"
    for query in ("window=0.5", "window=11", "window=x", "window=nan", "window=1e1", "window=-3"):
        assert site.request(f"{path}?{query}", "POST", b"")[0] == 400, query
    for layer in ("conv9", "objects", "../conv1"):
        assert site.request(f"{path}?layer={layer}", "POST", b"")[0] == 404
    assert site.request(path, "POST", b"odd")[0] == 400
    limit = 20 * 8000 * 2
    assert site.request(path, "POST", bytes(limit + 1))[0] == 413
    # chunked, so that no length is announced
    assert site.request(path, "POST", (bytes(32_000) for _ in range(11)))[0] == 413
    for query in ("units=x&layer=conv1", "spectrogram=-1", f"units={10**9}&layer=conv1"):
        assert site.request(f"{path}?{query}", "POST", b"")[0] == 200, query
    status, _, body = site.request(path, "POST", bytes(limit))
    assert (status, json.loads(body)["seconds"] > 19.8) == (200, True)  # less what the resampler holds
    assert site.request(path, "POST", b"", Origin="http://evil.example")[0] == 403
    assert site.request("/live?rate=8000", "POST", b"", Host="evil.example")[0] == 421
    site.request(path, "DELETE")


def test_sessions_are_few_and_idle_ones_are_closed(network, folder, monkeypatch):
    monkeypatch.setattr(live, "IDLE_SECONDS", 0.3)
    with run_site(network) as site:
        first, *_ = [begin(site) for _ in range(live.MAX_SESSIONS)]
        status, _, body = site.request("/live?rate=8000", "POST")
        assert (status, json.loads(body)["error"]) == (
            503,
            "The server has too many live sounds. Try again in some minutes.",
        )
        wait_for(lambda: site.request("/live?rate=8000", "POST")[0] == 201)
        assert site.request(f"/live/{first['id']}", "POST", b"")[0] == 404


def test_chunks_of_a_session_come_one_after_the_other(site):
    """Otherwise samples could be mixed up."""
    path = f"/live/{begin(site, 8000)['id']}"
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + bytes(50))
        wait_for(lambda: site.request(path, "POST", b"")[0] == 409)
    wait_for(lambda: site.request(path, "POST", b"")[0] == 200)  # the other has gone
    site.request(path, "DELETE")


# ---- the page


def test_samples_that_stop_arriving_leave_the_session_free(site, monkeypatch):
    """As from a phone that has lost its network."""
    monkeypatch.setattr(live_routes, "_PATIENCE", 0.2)
    session = json.loads(site.request("/live?rate=8000", "POST")[2])["id"]
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as connection:
        head = f"POST /live/{session} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Length: 8\r\n\r\n"
        connection.sendall(head.encode() + b"1234")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    assert site.request(f"/live/{session}", "POST", bytes(8))[0] == 200
    assert site.request(f"/live/{session}", "DELETE")[0] == 204


@pytest.fixture(scope="module")
def chromium(tmp_path_factory, sound):
    """A browser whose microphone gives 1.6 s of silence, 2 s of waves, and a baby for a while."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    path = tmp_path_factory.mktemp("microphone") / "sound.wav"
    parts = [np.zeros(round(1.6 * RATE), np.float32), sound, np.tile(sound[2 * RATE :], 10)]
    soundfile.write(path, np.concatenate(parts), RATE, "PCM_16")
    with sync_api.sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={path}%noloop"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def until(page, condition):
    """Wait for a condition in the page, whose policy forbids the eval of Playwright's `wait_for_function`."""
    wait_for(lambda: page.evaluate(condition) or page.wait_for_timeout(20))


SILENCE = ["The microphone gives digital silence. Is it muted, or another one selected?"]
FIRST = "document.querySelector('#live-scenes li[data-rank=\"0\"] .label')?.textContent"


def open_page(page, site):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")


def test_answers_come_while_it_sounds_and_are_those_of_predict(page, site, network, tmp_path):
    open_page(page, site)
    responses = []
    page.on("response", lambda response: responses.append(response) if "/live/" in response.url else None)
    page.click("#listen")
    until(page, "document.querySelector('#live-warning').textContent.includes('silence')")
    page.select_option("#live-window", "2")
    page.select_option("#live-layer", "conv5")
    until(page, f"{FIRST} == 'nursery'")  # a baby from 3.6 s on
    assert page.inner_text("#live-warning") == ""
    delay = page.evaluate("({ ...document.querySelector('#live-delay').dataset })")
    # a chunk of 0.25 s, its way to the server, a few ms of computing, and two frames
    assert 0 < float(delay["newest"]) < float(delay["oldest"]) < 1
    assert page.inner_text("#live-hears").startswith("The answers hear the last 2.0 s, played 6 times")
    assert page.inner_text("#live-units-caption").startswith("Unit 0 is on top. Each value hears 512 ms")
    for canvas in ("waveform", "spectrogram", "units"):
        image = f"document.querySelector('#live-{canvas}')"
        pixels = f"{image}.getContext('2d').getImageData(0, 0, {image}.width, {image}.height).data.buffer"
        assert page.evaluate(f"new Set(new Uint32Array({pixels})).size > 2"), canvas
    for width, scheme in ((1280, "light"), (360, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # what fades in has little contrast
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert find_accessibility_violations(page) == []
        screenshot(page, f"live-{scheme}-{width}")
    page.click("#live-stop")
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.locator("#live").is_hidden()
    assert page.inner_text("#name").startswith("live ")
    chunks = [response.json() for response in responses if response.request.method == "POST"]
    # what is kept has the samples that were heard
    sound = page.get_attribute("#downloads a", "href").split("/")[1]
    (tmp_path / "kept.wav").write_bytes(site.request(f"/sounds/{sound}/sound.wav")[2])
    kept = sp.load_audio(tmp_path / "kept.wav")
    assert torch.count_nonzero(kept[: int(1.5 * RATE)]) == 0
    first = set()
    for chunk in chunks:
        end, answer = round(chunk["seconds"] * RATE), chunk["answer"]
        if answer is None or end > len(kept):
            continue
        expected = sp.predict(network, kept[end - round(answer["seconds"] * RATE) : end])
        if expected.level < -60:  # a few samples of waves, which rounding changes
            continue
        top = answer["heads"]["scenes"]["top"]
        assert top[0][0] == expected.scenes[0].index
        # it is rounded to 16 bits
        assert top[0][1] == pytest.approx(expected.scenes[0].probability, abs=2e-3)
        first.add(expected.scenes[0].label)
    assert len(first) > 1  # it moved


PULSES = """async () => {
  const { ColumnStrip } = await import(new URL("live-strips.js", location.href));
  const [count, step] = [1292, 60 / 1292];
  const bytes = Array.from({ length: count }, (_, column) => (column % 19 ? 0 : 255));
  const levels = btoa(String.fromCharCode(...bytes));
  const strip = Object.assign(new ColumnStrip(61), { scale: 1 });
  strip.add({ first: 0, columns: count, units: 1, start: 0, step, levels }, 0);
  const canvas = document.createElement("canvas");
  canvas.style.cssText = "position: absolute; width: 916px; height: 1px";
  document.body.append(canvas);
  return Array.from({ length: 20 }, (_, time) => {
    strip.draw(canvas, 0.0137 * time, 60 + 0.0137 * time, "activations");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, 1);
    const dark = [...Array(canvas.width).keys()].filter((x) => data[4 * x + 3] && data[4 * x] < 128);
    canvas.width = 0;
    return dark;
  });
}"""


def test_columns_that_share_a_pixel_all_show_and_scroll_as_one(page, site):
    open_page(page, site)
    pictures = [np.array(dark) for dark in page.evaluate(PULSES)]
    assert len(pictures[0]) == len(range(0, 1292, 19))
    for picture in pictures:
        moved = picture - pictures[0][-len(picture) :]  # some have left on the left
        assert len(picture) >= len(pictures[0]) - 1
        assert len(set(moved)) == 1


HOOK = """
const original = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  if (window.denied) throw new DOMException("Permission denied", "NotAllowedError");
  return (window.microphone = await original(wanted));
};
"""


def test_a_microphone_may_be_denied_or_vanish(page, site):
    page.add_init_script(HOOK)
    open_page(page, site)
    page.evaluate("window.denied = true")
    page.click("#listen")
    until(
        page,
        "document.querySelector('#error').textContent == 'The microphone cannot be used: Permission denied'",
    )
    assert page.locator("#live").is_hidden()
    page.evaluate("window.denied = false")
    page.click("#listen")
    until(page, "document.querySelector('#live-delay').textContent")
    assert page.locator("#error").is_hidden()
    page.evaluate("window.microphone.getTracks()[0].dispatchEvent(new Event('ended'))")
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.inner_text("#name").startswith("live ")


def test_a_file_that_is_dropped_ends_it_and_is_shown(page, site, sound):
    open_page(page, site)
    page.click("#listen")
    until(page, "document.querySelector('#live-delay').textContent")
    page.evaluate(
        """async () => {
          const dataTransfer = new DataTransfer();
          const response = await fetch("example.wav");
          dataTransfer.items.add(new File([await response.blob()], "dropped.wav"));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }"""
    )
    assert page.locator("#live").is_hidden()
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.inner_text("#name") == "dropped.wav"
    assert page.inner_text("#sounds .name >> nth=0").startswith("live ")


def test_sessions_that_end_are_begun_again_and_a_server_that_ends_is_reported(
    chromium, network, folder, monkeypatch
):
    """A session that the server has closed is what a computer finds that has slept."""
    context = chromium.new_context()  # not the fixture's, as failed requests are errors in the console
    page = context.new_page()
    with run_site(network) as site:
        open_page(page, site)
        page.click("#listen")
        until(page, FIRST)
        responses = []
        page.on(
            "response",
            lambda response: (
                responses.append(response)
                if "/live" in response.url and response.request.method == "POST"
                else None
            ),
        )
        with monkeypatch.context() as patch:
            patch.setattr(live, "IDLE_SECONDS", -1)  # the next one to begin closes all
            assert site.request("/live?rate=8000", "POST")[0] == 201
        wait_for(lambda: "201 200" in " ".join(str(r.status) for r in responses) or page.wait_for_timeout(20))
        assert 404 in [response.status for response in responses]
        number = [response.status for response in responses].index(201)
        assert responses[number + 1].json()["seconds"] > 1.0  # it got what had been heard before
        assert page.inner_text("#live-warning") in ("", *SILENCE)
    until(page, "document.querySelector('#live-warning').textContent.includes('does not respond')")
    assert "Still recording" in page.inner_text("#live-warning")
    page.click("#live-stop")
    until(page, "document.querySelector('#error').textContent.includes('does not respond')")
    context.close()
