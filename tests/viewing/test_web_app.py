"""The page that shows what the network hears: the server by itself, and all of it in a browser."""

import base64
import contextlib
import csv
import http.client
import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from support.browser import inaccessible, screenshot
from support.video_fixtures import write_film

import soundnet_port as sp
from soundnet_port.audio.examples import medley
from soundnet_port.cli.main import main

pytest.importorskip("uvicorn", reason="needs the extra [web]")
import uvicorn

from soundnet_port.viewing import web_app as server
from soundnet_port.viewing.web_app import Columns, make_app

RATE = 22_050
# Probabilities are a softmax of logits that agree to float32's rounding, and are rounded to four digits
# for the page.
CLOSE, SHOWN = 2e-5, 1e-4


class Site:
    """A server that runs, and requests to it."""

    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}/"

    def ask(self, path, method="GET", body=None, **headers):
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, _, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def send(self, content, name="a.wav"):
        """The id of a sound that is sent."""
        status, _, body = self.ask(f"/sounds?name={quote(name)}", "POST", content)
        assert status == 201, body
        return json.loads(body)["id"]

    def heard(self, sound):
        """What is known of a sound when all was heard."""
        for _ in range(3000):
            view = self.get(f"/sounds/{sound}")
            if view["state"] in ("done", "failed"):
                return view
            time.sleep(0.02)
        raise AssertionError(view["state"])


@contextlib.contextmanager
def site_of(model, **settings):
    """Ends with the block, and leaves no file."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hosts = frozenset({"127.0.0.1", "localhost"})
        app = make_app(model, **{"hosts": hosts, **settings})
        running = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield Site(listening.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where temporary files go."""
    place = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(place)
    yield place
    tempfile.tempdir = before
    assert not list(place.iterdir())


@pytest.fixture(scope="module")
def network():
    return sp.load_pretrained("demo")


@pytest.fixture(scope="module")
def site(network, folder):
    with site_of(network, megabytes=30) as running:
        yield running


def wav(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def example():
    """25 s: waves, then a crying baby."""
    return medley().numpy()[: 25 * RATE] / 256


# ---- the numbers are those of predict


@pytest.mark.parametrize("seconds", [0.3, 3.7, 10.0, 13.0, 25.0])
def test_results_are_those_of_predict(site, network, example, tmp_path, seconds):
    view = assert_as_predicted(site, network, example, tmp_path, seconds)
    assert site.get("/network")["edge_frames"] is False
    assert view["edges"] == (seconds in (13, 25))


def test_with_edge_frames_results_are_the_originals(network, folder, example, tmp_path):
    with site_of(network, edge_frames=True) as site:
        for seconds in (5.0, 13.0):
            assert assert_as_predicted(site, network, example, tmp_path, seconds, edge_frames=True)["edges"]
        assert site.get("/network")["edge_frames"] is True


def assert_as_predicted(site, network, example, tmp_path, seconds, **settings):
    """Sends the beginning of the example, and returns what the page is told of it."""
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(example[: int(RATE * seconds)]))
    expected = sp.predict(network, path, top=10, **settings)
    sound = site.send(path.read_bytes(), "clip.wav")
    view = site.heard(sound)
    assert view["repeats"] == expected.repeats
    assert view["edges"] == network.edge_frames("scenes", int(RATE * seconds) * expected.repeats)
    assert view["seconds"] == pytest.approx(seconds)
    results = site.get(f"/sounds/{sound}/results.json")
    assert results.pop("file") == "clip.wav"
    assert_same(results, expected.to_dict())
    rows = list(csv.reader(io.StringIO(site.ask(f"/sounds/{sound}/results.csv")[2].decode())))
    assert rows[0] == ["start", "end", "head", "rank", "index", "label", "probability"]
    assert [row[:6] for row in rows[1:]] == [list(map(str, row[:6])) for row in expected.to_rows()]
    for head, singular in (("objects", "object"), ("scenes", "scene")):
        shown, values = view["heads"][head], getattr(expected, f"{singular}_probabilities").numpy()
        assert [index for index, _ in shown["clip"]] == [each.index for each in getattr(expected, head)]
        for index, track in shown["rows"]:
            np.testing.assert_allclose(track, values[index], atol=SHOWN)
        for frame, top in zip(expected.frames, shown["tops"], strict=True):
            assert top[::2] == [each.index for each in getattr(frame, head)]
            np.testing.assert_allclose(top[1::2], [p for *_, p in getattr(frame, head)], atol=SHOWN)
    return view


