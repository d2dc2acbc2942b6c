"""Distillation: examples, and the three forms of data."""

import io
import json
import math
import shutil
import tarfile
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.distillation import (
    LABELS,
    WIDTHS,
    draw_distributions,
    read_log,
    write_manifest,
    write_sound,
)

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.distillation import (
    TrainConfig,
)
from soundnet_port.learning.distillation_data import open_distillation_data
from soundnet_port.learning.distillation_examples import (
    STEP_SAMPLES,
    DistillationExamples,
    ResumableBatchSampler,
    fit_example,
)
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.flickr_release import FlickrRelease
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.weights import read_metadata

pytestmark = pytest.mark.usefixtures("one_thread")


# --- examples --------------------------------------------------------------------------------


@settings(max_examples=budget(25), deadline=None)
@given(steps=st.integers(1, 4), samples=st.integers(1, 25 * SAMPLE_RATE))
def test_an_example_is_fitted_as_in_the_original(steps, samples):
    """Compare with the rules of donkey_audio.lua, in numpy."""
    waveform = np.random.default_rng(samples).random(samples, np.float32)
    labels = np.arange(steps * 3, dtype=np.float32).reshape(steps, 3)
    samples_labeled = steps * 5 * 22050
    expected = np.concatenate([waveform, np.zeros(max(0, samples_labeled - samples), np.float32)])
    if steps < 4:
        expected = np.tile(expected[:samples_labeled], math.ceil(20 * 22050 / samples_labeled))
    fitted, repeated = fit_example(torch.from_numpy(waveform), {"objects": torch.from_numpy(labels)})
    assert np.array_equal(fitted.numpy(), expected[: 20 * 22050])
    assert np.array_equal(repeated["objects"].numpy(), np.tile(labels, (4, 1))[:4])


def test_longer_sounds_give_another_part_in_each_epoch(tmp_path):
    data = open_distillation_data(write_manifest(tmp_path, steps=(7,), short=0.0))
    labels = torch.from_numpy(data.read_labels(0)["objects"])
    waveform = sp.load_audio(data.sound_name(0))
    offsets = set()
    for cache in (0, 1e9):
        examples = DistillationExamples(data, TrainConfig(), cache)
        for epoch in range(12):
            example = examples[epoch, 0]
            (first,) = [k for k in range(4) if torch.equal(example["targets"]["objects"], labels[k : k + 4])]
            assert torch.equal(example["waveform"], waveform[first * STEP_SAMPLES :][: 4 * STEP_SAMPLES])
            offsets.add(first)
    assert offsets == {0, 1, 2, 3}
    first = DistillationExamples(data, None)[5, 0]  # validation
    assert torch.equal(first["targets"]["objects"], labels[:4])
    assert torch.equal(first["waveform"], waveform[: 4 * STEP_SAMPLES])


def test_an_example_depends_on_seed_epoch_and_index_alone(clips):
    config = TrainConfig(augmentation=Augmentation(gain=6, shift=1))
    data = open_distillation_data(clips)
    once, again = DistillationExamples(data, config), DistillationExamples(data, config, cache=1e9)
    wave = once[3, 1]["waveform"]
    _ = [again[0, i] for i in range(5)]
    assert torch.equal(wave, again[3, 1]["waveform"])
    assert not torch.equal(wave, once[4, 1]["waveform"])
    assert not torch.equal(wave, DistillationExamples(data, replace(config, seed=1))[3, 1]["waveform"])
    assert wave.abs().max() <= 256


