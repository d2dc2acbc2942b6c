"""What the pictures show, and what notebooks show of networks and predictions."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.inference.prediction import Category, Frame, Prediction
from soundnet_port.network.weights import write_weights

pytest.importorskip("matplotlib", reason="needs the extra [plot]")

from soundnet_port.viewing.plots import PlotError, filters, filters_figure, prediction_figure, write_figure

BIN = 22_050 / 4096  # Hz, of the responses


def tone(frequency, window=torch.hann_window):
    """Taps that let a frequency pass."""
    return window(64) * torch.cos(2 * torch.pi * frequency * torch.arange(64) / 22_050)


def with_filters(*taps):
    model = sp.SoundNet(sp.SOUNDNET8.resized([len(taps), 2, 2, 2, 2, 2, 2], {"objects": 4, "scenes": 3}))
    with torch.no_grad():
        model.conv1.weight[:, 0] = torch.stack(taps)
    return model.eval()


def test_a_windowed_sinusoid_has_its_frequency_and_its_windows_bandwidth():
    (found,) = filters(with_filters(tone(1000)))
    # the window of a tone and that of its negative frequency overlap a little
    assert found.center == pytest.approx(1000, abs=2 * BIN)
    # Harris 1978, table 1: 1.44 bins of 22050 / 64 Hz at -3 dB
    assert found.bandwidth == pytest.approx(1.44 * 22_050 / 64, abs=12)


def test_filters_come_by_frequency_and_silent_ones_last():
    model = with_filters(tone(5000), torch.zeros(64), tone(300), torch.ones(64), tone(11_025))
    found = filters(model)
    assert [each.index for each in found] == [3, 2, 0, 4, 1]
    assert found[0].center == 0  # a mean
    assert found[3].center == pytest.approx(11_025, abs=BIN)
    assert found[4] == (1, None, None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_filters_with_nan_are_refused(value):
    with pytest.raises(PlotError, match="NaN or infinite"):
        filters(with_filters(tone(300) * value))


def test_the_picture_of_filters_is_in_the_tables_order():
    model = with_filters(tone(5000), tone(300), 0.1 * tone(2000))
    axes = [each for each in filters_figure(model).axes if each.axison]
    taps = [each for each in axes if each.get_ylabel()]
    responses = [each for each in axes if not each.get_ylabel()]
    across = [taps[0], taps[2], taps[1]]  # the figure is filled by columns, its axes are listed by rows
    assert [each.get_ylabel().split("\n")[0] for each in across] == ["#1", "#2", "#0"]
    for each in taps:
        index = int(each.get_ylabel()[1])
        np.testing.assert_allclose(
            each.lines[0].get_ydata(), model.conv1.weight[index, 0].detach(), rtol=1e-6
        )
        assert each.lines[0].get_xdata()[-1] == pytest.approx(1000 * 63 / 22_050)  # ms
    decibels = sorted(each.lines[0].get_ydata().max() for each in responses)
    assert decibels[-1] == 0
    assert decibels[0] == pytest.approx(-20, abs=1)  # 300 Hz gains from its negative frequency


# ---- predictions


def prediction_of(objects, scenes, top=2, seconds=20.0, repeats=1, names="{head} {index}"):
    """From probabilities (categories, frames); frames hear 14 s, one begins every 3 s."""

    def best(head, values):
        order = np.argsort(-values)[:top].tolist()
        return [Category(i, names.format(head=head, index=i), float(values[i])) for i in order]

    objects, scenes = np.asarray(objects, np.float32), np.asarray(scenes, np.float32)
    frames = [
        Frame(3.0 * t - 2, 3.0 * t + 5, 3.0 * t + 12, best("object", o), best("scene", s), [])
        for t, (o, s) in enumerate(zip(objects.T, scenes.T, strict=True))
    ]
    return Prediction(
        objects=best("object", objects.mean(1)),
        scenes=best("scene", scenes.mean(1)),
        object_probabilities=torch.from_numpy(objects),
        scene_probabilities=torch.from_numpy(scenes),
        frames=frames,
        middle=(frames[0].objects[0], frames[0].scenes[0]),
        seconds=seconds,
        repeats=repeats,
    )


OBJECTS = [[0.5, 0.6, 0.1], [0.4, 0.3, 0.1], [0.0, 0.0, 0.7], [0.1, 0.1, 0.1]]
SCENES = [[0.2, 0.3, 0.4], [0.8, 0.7, 0.6]]


def panels(figure):
    return {each.get_title(loc="left"): each for each in figure.axes if each.get_title(loc="left")}


def test_rows_are_the_clips_list_and_then_what_else_was_a_frames_best():
    made = panels(prediction_figure(prediction_of([*OBJECTS[:2], [0.0, 0.0, 0.5], *OBJECTS[3:]], SCENES)))
    assert [text.get_text() for text in made["objects"].get_yticklabels()] == [
        "object 0",
        "object 1",
        "object 2",
    ]
    np.testing.assert_allclose(
        made["objects"].collections[0].get_array(), [[0.5, 0.6, 0.1], [0.4, 0.3, 0.1], [0, 0, 0.5]], rtol=1e-6
    )
    assert [text.get_text() for text in made["scenes"].get_yticklabels()] == ["scene 1", "scene 0"]


def test_every_moment_of_the_clip_shows_the_frame_whose_centre_is_nearest():
    axes = panels(prediction_figure(prediction_of(OBJECTS, SCENES)))["scenes"]
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, 6.5, 9.5, 20]  # centers at 5, 8 and 11 s
    assert axes.get_xlim() == (0, 20)


def test_scenes_are_red_objects_blue_and_stronger_where_more_probable():
    made = panels(prediction_figure(prediction_of(OBJECTS, SCENES)))
    for head, channel in (("scenes", 0), ("objects", 2)):
        mesh = made[head].collections[0]
        weak, strong = mesh.to_rgba([0.05, 0.6])
        assert strong[:3].argmax() == channel
        assert strong[:3].sum() < weak[:3].sum()
        assert mesh.get_clim() == (0, 1)  # so that pictures compare


def test_classes_of_ones_own_are_green(tmp_path):
    model = sp.SoundNet(sp.SOUNDNET8.resized([2] * 7, {}).with_classes(3, "pool5")).eval()
    figure = prediction_figure(sp.predict(model, torch.ones(220_500), top=3))
    (axes,) = panels(figure).values()
    assert axes.get_title(loc="left") == "classes"
    assert axes.collections[0].to_rgba([0.6])[0][:3].argmax() == 1


def test_the_waveform_is_drawn_as_often_as_it_was_played():
    wave = torch.zeros(3 * 22_050)
    wave[11_025] = 100.0
    prediction = prediction_of(OBJECTS, SCENES, seconds=3.0, repeats=4)
    figure = prediction_figure(prediction, wave, "dog.wav")
    (axes,) = (axes for title, axes in panels(figure).items() if title.startswith("waveform"))
    points = axes.collections[0].get_paths()[0].vertices
    at = np.unique(points[points[:, 1] == 100, 0])
    assert at == pytest.approx([0.5, 3.5, 6.5, 9.5], abs=12 / 2000)  # a column
    assert figure.get_suptitle() == "dog.wav  (3.00 s, played 4 times)"
    with pytest.raises(PlotError, match=r"\(66150,\), not \(66149,\)"):
        prediction_figure(prediction, wave[1:])


@pytest.mark.parametrize("edge_frames", [False, True])
def test_edge_frames_are_drawn_only_where_the_prediction_has_them(edge_frames):
    torch.manual_seed(0)
    model = sp.SoundNet(sp.SOUNDNET8.resized([2] * 7, {"objects": 4, "scenes": 3})).eval()
    wave = 20 * torch.randn(13 * 22_050)  # two head frames, the last of them an edge frame
    prediction = sp.predict(model, wave, top=2, edge_frames=edge_frames)
    figure = prediction_figure(prediction, wave, "dog.wav")
    assert panels(figure)["scenes"].collections[0].get_array().shape[1] == 1 + edge_frames
    note = "" if edge_frames else ", edge frame left out"
    assert figure.get_suptitle() == f"dog.wav  (13.00 s{note})"


def test_labels_are_those_that_people_read():
    model = sp.load_pretrained("demo")
    prediction = sp.predict(model, sp.example("waves"))
    shown = [text.get_text() for text in panels(prediction_figure(prediction))["scenes"].get_yticklabels()]
    assert shown[:5] == [category.label for category in prediction.scenes]
    assert not any("/" in text or "_" in text for text in shown)


def test_any_label_can_be_drawn(tmp_path):
    """matplotlib would read dollars as formulas, and warn of letters that its fonts don't have."""
    prediction = prediction_of(OBJECTS, SCENES, names="{head} $\\frac{{ {index} \n 犬 " + 40 * "long ")
    write_figure(prediction_figure(prediction, title="$x$ 犬.wav"), tmp_path / "made.svg")
    assert "<svg" in (tmp_path / "made.svg").read_text("utf-8")


