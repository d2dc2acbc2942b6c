"""Sound files: Torch7's own samples where it loaded the file, and every bad file named."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from soundnet_port import AudioError, load_audio

RATE = 22_050


def tone(samples=RATE, rate=RATE, hertz=440.0, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)
    return np.stack([wave * (1 - 0.5 * c) for c in range(channels)], axis=1)


@pytest.fixture
def wav(tmp_path):
    """Writes a WAV file (or another kind, by its suffix) and returns its path."""

    def write(samples, rate=RATE, name="a.wav", **how):
        path = tmp_path / name
        soundfile.write(path, samples, rate, **how)
        return path

    return write


def test_integer_samples_are_exactly_torch7s():
    """audio.load times 2^-23: bit for bit for integer PCM; 1.2e-7 for floats; see the facts file."""
    folder = SHARED.parent / "reference" / "audio"
    if not folder.is_dir():
        pytest.skip("the recorded sound files are not part of the project (11 MB), and ../shared is absent")
    loaded = np.load(folder / "torch7_loaded.npz")
    facts = json.loads((folder / "audio_facts.json").read_text())
    checked = 0
    for name in facts:
        if name.endswith((".wav", ".flac")):
            (key,) = (k for k in loaded.files if k.split("/")[0].startswith(name))
            ours, theirs = load_audio(folder / name, sample_rate=None).numpy(), loaded[key].ravel()
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= (1.2e-7 * 256 if "float" in name else 0), name
            checked += 1
    assert checked >= 9


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_U8", 8), ("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 32)])
def test_full_scale_is_256_at_every_depth(wav, subtype, bits):
    levels = np.array([0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 2)], np.int64)
    path = wav((levels << (32 - bits)).astype(np.int32), subtype=subtype)
    expected = (levels / 2.0 ** (bits - 1) * 256).astype(np.float32)
    np.testing.assert_array_equal(load_audio(path), expected)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.au", "a.caf", "a.w64"])
def test_lossless_formats_agree(wav, name):
    samples = (tone() * 32_767).astype(np.int16)
    expected = load_audio(wav(samples))
    assert torch.equal(load_audio(wav(samples, name=name)), expected)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3", "a.opus"])
def test_lossy_formats_are_read(wav, name):
    rate = 48_000 if name == "a.opus" else RATE
    how = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    heard = load_audio(wav(tone(rate, rate), rate, name, **how))
    assert abs(len(heard) - RATE) < 3_000
    assert 100 < heard[5_000:15_000].abs().max() < 156


def test_floats_beyond_full_scale_are_clipped(wav):
    path = wav(np.array([0.5, 1.5, -7.0, 1.0]), subtype="FLOAT")
    assert load_audio(path).tolist() == [128.0, 256.0, -256.0, 256.0]
    assert load_audio(path).dtype == torch.float32


def test_the_first_channel_is_heard_never_a_mix(wav):
    path = wav(tone(channels=2))
    left = load_audio(path)
    assert torch.equal(left, load_audio(wav(tone(), name="left.wav")))
    assert torch.equal(load_audio(path, channel=1), load_audio(wav(tone(channels=2)[:, 1], name="r.wav")))
    with pytest.raises(AudioError, match="has 2 channels"):
        load_audio(path, channel=2)
    eight = wav(tone(channels=8), name="eight.wav")
    assert torch.equal(load_audio(eight), left)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 32_000, 44_100, 48_000, 96_000, 192_000, 12_345])
def test_any_rate_becomes_22050(wav, rate):
    heard = load_audio(wav(tone(rate, rate), rate))
    assert abs(len(heard) - RATE) <= 1
    middle = slice(2_000, 20_000)
    error = heard[middle] - torch.from_numpy(tone()[middle, 0]) * 256
    assert error.abs().max() < 0.05  # 16-bit samples are 1/128 apart; the filter's ripple is below that
    assert len(load_audio(wav(tone(rate, rate), rate), sample_rate=None)) == rate


def test_what_the_network_cannot_hear_is_gone(wav):
    heard = load_audio(wav(tone(44_100, 44_100, hertz=15_000), 44_100))
    assert heard[2_000:20_000].abs().max() < 0.1  # 15 kHz lies above 11,025 Hz: 60 dB down and more


@pytest.mark.parametrize("samples", [0, 1, 2, 100])
def test_tiny_files(wav, samples):
    path = wav(tone(samples), subtype="FLOAT")
    if samples:
        assert len(load_audio(path)) == samples
    else:
        with pytest.raises(AudioError, match=r"a\.wav: holds no samples"):
            load_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_samples_are_refused(wav, bad):
    samples = tone()[:, 0]
    samples[777] = bad
    with pytest.raises(AudioError, match=r"a\.wav: sample 777 is NaN or infinite"):
        load_audio(wav(samples, subtype="FLOAT"))


def test_truncated_files_are_refused(wav):
    for name in ("a.wav", "a.aiff", "a.flac", "a.w64", "a.au", "a.caf", "rf.wav"):
        path = wav(tone(5 * RATE), name=name, format="RF64" if name == "rf.wav" else None)
        assert len(load_audio(path)) == 5 * RATE
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
        with pytest.raises(AudioError, match=f"{name}: (truncated|cannot be decoded)"):
            load_audio(path)


def test_wav_written_to_a_pipe_is_no_truncated_file(wav):
    path = wav(tone(), subtype="PCM_16")
    data = path.read_bytes()
    at = data.index(b"data") + 4
    expected = load_audio(path)
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff\xff\x7f"):
        path.write_bytes(data[:4] + size + data[8:at] + size + data[at + 4 :])
        assert torch.equal(load_audio(path), expected)


def test_other_files_are_named(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("this is no sound\n" * 50)
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded \(Format not recognised\)"):
        load_audio(text)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"empty\.wav: an empty file"):
        load_audio(tmp_path / "empty.wav")
    with pytest.raises(AudioError, match="a directory"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match=r"no\.wav: No such file"):
        load_audio(tmp_path / "no.wav")
    with pytest.raises(ValueError, match="choose from auto"):
        load_audio(text, decoder="magic")
    with pytest.raises(ValueError, match="sample_rate"):
        load_audio(text, sample_rate=0)


def test_names_of_any_kind(wav):
    expected = load_audio(wav(tone()))
    for name in ("töne 音.wav", "with space.wav", "line\nbreak.wav", "-dash.wav", "no_suffix"):
        how = {} if name.endswith("wav") else {"format": "WAV"}
        assert torch.equal(load_audio(wav(tone(), name=name, **how)), expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_but_our_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    suffix = data.draw(st.sampled_from(["wav", "flac", "ogg", "mp3", "aiff"]))
    path = folder / f"damaged.{suffix}"
    soundfile.write(path, tone(4_000), RATE)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 400)))
        raw[at : at + 1] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        heard = load_audio(path)
    except AudioError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert heard.ndim == 1
        assert torch.isfinite(heard).all()
