"""Top sounds of units: what is found, said and written, and the pages in a browser."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.browser import inaccessible, screenshot
from support.budget import budget
from support.networks import NETS, TOLERANCE, model_of

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES
from soundnet_port.cli.main import main
from soundnet_port.corpus.extractor import CorpusError
from soundnet_port.corpus.formats import MOST, PEAKS, Contents, Features, names_of, read_peaks
from soundnet_port.viewing import gallery, units
from soundnet_port.viewing.gallery import write_gallery
from soundnet_port.viewing.units import TopSound, chance, layers_of, sparseness, top_sounds, window

LAYERS = ["conv7", "conv5"]
# in a page, in an address and as bytes these mean something else
NASTY = ["<script>hit=1<script>.wav", "a#b?c%20d&amp;.wav", "\"x' onerror=hit=1.wav"]
if sys.platform == "linux":
    NASTY.append(os.fsdecode(b"\xff\xfe.wav"))


def with_a_dead_unit(net="n8_d16"):
    model = model_of(NETS[net])
    model.bn7.bias[3] = -1e6
    return model


def write(path, samples, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = reference_weights.samples(start + samples)[start:]
    with open(path, "wb") as file:  # by name it has to be text
        soundfile.write(file, whole, 22_050, format="WAV")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sounds of several lengths, and one of more than a block."""
    folder = tmp_path_factory.mktemp("units") / "sounds"
    for number in range(12):
        write(folder / f"{number % 3}" / f"{number}.wav", 13_000 + 17_321 * number, 9_001 * number)
    random = np.random.default_rng(0)
    hum = 0.3 * np.sin(np.arange(101 * 22_050) ** 1.1 / 50) * random.random(101).repeat(22_050)
    soundfile.write(folder / "long.wav", hum, 22_050)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes, names of all kinds, and a bad file."""
    folder = tmp_path_factory.mktemp("units") / "labelled"
    for number, name in enumerate([*NASTY, "1.wav", "2.wav"]):
        write(folder / "dog_bark" / name, 60_000 + 9_000 * number, 11_000 * number)
        write(folder / '<b>rain & "hail"' / f"{number}.wav", 100_000, 50_000 * number)
    (folder / "dog_bark" / "bad.wav").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def made(labelled, tmp_path_factory):
    """A gallery, and what is in it."""
    output = tmp_path_factory.mktemp("units") / "gallery"
    found = write_gallery(
        with_a_dead_unit(), output, layers=LAYERS, top=5, labels=labelled, table=True, workers=1
    )
    return output, found


@pytest.fixture
def weights(tmp_path):
    from soundnet_port.network.weights import write_weights

    net, path = NETS["n8_d16"], tmp_path / "small.safetensors"
    state = {name: each for name, each in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return str(path)


# ---- what is found


def ordinary(model, layer, frames, seconds):
    """A sound's frames without edge frames."""
    return frames[:, : frames.shape[1] - model.edge_frames(layer, round(seconds * 22_050))]


