"""Warnings about waveforms at another scale, and about training mode without anything to train."""

import copy
import subprocess
import sys
import warnings

import pytest
import soundfile
import torch
from support.networks import NETS, model_of
from torch.fx.experimental.proxy_tensor import make_fx

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.errors import SoundNetWarning, TrainingModeWarning, WaveformScaleWarning
from soundnet_port.learning.protocol_features import PaperFeatures
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.modules import runs_eagerly

SECOND = 22_050
UNIT_SCALE = r"no sample is beyond \+-0\.9\d*, nearly silence where full scale is 256"


@pytest.fixture
def model():
    return model_of(NETS["n8_d16"])


def noise(seconds, peak, seed=0):
    wave = torch.rand(round(seconds * SECOND), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return wave / wave.abs().max() * peak


def listen(model, wave, way):
    if way == "extract":
        model.extract(wave, ["pool5"])
    elif way == "extract a batch":
        model.extract(wave.repeat(2, 1), [17])
    elif way == "extract_each":
        model.extract_each([wave, wave[: SECOND // 2]], ["pool5"])
    elif way == "extract_each, modules":
        model.extract_each([wave], [17])
    elif way == "forward":
        model(wave)
    elif way == "stream":
        sp.stream(model, ["pool5"], sample_rate=44_100).push(wave)
    elif way == "embed":
        sp.embed(model, wave)
    elif way == "predict":
        sp.predict(model, wave)
    elif way == "training":
        model.requires_grad_(True).train()
        model.extract(wave.repeat(2, 1), ["conv7"])
    elif way == "half precision":
        model.half().extract(wave, ["pool5"])


WAYS = (
    "extract|extract a batch|extract_each|extract_each, modules|forward|stream|embed|predict|training|"
    "half precision"
).split("|")


@pytest.mark.parametrize("way", WAYS)
def test_a_waveform_within_1_is_noticed_once_at_the_callers_line(model, way):
    with pytest.warns(WaveformScaleWarning, match=UNIT_SCALE) as caught:
        listen(model, noise(12, 0.95), way)
    assert [warning.filename for warning in caught] == [__file__]  # neither torch's lines nor the package's
    model.extract(noise(1, 0.95), ["pool5"])  # warnings are errors here


@pytest.mark.parametrize("way", WAYS)
def test_a_waveform_within_256_settles_the_question(model, way):
    listen(model, noise(12, 3.0), way)
    assert not model.check_scale
    model.extract(noise(1, 0.95), ["pool5"])


def test_integers_as_floats_are_noticed(model):
    with pytest.warns(WaveformScaleWarning, match="samples up to 20,000, where full scale is 256"):
        model.extract(noise(0.5, 20_000), ["pool5"])
    model.extract(noise(0.5, 20_000), ["pool5"])
    overshooting = model_of(NETS["n8_d16"])
    overshooting.extract(noise(0.5, 500), ["pool5"])  # after resampling


def test_silence_and_short_sounds_say_nothing_yet(model):
    dither = torch.full((5 * SECOND,), 2 / 128)  # two steps of a 16-bit file
    for wave in (torch.zeros(5 * SECOND), dither, noise(0.9, 0.95)):
        model.extract(wave, ["pool5"])
        assert model.check_scale
    with pytest.warns(WaveformScaleWarning, match=UNIT_SCALE):
        model.extract(noise(0.3, 0.95), ["pool5"])  # with the one before more than a second


def test_a_stream_may_begin_quietly(model):
    stream = sp.stream(model, ["pool5"])
    for _ in range(4):
        stream.push(noise(1, 0.95))
    with pytest.warns(WaveformScaleWarning, match=UNIT_SCALE):
        stream.push(noise(1, 0.95))
    other = model_of(NETS["n8_d16"])
    sp.stream(other, ["pool5"]).push(noise(4.9, 0.95))
    sp.stream(other, ["pool5"]).push(noise(4.9, 0.95))  # streams count for themselves


def test_files_and_normalized_sounds_are_never_suspected(model, tmp_path):
    quiet = tmp_path / "quiet.wav"
    soundfile.write(quiet, noise(12, 0.9 / 256).numpy(), SECOND, subtype="FLOAT")
    sp.predict(model, quiet)
    sp.embed(model, quiet)
    sp.extract_corpus(model, [quiet], tmp_path / "out", layers=["pool5", 17], workers=1)
    PaperFeatures(model, "pool5", "paper").extract(quiet)
    sp.predict(model, sp.load_audio(quiet), normalize=True)
    assert model.check_scale  # nor do they settle anything
    assert "check_scale" not in vars(model)  # and the class's keeps its effect
    with pytest.warns(WaveformScaleWarning, match=UNIT_SCALE):
        sp.predict(model, sp.load_audio(quiet))  # a tensor is a tensor, and this is nearly silence


def test_commands_suspect_no_file(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    quiet = tmp_path / "quiet.wav"
    soundfile.write(quiet, noise(12, 0.9 / 256).numpy(), SECOND, subtype="FLOAT")
    assert main(["predict", str(quiet), "-w", "demo", "--plot", str(tmp_path / "a.png")]) == 0
    assert "quiet (-54 dB of full scale in its loudest second)" in capsys.readouterr().err


def test_the_warnings_can_be_silenced(model):
    model.check_scale = False
    model.extract(noise(1, 0.95), ["pool5"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoundNetWarning)
        model_of(NETS["n8_d16"]).train().extract(noise(1, 0.95)[None].repeat(2, 1), ["pool5"])


def test_evaluation_mode_restores_the_check(model):
    with evaluation_mode(model), evaluation_mode(model):
        model.extract(noise(1, 0.95), ["pool5"])
    assert model.check_scale
    model.check_scale = False
    with evaluation_mode(model):
        pass
    assert not model.check_scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::torch.jit.TracerWarning")
def test_compilers_tracers_and_transforms_see_no_check(model):
    """The check would read a value: an error, a graph break, or a constant in the graph."""
    wave = noise(1, 0.95)[None]

    def compute(x):
        return model.extract(x, ["conv2"])["conv2"]

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return compute(x)

    torch.export.export(Wrapped(), (wave,))
    torch.jit.trace(Wrapped(), wave, check_trace=False)
    make_fx(compute)(wave)
    torch.func.vmap(compute)(wave)
    torch.func.grad(lambda x: compute(x).sum())(wave)
    torch.compile(compute, backend="eager")(wave)
    assert runs_eagerly()
    assert model.check_scale


def test_the_check_changes_no_number(model):
    wave = noise(3, 0.95)
    with pytest.warns(WaveformScaleWarning):
        checked = model.extract(wave, ["conv7"])["conv7"]
    assert torch.equal(model.extract(wave, ["conv7"])["conv7"], checked)


# ---- training mode


def test_training_mode_with_frozen_parameters_warns_once(model):
    with pytest.warns(
        TrainingModeWarning, match=r"all parameters are frozen.*call model\.eval\(\)"
    ) as caught:
        assert model.train() is model
    assert [warning.filename for warning in caught] == [__file__]
    assert all(module.training for module in model.modules())  # as PyTorch does
    assert not model.eval().training
    model.train()
    before = model.bn1.running_mean.clone()
    model.extract(noise(1, 100).repeat(2, 1), ["conv2"])
    assert not torch.equal(model.bn1.running_mean, before)  # what the warning is about


def test_training_mode_inside_another_module_warns_too(model):
    backbone = torch.nn.Sequential(model, torch.nn.Linear(16, 2))
    with pytest.warns(TrainingModeWarning) as caught:
        backbone.train()
    assert [warning.filename for warning in caught] == [__file__]


def test_training_mode_with_something_to_train_does_not_warn(model):
    copy.deepcopy(model).requires_grad_(True).train()
    copy.deepcopy(model).eval().train(False)
    partly = copy.deepcopy(model)
    partly.objects.requires_grad_(True)
    partly.train()
    without_statistics = copy.deepcopy(model)
    for module in without_statistics.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.track_running_stats = False
    without_statistics.train()


def test_a_script_shows_each_warning_once_with_its_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, soundnet_port as sp\n"
        "model = sp.load_pretrained('demo')\n"
        "for _ in range(3):\n"
        "    model.extract(torch.rand(44_100), ['pool5'])\n"
        "model.train()\n"
        "model.eval().train()\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if "Warning: " in line]
    assert [line.partition(": ")[0] for line in lines] == [f"{script}:4", f"{script}:5"]
