"""Decoding: the samples that Torch7 loaded, and an error that names each bad file."""

import importlib.util
import os
import shutil
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import CHECKOUT, SHARED

from soundnet_port import AudioError, load_audio
from soundnet_port.audio.loading import read_blocks, read_sound

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


AUDIO = SHARED.parent / "reference" / "audio"
RECORDED = "the recorded sound files are not part of the project (11 MB), and ../shared is absent"

# Each decoder beside Torch7's audio.load: how many samples more (+) or fewer,
# how many leading samples Torch7 has more (lag), and the largest difference on the +-256 scale where
# they overlap. sox is Torch7's own decoder, so it is always (0, 0, 0). docs/audio.md shows this table.
MEASURED = {
    #  file                         soundfile              av
    "fullscale_16.wav":           ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_8.wav":              ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_16.wav":             ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_24.wav":             ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_32.wav":             ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_float.wav":          ((0, 0, 1.2e-7), (0, 0, 1.2e-7)),
    "stereo44k_16.wav":           ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k_16.flac":            ((0, 0, 0.0), (0, 0, 0.0)),
    "stereo44k_24.flac":          ((0, 0, 0.0), (0, 0, 0.0)),
    "mono22k.ogg":                ((0, 0, 0.004), (0, 0, 0.004)),
    "mono22k_sox.ogg":            ((0, 0, 0.004), (0, 0, 0.004)),
    "mono22k_cbr64_sox.mp3":      ((576, 0, 4e-4), (576, 0, 9e-4)),
    "mono22k_noxing_ff.mp3":      ((576, 0, 4e-4), (576, 0, 9e-4)),
    "mono22k_cbr64_ff.mp3":       ((-1494, 1681, 4e-4), (-1494, 1681, 9e-4)),
    "mono22k_vbr_sox.mp3":        ((-1477, 1681, 4e-4), (-1477, 1681, 9e-4)),
    "train_like_22k_mono_ff.mp3": ((-1494, 1681, 4e-4), (-1494, 1681, 9e-4)),
    "stereo44k_cbr128_sox.mp3":   ((1152, 0, 4e-4), (1152, 0, 9e-4)),
    "stereo44k_vbr_id3_ff.mp3":   ((-1808, 2257, 4e-4), (-1808, 2257, 9e-4)),
}  # fmt: skip


def against_torch7(name, decoder):
    """(samples more than Torch7, largest difference at the lag of the table)."""
    if not AUDIO.is_dir():
        pytest.skip(RECORDED)
    loaded = np.load(AUDIO / "torch7_loaded.npz")[name].ravel()
    clip = read_sound(AUDIO / name, sample_rate=None, decoder=decoder)
    assert clip.decoder == decoder
    assert clip.file_rate == clip.sample_rate == (44_100 if "44k" in name else 22_050)
    return loaded, clip.waveform.numpy()


@pytest.mark.parametrize("decoder", ["soundfile", "av"])
@pytest.mark.parametrize("name", MEASURED)
def test_decoders_differ_from_torch7_as_documented(name, decoder):
    if decoder == "av":
        pytest.importorskip("av", reason="needs the extra [av]")
    longer, lag, largest = MEASURED[name][decoder == "av"]
    theirs, ours = against_torch7(name, decoder)
    assert len(ours) - len(theirs) == longer
    overlap = min(len(theirs) - lag, len(ours))
    assert np.abs(theirs[lag : lag + overlap] - ours[:overlap]).max() <= largest


@pytest.mark.skipif(shutil.which("sox") is None, reason="needs the sox program")
@pytest.mark.parametrize("name", MEASURED)
def test_sox_gives_torch7s_samples_to_the_bit(name):
    theirs, ours = against_torch7(name, "sox")
    np.testing.assert_array_equal(ours, theirs)