def test_the_top_sounds_are_those_of_a_plain_loop(model, sounds):
    found = top_sounds(model, [sounds], LAYERS, top=4, workers=1)
    assert (found.heard, len(found.units), found.failures) == (13, 64 + 16, ())
    paths = sorted(map(str, sounds.rglob("*.wav")))
    made = {path: model.extract(sp.load_audio(path), LAYERS) for path in paths}
    seconds_of = {path: soundfile.info(path).duration for path in paths}
    for layer in LAYERS:
        largest = {
            path: ordinary(model, layer, each[layer][0], seconds_of[path]).max(1)
            for path, each in made.items()
        }
        scale = TOLERANCE * max(float(each.values.max()) for each in largest.values())
        for unit in (unit for unit in found.units if unit.layer == layer):
            answers = {path: float(each.values[unit.number]) for path, each in largest.items()}
            assert len({each.path for each in unit.sounds}) == len(unit.sounds) <= 4
            wanted = sorted((each for each in answers.values() if each > 0), reverse=True)[:4]
            np.testing.assert_allclose([each.activation for each in unit.sounds], wanted, atol=scale)
            for rank, each in enumerate(unit.sounds, 1):
                assert each.rank == rank
                assert each.activation == pytest.approx(answers[each.path], abs=scale)
                frames = made[each.path][layer][0, unit.number]
                assert float(frames[each.frame]) == pytest.approx(each.activation, abs=scale)
                start, center, end = model.frame_times(layer, len(frames))[each.frame].tolist()
                seconds = seconds_of[each.path]
                assert (each.start, each.peak, each.end) == (max(0, start), center, min(end, seconds))
            mean, power = np.mean(list(answers.values())), np.mean(np.square(list(answers.values())))
            assert unit.dead or unit.selectivity == pytest.approx((1 - mean**2 / power) / (12 / 13), abs=1e-4)
    assert sum(each.frame > 60 for unit in found.units for each in unit.sounds) > 10  # of the long sound