def assert_same(made, expected):
    if isinstance(expected, dict):
        assert made.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(made[key], value)
    elif isinstance(expected, list):
        assert len(made) == len(expected)
        for pair in zip(made, expected, strict=True):
            assert_same(*pair)
    else:
        assert made == (pytest.approx(expected, abs=CLOSE) if isinstance(expected, float) else expected)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(2, 9))
def test_columns_are_maxima_of_equal_stretches(lengths, most):
    values = np.random.default_rng(0).normal(size=(3, sum(lengths))).astype(np.float32)
    columns, at = Columns(3, most), 0
    for length in lengths:
        columns.add(values[:, at : at + length])
        at += length
    stretches = range(0, at, columns.width)
    assert columns.values.shape[1] == len(stretches) <= most
    assert columns.width == 1 or at > most * columns.width / 2  # no coarser than it has to be
    for column, start in enumerate(stretches):
        stretch = values[:, start : start + columns.width]
        np.testing.assert_array_equal(columns.values[:, column], stretch.max(1))


def test_heat_and_waveform_are_maxima_of_what_was_heard(site, network, example):
    sound = site.send(wav(example))
    outline = site.heard(sound)["outline"]
    samples = soundfile.read(io.BytesIO(wav(example)))[0]
    step = round(outline["step"] * RATE)
    begins = np.arange(0, len(samples), step)
    np.testing.assert_allclose(outline["high"], np.maximum.reduceat(samples, begins), atol=6e-4)
    np.testing.assert_allclose(outline["low"], -np.minimum.reduceat(samples, begins), atol=6e-4)
    wave = torch.from_numpy(samples * 256).float()
    for layer, expected in network.extract(wave, ["conv1", "pool5", "conv7"]).items():
        expected = expected[..., : expected.shape[2] - network.edge_frames(layer, len(wave))]
        heat = site.get(f"/sounds/{sound}/heat?layer={layer}")
        values = np.frombuffer(base64.b64decode(heat["values"]), np.uint8)
        values = values.reshape(heat["units"], heat["columns"])
        stride = network.architecture.layer(layer).stride
        width = round(heat["step"] * RATE / stride)
        begins = np.arange(0, expected.shape[2], width)
        largest = np.maximum.reduceat(expected[0].numpy(), begins, axis=1)
        assert heat["largest"] == pytest.approx(float(largest.max()), rel=1e-5)
        # conv1 is drawn from pool1, which leaves out what fills no window at the end
        np.testing.assert_allclose((values / 255)[:, :-1] ** 2, largest[:, :-1] / heat["largest"], atol=0.005)
        # a column lies around the centers of its frames
        assert heat["first"] + stride / RATE / 2 == pytest.approx(float(network.frame_times(layer, 1)[0, 1]))


def test_edge_frames_are_drawn_on_demand_and_never_set_the_scale(network, folder, example):
    """At 11 s the demonstration network's largest value is in its edge frame."""
    frames = network.extract(torch.from_numpy(example[: 11 * RATE] * 256), ["conv7"])["conv7"][0]
    columns, largest = {}, float(frames[:, :-1].max())
    assert frames[:, -1].max() > 1.3 * largest
    for edge_frames in (False, True):
        with site_of(network, edge_frames=edge_frames) as site:
            sound = site.send(wav(example[: 11 * RATE]))
            site.heard(sound)
            heat = site.get(f"/sounds/{sound}/heat?layer=conv7")
            assert heat["largest"] == pytest.approx(largest, rel=1e-4)
            assert heat["edges"] == 1
            assert site.get(f"/sounds/{sound}/heat?layer=conv6")["edges"] == 0
            columns[edge_frames] = heat["columns"]
    assert columns == {False: frames.shape[1] - 1, True: frames.shape[1]}


