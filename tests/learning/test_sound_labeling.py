"""Training data from sounds: the teacher's numbers, steps, and failures."""

import json

import numpy as np
import pytest
import soundfile
import torch
from support import reference_weights
from support.networks import NETS, model_of

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.learning.distillation_data import open_distillation_data
from soundnet_port.learning.sound_labeling import label_sound, label_sounds
from soundnet_port.network.weights import cpu_state_dict, write_weights

STEP = 5 * 22_050


@pytest.fixture(scope="module")
def model():
    return model_of(NETS["n8_d16"])


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, reference_weights.samples(samples), 22_050)
    return path


def probabilities(model, waveform):
    """Each frame's distribution over the objects, (frames, categories)."""
    return torch.softmax(model(waveform).objects[0], 0).T


def test_a_short_sound_is_repeated_to_20_s(model, tmp_path):
    path = write(tmp_path / "short.wav", STEP)
    rows, seconds = label_sound(model, path)
    expected = probabilities(model, sp.load_audio(path).repeat(4)).mean(0)
    np.testing.assert_array_equal(rows["objects"], expected[None])
    assert rows["scenes"].shape == (1, 6)
    assert seconds == 5


def test_each_step_of_a_long_sound_has_the_frame_of_training(model, tmp_path):
    """20 s have four head frames; of the rest, 12 s, two steps are played twice."""
    path = write(tmp_path / "long.wav", 4 * STEP + 12 * 22_050)
    rows, seconds = label_sound(model, path)
    wave = sp.load_audio(path)
    first = probabilities(model, wave[: 4 * STEP])
    rest = probabilities(model, wave[4 * STEP : 6 * STEP].repeat(2))
    expected = torch.cat([first, torch.stack([rest[[0, 2]].mean(0), rest[[1, 3]].mean(0)])])
    torch.testing.assert_close(torch.from_numpy(rows["objects"]), expected, rtol=0, atol=1e-6)
    assert seconds == 32


@pytest.mark.parametrize(("seconds", "steps"), [(1, 1), (7.4, 1), (7.6, 2), (22.4, 4), (22.6, 5)])
def test_a_step_has_at_least_half_of_its_sound(model, tmp_path, seconds, steps):
    path = write(tmp_path / "a.wav", round(seconds * 22_050))
    assert len(label_sound(model, path)[0]["objects"]) == steps


def test_the_folder_is_what_training_reads(model, tmp_path, monkeypatch):
    write(tmp_path / "sounds" / "a.wav", STEP)
    write(tmp_path / "sounds" / "deep" / "b.wav", 2 * STEP)
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"RIFF")
    reports = []
    result = label_sounds(model, [tmp_path / "sounds"], tmp_path / "labels", progress=reports.append)
    assert (result.total, result.extracted, result.already_done) == (3, 2, 0)
    assert [failure.path for failure in result.failures] == [str(tmp_path / "sounds" / "broken.wav")]
    assert result.report.read_text().startswith(str(tmp_path / "sounds" / "broken.wav"))
    assert [report.done for report in reports] == [1, 2, 3]
    data = open_distillation_data(result.output)
    assert data.teachers == {"objects": 10, "scenes": 6}
    assert data.steps.tolist() == [1, 2]
    assert (result.output.parent / "objects" / "deep" / "b.wav.npy").exists()
    again = label_sounds(model, [tmp_path / "sounds"], tmp_path / "labels")
    assert (again.extracted, again.already_done, len(again.failures)) == (0, 2, 1)


def test_labels_of_another_teacher_are_refused(model, tmp_path):
    path = write(tmp_path / "a.wav", STEP)
    label_sounds(model, path, tmp_path / "labels", name="first")
    with pytest.raises(
        CorpusError, match=r"are of another model \(first, not second\); choose another folder"
    ):
        label_sounds(model_of(NETS["n8_d8"]), path, tmp_path / "labels", name="second")
    trunk = sp.SoundNet(NETS["n8_d16"].architecture.with_classes(3, "conv7"))
    with pytest.raises(CorpusError, match="no heads objects and scenes; a teacher needs both"):
        label_sounds(trunk, path, tmp_path / "other")


def test_the_command_writes_a_manifest_and_names(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    categories = {
        head: [f"{head} {n}" for n in range(size)] for head, size in model.architecture.head_sizes.items()
    }
    write_weights(
        tmp_path / "t.safetensors",
        model.architecture,
        cpu_state_dict(model, torch.float32),
        {"categories": categories},
    )
    write(tmp_path / "a.wav", STEP)
    assert main("label-sounds a.wav nowhere.wav -w t.safetensors -o labels".split()) == 1
    err = capsys.readouterr().err
    assert "nowhere.wav: No such file or directory" in err
    assert "labels/manifest.tsv: 1 files, 0.00 hours of sound" in err
    lines = (tmp_path / "labels" / "manifest.tsv").read_text().splitlines()
    assert lines == ["sound\tobjects\tscenes", "../a.wav\tobjects/a.wav.npy\tscenes/a.wav.npy"]
    assert (tmp_path / "labels" / "scenes.categories.txt").read_text().splitlines() == categories["scenes"]
    assert (
        json.loads((tmp_path / "labels" / "teachers.json").read_text())["scenes"]["model"] == "t.safetensors"
    )