def test_pyplot_is_left_alone(tmp_path):
    """No backend is chosen, no figure is kept."""
    program = (
        "import sys, soundnet_port as sp; from soundnet_port.viewing.plots import filters_figure, write_figure\n"
        "model = sp.SoundNet(sp.SOUNDNET8.resized([1] * 7, {}))\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"write_figure(filters_figure(model), {str(tmp_path / 'made.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


# ---- the command line


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = with_filters(tone(5000), tone(300))
    state = {name: each for name, each in model.state_dict().items() if "batches" not in name}
    path = tmp_path / "narrow.safetensors"
    write_weights(path, model.architecture, state, {"categories": None, "converter": sp.__version__})
    return str(path)


def sounds(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).normal(size=4000) / 10
        soundfile.write(folder / name, noise, 22_050)
    return folder


def test_filters_draws_and_prints_the_table(tmp_path, weights, capsys):
    out = str(tmp_path / "filters.png")
    assert main(["filters", "-w", weights, "-o", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["index"] for each in printed["filters"]] == [1, 0]
    assert printed["filters"][1]["center"] == pytest.approx(5000, abs=2 * BIN)
    assert main(["filters", "-w", weights, "-o", out]) == 2
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert main(["filters", "-w", weights, "-o", out, "--force"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "filter  center (Hz)  bandwidth (Hz)"


def test_predict_draws_a_sound_into_a_file(tmp_path, weights, capsys):
    sound = sounds(tmp_path, "dog.wav") / "dog.wav"
    assert main(["predict", "-w", weights, str(sound), "--json"]) == 0
    alone = capsys.readouterr().out
    assert main(["predict", "-w", weights, str(sound), "--json", "--plot", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out == alone
    assert "<svg" in (tmp_path / "a.svg").read_text("utf-8")


def test_predict_draws_several_sounds_into_a_folder(tmp_path, weights, capsys):
    recordings = sounds(tmp_path / "recordings", "dog.wav", "monday/dog.wav", "monday/dog.flac")
    call = ["predict", "-w", weights, "-n", "1", str(recordings), "--plot"]
    assert main([*call, str(tmp_path / "out.png")]) == 2
    assert "one picture for 3 sounds; name a folder" in capsys.readouterr().err
    (recordings / "bad.wav").write_text("no sound")
    assert main([*call, str(tmp_path / "out")]) == 1  # the rest goes on
    made = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*"))
    assert [path.as_posix() for path in made] == [
        "dog.wav.png",
        "monday/dog.flac.png",
        "monday/dog.wav.png",
    ]
    capsys.readouterr()
    assert main([*call, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("is there already; --force replaces it") == 3


def test_pictures_of_other_kinds_and_a_missing_extra_are_a_line(tmp_path, weights, capsys, monkeypatch):
    sound = str(sounds(tmp_path, "dog.wav") / "dog.wav")
    assert main(["filters", "-w", weights, "-o", str(tmp_path / "a.jpg")]) == 2
    assert capsys.readouterr().err.endswith("a.jpg: pictures are .png or .svg\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (["filters", "-o"], ["predict", sound, "--plot"]):
        assert main([*call, str(tmp_path / "a.png"), "-w", weights]) == 2
        line = "soundnet-port: matplotlib is not installed: pip install 'soundnet-port[plot]'\n"
        assert capsys.readouterr() == ("", line)
    assert not (tmp_path / "a.png").exists()


# ---- notebooks


class Tags(HTMLParser):
    """What is in some HTML; every tag is closed by its own."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_prediction_shows_itself_in_a_line():
    prediction = prediction_of(OBJECTS, SCENES, seconds=3.0, repeats=4)
    line = "<Prediction of 3.00 s played 4 times: object 0 0.40, scene 1 0.70; 3 frames>"
    assert repr(prediction) == line


def test_a_prediction_shows_itself_as_bars_in_a_notebook():
    evil = "<script>alert('{index}')</script> & \"{head}\""
    shown = Tags(prediction_of(OBJECTS, SCENES, names=evil)._repr_html_())
    assert {tag for tag, _ in shown.tags} == {"table", "caption", "tr", "th", "td", "div"}
    assert {name for _, attributes in shown.tags for name in attributes} <= {"style", "colspan"}
    assert evil.format(index=0, head="object") in shown.text
    widths = [a["style"].split(";")[0] for tag, a in shown.tags if tag == "div"]
    assert widths == ["width: 40.0%", "width: 26.7%", "width: 70.0%", "width: 30.0%"]


def test_a_network_shows_its_layers_in_a_notebook():
    model = with_filters(tone(300))
    shown = Tags(model._repr_html_()).text
    at = shown.index("pool1")
    assert shown[at : at + 5] == ["pool1", "1", "16", "0.0007", "0.004"]  # 78 samples of 22,050
    assert [name for name in shown if name in model.architecture.layers] == list(model.architecture.layers)
    assert repr(model).startswith("SoundNet(\n  (conv1): Convolution(1, 1,")