def test_a_quiet_sound_is_said_to_be_quiet(site, example):
    clip = example[: 12 * RATE]
    assert [site.heard(site.send(wav(gain * clip)))["quiet"] for gain in (1, 0.001)] == [False, True]


def test_classes_of_ones_own_and_networks_without_heads(folder, example):
    torch.manual_seed(0)
    narrow = sp.SOUNDNET8.resized([2, 2, 2, 2, 4, 4, 4], {})
    own = sp.SoundNet(narrow.with_classes(3, "pool5"), {"classes": ["a", "b", "c"]}).eval()
    clip = wav(example[:8000])
    with site_of(own) as site:
        sound = site.send(clip)
        view, expected = site.heard(sound), sp.predict(own, torch.from_numpy(example[:8000] * 256), top=3)
        (head,) = view["heads"].values()
        assert [index for index, _ in head["clip"]] == [each.index for each in expected.classes]
        np.testing.assert_allclose([p for _, p in head["clip"]], [p for *_, p in expected.classes], atol=1e-3)
    with site_of(sp.SoundNet(narrow).eval()) as site:
        sound = site.send(wav(example[:3000]))
        assert site.heard(sound)["heads"] == {}
        assert site.get(f"/sounds/{sound}/heat?layer=conv7")["units"] == 4
        status, _, body = site.ask(f"/sounds/{sound}/results.json")
        assert (status, json.loads(body)["error"]) == (
            409,
            "These weights have no heads, they cannot name sounds.",
        )


def test_downloads_are_named_after_the_sound(site, example):
    sound = site.send(wav(example[:RATE]), 'dög "a";\r\nx.wav')
    site.heard(sound)
    for what, kind in (
        ("results.json", "application/json"),
        ("results.csv", "text/csv; charset=utf-8"),
        ("picture.png", "image/png"),
    ):
        status, headers, body = site.ask(f"/sounds/{sound}/{what}")
        assert (status, headers["content-type"]) == (200, kind)
        name = quote('dög "a";\ufffd\ufffdx.wav' + Path(what).suffix, safe="")
        assert headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}"
    assert body.startswith(b"\x89PNG")


def test_the_sound_is_there_as_the_network_hears_it_in_parts_too(site, example):
    sound = site.send(wav(np.stack([example[: 2 * RATE], np.zeros(2 * RATE)], 1)))
    status, headers, body = site.ask(f"/sounds/{sound}/sound.wav")
    assert (status, headers["content-type"]) == (200, "audio/wav")
    samples, rate = soundfile.read(io.BytesIO(body))
    assert (rate, samples.shape) == (RATE, (2 * RATE,))
    np.testing.assert_allclose(samples, example[: 2 * RATE], atol=1.1 / 2**15)  # rounded twice
    status, _, part = site.ask(f"/sounds/{sound}/sound.wav", Range="bytes=1000-1999")
    assert (status, part) == (206, body[1000:2000])


# ---- while it is heard


@pytest.fixture
def held(monkeypatch):
    """Decoding stops after two blocks, 24 s, until the event is set."""
    event, open_sound = threading.Event(), server.open_sound

    @contextlib.contextmanager
    def opened(*arguments):
        with open_sound(*arguments) as sound:
            blocks = sound.blocks

            def slowly(samples):
                for number, block in enumerate(blocks(samples)):
                    yield block
                    if number:
                        event.wait(60)

            object.__setattr__(sound, "blocks", slowly)
            yield sound

    monkeypatch.setattr(server, "open_sound", opened)
    yield event
    event.set()


