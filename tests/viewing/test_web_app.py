"""The web application's API over HTTP, and its command."""

import base64
import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
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
from support.web_site import RATE, Site, run_site, wait_for, wav

import soundnet_port as sp
from soundnet_port.cli.main import main

pytest.importorskip("uvicorn", reason="needs the extra [web]")

from soundnet_port.viewing import session_store
from soundnet_port.viewing.activation_maps import ORDERS
from soundnet_port.viewing.spectrograms import SpectrogramStream, mel
from soundnet_port.viewing.summaries import MaxEnvelope

# probabilities are a softmax of logits that agree to float32's rounding; the page gets four digits
TOLERANCE, PAGE_TOLERANCE = 2e-5, 1e-4


# ---- results


@pytest.mark.parametrize("seconds", [0.3, 3.7, 10.0, 13.0, 25.0])
def test_results_equal_those_of_predict(site, network, example, tmp_path, seconds):
    results = check_results(site, network, example, tmp_path, seconds)
    assert site.get("/network")["edge_frames"] is False
    assert results["edge_frames"] == (seconds in (13, 25))


def test_results_with_edge_frames_equal_those_of_predict(network, folder, example, tmp_path):
    with run_site(network, edge_frames=True) as site:
        for seconds in (5.0, 13.0):
            assert check_results(site, network, example, tmp_path, seconds, edge_frames=True)["edge_frames"]
        assert site.get("/network")["edge_frames"] is True


def check_results(site, network, example, tmp_path, seconds, **settings):
    """Send the beginning of the example, compare its results with those of `predict`, and return them."""
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(example[: int(RATE * seconds)]))
    expected = sp.predict(network, path, top=10, **settings)
    sound = site.send(path.read_bytes(), "clip.wav")
    results = site.wait(sound)
    assert results["repeats"] == expected.repeats
    assert results["edge_frames"] == network.edge_frames("scenes", int(RATE * seconds) * expected.repeats)
    assert results["seconds"] == pytest.approx(seconds)
    download = site.get(f"/sounds/{sound}/results.json")
    assert download.pop("file") == "clip.wav"
    assert_close(download, expected.to_dict())
    rows = list(csv.reader(io.StringIO(site.request(f"/sounds/{sound}/results.csv")[2].decode())))
    assert rows[0] == ["file", "start", "end", "head", "rank", "index", "label", "probability"]
    assert [row[:7] for row in rows[1:]] == [["clip.wav", *map(str, row[:6])] for row in expected.to_rows()]
    for head, singular in (("objects", "object"), ("scenes", "scene")):
        summary, values = results["heads"][head], getattr(expected, f"{singular}_probabilities").numpy()
        assert [index for index, _ in summary["clip"]] == [
            category.index for category in getattr(expected, head)
        ]
        for index, track in summary["tracks"]:
            np.testing.assert_allclose(track, values[index], atol=PAGE_TOLERANCE)
        for frame, pairs in zip(expected.frames, summary["frames"], strict=True):
            assert pairs[::2] == [category.index for category in getattr(frame, head)]
            np.testing.assert_allclose(
                pairs[1::2], [p for *_, p in getattr(frame, head)], atol=PAGE_TOLERANCE
            )
    return results


def assert_close(value, expected):
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for pair in zip(value, expected, strict=True):
            assert_close(*pair)
    else:
        assert value == (pytest.approx(expected, abs=TOLERANCE) if isinstance(expected, float) else expected)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(2, 9))
def test_envelopes_are_maxima_of_equal_intervals(lengths, max_columns):
    values = np.random.default_rng(0).normal(size=(3, sum(lengths))).astype(np.float32)
    envelope, total = MaxEnvelope(3, max_columns), 0
    for length in lengths:
        envelope.add(values[:, total : total + length])
        total += length
    starts = range(0, total, envelope.width)
    assert envelope.values.shape[1] == len(starts) <= max_columns
    assert envelope.width == 1 or total > max_columns * envelope.width / 2  # no wider than necessary
    for column, start in enumerate(starts):
        interval = values[:, start : start + envelope.width]
        np.testing.assert_array_equal(envelope.values[:, column], interval.max(1))