def test_the_documented_table_is_the_measured_one():
    text = (CHECKOUT / "docs" / "audio.md").read_text("utf-8")
    for name, (soundfile_, av) in MEASURED.items():
        cells = [f"{longer:+,} / {lag:,} / {largest:g}" for longer, lag, largest in (soundfile_, av)]
        cells = [cell.replace("+0 / 0 / 0", "exact") if cell == "+0 / 0 / 0" else cell for cell in cells]
        assert f"| {name} | {cells[0]} | {cells[1]} | exact |" in text, name


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Small files that only PyAV reads, made by PyAV: a tone beside pictures, or alone."""
    av = pytest.importorskip("av", reason="needs the extra [av]")
    folder = tmp_path_factory.mktemp("videos")
    paths = {}
    for name, codec, pictures in (
        ("a.mp4", "aac", "mpeg4"),
        ("a.m4a", "aac", None),
        ("a.mkv", "pcm_s16le", "mpeg4"),
        ("a.webm", "libopus", None),
        ("silent.mp4", None, "mpeg4"),
    ):
        paths[name] = folder / name
        rate = 48_000 if codec == "libopus" else 44_100
        with av.open(str(paths[name]), "w") as out:
            video = out.add_stream(pictures, rate=10, width=32, height=32) if pictures else None
            streams = [out.add_stream(codec, rate=rate, layout="stereo") for _ in range(2) if codec]
            if video is not None:
                for _ in range(20):
                    frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                    out.mux(video.encode(frame))
                out.mux(video.encode())
            for number, stream in enumerate(streams[: 1 if name == "a.webm" else 2]):
                wave = tone(2 * rate, rate, 440 * (1 + number), channels=2).T
                wave = np.ascontiguousarray((wave * 32_000).astype(np.int16).T.reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
                frame.sample_rate = rate
                out.mux(stream.encode(frame))
                out.mux(stream.encode())
    return paths


@pytest.mark.parametrize("name", ["a.mp4", "a.m4a", "a.mkv"])
def test_the_first_audio_stream_of_videos_is_heard(videos, name):
    sound = read_sound(videos[name])
    assert (sound.decoder, sound.file_rate, sound.sample_rate) == ("av", 44_100, RATE)
    assert abs(len(sound.waveform) - 2 * RATE) < 2_000
    middle = sound.waveform[10_000 : 10_000 + RATE // 2]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    assert abs(int(spectrum.argmax()) * RATE / len(middle) - 440) < 5  # the second stream has 880 Hz
    right = load_audio(videos[name], channel=1)[10_000:20_000]
    assert 0.4 < float(right.square().mean().sqrt() / middle.square().mean().sqrt()) < 0.6
    with pytest.raises(AudioError, match="has 2 channels"):
        load_audio(videos[name], channel=2)


def test_videos_without_sound_and_damaged_ones_are_named(videos, tmp_path):
    with pytest.raises(AudioError, match=r"silent\.mp4: has no audio stream"):
        load_audio(videos["silent.mp4"])
    cut = tmp_path / "cut.m4a"
    cut.write_bytes(videos["a.m4a"].read_bytes()[:3_000])
    with pytest.raises(AudioError, match=r"cut\.m4a: cannot be decoded"):
        load_audio(cut)


def test_a_coding_that_nobody_knows_is_refused(videos, tmp_path):
    strange = tmp_path / "strange.webm"
    strange.write_bytes(videos["a.webm"].read_bytes().replace(b"A_OPUS", b"A_ZZZZ"))
    with pytest.raises(AudioError, match=r"strange\.webm: has an audio stream in a coding that FFmpeg"):
        load_audio(strange)


def test_a_playlist_posing_as_sound_opens_nothing(tmp_path, wav):
    pytest.importorskip("av", reason="needs the extra [av]")
    hidden = wav(tone())
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{hidden}\n", f"ffconcat version 1.0\nfile {hidden}\n"):
        path = tmp_path / "list.m4a"
        path.write_text(text)
        with pytest.raises(AudioError, match="cannot be decoded"):
            load_audio(path)


def test_without_pyav_the_error_says_how_to_get_it(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"pip install 'soundnet-port\[av\]'"):
        load_audio(videos["a.m4a"])
    with pytest.raises(AudioError, match="PyAV is not installed"):
        load_audio(videos["a.m4a"], decoder="av")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match="needs the sox program"):
        load_audio(videos["a.m4a"], decoder="sox")


@pytest.mark.skipif(shutil.which("sox") is None, reason="needs the sox program")
def test_names_mean_nothing_to_sox(wav, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_audio(wav(tone()))
    for name in ("|touch hacked;.wav", "-h.wav", "http:..a.wav", "@list.wav"):
        assert torch.equal(load_audio(wav(tone(), name=name).name, decoder="sox"), expected)
    assert not (tmp_path / "hacked").exists()
    text = tmp_path / "text.wav"
    text.write_text("no sound at all")
    with pytest.raises(AudioError, match=r"text\.wav: sox cannot decode it"):
        load_audio(text, decoder="sox")
    with pytest.raises(AudioError, match="sox cannot decode it"):
        load_audio(wav(tone()), decoder="sox", channel=3)


@pytest.mark.parametrize("kind", ["WAV", "MP3", "FLAC"])
def test_standard_input_is_read(wav, monkeypatch, kind):
    path = wav(tone(), name=f"a.{kind.lower()}", format=kind)
    decoders = ["auto", *(["sox"] if shutil.which("sox") else [])]
    for decoder in decoders:
        with open(path, "rb") as file:
            monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": file}))
            waveform = load_audio("-", decoder=decoder)
        assert torch.equal(waveform, load_audio(path, decoder=decoder))


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
    waveform = load_audio(wav(tone(rate, rate), rate, name, **how))
    assert abs(len(waveform) - RATE) < 3_000
    assert 100 < waveform[5_000:15_000].abs().max() < 156


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


def test_of_many_channels_each_can_be_heard_through_pyav(wav):
    """PyAV looks for the end of a frame's planes, and finds none if there are more than eight."""
    pytest.importorskip("av", reason="needs the extra [av]")
    waves = np.random.default_rng(0).integers(-9000, 9000, (5000, 24), np.int16)
    path = wav(waves, name="many.wav")
    for channel in (0, 8, 23):
        samples = load_audio(path, channel=channel, decoder="av")
        assert torch.equal(samples, load_audio(path, channel=channel, decoder="soundfile"))