def test_an_excerpt_alone_drives_the_unit_as_much(model, sounds):
    """What comes before the excerpt, up to a stride, keeps the network's grid where it was."""
    found = top_sounds(model, [sounds], LAYERS, top=3, workers=1)
    inside = 0
    for unit in found.units:
        for each in unit.sounds:
            layer, wave = found.layers[unit.layer], sp.load_audio(each.path)
            start, end = window(layer, each.frame)
            if not 0 <= start < end <= len(wave):
                continue
            inside += 1
            cut = start // layer.stride * layer.stride
            alone = model.extract(wave[cut:end], [unit.layer])[unit.layer][0, unit.number]
            value = float(alone[each.frame - cut // layer.stride])
            assert value == pytest.approx(each.activation, rel=1e-4)  # rounding, of small values too
    assert inside > 50


@settings(max_examples=budget(40), deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_groups_merged_are_all_sounds_at_once_in_the_memory_of_a_few(sizes, seed, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("parts"), np.random.default_rng(seed)
    contents = Contents({"conv7": 3}, "peak", {})
    values = np.round(random.random((sum(sizes), 3)) * 20).astype(np.float32)  # many are equal
    frames, at = random.integers(0, 9, values.shape), 0
    for number, size in enumerate(sizes):
        inputs = [
            Features(f"{i}", {"conv7": values[i], "conv7_frames": frames[i], "samples": np.array(i)}, {})
            for i in range(at, at + size)
        ]
        PEAKS.write(folder / f"{number}", inputs, contents, True)
        assert len(read_peaks(folder / f"{number}")["conv7"]) == min(size, MOST)
        at += size
    PEAKS.merge(folder / "all", [folder / f"{number}" for number in range(len(sizes))], contents)
    merged, kept = read_peaks(folder / "all"), min(sum(sizes), MOST)
    order = np.argsort(-values, axis=0, kind="stable")[:kept]
    names = np.array(names_of(merged), dtype=object)
    assert len(names) == len(merged["samples"]) <= 3 * MOST
    assert (names[merged["conv7_sounds"]].astype(int) == order).all()
    assert (merged["samples"][merged["conv7_sounds"]] == order).all()
    assert (merged["conv7"] == np.take_along_axis(values, order, 0)).all()
    assert (merged["conv7_frames"] == np.take_along_axis(frames, order, 0)).all()
    assert merged["count"] == sum(sizes)
    np.testing.assert_allclose(merged["conv7_sums"], [values.sum(0), np.square(values).sum(0)])


def test_the_number_of_workers_changes_nothing(model, sounds):
    one, two = (top_sounds(model, [sounds], LAYERS, workers=workers) for workers in (1, 2))
    assert one.to_dict() == two.to_dict()


def test_an_interrupted_pass_goes_on(model, tmp_path):
    for number in range(70):  # two groups
        write(tmp_path / "sounds" / f"{number:03}.wav", 13_000, 500 * number)

    def stop(progress):
        if progress.files > 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        top_sounds(model, [tmp_path / "sounds"], folder=tmp_path / "pass", workers=1, progress=stop)
    heard = []
    again = top_sounds(
        model,
        [tmp_path / "sounds"],
        folder=tmp_path / "pass",
        top=5,  # not a setting of the pass
        workers=1,
        progress=lambda progress: heard.append(progress.files),
    )
    assert heard[0] == 64
    assert again.to_dict() == top_sounds(model, [tmp_path / "sounds"], top=5, workers=1).to_dict()
    with pytest.raises(CorpusError, match=r"other settings.*conv3"):
        top_sounds(model, [tmp_path / "sounds"], ["conv3"], folder=tmp_path / "pass", workers=1)
    with pytest.raises(CorpusError, match=r"other settings \(edge frames: False there, True now\)"):
        top_sounds(model, [tmp_path / "sounds"], edge_frames=True, folder=tmp_path / "pass", workers=1)


def test_units_rank_by_ordinary_frames(model, sounds):
    """By default; layers without edge frames are the same to the bit either way."""
    without = top_sounds(model, [sounds], LAYERS, top=4, workers=1)
    within = top_sounds(model, [sounds], LAYERS, top=4, edge_frames=True, workers=1)
    at_edges = 0
    for found in (without, within):
        for unit in (unit for unit in found.units if unit.layer == "conv7"):
            for each in unit.sounds:
                samples = round(soundfile.info(each.path).duration * 22_050)
                frames = model.architecture.frames("conv7", samples)
                if found is without:
                    assert each.frame < frames - model.edge_frames("conv7", samples)
                at_edges += each.frame == frames - 1
    assert at_edges > 10
    assert [found.to_dict()["edge_frames"] for found in (without, within)] == [False, True]
    conv5 = [[unit for unit in found.units if unit.layer == "conv5"] for found in (without, within)]
    assert conv5[0] == conv5[1]
    assert "edge_frames" not in top_sounds(model, [sounds / "1"], ["conv5"], workers=1).to_dict()


def test_a_sound_of_edge_frames_alone_is_a_failure(model, tmp_path):
    for name, samples in (("shortest", 12_766), ("shorter", 12_765)):
        write(tmp_path / f"{name}.wav", samples)
    found = top_sounds(model, [tmp_path], ["conv7"], workers=1)
    assert found.heard == 1
    ((path, reason),) = [(Path(each.path).name, each.reason) for each in found.failures]
    assert path == "shorter.wav"
    assert "edge frames alone" in reason
    assert "use at least 12,766 samples" in reason
    assert top_sounds(model, [tmp_path], ["conv7"], edge_frames=True, workers=1).heard == 2


@pytest.mark.released
def test_edge_frames_would_top_nearly_all_units_of_conv7(released_model, tmp_path):
    """And make units of clips of one kind rarer, and dead ones seem alive."""
    for name in EXAMPLES:
        wave = sp.load_audio(sp.example(name)).numpy() / 256
        for number in range(3):
            soundfile.write(tmp_path / f"{name}{number}.wav", np.roll(wave, 30_000 * number), 22_050)
    at_ends, of_one_kind, dead = [], [], []
    for edge_frames in (False, True):
        found = top_sounds(released_model, [tmp_path], ["conv7"], top=3, edge_frames=edge_frames, workers=1)
        at_ends.append(np.mean([each.frame == 3 for unit in found.units for each in unit.sounds]))
        kinds = [{each.name[:4] for each in unit.sounds} for unit in found.units if len(unit.sounds) == 3]
        of_one_kind.append(np.mean([len(each) == 1 for each in kinds]))
        dead.append(sum(unit.dead for unit in found.units))
    assert at_ends[0] == 0
    assert at_ends[1] > 0.95  # 5 s have four frames
    assert of_one_kind[0] > 0.5 > 0.35 > of_one_kind[1]
    assert dead[0] > 800 > 250 > dead[1]


def test_the_default_layers_are_the_last_and_the_last_pooled_one():
    assert list(layers_of(sp.SOUNDNET8)) == ["conv7", "conv5"]
    assert list(layers_of(sp.SOUNDNET5)) == ["conv4", "conv3"]
    assert list(layers_of(sp.SOUNDNET8.with_classes(4, "pool2"))) == ["conv2", "conv1"]


# ---- what is said


def test_sparseness_is_0_for_equal_answers_and_1_for_a_single_one():
    answers = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])
    made = sparseness(answers.sum(1), np.square(answers).sum(1), 4)
    # 3 and 1 of four: mean 1, mean square 2.5
    np.testing.assert_allclose(made, [0, 1, (1 - 1 / 2.5) / (3 / 4), np.nan])
    assert np.isnan(sparseness(np.ones(1), np.ones(1), 1)).all()


def test_a_unit_is_named_after_the_class_of_most_of_its_sounds():
    def of(*labels):
        sounds = tuple(TopSound(n, 1, "", "", label, 0, 0, 0, 0) for n, label in enumerate(labels, 1))
        return units.Unit("conv7", 0, sounds, 0.5, *units._class(sounds, {"rooster": 40, "dog_bark": 360}))

    unit = of(*["rooster"] * 7, "dog_bark", "dog_bark")
    assert (unit.name, unit.label, unit.purity) == ("rooster-like", "rooster", 7 / 9)
    assert unit.enrichment == pytest.approx(7 / 9 / 0.1)
    assert unit.p == pytest.approx(1.8683100849896379e-06)  # scipy.stats.hypergeom.sf(6, 400, 40, 9)
    assert of(*["dog_bark"] * 9).name == "dog bark-like"
    half = of("rooster", "dog_bark", "dog_bark", "rooster")
    assert (half.name, half.label, half.purity) == (None, "rooster", 0.5)  # the stronger one's
    assert of().purity is None
    assert chance(0, 9, 40, 400) == 1


def test_labels_are_counted_over_the_sounds_that_were_heard(made):
    _, found = made
    assert found.classes == {"dog_bark": 2 + len(NASTY), '<b>rain & "hail"': 2 + len(NASTY)}
    assert [Path(each.path).name for each in found.failures] == ["bad.wav"]
    living = [unit for unit in found.units if not unit.dead]
    for unit in living:
        labels = [Path(each.path).parent.name for each in unit.sounds]
        assert labels == [each.label for each in unit.sounds]
        assert unit.purity == max(map(labels.count, labels)) / len(labels)
    assert next(unit for unit in found.units if unit.number == 3).dead


def test_one_fold_is_heard_alone(model, tmp_path, sounds):
    lines = [f"{n % 3}/{n}.wav\t{'ab'[n % 2]}\t{n % 4}\n" for n in range(12)]
    (sounds / "list.tsv").write_text("".join(lines))
    found = top_sounds(model, labels=sounds / "list.tsv", fold="2", workers=1)
    assert found.heard == 3
    assert {each.name for unit in found.units for each in unit.sounds} == {"2/2.wav", "0/6.wav", "1/10.wav"}
    assert top_sounds(model, [sounds], labels=sounds / "list.tsv", fold="2", workers=1).heard == 3
    for more, said in (
        ({"fold": "7"}, "no fold '7'; there are 0, 1, 2, 3"),
        ({"inputs": [sounds]}, "1 of 13 sounds have no label.*long.wav"),
        ({"inputs": [sounds / "long.wav"], "fold": "2"}, "none of the inputs is in fold 2"),
    ):
        with pytest.raises(CorpusError, match=said):
            top_sounds(model, labels=sounds / "list.tsv", workers=1, **more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": ["objects"]}, "'objects' has no units after ReLU; choose from conv1"),
        ({"layers": [22]}, "22 has no units"),
        ({"layers": ["conv9"]}, "no layer 'conv9'; choose from"),
        ({"top": 33}, "top must be 1 to 32, not 33"),
        ({"fold": "1"}, "say where the labels are"),
        ({"inputs": []}, "no inputs"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(model, sounds, given, said):
    with pytest.raises(CorpusError, match=said):
        top_sounds(model, **{"inputs": [sounds], **given})


# ---- what is written


def test_a_gallery_holds_each_excerpt_once_and_a_table(made, labelled):
    folder, found = made
    table = json.loads((folder / "units.json").read_text())
    assert [len(table["units"]), table["sounds"]] == [80, found.heard]
    rows = table["rows"]
    assert len(rows) == sum(len(unit.sounds) for unit in found.units)
    excerpts = {row["excerpt"] for row in rows}
    assert {path.name for path in (folder / "sounds").iterdir()} == {Path(each).name for each in excerpts}
    assert len(excerpts) == len(list((folder / "pictures").iterdir()))
    windows = {(row["path"], row["layer"], row["start"], row["end"]) for row in rows}
    assert len(excerpts) == len(windows) < len(rows)  # several units share some
    for row in rows[::29]:
        sound = soundfile.info(folder / row["excerpt"])
        assert (sound.samplerate, sound.channels) == (22_050, 1)
        assert sound.duration == pytest.approx(row["end"] - row["start"], abs=1e-9)
    for unit in (unit for unit in found.units if not unit.dead):
        assert (folder / unit.layer / f"{unit.number}.html").is_file()
    assert not (folder / "conv7" / "3.html").exists()
    assert "1 unit is never above 0 in this corpus: 3." in (folder / "index.html").read_text()
    from pyarrow import parquet

    columns = parquet.read_table(folder / "units.parquet").to_pydict()
    assert columns["activation"] == [row["activation"] for row in rows]
    assert not folder.with_name("gallery.parts").exists()


def test_curves_are_the_units_activations_in_the_whole_sound(model, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "BLOCK", 50_000)  # pieces come from several blocks
    found = top_sounds(model, [sounds / "1", sounds / "2"], LAYERS, top=2, workers=1)
    excerpts = gallery.cut(model, found, tmp_path, workers=2, decoder="auto")
    whole = {}
    for unit in found.units:
        for each in unit.sounds:
            if each.path not in whole:
                whole[each.path] = model.extract(sp.load_audio(each.path), LAYERS)
            seconds = soundfile.info(each.path).duration
            frames = ordinary(model, unit.layer, whole[each.path][unit.layer][0], seconds)[unit.number]
            excerpt = excerpts[each.path, unit.layer, each.frame]
            curve = excerpt.curves[unit.number]
            wanted = frames[excerpt.first : each.frame + (len(curve) - (each.frame - excerpt.first))]
            scale = TOLERANCE * float(whole[each.path][unit.layer].max())
            np.testing.assert_allclose(curve, wanted[: len(curve)], atol=scale)
            reach = found.layers[unit.layer].receptive_field / found.layers[unit.layer].stride
            assert excerpt.first <= max(0, each.frame - reach)
            assert excerpt.first + len(curve) >= min(len(frames), each.frame + reach + 1)


def test_a_tone_is_where_it_should_be_in_the_spectrogram():
    time = torch.arange(22_050) / 22_050
    made = gallery.spectrogram(torch.sin(2 * torch.pi * 1000 * time) * (time > 0.5), 44_100)
    assert made.shape == (112, 160)  # half of what the unit sees
    assert float(made.max()) == 0
    assert float(made.min()) == -60
    assert (made[:, :70] == -60).all()
    mel = gallery._mel
    row = (mel(11_025) - mel(1000)) / (mel(11_025) - mel(50)) * 112
    assert made[:, 120].argmax().item() == pytest.approx(row, abs=1)
    assert (gallery.spectrogram(torch.zeros(78), 78) == -60).all()


def test_names_do_nothing_but_be_shown(made):
    folder, _ = made
    pages = {path: path.read_text() for path in folder.rglob("*.html")}
    assert len(pages) == 80
    together = "".join(pages.values())
    for name in ("&lt;script&gt;hit=1", "a#b?c%20d&amp;amp;.wav", "&lt;b&gt;rain &amp; &quot;hail&quot;"):
        assert name in together
    assert "<script>hit" not in together
    assert "<b>" not in together
    if len(NASTY) > 3:
        assert "\\xff\\xfe.wav" in together


def test_the_command_line_reports_bad_files_and_replaces_with_force_only(labelled, weights, tmp_path, capsys):
    output = str(tmp_path / "out")
    command = ["units", str(labelled), "-o", output, "-w", weights, "--layers", "conv5", "-n", "1"]
    command += ["--workers", "1"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}/index.html\n"
    assert "bad.wav: cannot be decoded" in err
    assert "bad.wav" in (tmp_path / "out/errors.tsv").read_text()
    assert "16 units of conv5" in err
    before = (tmp_path / "out/units.json").read_bytes()
    assert main(command) == 2
    assert "is there already; --force replaces a gallery" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["units"], len(said["failures"])) == (16, 1)
    assert (tmp_path / "out/units.json").read_bytes() == before
    mine = tmp_path / "mine"
    write(mine / "mine.wav", 5000)
    assert main(["units", str(mine), "-o", str(mine), "-w", weights, "--force"]) == 2
    assert "no gallery" in capsys.readouterr().err
    assert (mine / "mine.wav").exists()
    inside = ["units", str(mine), "-o", str(mine / "out"), "-w", weights, "-l", "conv1", "--workers", "1"]
    assert main(inside) == 0  # a layer with excerpts of milliseconds
    assert main([*inside, "--force"]) == 2
    assert "its excerpts would be among the sounds" in capsys.readouterr().err
    for wrong in (["--esc10"], ["--top", "0"], ["--fold", "1"], ["-l", "scenes"]):
        assert main(["units", str(mine), "-o", output + "2", "-w", weights, *wrong]) == 2
    (tmp_path / "text.wav").write_text("no sound")
    assert main(["units", str(tmp_path / "text.wav"), "-o", output + "2", "-w", weights]) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_pages_and_the_summary_say_whether_edge_frames_count(sounds, weights, tmp_path, capsys):
    command = ["units", str(sounds / "1"), "-w", weights, "-l", "conv7,conv5", "-n", "2", "--workers", "1"]
    for options, kept, said in (([], False, "are left out"), (["--edge-frames"], True, "count as all")):
        output = tmp_path / f"out{kept}"
        assert main([*command, *options, "-o", str(output), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["edge_frames"] is kept
        assert json.loads((output / "units.json").read_text())["edge_frames"] is kept
        text = f"Edge frames, which hear zeros after the sound's end, {said}"
        assert (output / "index.html").read_text().count(text) == 1  # in conv7's section
        pages = {layer: next((output / layer).glob("*.html")).read_text() for layer in LAYERS}
        assert [text in pages[layer] for layer in LAYERS] == [True, False]


@pytest.mark.skipif(os.name == "nt", reason="needs file locks and SIGKILL")
def test_a_killed_run_leaves_no_gallery_and_goes_on(sounds, weights, tmp_path, capsys):
    command = ["units", str(sounds / "1"), "-o", str(tmp_path / "out"), "-w", weights, "--workers", "1"]
    command += ["--layers", "conv3", "--top", "4"]
    process = subprocess.Popen([sys.executable, "-m", "soundnet_port", *command])
    until = time.monotonic() + 120  # where others keep the machine busy
    while not list(tmp_path.glob("out.parts/.extract/*/gallery/sounds/*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.parts/peaks.npz").exists()  # the pass was complete
    assert main(command) == 0
    assert (tmp_path / "out/index.html").exists()
    assert not (tmp_path / "out.parts").exists()


def test_a_file_that_is_gone_before_it_is_cut_is_an_error(model, tmp_path, monkeypatch):
    write(tmp_path / "a.wav", 60_000)
    found = top_sounds(model, [tmp_path / "a.wav"], workers=1)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(CorpusError, match=r"a\.wav: No such file.*run the command again"):
        gallery.cut(model, found, tmp_path / "made", workers=1, decoder="auto")


# ---- in a browser


def test_a_unit_plays_without_a_server(made, page):
    folder, found = made
    first, second = [unit for unit in found.units if unit.layer == "conv7" and not unit.dead][:2]
    page.goto((folder / "index.html").as_uri())
    page.click(f"#conv7 .cards li[data-number='{first.number}'] a")
    assert page.locator("audio").count() == len(first.sounds)
    assert all(page.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth > 0)"))
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelector('audio').currentTime > 0.1")
    assert page.locator("li.playing").count() == 1
    assert page.locator(".playhead").first.is_visible()
    page.keyboard.press("2")  # in place of the first
    page.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0")
    assert page.evaluate("document.querySelector('audio').paused")
    page.keyboard.press(" ")
    assert page.evaluate("[...document.querySelectorAll('audio')].every((each) => each.paused)")
    screenshot(page, "units-unit")
    for key, unit in (("n", second), ("ArrowLeft", first), ("ArrowRight", second), ("p", first)):
        page.keyboard.press(key)
        page.wait_for_url(f"**/conv7/{unit.number}.html")
    page.uncheck("#keys")
    page.locator("h1").click()
    page.keyboard.press("n")
    page.reload()
    assert not page.is_checked("#keys")
    assert page.url.endswith(f"/conv7/{first.number}.html")


def test_units_are_searched_and_sorted(made, page):
    folder, found = made
    page.goto((folder / "index.html").as_uri())
    living = [unit for unit in found.units if unit.layer == "conv7" and not unit.dead]

    def shown():
        return page.eval_on_selector_all(
            "#conv7 .cards li:not([hidden])", "all => all.map((each) => Number(each.dataset.number))"
        )

    assert shown() == [unit.number for unit in living]
    for key in ("selectivity", "purity", "activation"):
        page.select_option("#sort", key)
        assert shown() == [
            unit.number for unit in sorted(living, key=lambda unit: -float(f"{getattr(unit, key):.6g}"))
        ]
    page.fill("#search", "12")
    assert shown() == [12]
    assert page.inner_text("#count") == "2 of 79 units"  # conv5 has one too
    page.fill("#search", "DOG bark 2.wav")
    page.select_option("#sort", "number")
    assert shown() == [
        unit.number
        for unit in living
        if {"dog_bark"} <= {each.label for each in unit.sounds}
        and any(each.name.endswith("/2.wav") for each in unit.sounds)
    ]
    page.fill("#search", "no such thing")
    assert shown() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "conv7/0.html"])
def test_pages_are_accessible_and_names_do_nothing(made, page, scheme, name):
    page.emulate_media(color_scheme=scheme)
    page.goto((made[0] / name).as_uri())
    assert inaccessible(page) == []
    assert page.evaluate("typeof hit") == "undefined"
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    screenshot(page, f"units-{Path(name).stem}-{scheme}-narrow")


def test_pages_can_be_read_without_javascript(made, chromium):
    context = chromium.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((made[0] / "index.html").as_uri())
    assert opened.locator(".cards li").count() == 79
    assert not opened.is_visible("#tools")
    opened.goto((made[0] / "conv5" / "0.html").as_uri())
    assert opened.locator("audio").first.is_visible()
    assert not opened.is_visible(".keys")
    context.close()