def test_activations_and_waveform_are_maxima(site, network, example):
    sound = site.send(wav(example))
    waveform = site.wait(sound)["waveform"]
    samples = soundfile.read(io.BytesIO(wav(example)))[0]
    step = round(waveform["step"] * RATE)
    starts = np.arange(0, len(samples), step)
    np.testing.assert_allclose(waveform["high"], np.maximum.reduceat(samples, starts), atol=6e-4)
    np.testing.assert_allclose(waveform["low"], -np.minimum.reduceat(samples, starts), atol=6e-4)
    wave = torch.from_numpy(samples * 256).float()
    for layer, expected in network.extract(wave, ["conv1", "pool5", "conv7"]).items():
        expected = expected[..., : expected.shape[2] - network.edge_frames(layer, len(wave))]
        activations = site.get(f"/sounds/{sound}/activations?layer={layer}")
        levels = np.frombuffer(base64.b64decode(activations["levels"]), np.uint8)
        levels = levels.reshape(activations["units"], activations["columns"])
        stride = network.architecture.layer(layer).stride
        width = round(activations["step"] * RATE / stride)
        starts = np.arange(0, expected.shape[2], width)
        maxima = np.maximum.reduceat(expected[0].numpy(), starts, axis=1)
        assert activations["largest"] == pytest.approx(float(maxima.max()), rel=1e-5)
        # conv1 is drawn from pool1, which leaves out an incomplete window at the end
        # colors end where 99.5 % of the values above 0 are below, but for that window
        positive = maxima[:, : expected.shape[2] // width]
        scale = np.percentile(positive[positive > 0], 99.5)
        assert activations["scale"] == pytest.approx(float(scale), rel=0.01 if layer == "conv1" else 1e-5)
        assert activations["inactive"] == (maxima.max(1) <= 0).sum()
        expected_levels = maxima[:, :-1] / activations["largest"]
        np.testing.assert_allclose((levels / 255)[:, :-1] ** 2, expected_levels, atol=0.005)
        # columns are centered on their frames
        center = float(network.frame_times(layer, 1)[0, 1])
        assert activations["start"] + stride / RATE / 2 == pytest.approx(center)
        assert activations["order"] is None
        # units that are never active are in no order
        active = set(np.flatnonzero(maxima.max(1) > 0))
        for order in ("mean", "peak", "similarity"):
            units = site.get(f"/sounds/{sound}/activations?layer={layer}&order={order}")["order"]
            assert len(units) == len(set(units))
            assert set(units) <= active
            assert {unit for unit in active if levels[unit].any()} == set(units)
            shown = (levels[units] / 255.0) ** 2
            if order == "mean":
                assert (np.diff(shown.mean(1)) <= 1e-6).all()
            if order == "peak":
                assert (np.diff(shown.argmax(1)) >= 0).all()
    assert site.request(f"/sounds/{sound}/activations?layer=conv1&order=size")[0] == 404


def test_maps_of_a_repeated_clip_are_of_its_first_time(site, network, example):
    samples = wav(example[: 3 * RATE])
    sound = site.send(samples)
    repeats = site.wait(sound)["repeats"]
    assert repeats > 1
    decoded = soundfile.read(io.BytesIO(samples))[0]
    waveform = torch.from_numpy(decoded * 256).float().repeat(repeats)
    for layer in ("pool5", "conv7"):
        activations = site.get(f"/sounds/{sound}/activations?layer={layer}")
        columns, step = activations["columns"], activations["step"]
        assert 3 <= activations["start"] + columns * step < 3 + step
        frames = network.extract(waveform, [layer])[layer][0, :, :columns]
        assert activations["largest"] == pytest.approx(float(frames.max()), rel=1e-4)
        assert activations["inactive"] == int((frames.amax(1) <= 0).sum())


def test_units_that_are_active_together_are_neighbors_by_similarity():
    random = np.random.default_rng(0)
    groups = random.permutation(np.repeat(np.arange(4), 8))
    times = np.repeat(np.eye(4), 10, axis=1)[groups]
    order = ORDERS["similarity"]((times + 0.1 * random.random(times.shape)).astype(np.float32))
    assert sorted(order) == list(range(32))
    assert np.count_nonzero(np.diff(groups[order])) == 3  # each group in one piece


@pytest.mark.parametrize("seconds", [1, 9.9, 25, 100])
def test_spectrograms_are_bounded_and_show_the_frequency(site, seconds):
    samples = np.sin(2 * np.pi * 1000 * np.arange(int(seconds * RATE)) / RATE)
    samples[: len(samples) // 2] *= 0.1  # 20 dB less
    sound = site.send(wav(samples))
    site.wait(sound)
    spectrogram = site.get(f"/sounds/{sound}/spectrogram")
    assert 100 < spectrogram["columns"] <= 1500
    levels = np.frombuffer(base64.b64decode(spectrogram["levels"]), np.uint8)
    levels = levels.reshape(spectrogram["bands"], spectrogram["columns"])
    end = spectrogram["start"] + spectrogram["columns"] * spectrogram["step"]
    assert end == pytest.approx(seconds, abs=1.5 * spectrogram["step"])
    bands = np.linspace(*map(mel, reversed(spectrogram["frequencies"])), len(levels) + 1)
    band = int(np.flatnonzero(bands > mel(1000))[-1])
    quarter = levels.shape[1] // 4
    assert np.abs(levels[:, [quarter, 3 * quarter]].argmax(0) - band).max() <= 1
    decibels = spectrogram["range"] * (levels.max(0) / 255.0 - 1)
    assert decibels[3 * quarter] == pytest.approx(0, abs=0.5)
    assert decibels[quarter] == pytest.approx(-20, abs=0.5)


def test_layers_are_described_in_seconds(site):
    network = site.get("/network")
    assert network["layers"]["conv1"] == {"units": 8, "length": 64 / RATE, "step": 2 / RATE}
    assert network["frame"]["length"] == pytest.approx(14.5, abs=0.05)
    assert len(network["sha256"]) == 64


def test_spectrograms_of_blocks_are_those_of_the_whole():
    samples = torch.from_numpy(np.random.default_rng(0).normal(size=20_000)).float()
    whole, parts = SpectrogramStream(256), SpectrogramStream(256)
    expected = torch.cat([whole.push(samples), whole.finish()], 1)
    blocks = [parts.push(block) for block in samples.split([1, 100, 5000, 300, 14_599])]
    assert expected.shape[1] == 20_000 // 256 + 1
    torch.testing.assert_close(torch.cat([*blocks, parts.finish()], 1), expected)


def test_classes_of_a_pooled_head_are_shown(folder, example, tmp_path):
    torch.manual_seed(0)
    narrow = sp.SOUNDNET8.resized([2, 2, 2, 2, 4, 4, 4], {})
    architecture = narrow.with_pooled_head(3, ("conv4", "pool5"), 5.0)
    pooled = sp.SoundNet(architecture, {"classes": ["a", "b", "c"]}).eval()
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(example[: 12 * RATE]))
    expected = sp.predict(pooled, path, top=3)
    with run_site(pooled) as site:
        network = site.get("/network")
        assert network["heads"] == {"classes": ["a", "b", "c"]}
        assert network["frame"] == {"center": 2.5, "step": 2.5, "length": 5.0}
        sound = site.send(path.read_bytes(), "clip.wav")
        summary = site.wait(sound)["heads"]["classes"]
        assert len(summary["frames"]) == len(expected.frames) == 4
        assert [index for index, _ in summary["clip"]] == [category.index for category in expected.classes]
        for index, track in summary["tracks"]:
            np.testing.assert_allclose(
                track, expected.class_probabilities[index].numpy(), atol=PAGE_TOLERANCE
            )
        download = site.get(f"/sounds/{sound}/results.json")
        assert download.pop("file") == "clip.wav"
        assert_close(download, sp.predict(pooled, path, top=10).to_dict())
        assert site.request(f"/sounds/{sound}/picture.png")[0] == 200


def test_edge_frames_are_optional_and_never_set_the_scale(network, folder, example):
    """At 11 s the demonstration network's largest value is in its edge frame."""
    frames = network.extract(torch.from_numpy(example[: 11 * RATE] * 256), ["conv7"])["conv7"][0]
    columns, largest = {}, float(frames[:, :-1].max())
    assert frames[:, -1].max() > 1.3 * largest
    for edge_frames in (False, True):
        with run_site(network, edge_frames=edge_frames) as site:
            sound = site.send(wav(example[: 11 * RATE]))
            site.wait(sound)
            activations = site.get(f"/sounds/{sound}/activations?layer=conv7")
            assert activations["largest"] == pytest.approx(largest, rel=1e-4)
            assert activations["edge_frames"] == 1
            assert site.get(f"/sounds/{sound}/activations?layer=conv6")["edge_frames"] == 0
            columns[edge_frames] = activations["columns"]
    assert columns == {False: frames.shape[1] - 1, True: frames.shape[1]}


def test_quiet_sounds_are_flagged(site, example):
    clip = example[: 12 * RATE]
    assert [site.wait(site.send(wav(gain * clip)))["quiet"] for gain in (1, 0.001)] == [False, True]


def test_networks_with_custom_classes_and_without_heads(folder, example):
    torch.manual_seed(0)
    narrow = sp.SOUNDNET8.resized([2, 2, 2, 2, 4, 4, 4], {})
    custom = sp.SoundNet(narrow.with_classes(3, "pool5"), {"classes": ["a", "b", "c"]}).eval()
    clip = wav(example[:8000])
    with run_site(custom) as site:
        sound = site.send(clip)
        results, expected = (
            site.wait(sound),
            sp.predict(custom, torch.from_numpy(example[:8000] * 256), top=3),
        )
        (head,) = results["heads"].values()
        assert [index for index, _ in head["clip"]] == [category.index for category in expected.classes]
        np.testing.assert_allclose([p for _, p in head["clip"]], [p for *_, p in expected.classes], atol=1e-3)
    with run_site(sp.SoundNet(narrow).eval()) as site:
        sound = site.send(wav(example[:3000]))
        assert site.wait(sound)["heads"] == {}
        assert site.get(f"/sounds/{sound}/activations?layer=conv7")["units"] == 4
        status, _, body = site.request(f"/sounds/{sound}/results.json")
        assert (status, json.loads(body)["error"]) == (
            409,
            "This network has no heads, so it cannot name sounds.",
        )


def test_downloads_are_named_after_the_sound(site, example):
    sound = site.send(wav(example[:RATE]), 'dög "a";\r\nx.wav')
    site.wait(sound)
    for file, media_type in (
        ("results.json", "application/json"),
        ("results.csv", "text/csv; charset=utf-8"),
        ("picture.png", "image/png"),
    ):
        status, headers, body = site.request(f"/sounds/{sound}/{file}")
        assert (status, headers["content-type"]) == (200, media_type)
        name = quote('dög "a";\ufffd\ufffdx.wav' + Path(file).suffix, safe="")
        assert headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}"
    assert body.startswith(b"\x89PNG")