def test_cover_art_is_not_heard(wav, tmp_path):
    bare = wav(tone(2 * RATE), name="bare.mp3").read_bytes()
    picture = b"\x00image/png\x00\x03\x00" + bytes(range(256)) * 400
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    covered = tmp_path / "covered.mp3"
    covered.write_bytes(b"ID3\x03\x00\x00" + size + frame + bare)
    for decoder in ("soundfile", "av") if importlib.util.find_spec("av") else ("soundfile",):
        waveform = load_audio(covered, decoder=decoder)
        assert torch.equal(waveform, load_audio(tmp_path / "bare.mp3", decoder=decoder)), decoder


def test_an_hour_is_read_whole(tmp_path):
    path, minute = tmp_path / "hour.wav", tone(60 * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_U8") as file:
        for _ in range(60):
            file.write(minute)
    waveform = load_audio(path)
    assert len(waveform) == 3_600 * RATE
    assert torch.equal(waveform[-60 * RATE :], waveform[: 60 * RATE])
    assert waveform[-RATE:].abs().max() > 50


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 32_000, 44_100, 48_000, 96_000, 192_000, 12_345])
def test_any_rate_becomes_22050(wav, rate):
    waveform = load_audio(wav(tone(rate, rate), rate))
    assert abs(len(waveform) - RATE) <= 1
    middle = slice(2_000, 20_000)
    error = waveform[middle] - torch.from_numpy(tone()[middle, 0]) * 256
    assert error.abs().max() < 0.05  # 16-bit samples are 1/128 apart; the filter's ripple is below that
    assert len(load_audio(wav(tone(rate, rate), rate), sample_rate=None)) == rate


