"""Files joined end to end are read to their end; other files called .mp3 are refused quietly."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from soundnet_port import AudioError, load_audio
from soundnet_port.audio import mpeg, ogg
from soundnet_port.audio.loading import read_blocks, read_sound

RATE = 22_050
HEADERLESS = {"write_xing": "0", "id3v2_version": "0"}
WITH_TAGS = {"write_xing": "0", "id3v2_version": "3", "write_id3v1": "1"}


def tone(seconds, hertz, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def encode(path, codec, wave, container=None, options=None):
    """Write a file with FFmpeg, whose headers and tags can be chosen."""
    av = pytest.importorskip("av", reason="needs the extra [av]")
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            (wave * 32_000).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts = RATE, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


def write_xing(path, wave):
    soundfile.write(path, wave, RATE, format="MP3")


def write_variable(path, wave):
    soundfile.write(path, wave, RATE, format="MP3", bitrate_mode="VARIABLE")


def write_tagged_xing(path, wave):
    encode(path, "libmp3lame", wave)


def write_headerless(path, wave):
    encode(path, "libmp3lame", wave, options=HEADERLESS)


def write_headerless_with_tags(path, wave):
    encode(path, "libmp3lame", wave, options=WITH_TAGS)


def write_vorbis(path, wave):
    soundfile.write(path, wave, RATE, format="OGG", subtype="VORBIS")


def write_opus(path, wave):
    soundfile.write(path, wave, 48_000, format="OGG", subtype="OPUS")


def write_ogg_flac(path, wave):
    encode(path, "flac", wave, container="ogg")


@pytest.fixture
def join(tmp_path):
    """Write two files and both joined; return the three paths."""

    def write(suffix, write_first, write_second, seconds=(3, 5)):
        paths = [tmp_path / f"{name}.{suffix}" for name in ("first", "second", "joined")]
        write_first(paths[0], tone(seconds[0], 440))
        write_second(paths[1], tone(seconds[1], 880))
        paths[2].write_bytes(paths[0].read_bytes() + paths[1].read_bytes())
        return paths

    return write


@pytest.mark.parametrize("write_second", [write_xing, write_tagged_xing, write_headerless_with_tags])
@pytest.mark.parametrize(
    "write_first",
    [write_xing, write_variable, write_tagged_xing, write_headerless, write_headerless_with_tags],
)
def test_joined_mp3s_are_their_parts_decoded_one_after_the_other(join, write_first, write_second):
    first, second, joined = join("mp3", write_first, write_second)
    parts = torch.cat([load_audio(first), load_audio(second)])
    samples = load_audio(joined, decoder="soundfile")
    if write_second is write_headerless_with_tags and write_first is write_headerless_with_tags:
        # the same as one stream: frames overlap where they meet
        assert len(samples) == len(parts)
    assert torch.equal(samples, parts)


@pytest.mark.parametrize("write_first", [write_xing, write_tagged_xing])
def test_frames_without_a_header_after_a_stream_with_one_are_a_stream_of_their_own(join, write_first):
    first, second, joined = join("mp3", write_first, write_headerless)
    assert torch.equal(load_audio(joined), torch.cat([load_audio(first), load_audio(second)]))


def test_mp3s_without_any_header_between_them_are_one_stream(join):
    first, second, joined = join("mp3", write_headerless, write_headerless)
    parts = torch.cat([load_audio(first), load_audio(second)])
    samples = load_audio(joined)
    assert len(samples) == len(parts)
    length = len(load_audio(first))
    delay = 2 * 1_152  # of encoder and decoder, which overlap where the parts meet
    assert torch.equal(samples[: length - delay], parts[: length - delay])
    assert (samples[length + delay :] - parts[length + delay :]).abs().max() < 1e-3


def test_many_short_mp3s(join):
    first, second, joined = join("mp3", write_xing, write_tagged_xing, seconds=(0.05, 0.2))
    joined.write_bytes(joined.read_bytes() * 5)
    pair = [load_audio(first), load_audio(second)]
    assert torch.equal(load_audio(joined), torch.cat(pair * 5))


@pytest.mark.parametrize("write", [write_vorbis, write_opus])
def test_chained_oggs_are_their_links_decoded_one_after_the_other(join, write):
    first, second, joined = join("ogg", write, write)
    parts = torch.cat([load_audio(path, sample_rate=None) for path in (first, second)])
    assert torch.equal(load_audio(joined, sample_rate=None), parts)
    assert torch.equal(torch.cat(list(read_blocks(joined, sample_rate=None, samples=10_001))), parts)
    joined.write_bytes(first.read_bytes() * 2)  # with the same serial number in both
    assert torch.equal(load_audio(joined, sample_rate=None), load_audio(first, sample_rate=None).repeat(2))
    contents = [first.read_bytes(), second.read_bytes()]
    halves = [content[: len(content) // 2] for content in contents]
    for damaged in (contents[0] + halves[1], halves[0] + contents[1]):
        joined.write_bytes(damaged)
        with pytest.raises(AudioError, match=r"joined\.ogg: (truncated|cannot be decoded)"):
            load_audio(joined)


def test_flac_in_ogg_is_read_by_pyav_all_of_it(join):
    first, second, joined = join("ogg", write_ogg_flac, write_ogg_flac)
    assert read_sound(joined).decoder == "av"
    assert torch.equal(load_audio(joined), torch.cat([load_audio(first), load_audio(second)]))


@pytest.mark.parametrize(("suffix", "subtype"), [("mp3", None), ("ogg", "VORBIS")])
@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (RATE, 2)])
def test_parts_of_another_rate_or_number_of_channels_are_refused(tmp_path, suffix, subtype, rate, channels):
    first, second, joined = (tmp_path / f"{name}.{suffix}" for name in "abc")
    soundfile.write(first, tone(2, 440), RATE, subtype=subtype)
    soundfile.write(second, np.stack([tone(2, 440, rate)] * channels, 1), rate, subtype=subtype)
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    message = rf"joined from files of 22,050 Hz, 1 channels and {rate:,} Hz, {channels} channels; split or"
    with pytest.raises(AudioError, match=message):
        load_audio(joined)


def test_a_truncated_mp3_before_another_is_refused(join):
    first, second, joined = join("mp3", write_xing, write_xing)
    data = first.read_bytes()
    joined.write_bytes(data[: len(data) * 2 // 3] + second.read_bytes())
    with pytest.raises(AudioError, match=r"joined\.mp3: truncated"):
        load_audio(joined)


TAIL = [b"TAG" + bytes(125), bytes(5_000), b"\xff\xfb" * 2_000, os.urandom(100_000)]


@pytest.mark.parametrize("rest", range(4))
@pytest.mark.parametrize("write", [write_xing, write_tagged_xing, write_headerless])
def test_what_is_no_sound_after_an_mp3_changes_nothing(tmp_path, write, rest):
    path, longer = tmp_path / "a.mp3", tmp_path / "b.mp3"
    write(path, tone(3, 440))
    longer.write_bytes(path.read_bytes() + TAIL[rest])
    for file in (path, longer):
        with open(file, "rb") as opened:
            assert len(mpeg.find_streams(opened)) == 1
    if write is not write_headerless or rest == 0:  # libmpg123 takes other data for damage
        assert torch.equal(load_audio(longer), load_audio(path))


def test_a_single_file_has_one_part(tmp_path):
    rng = np.random.default_rng(0)
    for suffix, find in (("mp3", mpeg.find_streams), ("ogg", ogg.find_links)):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, rng.uniform(-0.5, 0.5, 60 * RATE), RATE)
        with open(path, "rb") as file:
            assert len(find(file)) == 1


NOISE = np.random.default_rng(0).bytes(50_000)
JUNK = {
    "random.mp3": NOISE,
    "short.mp3": NOISE[:500],
    "text.mp3": b"no sound at all\n" * 300,
    "zeros.mp3": bytes(5_000),
    "sync.mp3": b"\xff\xfb" * 2_500,
    "frame_header": b"\xff\xfb\x90\x00" + NOISE,
    "tag.mp3": b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + NOISE,
}


@pytest.mark.parametrize("name", JUNK)
def test_what_is_no_mp3_is_refused_and_nothing_is_printed(tmp_path, name, capfd):
    """Decoders would write to the file descriptor."""
    (tmp_path / name).write_bytes(JUNK[name])
    with pytest.raises(AudioError, match=r"cannot be decoded \(Format not recognised\)"):
        load_audio(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_a_wav_called_mp3_is_read_by_its_content(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(1, 440), RATE, format="WAV")
    assert len(load_audio(path)) == RATE


def test_the_copy_of_standard_input_is_closed_when_decoders_open_it_and_removed(tmp_path, monkeypatch):
    from soundnet_port import files

    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 440), RATE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with open(path, "rb") as stream, files.temporary_copy(stream, ".wav") as copy:
        assert copy.read_bytes() == path.read_bytes()
        assert copy.suffix == ".wav"
        descriptors = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
        assert str(copy) not in descriptors
    with open(path, "rb") as stream:
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": stream}))
        assert len(load_audio("-")) == RATE
    assert list((tmp_path / "temporary").iterdir()) == []