def test_the_decoded_sound_can_be_downloaded_in_ranges(site, example):
    sound = site.send(wav(np.stack([example[: 2 * RATE], np.zeros(2 * RATE)], 1)))
    status, headers, body = site.request(f"/sounds/{sound}/sound.wav")
    assert (status, headers["content-type"]) == (200, "audio/wav")
    samples, rate = soundfile.read(io.BytesIO(body))
    assert (rate, samples.shape) == (RATE, (2 * RATE,))
    np.testing.assert_allclose(samples, example[: 2 * RATE], atol=1.1 / 2**15)  # rounded twice
    status, _, content = site.request(f"/sounds/{sound}/sound.wav", Range="bytes=1000-1999")
    assert (status, content) == (206, body[1000:2000])


# ---- during the analysis


def test_first_results_come_during_the_analysis(site, example, resume):
    sound = site.send(wav(np.tile(example, 4)))
    for _ in range(1000):
        results = site.get(f"/sounds/{sound}")
        if results["heads"]["scenes"]["clip"]:
            break
        time.sleep(0.02)
    assert results["state"] == "computing"
    assert results["announced_seconds"] == 100
    assert 20 < results["seconds"] < 30
    count = len(results["heads"]["objects"]["frames"])
    assert count == len(results["heads"]["objects"]["tracks"][0][1]) > 0
    assert site.get(f"/sounds/{sound}/activations?layer=conv5")["columns"] > 0
    assert site.request(f"/sounds/{sound}/results.json")[0] == 409
    resume.set()
    site.wait(sound)
    update = site.get(f"/sounds/{sound}?first_frame={count}")["heads"]["objects"]
    assert len(update["frames"]) == len(update["tracks"][0][1]) - count > 0