def test_what_the_network_cannot_hear_is_gone(wav):
    waveform = load_audio(wav(tone(44_100, 44_100, hertz=15_000), 44_100))
    assert waveform[2_000:20_000].abs().max() < 0.1  # 15 kHz lies above 11,025 Hz: 60 dB down and more


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
    for name in ("a.ogg", "a.wav", "a.aiff", "a.flac", "a.w64", "a.au", "a.caf", "rf.wav"):
        path = wav(tone(5 * RATE), name=name, format="RF64" if name == "rf.wav" else None)
        assert len(load_audio(path)) == 5 * RATE
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
        with pytest.raises(AudioError, match=f"{name}: (truncated|cannot be decoded)"):
            load_audio(path)


def test_an_mp3_of_unknown_length_is_not_cut_short(wav):
    """Variable bitrate and no Xing header: libsndfile reckons with the first frame's bitrate."""
    av = pytest.importorskip("av", reason="needs the extra [av]")
    rng = np.random.default_rng(0)
    loud = rng.uniform(-0.5, 0.5, 20 * RATE)
    for samples in (np.concatenate([loud * 0, loud]), np.concatenate([loud, loud * 0])):
        path = wav(samples, name="a.mp3", bitrate_mode="VARIABLE")
        data = path.read_bytes()
        at = data.find(b"Xing")
        assert at > 0
        path.write_bytes(data[data.index(b"\xff\xf3", at) :])  # without the frame that holds the header
        sound = read_sound(path)
        assert sound.decoder == "av"
        assert abs(len(sound.waveform) - 40 * RATE) < 3_000
        with pytest.raises(AudioError, match="without a header for its length"):
            load_audio(path, decoder="soundfile")
    assert av


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
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded \(Format not recognised\)") as error:
        load_audio(text)
    # advice to install the extra is for those who have not
    assert ("pip install" in str(error.value)) == (importlib.util.find_spec("av") is None)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"empty\.wav: an empty file"):
        load_audio(tmp_path / "empty.wav")
    with pytest.raises(AudioError, match="a directory"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match=r"no\.wav: No such file"):
        load_audio(tmp_path / "no.wav")
    os.mkfifo(tmp_path / "fifo.wav")
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(tmp_path / "fifo.wav")
    with pytest.raises(ValueError, match="choose from auto"):
        load_audio(text, decoder="magic")
    for rate in (0, float("nan"), 10**9):
        with pytest.raises(ValueError, match="sample_rate"):
            load_audio(text, sample_rate=rate)


def test_names_of_any_kind(wav):
    expected = load_audio(wav(tone()))
    for name in ("töne 音.wav", "with space.wav", "line\nbreak.wav", "-dash.wav", "no_suffix"):
        how = {} if name.endswith("wav") else {"format": "WAV"}
        assert torch.equal(load_audio(wav(tone(), name=name, **how)), expected)


@settings(max_examples=budget(150), deadline=None)
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
        waveform = load_audio(path)
    except AudioError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert waveform.ndim == 1
        assert torch.isfinite(waveform).all()


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("decoder", ["soundfile", "av", "sox"])
def test_blocks_are_the_whole_sound(wav, kind, rate, decoder):
    if decoder == "av":
        pytest.importorskip("av", reason="needs the extra [av]")
    if decoder == "sox" and not shutil.which("sox"):
        pytest.skip("needs the sox program")
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 400_000)
    path = wav(noise, rate, name=f"a.{kind}")
    blocks = list(read_blocks(path, decoder=decoder, samples=70_001))
    assert {len(block) for block in blocks[:-1]} == {70_001}
    assert 1 <= len(blocks[-1]) <= 70_001
    assert torch.equal(torch.cat(blocks), load_audio(path, decoder=decoder))


def test_damage_further_on_shows_where_it_is_reached(wav):
    path = wav(np.random.default_rng(1).uniform(-0.5, 0.5, 2_000_000), name="a.flac")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    blocks = read_blocks(path, samples=100_000)
    assert len(next(blocks)) == 100_000
    with pytest.raises(AudioError, match=r"a\.flac: (truncated|cannot be decoded to its end)"):
        list(blocks)
