"""Rows on a stimulus clock: means of the frames that last in a period."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.inference.alignment import ALIGNMENTS, Clock, align

RATE = sp.SAMPLE_RATE


def by_sampling(model, layer, frames, seconds, tr, to):
    """Align by looking up the current frame at many moments of each period."""
    g = model.architecture.layer(layer)
    times = model.frame_times(layer, len(frames)).numpy()
    begins = times[:, 1] - g.stride / 2 / RATE if to == "center" else times[:, 2]
    rows = []
    for period in range(int(np.ceil(seconds / tr))):
        moments = tr * (period + (np.arange(4000) + 0.5) / 4000)
        at = np.searchsorted(begins, moments, side="right") - 1
        at = at.clip(0) if to == "center" else at[at >= 0]
        rows.append(frames[at].double().mean(0).numpy() if len(at) else np.full(frames.shape[1], np.nan))
    return np.array(rows)


@pytest.mark.parametrize("to", ALIGNMENTS)
@pytest.mark.parametrize("layer", ["conv4", "pool5", "conv7", "objects"])
def test_a_row_is_the_mean_of_the_frames_that_last_in_it(model, layer, to):
    frames = model.extract(torch.randn(20 * RATE) * 20, [layer])[layer][0].T
    rows, times = align(model, layer, frames, 20.0, tr=0.7, to=to, edge_frames=True)
    wanted = by_sampling(model, layer, frames, 20.0, 0.7, to)
    assert rows.shape == wanted.shape == (29, frames.shape[1])
    assert np.array_equal(np.isnan(rows.numpy()), np.isnan(wanted))
    # 4,000 moments in a period find a frame's ends to 1/4000 of it
    assert np.nanmax(np.abs(rows.numpy() - wanted)) < 2e-3 * frames.abs().max()
    assert times[:, 1].tolist() == pytest.approx([0.7 * (period + 0.5) for period in range(29)])


@pytest.mark.parametrize("to", ALIGNMENTS)
@pytest.mark.parametrize("seconds", [0.3, 5.0, 20.0])
def test_where_only_an_edge_frame_lasts_there_is_no_number(model, to, seconds):
    samples = round(seconds * RATE)
    frames = model.extract(torch.randn(samples) * 20, ["conv7"])["conv7"][0].T
    rows, times = align(model, "conv7", frames, seconds, tr=0.1, to=to)
    marked = frames.clone()
    marked[-1] = 1e6
    again, _ = align(model, "conv7", marked, seconds, tr=0.1, to=to)
    torch.testing.assert_close(rows, again, rtol=0, atol=0, equal_nan=True)
    first = model.frame_times("conv7", len(frames))[-1]
    g = model.architecture.layer("conv7")
    begins = float(first[1]) - g.stride / 2 / RATE if to == "center" else float(first[2])
    unknown = torch.isnan(rows[:, 0])
    for period in range(len(rows)):
        if 0.1 * period >= begins and len(frames) > 1:
            assert bool(unknown[period])
            assert math.isnan(float(times[period, 0]))
        elif to == "center" and 0.1 * period < begins and len(frames) > 1:
            assert not bool(unknown[period])
    if len(frames) == 1:
        assert bool(unknown.all())


@given(
    tr=st.floats(0.05, 5),
    cuts=st.lists(st.integers(0, 54), max_size=5),
    to=st.sampled_from(ALIGNMENTS),
    layer=st.sampled_from(["pool5", "conv7"]),
)
@settings(deadline=None, max_examples=budget(60))
def test_frames_may_come_bit_by_bit(tr, cuts, to, layer):
    geometry = sp.SOUNDNET8.layer(layer)
    frames = torch.from_numpy(np.random.default_rng(len(cuts)).normal(size=(54, 3)))
    clock, pieces = Clock(geometry, tr, to), Clock(geometry, tr, to)
    clock.add(frames)
    for piece in np.split(frames, sorted(cuts)):
        pieces.add(piece)
    for expected, actual in zip(clock.result(20 * RATE), pieces.result(20 * RATE), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@given(tr=st.floats(0.01, 30), seconds=st.floats(0.3, 60), to=st.sampled_from(ALIGNMENTS))
@settings(deadline=None, max_examples=budget(60))
def test_what_is_constant_stays_so(tr, seconds, to):
    geometry = sp.SOUNDNET8.layer("pool5")
    count = sp.SOUNDNET8.frames("pool5", max(round(seconds * RATE), geometry.shortest))
    frames = torch.full((count, 2), 3.25)
    clock = Clock(geometry, tr, to)
    clock.add(frames)
    rows, times = clock.result(round(seconds * RATE))
    known = ~torch.isnan(rows[:, 0])
    assert len(rows) == len(times) == np.ceil(round(seconds * RATE) / (tr * RATE) - 1e-9)
    torch.testing.assert_close(rows[known], torch.full_like(rows[known], 3.25))
    assert to == "end" or bool(known.all())


def test_with_end_no_row_knows_what_comes_later(model):
    sound = torch.randn(12 * RATE) * 20
    other = sound.clone()
    other[6 * RATE :] = 0
    rows, changed = (
        align(
            model,
            "conv7",
            model.extract(wave, ["conv7"])["conv7"][0].T,
            12.0,
            tr=1.5,
            to="end",
            edge_frames=True,
        )[0]
        for wave in (sound, other)
    )
    # up to rounding: blocks of other content are the same sums, in the same order
    torch.testing.assert_close(rows[:4], changed[:4], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not torch.allclose(rows[5:], changed[5:], atol=1e-3)
    assert bool(torch.isnan(rows[0]).all())  # conv7's first frame ends after 1.6 s
    assert not bool(torch.isnan(rows[1:]).any())


@pytest.mark.parametrize("to", ALIGNMENTS)
def test_times_are_of_all_that_a_row_heard(model, to):
    _, times = align(
        model, "pool5", model.extract(torch.zeros(9 * RATE), ["pool5"])["pool5"][0].T, 9, tr=1, to=to
    )
    frames = model.frame_times("pool5", 24).numpy()
    g = model.architecture.layer("pool5")
    begins = frames[:, 1] - g.stride / 2 / RATE if to == "center" else frames[:, 2]
    begins[0] = 0 if to == "center" else begins[0]
    for period in range(1, 8):
        inside = [n for n in range(23) if begins[n] < period + 1 and begins[n + 1] > period]
        assert times[period, 0] == pytest.approx(frames[inside[0], 0])
        assert times[period, 2] == pytest.approx(frames[inside[-1], 2])


def test_all_layers_in_one_pass_are_as_one_by_one(model, tmp_path):
    wave = (np.random.default_rng(1).normal(0, 0.1, 30 * RATE)).astype("float32")
    soundfile.write(tmp_path / "story.wav", wave, RATE, subtype="FLOAT")
    layers = ["conv2", "pool5", "conv7", "scenes"]
    sp.extract_corpus(
        model, [tmp_path / "story.wav"], tmp_path / "story.npz", layers=layers, tr=2, align="end",
        batch_seconds=10, workers=1,
    )  # fmt: skip
    arrays = np.load(tmp_path / "story.npz")
    waveform = sp.load_audio(tmp_path / "story.wav")
    for layer, frames in model.extract(waveform, layers).items():
        rows, times = align(model, layer, frames[0].T, 30, tr=2, to="end")
        # in blocks of 10 s, so sums are in another order
        np.testing.assert_allclose(
            arrays[f"story.wav/{layer}"], rows, rtol=1e-4, atol=1e-4 * float(frames.abs().max())
        )
        assert np.array_equal(arrays[f"story.wav/{layer}_times"], times, equal_nan=True)
    described = json.loads(str(arrays["soundnet_port"]))
    assert (described["tr"], described["align"], described["axes"]) == (2, "end", "periods, channels")
    assert described["receptive_field_seconds"]["pool5"] == pytest.approx(17438 / RATE, abs=1e-6)


def test_rows_and_frames_do_not_mix(model, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(3 * RATE), RATE)
    sp.extract_corpus(model, [tmp_path / "a.wav"], tmp_path / "out", tr=1.0, workers=1)
    for other in ({}, {"tr": 2.0}, {"tr": 1.0, "align": "end"}):
        with pytest.raises(ValueError, match="made with other settings"):
            sp.extract_corpus(model, [tmp_path / "a.wav"], tmp_path / "out", workers=1, **other)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tr", "0"], "period must be 0.001 to 3600 seconds, not 0"),
        (["--tr", "nan"], "period must be"),
        (["--tr", "1.5", "--pool", "mean"], "means over time already"),
        (["--tr", "1.5", "--format", "torch7"], "torch7 holds the network's own frames"),
        (["--align", "end"], "--align needs --tr"),
    ],
)
def test_a_clock_that_cannot_be_is_refused(tmp_path, capsys, arguments, complaint):
    assert main(["extract", str(tmp_path), "-w", "demo", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_bad_alignment_or_nothing_is_refused(model):
    with pytest.raises(ValueError, match="choose from center, end"):
        align(model, "pool5", torch.zeros(3, 2), 3, tr=1, to="start")
    with pytest.raises(ValueError, match="no frames"):
        align(model, "pool5", torch.zeros(0, 2), 3, tr=1)
    with pytest.raises(ValueError, match="too large for the network's number type"):
        align(model, "pool5", torch.full((8, 2), torch.inf), 3, tr=1)
