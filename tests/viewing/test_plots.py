"""Figures of filters and predictions, and the HTML of networks and predictions in notebooks."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.inference.prediction import Category, Frame, HeadPrediction, Prediction
from soundnet_port.network.weights import write_weights

pytest.importorskip("matplotlib", reason="needs the extra [plot]")

from soundnet_port.viewing.figures import PlotError, write_figure
from soundnet_port.viewing.filter_plots import compute_auditory_erb, measure_filters, plot_filters
from soundnet_port.viewing.prediction_plots import plot_prediction

BIN = 22_050 / 4096  # Hz per FFT bin


def tone(frequency, window=torch.hann_window):
    """Taps of a band-pass filter at this frequency."""
    return window(64) * torch.cos(2 * torch.pi * frequency * torch.arange(64) / 22_050)


def model_with_filters(*taps):
    """A narrow network whose conv1 has these filters."""
    model = sp.SoundNet(sp.SOUNDNET8.resized([len(taps), 2, 2, 2, 2, 2, 2], {"objects": 4, "scenes": 3}))
    with torch.no_grad():
        model.conv1.weight[:, 0] = torch.stack(taps)
    return model.eval()


def test_center_and_bandwidth_of_a_windowed_sinusoid():
    (response,) = measure_filters(model_with_filters(tone(1000)))
    # the main lobes at the positive and the negative frequency overlap a little
    assert response.center == pytest.approx(1000, abs=2 * BIN)
    # Harris 1978, table 1: 1.44 bins of 22050 / 64 Hz at -3 dB
    assert response.bandwidth == pytest.approx(1.44 * 22_050 / 64, abs=12)


def test_equivalent_rectangular_bandwidths():
    """No filter of 64 taps has a smaller one than a sinusoid that is cut off."""
    cut, smooth = measure_filters(model_with_filters(tone(3000, torch.ones), tone(4000)))
    # the sidelobes of the negative frequency overlap
    assert cut.erb == pytest.approx(22_050 / 64, rel=0.02)
    assert smooth.erb == pytest.approx(1.5 * 22_050 / 64, rel=0.02)  # Harris 1978, table 1, Hann
    assert compute_auditory_erb(1000) == pytest.approx(132.6, abs=0.05)  # Glasberg and Moore 1990


def test_filters_are_sorted_by_frequency_with_silent_ones_last():
    model = model_with_filters(tone(5000), torch.zeros(64), tone(300), torch.ones(64), tone(11_025))
    responses = measure_filters(model)
    assert [response.index for response in responses] == [3, 2, 0, 4, 1]
    assert responses[0].center == 0  # a moving average
    assert responses[3].center == pytest.approx(11_025, abs=BIN)
    assert responses[4] == (1, None, None, None, None)
    assert responses[4].shape == "silent"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_filters_with_nan_raise_an_error(value):
    with pytest.raises(PlotError, match="NaN or infinite"):
        measure_filters(model_with_filters(tone(300) * value))


def test_plotted_filters_are_sorted_like_the_table():
    model = model_with_filters(tone(5000), tone(300), 0.1 * tone(2000))
    *grid, bandwidths, residuals = plot_filters(model).axes
    plots = [axes for axes in grid if axes.axison]
    taps = [axes for axes in plots if axes.get_ylabel()]
    responses = [axes for axes in plots if not axes.get_ylabel()]
    in_order = [taps[0], taps[2], taps[1]]  # the figure is filled by columns, its axes are listed by rows
    assert [axes.get_ylabel().split("\n")[0] for axes in in_order] == ["#1", "#2", "#0"]
    for axes in taps:
        index = int(axes.get_ylabel()[1])
        np.testing.assert_allclose(
            axes.lines[0].get_ydata(), model.conv1.weight[index, 0].detach(), rtol=1e-6
        )
        assert axes.lines[0].get_xdata()[-1] == pytest.approx(1000 * 63 / 22_050)  # ms
    decibels = sorted(axes.lines[0].get_ydata().max() for axes in responses)
    assert decibels[-1] == 0
    assert decibels[0] == pytest.approx(-20, abs=1)  # 300 Hz gains from its negative frequency

    measured = measure_filters(model)
    points = {line.get_label(): line for line in bandwidths.lines}["ERB of the filter"]
    np.testing.assert_allclose(points.get_xydata(), [(row.center, row.erb) for row in measured])
    assert [text.get_text() for text in bandwidths.texts] == ["1", "2", "0"]
    assert [text.get_text() for text in residuals.get_xticklabels()] == ["1", "2", "0"]
    left = {line.get_label(): line for line in residuals.lines}["gammatone"].get_ydata()
    np.testing.assert_allclose(left, [100 * (1 - row.fits.gammatone.explained) for row in measured])


def test_a_figure_of_silent_filters_can_be_drawn(tmp_path):
    write_figure(plot_filters(model_with_filters(*torch.zeros(3, 64))), tmp_path / "silent.png")
    assert (tmp_path / "silent.png").stat().st_size


# ---- predictions


def prediction_of(objects, scenes, top=2, seconds=20.0, repeats=1, names="{head} {index}"):
    """A prediction with these probabilities (categories, frames); frames of 14 s, one every 3 s."""

    def best(head, values):
        order = np.argsort(-values)[:top].tolist()
        return [Category(i, names.format(head=head, index=i), float(values[i])) for i in order]

    objects, scenes = np.asarray(objects, np.float32), np.asarray(scenes, np.float32)
    frames = [
        Frame(
            3.0 * t - 2, 3.0 * t + 5, 3.0 * t + 12, {"objects": best("object", o), "scenes": best("scene", s)}
        )
        for t, (o, s) in enumerate(zip(objects.T, scenes.T, strict=True))
    ]
    return Prediction(
        heads={
            "objects": HeadPrediction(best("object", objects.mean(1)), torch.from_numpy(objects)),
            "scenes": HeadPrediction(best("scene", scenes.mean(1)), torch.from_numpy(scenes)),
        },
        frames=frames,
        middle=(frames[0].objects[0], frames[0].scenes[0]),
        seconds=seconds,
        repeats=repeats,
    )


OBJECTS = [[0.5, 0.6, 0.1], [0.4, 0.3, 0.1], [0.0, 0.0, 0.7], [0.1, 0.1, 0.1]]
SCENES = [[0.2, 0.3, 0.4], [0.8, 0.7, 0.6]]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def test_rows_are_the_clips_list_then_other_frames_best():
    axes = panels(plot_prediction(prediction_of([*OBJECTS[:2], [0.0, 0.0, 0.5], *OBJECTS[3:]], SCENES)))
    assert [text.get_text() for text in axes["objects"].get_yticklabels()] == [
        "object 0",
        "object 1",
        "object 2",
    ]
    np.testing.assert_allclose(
        axes["objects"].collections[0].get_array(), [[0.5, 0.6, 0.1], [0.4, 0.3, 0.1], [0, 0, 0.5]], rtol=1e-6
    )
    assert [text.get_text() for text in axes["scenes"].get_yticklabels()] == ["scene 1", "scene 0"]


def test_each_moment_shows_the_frame_with_the_nearest_center():
    axes = panels(plot_prediction(prediction_of(OBJECTS, SCENES)))["scenes"]
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, 6.5, 9.5, 20]  # centers at 5, 8 and 11 s
    assert axes.get_xlim() == (0, 20)


def test_scenes_are_red_objects_blue_and_darker_if_more_probable():
    axes = panels(plot_prediction(prediction_of(OBJECTS, SCENES)))
    for head, channel in (("scenes", 0), ("objects", 2)):
        mesh = axes[head].collections[0]
        weak, strong = mesh.to_rgba([0.05, 0.6])
        assert strong[:3].argmax() == channel
        assert strong[:3].sum() < weak[:3].sum()
        assert mesh.get_clim() == (0, 1)  # the same scale in all figures


def test_custom_classes_are_green():
    model = sp.SoundNet(sp.SOUNDNET8.resized([2] * 7, {}).with_classes(3, "pool5")).eval()
    figure = plot_prediction(sp.predict(model, torch.full((220_500,), 100.0), top=3))
    (axes,) = panels(figure).values()
    assert axes.get_title(loc="left") == "classes"
    assert axes.collections[0].to_rgba([0.6])[0][:3].argmax() == 1


def test_the_waveform_is_repeated_like_the_clip():
    wave = torch.zeros(3 * 22_050)
    wave[11_025] = 100.0
    prediction = prediction_of(OBJECTS, SCENES, seconds=3.0, repeats=4)
    figure = plot_prediction(prediction, wave, "dog.wav")
    (axes,) = (axes for title, axes in panels(figure).items() if title.startswith("waveform"))
    points = axes.collections[0].get_paths()[0].vertices
    times = np.unique(points[points[:, 1] == 100, 0])
    assert times == pytest.approx([0.5, 3.5, 6.5, 9.5], abs=12 / 2000)  # a column
    assert figure.get_suptitle() == "dog.wav  (3.00 s, played 4 times)"
    with pytest.raises(PlotError, match=r"shape \(66149,\) does not match the clip's, \(66150,\)"):
        plot_prediction(prediction, wave[1:])


@pytest.mark.parametrize("edge_frames", [False, True])
def test_edge_frames_are_drawn_only_where_the_prediction_has_them(edge_frames):
    torch.manual_seed(0)
    model = sp.SoundNet(sp.SOUNDNET8.resized([2] * 7, {"objects": 4, "scenes": 3})).eval()
    wave = 20 * torch.randn(13 * 22_050)  # two head frames, the last of them an edge frame
    prediction = sp.predict(model, wave, top=2, edge_frames=edge_frames)
    figure = plot_prediction(prediction, wave, "dog.wav")
    assert panels(figure)["scenes"].collections[0].get_array().shape[1] == 1 + edge_frames
    note = "" if edge_frames else ", edge frame left out"
    assert figure.get_suptitle() == f"dog.wav  (13.00 s{note})"


def test_labels_are_readable():
    model = sp.load_pretrained("demo")
    prediction = sp.predict(model, sp.example("waves"))
    labels = [text.get_text() for text in panels(plot_prediction(prediction))["scenes"].get_yticklabels()]
    assert labels[:5] == [category.label for category in prediction.scenes]
    assert not any("/" in text or "_" in text for text in labels)


def test_any_label_can_be_drawn(tmp_path):
    """matplotlib would parse dollar signs as math, and warn about missing glyphs."""
    prediction = prediction_of(OBJECTS, SCENES, names="{head} $\\frac{{ {index} \n 犬 " + 40 * "long ")
    write_figure(plot_prediction(prediction, title="$x$ 犬.wav"), tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text("utf-8")


def test_pyplot_is_not_imported(tmp_path):
    """No backend is selected, and figures are garbage-collected."""
    program = (
        "import sys, soundnet_port as sp\n"
        "from soundnet_port.viewing.figures import write_figure\n"
        "from soundnet_port.viewing.filter_plots import plot_filters\n"
        "model = sp.SoundNet(sp.SOUNDNET8.resized([1] * 7, {}))\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"write_figure(plot_filters(model), {str(tmp_path / 'figure.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# ---- the command line


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = model_with_filters(tone(5000), tone(300))
    state = {name: tensor for name, tensor in model.state_dict().items() if "batches" not in name}
    path = tmp_path / "narrow.safetensors"
    write_weights(path, model.architecture, state, {"categories": None, "converter": sp.__version__})
    return str(path)


def write_sounds(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).normal(size=4000) / 10
        soundfile.write(folder / name, noise, 22_050)
    return folder


def test_filters_plots_and_prints_the_table(tmp_path, weights, capsys):
    out = str(tmp_path / "filters.png")
    assert main(["filters", "-w", weights, "-o", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["index"] for row in printed["filters"]] == [1, 0]
    last = printed["filters"][1]
    assert last["center"] == pytest.approx(5000, abs=2 * BIN)
    assert last["gabor"]["frequency"] == pytest.approx(5000, abs=2 * BIN)
    assert last["auditory_erb"] == pytest.approx(24.7 * (4.37 * last["center"] / 1000 + 1))
    assert main(["filters", "-w", weights, "-o", out]) == 2
    assert "already exists; use --force to replace it" in capsys.readouterr().err
    assert main(["filters", "-w", weights, "-o", out, "--force"]) == 0
    title, *rows, _ = capsys.readouterr().out.splitlines()
    columns = ["filter", "center (Hz)", "-3 dB (Hz)", "ERB (Hz)", "ear's ERB", "gammatone", "reversed"]
    assert re.split("  +", title) == [*columns, "Gabor", "shape"]
    assert [row.split()[0] for row in rows] == ["1", "0"]
    assert rows[1].split()[-1] == last["shape"]
    # every figure ends below the end of its title
    ends = [match.end() for match in re.finditer(r"\S+( \(Hz\)| dB \(Hz\)| ERB)?", title)][:-1]
    assert [match.end() for match in re.finditer(r"\S+", rows[1])][:8] == ends


def test_predict_plots_one_sound_to_a_file(tmp_path, weights, capsys):
    sound = write_sounds(tmp_path, "dog.wav") / "dog.wav"
    assert main(["predict", "-w", weights, str(sound), "--json"]) == 0
    without_plot = capsys.readouterr().out
    assert main(["predict", "-w", weights, str(sound), "--json", "--plot", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out == without_plot
    assert "<svg" in (tmp_path / "a.svg").read_text("utf-8")


def test_predict_plots_several_sounds_to_a_folder(tmp_path, weights, capsys):
    recordings = write_sounds(tmp_path / "recordings", "dog.wav", "monday/dog.wav", "monday/dog.flac")
    call = ["predict", "-w", weights, "-n", "1", str(recordings), "--plot"]
    assert main([*call, str(tmp_path / "out.png")]) == 2
    assert "one file for 3 sounds; name a folder" in capsys.readouterr().err
    (recordings / "bad.wav").write_text("no sound")
    assert main([*call, str(tmp_path / "out")]) == 1  # the others are processed
    pictures = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*"))
    assert [path.as_posix() for path in pictures] == [
        "dog.wav.png",
        "monday/dog.flac.png",
        "monday/dog.wav.png",
    ]
    capsys.readouterr()
    assert main([*call, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("already exists; use --force to replace it") == 3


def test_unknown_formats_and_a_missing_extra_give_one_line(tmp_path, weights, capsys, monkeypatch):
    sound = str(write_sounds(tmp_path, "dog.wav") / "dog.wav")
    assert main(["filters", "-w", weights, "-o", str(tmp_path / "a.jpg")]) == 2
    assert capsys.readouterr().err.endswith("a.jpg: unknown picture format; use .png or .svg\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (["filters", "-o"], ["predict", sound, "--plot"]):
        assert main([*call, str(tmp_path / "a.png"), "-w", weights]) == 2
        line = "soundnet-port: matplotlib is not installed: pip install 'soundnet-port[plot]'\n"
        assert capsys.readouterr() == ("", line)
    assert not (tmp_path / "a.png").exists()


# ---- notebooks


class Tags(HTMLParser):
    """Tags and texts of some HTML, whose tags must be balanced."""

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


def test_repr_of_a_prediction():
    prediction = prediction_of(OBJECTS, SCENES, seconds=3.0, repeats=4)
    line = "<Prediction of 3.00 s played 4 times: object 0 0.40, scene 1 0.70; 3 frames>"
    assert repr(prediction) == line


def test_html_of_a_prediction_has_bars():
    malicious = "<script>alert('{index}')</script> & \"{head}\""
    html = Tags(prediction_of(OBJECTS, SCENES, names=malicious)._repr_html_())
    assert {tag for tag, _ in html.tags} == {"table", "caption", "tr", "th", "td", "div"}
    assert {name for _, attributes in html.tags for name in attributes} <= {"style", "colspan"}
    assert malicious.format(index=0, head="object") in html.text
    widths = [a["style"].split(";")[0] for tag, a in html.tags if tag == "div"]
    assert widths == ["width: 40.0%", "width: 26.7%", "width: 70.0%", "width: 30.0%"]


def test_html_of_a_network_lists_its_layers():
    model = model_with_filters(tone(300))
    texts = Tags(model._repr_html_()).text
    start = texts.index("pool1")
    assert texts[start : start + 5] == ["pool1", "1", "16", "0.0007", "0.004"]  # 78 samples of 22,050
    assert [text for text in texts if text in model.architecture.layers] == list(model.architecture.layers)
    assert "  (conv1): Convolution(1, 1," in repr(model)