def test_first_results_come_while_the_rest_is_heard(site, example, held):
    sound = site.send(wav(np.tile(example, 4)))
    for _ in range(1000):
        view = site.get(f"/sounds/{sound}")
        if view["heads"]["scenes"]["clip"]:
            break
        time.sleep(0.02)
    assert view["state"] == "computing"
    assert view["total"] == 100
    assert 20 < view["seconds"] < 30
    count = len(view["heads"]["objects"]["tops"])
    assert count == len(view["heads"]["objects"]["rows"][0][1]) > 0
    assert site.get(f"/sounds/{sound}/heat?layer=conv5")["columns"] > 0
    assert site.ask(f"/sounds/{sound}/results.json")[0] == 409
    held.set()
    site.heard(sound)
    news = site.get(f"/sounds/{sound}?since={count}")["heads"]["objects"]  # only what is new
    assert len(news["tops"]) == len(news["rows"][0][1]) - count > 0


def test_others_wait_and_are_told_so_and_each_gets_its_own(site, example, held):
    clips = [example[RATE * start : RATE * (start + 12)] for start in (0, 3, 6, 9, 12)]
    sounds = [site.send(wav(clip), f"{number}.wav") for number, clip in enumerate(clips)]
    for _ in range(1000):
        views = [site.get(f"/sounds/{sound}") for sound in sounds]
        if [view["state"] for view in views] == ["computing"] * 2 + ["waiting"] * 3:
            break
        time.sleep(0.02)
    assert [view["ahead"] for view in views] == [0, 0, 0, 1, 2]
    assert site.ask(f"/sounds/{sounds[3]}", "DELETE")[0] == 204
    held.set()
    tracks = [site.heard(sound)["heads"]["scenes"]["tops"] for sound in sounds if sound != sounds[3]]
    assert len({json.dumps(each) for each in tracks}) == 4
    assert site.ask(f"/sounds/{sounds[3]}")[0] == 404


# ---- bad sounds


