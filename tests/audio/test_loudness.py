"""The level of a sound, that of its loudest second, and the treatment of quiet ones."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import NETS, model_of

import soundnet_port as sp
from soundnet_port.audio.loudness import NORMALIZED, QUIET, LevelMeter, level, normalize
from soundnet_port.cli.main import main
from soundnet_port.network.engine import BLOCK

RATE = sp.SAMPLE_RATE


def literal(samples):
    seconds = [samples[at : at + RATE] for at in range(0, len(samples) - RATE + 1, RATE)] or [samples]
    power = max(float(np.mean(np.square(np.asarray(second, np.float64) / 256))) for second in seconds)
    if len(samples) > RATE:  # what is left at the end, as part of a second
        rest = np.asarray(samples[len(samples) // RATE * RATE :], np.float64) / 256
        power = max(power, float(np.sum(np.square(rest))) / RATE)
    return 10 * math.log10(power) if power > 0 else -math.inf


@settings(max_examples=budget(40), deadline=None)
@given(
    length=st.integers(1, 4 * RATE),
    cuts=st.lists(st.integers(0, 4 * RATE), max_size=6),
    seed=st.integers(0, 99),
)
def test_it_is_the_rms_of_the_loudest_second_in_whatever_pieces_a_sound_comes(length, cuts, seed):
    random = np.random.default_rng(seed)
    samples = (random.normal(size=length) * np.repeat(random.uniform(0, 60, 8), RATE // 2)[:length]).astype(
        "f4"
    )
    meter = LevelMeter()
    for piece in np.split(samples, sorted(min(cut, length) for cut in cuts)):
        meter.add(torch.from_numpy(piece))
    assert meter.level == pytest.approx(literal(samples), abs=1e-9)
    assert level(torch.from_numpy(samples)) == pytest.approx(meter.level, abs=1e-9)


def test_normalizing_brings_the_loudest_second_to_the_level_as_far_as_the_peak_allows():
    tone = torch.sin(torch.arange(3 * RATE) / 10)
    assert level(normalize(tone * 0.01)) == pytest.approx(NORMALIZED, abs=1e-3)
    assert level(normalize(tone * 250)) == pytest.approx(NORMALIZED, abs=1e-3)
    click = torch.zeros(2 * RATE)
    click[100] = 2.0
    assert float(normalize(click).abs().max()) == 256
    assert torch.equal(normalize(torch.zeros(5)), torch.zeros(5))
    assert torch.equal(normalize(torch.full((5,), 1e-40)), torch.full((5,), 1e-40))


def test_a_sound_after_a_silent_second_is_no_silence():
    assert level(torch.cat([torch.zeros(RATE), torch.full((RATE - 1,), 200.0)])) > -5


def test_predict_measures_levels_and_normalizes_only_when_asked(tmp_path):
    model = model_of(NETS["n8_d16"])
    wave = torch.randn(13 * RATE, generator=torch.Generator().manual_seed(0)) * 30
    loud, quiet = sp.predict(model, wave), sp.predict(model, wave * 1e-3)
    assert (loud.quiet, quiet.quiet) == (False, True)
    assert quiet.level == pytest.approx(loud.level - 60, abs=1e-3)
    one, other = sp.predict(model, wave, normalize=True), sp.predict(model, wave * 1e-3, normalize=True)
    torch.testing.assert_close(one.object_probabilities, other.object_probabilities, rtol=1e-3, atol=1e-5)
    assert other.normalized
    assert not other.quiet
    assert other.level == pytest.approx(quiet.level)  # as it was given
    assert sp.predict(model, torch.zeros(13 * RATE)).to_dict()["level"] is None  # digital silence


def test_integers_are_refused_normalized_or_not():
    model = model_of(NETS["n8_d16"])
    for options in ({}, {"normalize": True}):
        with pytest.raises(ValueError, match="must be a float tensor"):
            sp.predict(model, torch.ones(300_000, dtype=torch.int16), **options)


def test_long_files_are_measured_in_passing(tmp_path):
    model = model_of(NETS["n8_d16"])
    random = np.random.default_rng(0)
    samples = random.normal(0, 0.01, BLOCK + 3 * RATE)
    samples[-2 * RATE :] *= 20
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="FLOAT")
    prediction = sp.predict(model, tmp_path / "long.wav")
    assert prediction.level == pytest.approx(literal(samples * 256), abs=1.0)  # seconds from the beginning
    assert prediction.level > QUIET


def test_the_command_line_says_that_a_sound_is_quiet(demo_report, tmp_path, capsys):
    path = tmp_path / "quiet.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 1e-3, 13 * RATE), RATE)
    command = ["predict", str(path), "-w", str(demo_report.weights), "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"soundnet-port: {path}: quiet (-60 dB of full scale in its loudest second)")
    assert "--normalize" in err
    assert json.loads(out)["level"] == pytest.approx(-60, abs=0.2)
    assert main([*command, "--normalize"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["normalized"] is True
    soundfile.write(path, np.zeros(13 * RATE), RATE)
    assert main(command) == 0
    assert capsys.readouterr().err.endswith(": digital silence; the prediction means nothing\n")