def test_sounds_wait_in_a_queue_and_get_their_own_results(site, example, resume):
    clips = [example[RATE * start : RATE * (start + 12)] for start in (0, 3, 6, 9, 12)]
    sounds = [site.send(wav(clip), f"{number}.wav") for number, clip in enumerate(clips)]
    for _ in range(1000):
        responses = [site.get(f"/sounds/{sound}") for sound in sounds]
        if [response["state"] for response in responses] == ["computing"] * 2 + ["waiting"] * 3:
            break
        time.sleep(0.02)
    assert [response["ahead"] for response in responses] == [0, 0, 0, 1, 2]
    assert site.request(f"/sounds/{sounds[3]}", "DELETE")[0] == 204
    resume.set()
    frames = [site.wait(sound)["heads"]["scenes"]["frames"] for sound in sounds if sound != sounds[3]]
    assert len({json.dumps(sound_frames) for sound_frames in frames}) == 4
    assert site.request(f"/sounds/{sounds[3]}")[0] == 404


# ---- invalid sounds


def invalid_files(example):
    """Contents that are not a sound, or a part of one, by description; some can be decoded anyway."""
    complete = wav(example[: RATE * 2])
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.wav", complete)
    header = bytearray(complete[:44])
    contents = {
        "nothing": b"",
        "a byte": b"R",
        "zeros": bytes(5000),
        "text": b"This is no sound.\n" * 50,
        "html": b"<!doctype html><script>alert(1)</script>" * 20,
        "zip": zipped.getvalue(),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "only a header": bytes(header),
        "half a header": complete[:30],
        "cut": complete[:-5001],
        "rate 0": complete[:24] + bytes(4) + complete[28:],
        "rate 2^31": complete[:24] + (2**31).to_bytes(4, "little") + complete[28:],
        "no channels": complete[:22] + bytes(2) + complete[24:],
        "65535 channels": complete[:22] + b"\xff\xff" + complete[24:],
        "claims 4 GB": complete[:4]
        + b"\xf0\xff\xff\x7f"
        + complete[8:40]
        + b"\xf0\xff\xff\x7f"
        + complete[44:],
    }
    for form, subtype in (("FLAC", None), ("OGG", None), ("MP3", None), ("AIFF", None), ("CAF", None)):
        file = io.BytesIO()
        soundfile.write(file, example[: RATE * 2], RATE, format=form, subtype=subtype)
        contents[f"{form}, a third"] = file.getvalue()[: len(file.getvalue()) // 3]
    return contents


NAMES = [
    "clip.wav",
    "../../../../tmp/escaped.wav",
    "..\\..\\escaped.mp4",
    "<img src=x onerror=alert(1)>.mp3",
    "nul\0nul.raw",
    "x" * 5000,
]
DECODABLE = {"MP3, a third", "CAF, a third", "claims 4 GB", "rate 2^31"}


def test_invalid_sounds_are_reported_and_leave_no_files(site, folder, example):
    contents = invalid_files(example)
    assert len(contents) * len(NAMES) > 100
    before = {path.name for path in folder.rglob("*")}
    siblings = set(folder.parent.iterdir())
    for description, content in contents.items():
        for name in NAMES:
            sound = site.send(content, name)
            results = site.wait(sound)
            page_name, error = results["name"], results["error"]
            if description not in DECODABLE:
                assert results["state"] == "failed", (description, results)
            if results["state"] == "failed":
                assert error.startswith(f"{page_name}: ")
                assert str(folder) not in error
                assert "could not be computed" not in error
                assert site.request(f"/sounds/{sound}/results.json")[0] == 409
            assert len(page_name) <= 200
            assert not set(page_name) & set("/\\\0")
            assert site.request(f"/sounds/{sound}", "DELETE")[0] == 204
    wait_for(lambda: {path.name for path in folder.rglob("*")} == before)
    assert set(folder.parent.iterdir()) == siblings
    assert site.wait(site.send(wav(example)))["state"] == "done"


def test_files_above_the_limits_are_refused(site, network, folder, example):
    status, _, body = site.request("/sounds", "POST", bytes(30_000_001))
    assert status == 413
    assert json.loads(body)["error"] == "The file is larger than 30 MB, the limit of this server."
    with run_site(network, max_megabytes=1, max_hours=0.01) as small:  # 36 s
        chunks = (bytes(100_000) for _ in range(11))  # chunked, so that no length is announced
        assert small.request("/sounds", "POST", chunks)[0] == 413
        for rate, name in ((RATE // 2, "a.wav"), (8000, "a.webm")):  # with and without a known length
            results = small.wait(small.send(wav(np.zeros(rate * 40), rate), name))
            assert results["error"] == f"{name}: longer than 0.01 hours, the limit of this server"


def list_paths(folder):
    """All paths in a folder, which may be changing."""
    return {f"{parent}/{name}" for parent, folders, files in os.walk(folder) for name in [*folders, *files]}


def test_a_client_that_disconnects_leaves_no_files(site, folder, example):
    before = list_paths(folder)
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        head = f"POST /sounds HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + bytes(200_000))
        wait_for(lambda: list_paths(folder) > before)
    wait_for(lambda: list_paths(folder) == before)


def test_idle_sounds_are_removed(network, folder, example, monkeypatch):
    monkeypatch.setattr(session_store, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(session_store, "MAX_SESSIONS", 1)
    before = set(folder.iterdir())
    with run_site(network) as site:
        wait_for(lambda: set(folder.iterdir()) > before)
        (server_folder,) = set(folder.iterdir()) - before
        assert server_folder.stat().st_mode & 0o77 == 0
        sound = site.send(wav(example[:RATE]))
        assert site.request("/sounds", "POST", b"")[0] == 503
        wait_for(lambda: not list(server_folder.iterdir()))
        status, _, body = site.request(f"/sounds/{sound}")
        assert (status, json.loads(body)["error"]) == (
            404,
            "This sound is no longer on the server. Load it again.",
        )
    assert not server_folder.exists()


# ---- security


def test_pages_of_other_sites_are_refused(site):
    local = f"127.0.0.1:{site.port}"
    for host in (
        "evil.example",
        f"evil.example:{site.port}",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
    ):
        assert site.request("/", Host=host)[0] == 421
    assert site.request("/", Host=f"LOCALHOST:{site.port}")[0] == 200
    sound = site.send(b"")
    for origin in (
        "http://evil.example",
        "null",
        "https://evil.example:80",
        "http://127.0.0.1:1",
        "http://[",
        "",
    ):
        assert site.request("/sounds", "POST", b"", Origin=origin)[0] == 403
        assert site.request(f"/sounds/{sound}", "DELETE", Origin=origin)[0] == 403
    assert site.request(f"/sounds/{sound}", "DELETE", Origin=f"http://{local}")[0] == 204


def test_all_responses_have_security_headers(site):
    for path in (
        "/",
        "/serve.js",
        "/serve.css",
        "/network",
        "/nowhere",
        "/sounds/x",
        "/sounds/../../setup.cfg",
    ):
        _, headers, _ = site.request(path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path, media_type in (
        ("/", "text/html"),
        ("/serve.js", "text/javascript"),
        ("/serve.css", "text/css"),
    ):
        assert site.request(path)[1]["content-type"] == f"{media_type}; charset=utf-8"


# ---- the command line


def test_the_command_serves_until_it_is_told_to_end(tmp_path, example, capsys):
    command = [sys.executable, "-m", "soundnet_port", "serve", "-w", "demo", "--port", "0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    exit_codes = {signal.SIGINT: 0, signal.SIGTERM: 143}
    with contextlib.ExitStack() as stack:
        processes = {}
        for sent in exit_codes:
            environment = {**os.environ, "TMPDIR": str(tmp_path)}
            processes[sent] = process = subprocess.Popen(command, env=environment, **streams)
            stack.enter_context(process)
            stack.callback(process.kill)
        for sent, process in processes.items():
            port = int(process.stdout.readline().rpartition(":")[2].strip("/\n"))
            site = Site(port)
            assert site.get("/network")["name"] == "soundnet8"
            assert site.wait(site.send(wav(example[:RATE])))["state"] == "done"
            assert main(["serve", "-w", "demo", "--port", str(port)]) == 2
            error = capsys.readouterr().err
            assert "Address already in use; use another --port, or 0" in error
            assert error.count("\n") == 1
            process.send_signal(sent)
            assert process.communicate(timeout=60) == ("", "")
            assert process.returncode == exit_codes[sent]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--port 70000", "--port must be from 0 to 65535, not 70000"),
        ("--max-megabytes 0", "--max-megabytes must be at least 1, not 0"),
        ("--max-hours -1", "--max-hours must be above 0 and at most 24, not -1"),
        ("--host 256.0.0.1.invalid", "--host 256.0.0.1.invalid --port 8765: "),
        ("-w nowhere.safetensors", "nowhere.safetensors: "),
    ],
)
def test_usage_errors_are_one_line(arguments, line, capsys):
    assert main(["serve", "-w", "demo", *arguments.split()]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"soundnet-port: {line}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "matplotlib"])
def test_a_missing_extra_is_one_line(package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "-w", "demo"]) == 2
    line = f"soundnet-port: {package} is not installed: pip install 'soundnet-port[web]'\n"
    assert capsys.readouterr().err == line