def bad_contents(example):
    """Name -> bytes that are no sound, or only part of one; of some, decoders make something all the same."""
    whole = wav(example[: RATE * 2])
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.wav", whole)
    header = bytearray(whole[:44])
    made = {
        "nothing": b"",
        "a byte": b"R",
        "zeros": bytes(5000),
        "text": b"This is no sound.\n" * 50,
        "html": b"<!doctype html><script>alert(1)</script>" * 20,
        "zip": zipped.getvalue(),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "only a header": bytes(header),
        "half a header": whole[:30],
        "cut": whole[:-5001],
        "rate 0": whole[:24] + bytes(4) + whole[28:],
        "rate 2^31": whole[:24] + (2**31).to_bytes(4, "little") + whole[28:],
        "no channels": whole[:22] + bytes(2) + whole[24:],
        "65535 channels": whole[:22] + b"\xff\xff" + whole[24:],
        "claims 4 GB": whole[:4] + b"\xf0\xff\xff\x7f" + whole[8:40] + b"\xf0\xff\xff\x7f" + whole[44:],
    }
    for form, subtype in (("FLAC", None), ("OGG", None), ("MP3", None), ("AIFF", None), ("CAF", None)):
        file = io.BytesIO()
        soundfile.write(file, example[: RATE * 2], RATE, format=form, subtype=subtype)
        made[f"{form}, a third"] = file.getvalue()[: len(file.getvalue()) // 3]
    return made


NAMES = [
    "clip.wav",
    "../../../../tmp/escaped.wav",
    "..\\..\\escaped.mp4",
    "<img src=x onerror=alert(1)>.mp3",
    "nul\0nul.raw",
    "x" * 5000,
]
BETTER_THAN_NOTHING = {"MP3, a third", "CAF, a third", "claims 4 GB", "rate 2^31"}


def test_bad_sounds_are_named_with_a_reason_and_leave_nothing(site, folder, example):
    contents = bad_contents(example)
    assert len(contents) * len(NAMES) > 100
    before = {path.name for path in folder.rglob("*")}
    around = set(folder.parent.iterdir())
    for what, content in contents.items():
        for name in NAMES:
            sound = site.send(content, name)
            view = site.heard(sound)
            if what not in BETTER_THAN_NOTHING:
                assert view["state"] == "failed", (what, view)
            if view["state"] == "failed":
                assert view["error"].startswith(f"{view['name']}: "), view["error"]
                assert str(folder) not in view["error"]
                assert "could not be computed" not in view["error"]
                assert site.ask(f"/sounds/{sound}/results.json")[0] == 409
            assert len(view["name"]) <= 200
            assert not set(view["name"]) & set("/\\\0")
            assert site.ask(f"/sounds/{sound}", "DELETE")[0] == 204
    wait_for(lambda: {path.name for path in folder.rglob("*")} == before)
    assert set(folder.parent.iterdir()) == around
    assert site.heard(site.send(wav(example)))["state"] == "done"


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("in vain")


def test_too_much_is_refused(site, network, folder, example):
    status, _, body = site.ask("/sounds", "POST", bytes(30_000_001))
    assert status == 413
    assert json.loads(body)["error"] == "The file is larger than 30 MB, the most that is taken here."
    with site_of(network, megabytes=1, hours=0.01) as small:  # 36 s
        parts = (bytes(100_000) for _ in range(11))  # chunked, so that no length is announced
        assert small.ask("/sounds", "POST", parts)[0] == 413
        for rate, name in ((RATE // 2, "a.wav"), (8000, "a.webm")):  # one that says its length, and any
            view = small.heard(small.send(wav(np.zeros(rate * 40), rate), name))
            assert view["error"] == f"{name}: longer than 0.01 hours, the longest that is taken here"


def below(folder):
    """All that is there, while some of it may be on its way out."""
    found = os.walk(folder)
    return {f"{place}/{name}" for place, folders, files in found for name in [*folders, *files]}


def test_a_client_that_hangs_up_leaves_no_file(site, folder, example):
    before = below(folder)
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        head = f"POST /sounds HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + bytes(200_000))
        wait_for(lambda: below(folder) > before)
    wait_for(lambda: below(folder) == before)


def test_sounds_that_nobody_asks_for_are_removed(network, folder, example, monkeypatch):
    monkeypatch.setattr(server, "_IDLE", 1.5)
    monkeypatch.setattr(server, "_SOUNDS", 1)
    before = set(folder.iterdir())
    with site_of(network) as site:
        wait_for(lambda: set(folder.iterdir()) > before)
        (place,) = set(folder.iterdir()) - before
        assert place.stat().st_mode & 0o77 == 0
        sound = site.send(wav(example[:RATE]))
        assert site.ask("/sounds", "POST", b"")[0] == 503
        wait_for(lambda: not list(place.iterdir()))
        status, _, body = site.ask(f"/sounds/{sound}")
        assert (status, json.loads(body)["error"]) == (404, "This sound is not here any more. Load it again.")
    assert not place.exists()


# ---- who may ask


def test_other_sites_pages_may_do_nothing(site):
    local = f"127.0.0.1:{site.port}"
    for host in (
        "evil.example",
        f"evil.example:{site.port}",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
    ):
        assert site.ask("/", Host=host)[0] == 421
    assert site.ask("/", Host=f"LOCALHOST:{site.port}")[0] == 200
    sound = site.send(b"")
    for origin in (
        "http://evil.example",
        "null",
        "https://evil.example:80",
        "http://127.0.0.1:1",
        "http://[",
        "",
    ):
        assert site.ask("/sounds", "POST", b"", Origin=origin)[0] == 403
        assert site.ask(f"/sounds/{sound}", "DELETE", Origin=origin)[0] == 403
    assert site.ask(f"/sounds/{sound}", "DELETE", Origin=f"http://{local}")[0] == 204


def test_every_answer_says_what_the_page_may_do(site):
    for path in (
        "/",
        "/serve.js",
        "/serve.css",
        "/network",
        "/nowhere",
        "/sounds/x",
        "/sounds/../../setup.cfg",
    ):
        _, headers, _ = site.ask(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path, kind in (("/", "text/html"), ("/serve.js", "text/javascript"), ("/serve.css", "text/css")):
        assert site.ask(path)[1]["content-type"] == f"{kind}; charset=utf-8"


# ---- the command line


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_command_serves_until_it_is_told_to_end(sent, code, folder, example, capsys):
    ran = []

    def use():
        try:
            wait_for(lambda: ran.append(capsys.readouterr().out) or ran[-1])
            port = int(ran[-1].split(":")[-1].strip("/\n"))
            site = Site(port)
            ran.append(site.get("/network")["name"])
            ran.append(site.heard(site.send(wav(example[:RATE])))["state"])
            ran.append(main(["serve", "-w", "demo", "--port", str(port)]))
        finally:
            os.kill(os.getpid(), sent)

    before = set(folder.iterdir())
    thread = threading.Thread(target=use)
    thread.start()
    try:
        ended = main(["serve", "-w", "demo", "--port", "0"])
    except SystemExit as error:
        ended = error.code
    thread.join()
    assert ended == code
    assert ran[-3:] == ["soundnet8", "done", 2]
    said = capsys.readouterr().err
    assert "Address already in use; take another with --port, or 0" in said
    assert said.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--port 70000", "--port is 0 to 65535, not 70000"),
        ("--max-megabytes 0", "--max-megabytes must be at least 1, not 0"),
        ("--max-hours -1", "--max-hours is up to 24, not -1"),
        ("--host 256.0.0.1.invalid", "--host 256.0.0.1.invalid --port 8765: "),
        ("-w nowhere.safetensors", "nowhere.safetensors: "),
    ],
)
def test_misuse_is_one_line(arguments, line, capsys):
    assert main(["serve", "-w", "demo", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"soundnet-port: {line}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "matplotlib"])
def test_a_missing_extra_is_one_line(package, monkeypatch, capsys):
    for name in [
        name for name in sys.modules if name.split(".")[0] == package or name.endswith("viewing.web_app")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "-w", "demo"]) == 2
    line = f"soundnet-port: {package} is not installed: pip install 'soundnet-port[web]'\n"
    assert capsys.readouterr().err == line


# ---- in a browser


def until(page, condition):
    """Waits. (Playwright's own way would need eval in the page, which its policy forbids.)"""
    wait_for(lambda: page.evaluate(condition) or page.wait_for_timeout(20))


def loaded(page, site, content=None, name="clip.wav", kind="audio/wav"):
    """Opens the page, and in it a sound."""
    if not page.url.startswith(site.url):
        page.goto(site.url)
    page.wait_for_selector("#track-scenes, #track-classes", state="attached")
    if content is None:
        page.click("#example")
    else:
        page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    until(page, "document.querySelector('#media').readyState > 0")


def colors(page, canvas):
    """(rows, columns, 3) of a canvas, 0 to 255."""
    address = page.evaluate("(name) => document.querySelector(name).toDataURL()", canvas)
    picture = imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.round(255 * picture[..., :3])


def mp3(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3")
    return file.getvalue()


def film(folder):
    path = folder / "film.mp4"
    write_film(path, [0.1 * each for each in range(120)])
    return path.read_bytes()


def test_an_example_is_heard_and_seen(page, site):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    screenshot(page, "serve-empty")
    assert page.locator("#heard").is_hidden()
    assert "1,000 objects" in page.inner_text("#network")
    assert inaccessible(page) == []
    loaded(page, site)
    page.evaluate("document.querySelector('#media').currentTime = 6")
    until(page, "document.querySelector('#time').textContent == '0:06 / 0:45'")
    assert page.inner_text("#now-scenes .label >> nth=0") == "ocean"
    assert page.inner_text("#now-objects .label >> nth=0").startswith("seashore")
    until(page, "document.querySelector('#said').textContent.startsWith('All heard, scenes: ')")
    page.set_viewport_size({"width": 1120, "height": 1268})
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    screenshot(page, "serve-demo")
    page.evaluate("document.querySelector('#media').currentTime = 23")
    until(page, "document.querySelector('#now-scenes .label').textContent == 'nursery'")
    for head, channel in (("scenes", 0), ("objects", 2)):  # red and blue
        track = colors(page, f"#track-{head} .strip canvas")
        first = track[12 * page.evaluate("devicePixelRatio")]
        assert len(np.unique(first, axis=0)) > 3
        assert (first.argmax(1) == channel).mean() > 0.95
        assert first[10].sum() < first[-10].sum() - 10  # what was waves is no baby
    assert colors(page, "#waveform").std() > 10
    before = colors(page, "#heat")
    page.select_option("#layer", "conv2")
    until(page, "document.querySelector('#heat-says').textContent.startsWith('16 units')")
    assert (colors(page, "#heat") != before).any()
    rows = page.locator("#tables table").nth(0).locator("tbody tr")
    assert rows.count() == 10
    assert rows.nth(0).inner_text().split("\t")[0] == "nursery"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_anybody_can_use_it_on_any_screen(page, site, scheme):
    page.emulate_media(color_scheme=scheme)
    for width in (1280, 360):
        page.set_viewport_size({"width": width, "height": 800})
        loaded(page, site)
        assert inaccessible(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        screenshot(page, f"serve-{scheme}-{width}")


def test_a_click_at_a_time_plays_from_there_and_keys_move(page, site, example):
    loaded(page, site, wav(example))
    at = "document.querySelector('#media').currentTime"
    for strip, fraction in (("#position", 0.25), ("#track-objects .strip", 0.5), ("#heat", 0.75)):
        box = page.locator(strip).bounding_box()
        page.locator(strip).click(position={"x": fraction * box["width"], "y": 10})
        assert page.evaluate(at) == pytest.approx(25 * fraction, abs=0.5)
        assert not page.evaluate("document.querySelector('#media').paused")
        page.click("#play")
        assert page.evaluate("document.querySelector('#media').paused")
    for key, seconds in (("Home", 0), ("ArrowRight", 1), ("PageUp", 11), ("ArrowDown", 10), ("End", 25)):
        page.locator("#position").press(key)
        assert page.evaluate(at) == pytest.approx(seconds, abs=0.1)
        assert page.get_attribute("#position", "aria-valuenow") == f"{page.evaluate(at):.1f}"
    assert page.get_attribute("#position", "aria-valuetext").startswith("0:25 of 0:25, ")
    page.locator("#position").press("Home")
    page.keyboard.press("Space")
    until(page, f"{at} > 0.2")  # the playhead goes along
    assert float(page.evaluate("document.querySelector('#cursor').style.getPropertyValue('--at')")) > 0
    page.keyboard.press("Space")


def test_downloads_arrive(page, site, example):
    loaded(page, site, wav(example[: 3 * RATE]), "a dog.wav")
    assert "played 4 times in a row" in page.inner_text("#note")
    made = {}
    for name in ("JSON", "CSV", "PNG"):
        with page.expect_download(timeout=120_000) as waiting:  # matplotlib may be new to the server
            page.get_by_role("link", name=name).click()
        made[waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes()
    assert json.loads(made["a dog.wav.json"])["repeats"] == 4
    assert made["a dog.wav.csv"].startswith(b"start,end,head,rank,")
    assert made["a dog.wav.png"].startswith(b"\x89PNG")


def test_the_page_says_what_was_left_out(page, site, example):
    loaded(page, site, wav(0.001 * example))
    note = page.inner_text("#note")
    assert "The last one hears zeros after the end; this edge frame is left out." in note
    assert "The sound is quiet" in note
    assert "left out" not in page.inner_text("#heat-says")
    page.select_option("#layer", "conv7")
    until(page, "document.querySelector('#heat-says').textContent.includes('edge frame at the end left out')")


@pytest.mark.released
def test_conv7s_units_can_be_seen(page, released_model, folder):
    """Colors go by the largest value of ordinary frames, 0.50; the edge frame's is 1.32."""
    with site_of(released_model) as site:
        loaded(page, site)
        page.evaluate("document.querySelector('#media').currentTime = 23")
        page.select_option("#layer", "conv7")
        until(page, "document.querySelector('#heat-says').textContent.startsWith('1024 units')")
        page.set_viewport_size({"width": 1120, "height": 1268})
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)
        screenshot(page, "serve")
        assert page.inner_text("#now-scenes .label >> nth=0") == "hospital"
        assert 0.4 < float(page.inner_text("#heat-says .legend span >> nth=-1")) < 0.6
        shown = colors(page, "#heat")
        differs = np.abs(shown - np.median(shown, (0, 1))).max(2) > 40
        assert 0.05 < differs.mean() < 0.5
        page.goto("about:blank")


def test_mp3_and_films_play_and_are_heard(page, site, example, tmp_path):
    loaded(page, site, mp3(example[: 12 * RATE]), "clip.mp3", "audio/mpeg")
    assert page.locator("#media").is_hidden()
    assert page.inner_text("#time") == "0:00 / 0:12"
    assert page.inner_text("#now-objects .label >> nth=0").startswith("seashore")
    loaded(page, site, film(tmp_path), "film.mp4", "video/mp4")
    page.wait_for_selector("#media", state="visible")
    screenshot(page, "serve-film")
    assert page.evaluate("document.querySelector('#media').videoWidth") == 64
    assert page.inner_text("#now-objects .label >> nth=0")


def test_what_the_browser_cannot_play_is_played_as_the_server_hears_it(page, site, example):
    file = io.BytesIO()
    soundfile.write(file, example[: 11 * RATE], RATE, format="AIFF")
    loaded(page, site, file.getvalue(), "clip.aiff", "audio/aiff")
    until(page, "document.querySelector('#media').src.endsWith('/sound.wav')")
    until(page, "document.querySelector('#media').duration > 10.9")
    page.click("#play")
    until(page, "document.querySelector('#media').currentTime > 0.1")


def test_a_bad_file_gets_its_message_and_the_next_one_is_heard(page, site, example, tmp_path):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    evil = "<img src=x onerror=document.title='got-in'>.wav"
    page.set_input_files("#file", {"name": evil, "mimeType": "audio/wav", "buffer": b"no sound"})
    until(page, "document.querySelector('#wrong').textContent.includes('cannot be decoded')")
    assert page.inner_text("#wrong").startswith(f"{evil}: ")
    assert page.locator("#heard").is_hidden()
    loaded(page, site, wav(example[:RATE]), evil)
    assert page.locator("#wrong").is_hidden()
    assert page.inner_text("#name") == evil
    assert "got-in" not in page.title()
    assert page.locator("main img").count() == 0
    (tmp_path / "big.wav").write_bytes(bytes(30_000_001))
    page.set_input_files("#file", tmp_path / "big.wav")
    until(page, "document.querySelector('#wrong').textContent.includes('larger than 30 MB')")


def test_a_long_sound_comes_bit_by_bit(page, site, example, held, tmp_path):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    soundfile.write(tmp_path / "long.wav", np.tile(example, 24), RATE)
    page.set_input_files("#file", tmp_path / "long.wav")
    until(page, "document.querySelector('#so-far').textContent == 'Heard 0:23 of 10:00'")
    until(page, "document.querySelectorAll('#track-scenes .names li').length >= 5")
    assert 0 < page.evaluate("document.querySelector('#progress').value") < 0.1
    assert page.locator("#downloads").is_hidden()
    held.set()
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    assert page.inner_text("#time") == "0:00 / 10:00"
    assert page.locator("#going").is_hidden()


def test_the_microphone_is_recorded(page, site):
    page.goto(site.url)
    page.wait_for_selector("#track-scenes", state="attached")
    page.click("#record")
    until(page, "document.querySelector('#record').textContent == 'Stop (0:01)'")
    page.click("#record")
    page.wait_for_selector("#downloads:not([hidden])", timeout=60_000)
    assert page.inner_text("#name") == "recording.webm"
    assert page.inner_text("#record") == "Record"
    until(page, "document.querySelector('#media').duration > 0.9")  # it can be sought in


def test_a_page_that_is_left_takes_its_sound_along(page, site, folder, example):
    before = set(folder.rglob("*"))
    loaded(page, site, wav(example[: 2 * RATE]))
    page.goto("about:blank")
    wait_for(lambda: set(folder.rglob("*")) <= before)
