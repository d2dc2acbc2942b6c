"""Top sounds of units, their statistics, and the gallery, also in a browser."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.browser import find_accessibility_violations, screenshot
from support.budget import budget
from support.networks import NETS, TOLERANCE, model_of

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES
from soundnet_port.cli.main import main
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.features import Features, OutputSpec
from soundnet_port.corpus.formats import PEAKS
from soundnet_port.corpus.peaks import MAX_TOP_SOUNDS, decode_names, read_peaks
from soundnet_port.viewing import excerpts
from soundnet_port.viewing.excerpts import cut_excerpts, place_window
from soundnet_port.viewing.gallery import write_gallery
from soundnet_port.viewing.spectrograms import compute_spectrogram, mel
from soundnet_port.viewing.unit_search import resolve_layers, top_sounds
from soundnet_port.viewing.unit_statistics import compute_class_statistics, hypergeometric_tail, sparseness
from soundnet_port.viewing.units import TopSound, Unit, frame_window

LAYERS = ["conv7", "conv5"]
# with a meaning in HTML, in URLs, or as bytes
MALICIOUS_NAMES = ["<script>hit=1<script>.wav", "a#b?c%20d&amp;.wav", "\"x' onerror=hit=1.wav"]
if sys.platform == "linux":
    MALICIOUS_NAMES.append(os.fsdecode(b"\xff\xfe.wav"))


DEAD = 62  # on the second page of the index


def model_with_dead_unit():
    model = model_of(NETS["n8_d16"])
    model.bn7.bias[DEAD] = -1e6
    return model


def write_sound(path, samples, start=0, gain=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = gain * reference_weights.samples(start + samples)[start:]
    with open(path, "wb") as file:  # soundfile takes only names that can be decoded
        soundfile.write(file, waveform, 22_050, format="WAV")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sounds of several lengths, one of them longer than a block."""
    folder = tmp_path_factory.mktemp("units") / "sounds"
    for number in range(12):
        write_sound(folder / f"{number % 3}" / f"{number}.wav", 13_000 + 17_321 * number, 9_001 * number)
    random = np.random.default_rng(0)
    hum = 0.3 * np.sin(np.arange(101 * 22_050) ** 1.1 / 50) * random.random(101).repeat(22_050)
    soundfile.write(folder / "long.wav", hum, 22_050)
    return folder


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Two classes, different enough for units to have names, malicious names, and an invalid file."""
    folder = tmp_path_factory.mktemp("units") / "labeled"
    for number, name in enumerate([*MALICIOUS_NAMES, "1.wav", "2.wav"]):
        write_sound(folder / "dog_bark" / name, 60_000 + 9_000 * number, 11_000 * number)
        write_sound(folder / '<b>rain & "hail"' / f"{number}.wav", 100_000, 50_000 * number, 0.5)
    (folder / "dog_bark" / "bad.wav").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def gallery(labeled, tmp_path_factory):
    """The folder of a gallery, and its top sounds."""
    output = tmp_path_factory.mktemp("units") / "gallery"
    result = write_gallery(
        model_with_dead_unit(), output, layers=LAYERS, top=5, labels=labeled, table=True, workers=1
    )
    return output, result


@pytest.fixture
def weights(tmp_path):
    from soundnet_port.network.weights import write_weights

    net, path = NETS["n8_d16"], tmp_path / "small.safetensors"
    state = {name: tensor for name, tensor in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return str(path)


# ---- the search


def drop_edge_frames(model, layer, frames, seconds):
    return frames[:, : frames.shape[1] - model.edge_frames(layer, round(seconds * 22_050))]


def test_top_sounds_equal_those_of_a_plain_loop(model, sounds):
    result = top_sounds(model, [sounds], LAYERS, top=4, workers=1)
    assert (result.sound_count, len(result.units), result.failures) == (13, 64 + 16, ())
    paths = sorted(map(str, sounds.rglob("*.wav")))
    activations = {path: model.extract(sp.load_audio(path), LAYERS) for path in paths}
    seconds_of = {path: soundfile.info(path).duration for path in paths}
    for layer in LAYERS:
        largest = {
            path: drop_edge_frames(model, layer, layers[layer][0], seconds_of[path]).max(1)
            for path, layers in activations.items()
        }
        scale = TOLERANCE * max(float(maxima.values.max()) for maxima in largest.values())
        for unit in (unit for unit in result.units if unit.layer == layer):
            maxima = {path: float(values.values[unit.number]) for path, values in largest.items()}
            assert len({sound.path for sound in unit.sounds}) == len(unit.sounds) <= 4
            expected = sorted((value for value in maxima.values() if value > 0), reverse=True)[:4]
            np.testing.assert_allclose([sound.activation for sound in unit.sounds], expected, atol=scale)
            for rank, sound in enumerate(unit.sounds, 1):
                assert sound.rank == rank
                assert sound.activation == pytest.approx(maxima[sound.path], abs=scale)
                frames = activations[sound.path][layer][0, unit.number]
                assert float(frames[sound.frame]) == pytest.approx(sound.activation, abs=scale)
                start, center, end = model.frame_times(layer, len(frames))[sound.frame].tolist()
                seconds = seconds_of[sound.path]
                assert (sound.start, sound.peak, sound.end) == (max(0, start), center, min(end, seconds))
            mean, power = np.mean(list(maxima.values())), np.mean(np.square(list(maxima.values())))
            assert unit.dead or unit.selectivity == pytest.approx((1 - mean**2 / power) / (12 / 13), abs=1e-4)
    assert sum(sound.frame > 60 for unit in result.units for sound in unit.sounds) > 10  # of the long sound


def test_an_excerpt_alone_activates_the_unit_equally(model, sounds):
    """It is cut at a multiple of the stride, so that frames lie where they did."""
    result = top_sounds(model, [sounds], LAYERS, top=3, workers=1)
    compared = 0
    for unit in result.units:
        for sound in unit.sounds:
            layer, wave = result.layers[unit.layer], sp.load_audio(sound.path)
            start, end = frame_window(layer, sound.frame)
            if not 0 <= start < end <= len(wave):
                continue
            compared += 1
            cut = start // layer.stride * layer.stride
            frames = model.extract(wave[cut:end], [unit.layer])[unit.layer][0, unit.number]
            value = float(frames[sound.frame - cut // layer.stride])
            assert value == pytest.approx(sound.activation, rel=1e-4)  # rounding, also of small values
    assert compared > 50


@settings(max_examples=budget(40), deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_merged_groups_equal_one_group_of_all_sounds(sizes, seed, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("parts"), np.random.default_rng(seed)
    spec = OutputSpec({"conv7": 3}, "peak", {})
    values = np.round(random.random((sum(sizes), 3)) * 20).astype(np.float32)  # many ties
    frames, start = random.integers(0, 9, values.shape), 0
    for number, size in enumerate(sizes):
        inputs = [
            Features(f"{i}", {"conv7": values[i], "conv7_frames": frames[i], "samples": np.array(i)}, {})
            for i in range(start, start + size)
        ]
        PEAKS.write(folder / f"{number}", inputs, spec, True)
        assert len(read_peaks(folder / f"{number}")["conv7"]) == min(size, MAX_TOP_SOUNDS)
        start += size
    PEAKS.merge(folder / "all", [folder / f"{number}" for number in range(len(sizes))], spec)
    merged, kept = read_peaks(folder / "all"), min(sum(sizes), MAX_TOP_SOUNDS)
    order = np.argsort(-values, axis=0, kind="stable")[:kept]
    names = np.array(decode_names(merged), dtype=object)
    assert len(names) == len(merged["samples"]) <= 3 * MAX_TOP_SOUNDS
    assert (names[merged["conv7_sounds"]].astype(int) == order).all()
    assert (merged["samples"][merged["conv7_sounds"]] == order).all()
    assert (merged["conv7"] == np.take_along_axis(values, order, 0)).all()
    assert (merged["conv7_frames"] == np.take_along_axis(frames, order, 0)).all()
    assert merged["count"] == sum(sizes)
    np.testing.assert_allclose(merged["conv7_sums"], [values.sum(0), np.square(values).sum(0)])


def test_results_do_not_depend_on_the_number_of_workers(model, sounds):
    one, two = (top_sounds(model, [sounds / "1"], LAYERS, workers=workers) for workers in (1, 2))
    assert one.to_dict() == two.to_dict()


def test_an_interrupted_search_resumes(model, tmp_path):
    for number in range(70):  # two groups
        write_sound(tmp_path / "sounds" / f"{number:03}.wav", 13_000, 500 * number)

    def stop(progress):
        if progress.done > 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        top_sounds(model, [tmp_path / "sounds"], folder=tmp_path / "pass", workers=1, progress=stop)
    reported = []
    resumed = top_sounds(
        model,
        [tmp_path / "sounds"],
        folder=tmp_path / "pass",
        top=5,  # not a setting of the pass over the corpus
        workers=1,
        progress=lambda progress: reported.append((progress.done, progress.total, progress.unit)),
    )
    assert (reported[0], reported[-1]) == ((64, 70, "file"), (70, 70, "file"))
    assert resumed.to_dict() == top_sounds(model, [tmp_path / "sounds"], top=5, workers=1).to_dict()
    with pytest.raises(CorpusError, match=r"other settings.*conv3"):
        top_sounds(model, [tmp_path / "sounds"], ["conv3"], folder=tmp_path / "pass", workers=1)
    with pytest.raises(CorpusError, match=r"other settings \(edge frames: False before, True now\)"):
        top_sounds(model, [tmp_path / "sounds"], edge_frames=True, folder=tmp_path / "pass", workers=1)


def test_edge_frames_do_not_count_by_default(model, sounds):
    """Layers without edge frames are bit-identical in both cases."""
    without = top_sounds(model, [sounds], LAYERS, top=4, workers=1)
    included = top_sounds(model, [sounds], LAYERS, top=4, edge_frames=True, workers=1)
    at_edges = 0
    for result in (without, included):
        for unit in (unit for unit in result.units if unit.layer == "conv7"):
            for sound in unit.sounds:
                samples = round(soundfile.info(sound.path).duration * 22_050)
                frames = model.architecture.frames("conv7", samples)
                if result is without:
                    assert sound.frame < frames - model.edge_frames("conv7", samples)
                at_edges += sound.frame == frames - 1
    assert at_edges > 10
    assert [result.to_dict()["edge_frames"] for result in (without, included)] == [False, True]
    conv5 = [[unit for unit in result.units if unit.layer == "conv5"] for result in (without, included)]
    assert conv5[0] == conv5[1]
    assert "edge_frames" not in top_sounds(model, [sounds / "1"], ["conv5"], workers=1).to_dict()


def test_a_sound_with_only_edge_frames_is_a_failure(model, tmp_path):
    for name, samples in (("shortest", 12_766), ("shorter", 12_765)):
        write_sound(tmp_path / f"{name}.wav", samples)
    result = top_sounds(model, [tmp_path], ["conv7"], workers=1)
    assert result.sound_count == 1
    ((path, reason),) = [(Path(failure.path).name, failure.reason) for failure in result.failures]
    assert path == "shorter.wav"
    assert "edge frames alone" in reason
    assert "use at least 12,766 samples" in reason
    assert top_sounds(model, [tmp_path], ["conv7"], edge_frames=True, workers=1).sound_count == 2


@pytest.mark.released
def test_edge_frames_would_top_nearly_all_units_of_conv7(released_model, tmp_path):
    """With them, top sounds are rarely of one kind, and dead units seem alive."""
    for name in EXAMPLES:
        wave = sp.load_audio(sp.example(name)).numpy() / 256
        for number in range(3):
            soundfile.write(tmp_path / f"{name}{number}.wav", np.roll(wave, 30_000 * number), 22_050)
    at_ends, of_one_kind, dead = [], [], []
    for edge_frames in (False, True):
        result = top_sounds(released_model, [tmp_path], ["conv7"], top=3, edge_frames=edge_frames, workers=1)
        at_ends.append(np.mean([sound.frame == 3 for unit in result.units for sound in unit.sounds]))
        kinds = [{sound.name[:4] for sound in unit.sounds} for unit in result.units if len(unit.sounds) == 3]
        of_one_kind.append(np.mean([len(names) == 1 for names in kinds]))
        dead.append(sum(unit.dead for unit in result.units))
    assert at_ends[0] == 0
    assert at_ends[1] > 0.95  # 5 s have four frames
    assert of_one_kind[0] > 0.5 > 0.35 > of_one_kind[1]
    assert dead[0] > 800 > 250 > dead[1]


def test_default_layers():
    assert list(resolve_layers(sp.SOUNDNET8)) == ["conv7", "conv5"]
    assert list(resolve_layers(sp.SOUNDNET5)) == ["conv4", "conv3"]
    assert list(resolve_layers(sp.SOUNDNET8.with_classes(4, "pool2"))) == ["conv2", "conv1"]


# ---- statistics


def test_sparseness_is_0_for_equal_activations_and_1_for_a_single_one():
    activations = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])
    values = sparseness(activations.sum(1), np.square(activations).sum(1), 4)
    # 3 and 1 of four: mean 1, mean square 2.5
    np.testing.assert_allclose(values, [0, 1, (1 - 1 / 2.5) / (3 / 4), np.nan])
    assert np.isnan(sparseness(np.ones(1), np.ones(1), 1)).all()


def test_a_unit_is_named_after_the_class_of_most_of_its_sounds():
    def build_unit(*labels):
        sounds = tuple(TopSound(n, 1, "", "", label, 0, 0, 0, 0, 0) for n, label in enumerate(labels, 1))
        return Unit(
            "conv7", 0, sounds, 0.5, *compute_class_statistics(labels, {"rooster": 40, "dog_bark": 360})
        )

    unit = build_unit(*["rooster"] * 7, "dog_bark", "dog_bark")
    assert (unit.name, unit.label, unit.purity) == ("rooster-like", "rooster", 7 / 9)
    assert unit.enrichment == pytest.approx(7 / 9 / 0.1)
    assert unit.p == pytest.approx(1.8683100849896379e-06)  # scipy.stats.hypergeom.sf(6, 400, 40, 9)
    assert build_unit(*["rooster"] * 3).name == "rooster-like"
    # two sounds are too few, though p is small; 9 of 9 are common where 90 % of all sounds are of the class
    few, common = build_unit("rooster", "rooster"), build_unit(*["dog_bark"] * 9)
    assert (few.name, few.purity, few.p) == (None, 1, pytest.approx(0.1 * 39 / 399))
    assert (common.name, common.purity, round(common.p, 2)) == (None, 1, 0.38)
    half = build_unit("rooster", "dog_bark", "dog_bark", "rooster")
    assert (half.name, half.label, half.purity) == (None, "rooster", 0.5)  # that of the strongest sound
    assert build_unit().purity is None
    assert hypergeometric_tail(0, 9, 40, 400) == 1


def test_classes_count_valid_sounds_only(gallery):
    _, result = gallery
    assert result.classes == {
        "dog_bark": 2 + len(MALICIOUS_NAMES),
        '<b>rain & "hail"': 2 + len(MALICIOUS_NAMES),
    }
    assert [Path(failure.path).name for failure in result.failures] == ["bad.wav"]
    living = [unit for unit in result.units if not unit.dead]
    for unit in living:
        labels = [Path(sound.path).parent.name for sound in unit.sounds]
        assert labels == [sound.label for sound in unit.sounds]
        assert unit.purity == max(map(labels.count, labels)) / len(labels)
    assert next(unit for unit in result.units if unit.number == DEAD).dead


def test_a_fold_selects_its_sounds(model, tmp_path, sounds):
    lines = [f"{n % 3}/{n}.wav\t{'ab'[n % 2]}\t{n % 4}\n" for n in range(12)]
    (sounds / "list.tsv").write_text("".join(lines))
    result = top_sounds(model, labels=sounds / "list.tsv", fold="2", workers=1)
    assert result.sound_count == 3
    assert {sound.name for unit in result.units for sound in unit.sounds} == {
        "2/2.wav",
        "0/6.wav",
        "1/10.wav",
    }
    assert top_sounds(model, [sounds], labels=sounds / "list.tsv", fold="2", workers=1).sound_count == 3
    for options, message in (
        ({"fold": "7"}, "no fold '7'; choose from 0, 1, 2, 3"),
        ({"inputs": [sounds]}, "1 of 13 sounds have no label.*long.wav"),
        ({"inputs": [sounds / "long.wav"], "fold": "2"}, "none of the inputs is in fold 2"),
    ):
        with pytest.raises(CorpusError, match=message):
            top_sounds(model, labels=sounds / "list.tsv", workers=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["objects"]}, "'objects' has no units after ReLU; choose from conv1"),
        ({"layers": [22]}, "22 has no units"),
        ({"layers": ["conv9"]}, "no layer 'conv9'; choose from"),
        ({"top": 33}, "top must be 1 to 32, not 33"),
        ({"fold": "1"}, "fold: needs labels"),
        ({"inputs": []}, "no inputs"),
    ],
)
def test_invalid_settings_raise_an_error(model, sounds, options, message):
    with pytest.raises(CorpusError, match=message):
        top_sounds(model, **{"inputs": [sounds], **options})


# ---- the gallery


def test_a_gallery_has_each_excerpt_once_and_a_table(gallery, labeled):
    folder, result = gallery
    table = json.loads((folder / "units.json").read_text())
    assert [len(table["units"]), table["sounds"]] == [80, result.sound_count]
    rows = table["rows"]
    assert len(rows) == sum(len(unit.sounds) for unit in result.units)
    names = {row["excerpt"] for row in rows}
    assert {path.name for path in (folder / "sounds").iterdir()} == {Path(name).name for name in names}
    assert len(names) == len(list((folder / "pictures").iterdir()))
    assert len(names) < len({(row["path"], row["layer"], row["start"]) for row in rows})  # near ones share
    for row in rows[::29]:
        sound = soundfile.info(folder / row["excerpt"])
        assert (sound.samplerate, sound.channels) == (22_050, 1)
        assert (
            row["excerpt_start"] <= row["start"] < row["end"] <= row["excerpt_start"] + sound.duration + 1e-9
        )
        # no half-second excerpts: 3 s, or the whole sound
        assert sound.duration > 2.9 or sound.duration == soundfile.info(row["path"]).duration
    for unit in (unit for unit in result.units if not unit.dead):
        assert (folder / unit.layer / f"{unit.number}.html").is_file()
    assert not (folder / "conv7" / f"{DEAD}.html").exists()
    sounds_of_corpus = result.sound_count
    assert f"1 never active on these {sounds_of_corpus} sounds" in (folder / "index.html").read_text()
    assert "16 units: all active" in (folder / "index.html").read_text()
    from pyarrow import parquet

    columns = parquet.read_table(folder / "units.parquet").to_pydict()
    assert columns["activation"] == [row["activation"] for row in rows]
    assert columns["excerpt_start"] == [row["excerpt_start"] for row in rows]
    assert not folder.with_name("gallery.parts").exists()


def test_curves_equal_activations_of_the_whole_sound(model, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(excerpts, "BLOCK", 50_000)  # spans extend over several blocks
    result = top_sounds(model, [sounds / "1", sounds / "2"], LAYERS, top=2, workers=1)
    reported = []
    by_frame = cut_excerpts(model, result, tmp_path, workers=2, decoder="auto", progress=reported.append)
    count = len(list((tmp_path / "sounds").iterdir()))
    assert (reported[-1].done, reported[-1].total, reported[-1].unit) == (count, count, "excerpt")
    assert count < len(by_frame)
    activations = {}
    for unit in result.units:
        layer = result.layers[unit.layer]
        for sound in unit.sounds:
            if sound.path not in activations:
                activations[sound.path] = model.extract(sp.load_audio(sound.path), LAYERS)
            layer_activations = activations[sound.path][layer.name][0]
            seconds = soundfile.info(sound.path).duration
            frames = drop_edge_frames(model, layer.name, layer_activations, seconds)[unit.number]
            excerpt = by_frame[sound.path, layer.name, sound.frame]
            curve = excerpt.curves[unit.number]
            expected = frames[excerpt.first_frame : excerpt.first_frame + len(curve)]
            np.testing.assert_allclose(curve, expected, atol=TOLERANCE * float(layer_activations.max()))
            # all frames with centers in the window, but for edge frames
            centers = model.frame_times(layer.name, len(frames))[:, 1] * 22_050
            inside = (excerpt.window.start <= centers) & (centers <= excerpt.window.end)
            assert excerpt.frame_step == 1
            assert inside.nonzero()[:, 0].tolist() == [
                excerpt.first_frame + number for number in range(len(curve))
            ]


@settings(max_examples=budget(100), deadline=None)
@given(
    layer=st.sampled_from([layer for layer in sp.SOUNDNET8.layers.values() if layer.kind != "head"]),
    samples=st.integers(13_000, 400_000),
    position=st.floats(0, 1),
)
def test_a_window_contains_what_the_unit_sees(layer, samples, position):
    frames = sp.SOUNDNET8.frames(layer.name, samples)  # edge frames too
    frame = min(frames - 1, int(position * frames))
    window = place_window(layer, frame, samples)
    start, end = frame_window(layer, frame)
    length = window.end - window.start
    assert length == max(3 * 22_050, round(1.5 * layer.receptive_field))
    assert window.start <= max(0, start)
    assert min(end, samples) <= window.end
    assert window.start <= start + layer.receptive_field / 2 <= window.end  # the curve's point
    margin = max(0, -(layer.start + layer.receptive_field // 2))
    assert length > samples or -margin <= window.start < window.end <= samples + margin
    near = {place_window(layer, other, samples) for other in range(max(0, frame - 300), frame + 1)}
    assert len(near) <= 2 + 300 * layer.stride / (length // 4)


def test_curves_of_many_frames_keep_the_peak(model, sounds, tmp_path):
    """conv1 has 33,000 frames in 3 s, more than a page could hold."""
    result = top_sounds(model, [sounds / "2"], ["conv1"], top=1, workers=1)
    by_frame = cut_excerpts(model, result, tmp_path, workers=1, decoder="auto")
    for unit in (unit for unit in result.units if not unit.dead):
        (sound,) = unit.sounds
        excerpt = by_frame[sound.path, "conv1", sound.frame]
        curve = excerpt.curves[unit.number]
        assert len(curve) <= 320
        assert max(curve) == pytest.approx(sound.activation, rel=1e-4)
        assert curve.index(max(curve)) == (sound.frame - excerpt.first_frame) // excerpt.frame_step


def test_spectrogram_of_a_tone():
    time = torch.arange(22_050) / 22_050
    decibels = compute_spectrogram(torch.sin(2 * torch.pi * 1000 * time) * (time > 0.5), 44_100)
    assert decibels.shape == (112, 160)  # half a receptive field
    assert float(decibels.max()) == 0
    assert float(decibels.min()) == -60
    assert (decibels[:, :70] == -60).all()
    row = (mel(11_025) - mel(1000)) / (mel(11_025) - mel(50)) * 112
    assert decibels[:, 120].argmax().item() == pytest.approx(row, abs=1)
    assert (compute_spectrogram(torch.zeros(78), 78) == -60).all()


def test_names_are_escaped(gallery):
    folder, _ = gallery
    pages = {path: path.read_text() for path in folder.rglob("*.html")}
    assert len(pages) == 80
    content = "".join(pages.values())
    for name in ("&lt;script&gt;hit=1", "a#b?c%20d&amp;amp;.wav", "&lt;b&gt;rain &amp; &#34;hail&#34;"):
        assert name in content
    assert "<script>hit" not in content
    assert "<b>" not in content
    data = (folder / "units.js").read_text()
    names = json.loads(data.removeprefix("globalThis.unitGallery = ").removesuffix(";\n"))["files"]
    assert any(name.endswith("<script>hit=1<script>.wav") for name in names)
    if len(MALICIOUS_NAMES) > 3:
        assert "\\xff\\xfe.wav" in content


def test_the_command_reports_invalid_files_and_replaces_only_with_force(labeled, weights, tmp_path, capsys):
    output = str(tmp_path / "out")
    command = ["units", str(labeled), "-o", output, "-w", weights, "--layers", "conv5", "-n", "1"]
    command += ["--workers", "1"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}/index.html\n"
    assert "bad.wav: cannot be decoded" in err
    assert "bad.wav" in (tmp_path / "out/errors.tsv").read_text()
    assert "16 units of conv5" in err
    before = (tmp_path / "out/units.json").read_bytes()
    assert main(command) == 2
    assert "already exists; use --force to replace a gallery" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["units"], len(summary["failures"])) == (16, 1)
    assert (tmp_path / "out/units.json").read_bytes() == before
    user_folder = tmp_path / "mine"
    write_sound(user_folder / "mine.wav", 5000)
    assert main(["units", str(user_folder), "-o", str(user_folder), "-w", weights, "--force"]) == 2
    assert "is not a gallery" in capsys.readouterr().err
    assert (user_folder / "mine.wav").exists()
    inside = [
        "units",
        str(user_folder),
        "-o",
        str(user_folder / "out"),
        "-w",
        weights,
        "-l",
        "conv1",
        "--workers",
        "1",
    ]
    assert main(inside) == 0  # whose excerpts last milliseconds
    assert main([*inside, "--force"]) == 2
    assert "its excerpts would be inputs" in capsys.readouterr().err
    for options in (["--esc10"], ["--top", "0"], ["--fold", "1"], ["-l", "scenes"]):
        assert main(["units", str(user_folder), "-o", output + "2", "-w", weights, *options]) == 2
    (tmp_path / "text.wav").write_text("no sound")
    assert main(["units", str(tmp_path / "text.wav"), "-o", output + "2", "-w", weights]) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_pages_and_summary_tell_whether_edge_frames_count(sounds, weights, tmp_path, capsys):
    command = ["units", str(sounds / "1"), "-w", weights, "-l", "conv7,conv5", "-n", "1", "--workers", "1"]
    for options, kept, verb in (([], False, "are left out"), (["--edge-frames"], True, "are included")):
        output = tmp_path / f"out{kept}"
        assert main([*command, *options, "-o", str(output), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["edge_frames"] is kept
        assert json.loads((output / "units.json").read_text())["edge_frames"] is kept
        text = f"Edge frames, which see zeros after the sound's end, {verb}"
        assert (output / "index.html").read_text().count(text) == 1  # in the section of conv7
        pages = {layer: next((output / layer).glob("*.html")).read_text() for layer in LAYERS}
        assert [text in pages[layer] for layer in LAYERS] == [True, False]


@pytest.mark.skipif(os.name == "nt", reason="needs file locks and SIGKILL")
def test_a_killed_run_leaves_no_gallery_and_resumes(sounds, weights, tmp_path, capsys):
    command = ["units", str(sounds / "1"), "-o", str(tmp_path / "out"), "-w", weights, "--workers", "1"]
    command += ["--layers", "conv3", "--top", "4"]
    process = subprocess.Popen([sys.executable, "-m", "soundnet_port", *command])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out.parts/.extract/*/gallery/sounds/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.parts/peaks.npz").exists()  # the search was complete
    assert main(command) == 0
    assert (tmp_path / "out/index.html").exists()
    assert not (tmp_path / "out.parts").exists()


def test_a_file_deleted_before_it_is_cut_is_an_error(model, tmp_path, monkeypatch):
    write_sound(tmp_path / "a.wav", 60_000)
    result = top_sounds(model, [tmp_path / "a.wav"], workers=1)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(CorpusError, match=r"a\.wav: No such file.*run the command again"):
        cut_excerpts(model, result, tmp_path / "gallery", workers=1, decoder="auto")


def test_few_sounds_are_fewer_than_three_and_than_asked_for(model, sounds):
    """With one sound per unit asked for, one says nothing about how many activate it."""
    three, one = (top_sounds(model, [sounds / "1"], ["conv7"], top=top, workers=1) for top in (3, 1))
    assert {len(unit.sounds) for unit in three.units if three.has_few_sounds(unit)} <= {1, 2}
    assert not any(one.has_few_sounds(unit) for unit in one.units)
    unit = three.units[0]
    for count, expected in ((0, False), (1, True), (2, True), (3, False)):
        assert three.has_few_sounds(replace(unit, sounds=unit.sounds[:1] * count)) is expected


# ---- in a browser


def test_a_unit_plays_without_a_server(gallery, page):
    folder, result = gallery
    first, second = [unit for unit in result.units if unit.layer == "conv7" and not unit.dead][:2]
    page.goto((folder / "index.html").as_uri())
    page.click(f"#cards li[data-number='{first.number}'] a")
    buttons = page.get_by_role("button", name="Play sound")
    assert buttons.count() == len(first.sounds)
    assert not page.locator("audio").first.is_visible()
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelector('audio').currentTime > 0.1")
    assert page.locator("li.playing").count() == 1
    assert page.get_by_role("button", name="Pause sound 1").is_visible()
    playhead, picture = page.locator(".playhead").first.bounding_box(), page.locator(".excerpt").first
    assert playhead["x"] > picture.bounding_box()["x"]
    page.locator(".play").nth(1).focus()
    page.keyboard.press("Enter")  # stops the first
    page.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0")
    assert page.evaluate("document.querySelector('audio').paused")
    page.keyboard.press("2")
    assert page.evaluate("[...document.querySelectorAll('audio')].every((player) => player.paused)")
    page.keyboard.press("r")
    assert page.evaluate("[...document.querySelectorAll('audio')].every((player) => player.loop)")
    screenshot(page, "units-unit")
    page.locator("h1").click()
    for key, unit in (("n", second), ("ArrowLeft", first), ("ArrowRight", second), ("p", first)):
        page.keyboard.press(key)
        page.wait_for_url(f"**/conv7/{unit.number}.html")
    assert page.is_checked("#loop")
    page.uncheck("#keys")
    page.locator("h1").click()
    page.keyboard.press("n")
    page.reload()
    assert not page.is_checked("#keys")
    assert page.url.endswith(f"/conv7/{first.number}.html")


def shown_units(page):
    return page.eval_on_selector_all("#cards li", "cards => cards.map((card) => Number(card.dataset.number))")


def test_units_are_filtered_and_sorted(gallery, page):
    folder, result = gallery
    page.goto((folder / "index.html").as_uri())
    units = [unit for unit in result.units if unit.layer == "conv7"]
    living = [unit for unit in units if not unit.dead]
    assert shown_units(page) == list(range(60))
    page.get_by_role("link", name="Next page").click()
    page.wait_for_function("document.querySelector('#cards li').dataset.number === '60'")
    assert shown_units(page) == list(range(60, 64))
    dead = page.locator("#cards li.dead")
    assert dead.inner_text().split() == [str(DEAD), *"never active on these 12 sounds".split()]
    assert dead.locator("a").count() == 0
    page.click(f"#cards li[data-number='{DEAD + 1}'] a")
    page.go_back()
    assert shown_units(page) == list(range(60, 64))  # where one was
    for key in ("selectivity", "purity", "activation"):
        page.select_option("#sort", key)
        # of equally pure units the less probable come first
        order = sorted(
            living, key=lambda unit: (-float(f"{getattr(unit, key):.6g}"), unit.p if key == "purity" else 0)
        )
        assert shown_units(page) == [unit.number for unit in order][:60]
    page.select_option("#sort", "number")
    page.select_option("#show", "dead")
    assert shown_units(page) == [DEAD]
    page.select_option("#show", "named")
    assert shown_units(page) == [unit.number for unit in living if unit.name]
    assert page.inner_text("#count") == f"{sum(unit.name is not None for unit in living)} of 64 units"
    label = next(unit.label for unit in living if unit.name)
    page.select_option("#class", label.replace("_", " "))
    named = [(unit.layer, unit.number) for unit in result.units if unit.name and unit.label == label]
    in_conv7 = [number for layer, number in named if layer == "conv7"]
    assert shown_units(page) == in_conv7
    page.wait_for_function("location.hash.includes('class=')")
    page.reload()
    assert shown_units(page) == in_conv7
    page.click("[data-layer='conv5']")
    page.wait_for_function("document.querySelector('[data-layer=conv5][aria-current]')")
    assert not page.is_visible("#conv7")
    assert shown_units(page) == [number for layer, number in named if layer == "conv5"]


def test_search_ranks_classes_before_file_names(gallery, page):
    """Every unit has a class, its sounds have others, and rain's sounds lie in a folder called dog too."""
    folder, result = gallery
    page.goto((folder / "index.html").as_uri())
    living = [unit for unit in result.units if unit.layer == "conv7" and not unit.dead]

    def rank(unit):
        labels = {sound.label for sound in unit.sounds}
        if unit.label == "dog_bark":
            return 0 if unit.name else 1
        return 2 if "dog_bark" in labels else 3

    page.fill("#search", "dog")
    ranked = sorted((unit for unit in living if rank(unit) < 3), key=lambda unit: (rank(unit), unit.number))
    assert [unit.number for unit in ranked][:60] == shown_units(page)
    counts = [sum(rank(unit) == number for unit in living) for number in range(3)]
    words = zip(counts, ("by name", "by class", "by a sound's class"), strict=True)
    assert page.inner_text("#count") == f"{len(ranked)} of 64 units: " + ", ".join(
        f"{count} {text}" for count, text in words if count
    )
    page.fill("#search", "12")  # a number, though file names have digits
    assert shown_units(page) == [12]
    page.fill("#search", f"{DEAD}")
    assert page.inner_text("#count") == "1 of 64 units: 1 by number"
    page.fill("#search", "DOG bark 2.wav")
    assert sorted(shown_units(page)) == [
        unit.number
        for unit in living
        if "dog_bark" in {sound.label for sound in unit.sounds}
        and any("2.wav" in sound.name for sound in unit.sounds)
    ]
    page.fill("#search", "no such thing")
    assert shown_units(page) == []
    # exact before prefix before other places
    texts = ["rain", "rain and hail", "light rain", "trains", "dog"]
    ranks = page.evaluate("texts => texts.map((text) => compareText(text, 'rain'))", texts)
    assert ranks[:4] == [0, 1, 1, 2]
    assert ranks[4] == float("inf")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("index.html#layer=&page=2", "light"),
        ("index.html#layer=&page=2", "dark"),
        ("conv7/0.html", "light"),
        ("conv7/0.html", "dark"),
    ],
)
def test_pages_are_accessible_and_names_are_inert(gallery, page, scheme, name):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{gallery[0].as_uri()}/{name}")
    assert find_accessibility_violations(page) == []
    assert page.evaluate("typeof hit") == "undefined"
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    screenshot(page, f"units-{Path(name).stem}-{scheme}-narrow")


def test_pages_work_without_javascript(gallery, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((gallery[0] / "index.html").as_uri())
    assert page.locator("#conv7 .plain a").count() == 63
    assert page.locator("#conv5 .plain a").count() == 16
    assert f"Never active: {DEAD}." in page.inner_text("#conv7")
    assert not page.is_visible("#tools")
    page.click("#conv5 .plain a >> nth=0")
    assert page.locator("audio").first.is_visible()
    assert not page.locator(".play").first.is_visible()
    assert not page.is_visible(".keys")
    context.close()