@settings(max_examples=budget(30), deadline=None)
@given(sounds=st.integers(1, 20), share=st.integers(1, 5), devices=st.integers(1, 3), step=st.integers(0, 10))
def test_every_epoch_has_every_sound_once_for_any_devices_and_start(sounds, share, devices, step):
    config = TrainConfig(batch=share * devices, iterations=20, seed=4)
    batches = list(ResumableBatchSampler(sounds, config))
    drawn = [pair for batch in batches for pair in batch]
    for epoch in range(len(drawn) // sounds):
        part = drawn[epoch * sounds : (epoch + 1) * sounds]
        assert sorted(part) == [(epoch, index) for index in range(sounds)]
    assert list(ResumableBatchSampler(sounds, config, step)) == batches[step:]
    parts = [list(ResumableBatchSampler(sounds, config, 0, rank, devices)) for rank in range(devices)]
    assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == batches


# --- the three forms of data -----------------------------------------------------------------


def write_release(folder):
    """Write the released data's layout, three lists of videos with 1 to 4 frames; return the labels."""
    generator = np.random.default_rng(7)
    truth, video = {}, 0
    for split, block, counts in (("train", 1, (1, 4, 2)), ("train", 2, (3, 1)), ("val", 1, (2, 4))):
        lines, names = [], []
        for count in counts:
            video += 1
            name = f"videos/{video:03d}/abc{video}.mp4"
            lines += [f"/some/where/frames/{name}/{frame:08d}.jpg 0" for frame in range(1, count + 1)]
            names.append((name, count))
            write_sound(folder / "mp3" / f"{name}.mp3", 5 * count + 0.5, 300 * video)
        (folder / "lists").mkdir(exist_ok=True)
        (folder / "lists" / f"{split}_frames4_{block:04d}.txt").write_text("\n".join(lines) + "\n")
        for head, kind, categories in (("objects", "IMNET", 1000), ("scenes", "PLACES2", 401)):
            probabilities = draw_distributions(generator, len(lines), categories).astype("<f4")
            path = folder / "features" / f"VGG16_{kind}_{split.upper()}_B{block:04d}" / "prob"
            path.parent.mkdir(parents=True)
            path.write_bytes(probabilities.tobytes())
            first = 0
            for name, count in names:
                truth.setdefault((split, name), {})[head] = probabilities[first : first + count]
                first += count
    return truth


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flickr")
    return folder, write_release(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_released_lists_and_probabilities_become_videos_with_their_rows(released, split):
    folder, truth = released
    data = open_distillation_data(folder, split)
    names = [name for kind, name in truth if kind == split]
    assert [data.sound_name(i) for i in range(len(data.steps))] == [
        str(folder / "mp3" / f"{n}.mp3") for n in names
    ]
    for i, name in enumerate(names):
        labels = data.read_labels(i)
        assert data.steps[i] == len(labels["objects"])
        for head in LABELS:
            assert np.array_equal(labels[head], truth[split, name][head])
    assert data.categories["objects"][0] == "tench, Tinca tinca"


def test_training_on_the_release_from_the_command_line(released, tmp_path, capsys, curves):
    folder, _ = released
    data = open_distillation_data(folder)
    bad = folder / "mp3" / "videos" / "001" / "abc1.mp4.mp3"
    good = bad.read_bytes()
    bad.write_bytes(b"RIFF nothing")
    arguments = [
        "train",
        str(folder),
        "-o",
        str(tmp_path / "run"),
        "--widths",
        ",".join(map(str, WIDTHS)),
        *"--batch 2 --iterations 4 --validate-every 2 --device cpu --json".split(),
        "--validation",
        str(folder),
    ]
    try:
        assert main(arguments) == 1  # one sound could not be read
    finally:
        bad.write_bytes(good)
    result = json.loads(capsys.readouterr().out)
    drawn = [
        index for batch in ResumableBatchSampler(5, TrainConfig(batch=2, iterations=4)) for _, index in batch
    ]
    silent = drawn.count([data.sound_name(i) for i in range(5)].index(str(bad)))
    assert list(result["unreadable"]) == [str(bad)]
    assert int(read_log(tmp_path / "run")[-1]["silent"]) == silent > 0
    assert str(bad) in (tmp_path / "run" / "unreadable.tsv").read_text()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [bool(row["validation loss"]) for row in read_log(tmp_path / "run")] == [False, True, False, True]
    # the result is a network like any other
    weights = tmp_path / "run" / "weights.safetensors"
    assert read_metadata(weights)["training"]["step"] == result["best"]
    prediction = sp.predict(sp.load_pretrained(weights), str(bad))
    assert prediction.objects[0].label in data.categories["objects"]
    assert main(["info", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "category names: yes" in out
    assert "source: trained by objects, scenes on data with sha256 " in out
    assert f"from random values; step {result['best']} of 4; batch 2, lr 0.001, seed 0" in out
    # the same again: nothing left to do; other settings: refused
    assert main(arguments) == 1
    capsys.readouterr()
    assert main([*arguments, "--lr", "0.1"]) == 2
    assert "lr 0.001 there, 0.1 now" in capsys.readouterr().err


def test_shards_give_what_the_manifest_gives(clips, tmp_path):
    expected = open_distillation_data(clips)
    (tmp_path / "objects.categories.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "scenes.categories.txt").write_text("x\ny\nz\n")
    for shard in range(2):
        with tarfile.open(tmp_path / f"clips-{shard:06d}.tar", "w") as tar:
            for i in range(shard * 3, min(shard * 3 + 3, 5)):
                for suffix in ("wav", "objects.npy", "scenes.npy"):
                    tar.add(clips.parent / f"{i}.{suffix}", f"part/{i}.{suffix}")
                extra = tarfile.TarInfo(f"part/{i}.json")  # other files do not matter
                tar.addfile(extra, io.BytesIO(b""))
    data = open_distillation_data(tmp_path)
    assert data.categories == {"objects": list("abcde"), "scenes": list("xyz")}
    one, other = DistillationExamples(expected, None), DistillationExamples(data, None)
    for i in range(5):
        assert torch.equal(one[0, i]["waveform"], other[0, i]["waveform"])
        for head in LABELS:
            assert torch.equal(one[0, i]["targets"][head], other[0, i]["targets"][head])
    cut = tmp_path / "clips-000001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(TrainingError, match=r"clips-000001\.tar: .*(truncated|damaged)"):
        open_distillation_data(tmp_path)


def edit(path, index, change):
    array = np.load(path)
    array[index] = change
    np.save(path, array)


BAD = {
    "sums to 0.5": lambda f: edit(f / "1.objects.npy", 1, [0.5, 0, 0, 0, 0]),
    "NaN": lambda f: edit(f / "1.scenes.npy", (0, 0), np.nan),
    "logits need a softmax": lambda f: edit(f / "1.scenes.npy", 0, [-1, 1, 1]),
    "the shape": lambda f: np.save(f / "1.scenes.npy", np.float32([0.5, 0.5, 0])),
    "4 categories, expected 5": lambda f: np.save(f / "1.objects.npy", np.full((2, 4), 0.25, np.float32)),
    "different lengths": lambda f: np.save(f / "1.objects.npy", np.full((1, 5), 0.2, np.float32)),
    "expected an array of float32": lambda f: np.save(f / "1.objects.npy", np.ones((2, 5), np.int64)),
    "not an array in NumPy's format": lambda f: (f / "1.objects.npy").write_bytes(b"\x80\x04N."),
    "No such file": lambda f: (f / "1.objects.npy").unlink(),
    "no such sound file": lambda f: (f / "1.wav").unlink(),
}


@pytest.mark.parametrize("message", BAD)
def test_a_manifest_with_bad_labels_is_refused_by_line_and_file(tmp_path, message):
    path = write_manifest(tmp_path, steps=(1, 2))
    BAD[message](tmp_path)
    with pytest.raises(TrainingError, match=message) as error:
        open_distillation_data(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns"),
        ("sound,objects,scenes\n", "the first line must name the columns"),
        ("sound\tobjects\n", "expected one or more for objects and for scenes"),
        ("sound\tobjects\tscenes\tthings\n", "unknown teacher 'things'"),
        ("sound\tobjects\tscenes\tobjects\n", "with different names"),
        ("sound\tobjects\tscenes\n", "lists no sounds"),
        ("sound\tobjects\tscenes\na.wav\tb.npy\n", "line 2: 2 columns, expected 3"),
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path, text, message, capsys):
    path = tmp_path / "clips.tsv"
    path.write_text(text)
    assert main(["train", str(path), "-o", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "run").exists()


def test_an_incomplete_release_is_refused(released, tmp_path):
    with pytest.raises(TrainingError, match="neither shards"):
        open_distillation_data(tmp_path)
    shutil.copytree(released[0], tmp_path, dirs_exist_ok=True)
    prob = tmp_path / "features" / "VGG16_PLACES2_TRAIN_B0002" / "prob"
    prob.write_bytes(prob.read_bytes()[:-4])
    with pytest.raises(TrainingError, match=r"prob: 6,412 bytes, expected 6,416 \(4 lines x 401 float32\)"):
        FlickrRelease(tmp_path)
