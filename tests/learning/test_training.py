"""Distillation: the numbers of a step, the data, and resuming interrupted runs."""

import csv
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import tarfile
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.cli_processes import run_at_once

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.learning import training_loop
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.distillation import (
    TrainConfig,
    create_adam,
    distillation_loss,
    set_torch7_eps,
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
from soundnet_port.learning.randomness import INITIALIZATION, derive_rng, initialize
from soundnet_port.learning.run_files import load_checkpoint
from soundnet_port.learning.training import train
from soundnet_port.network.architecture import SAMPLE_RATE, SOUNDNET5, SOUNDNET8
from soundnet_port.network.model import Logits, SoundNet
from soundnet_port.network.weights import read_metadata, read_weights

WIDTHS = (2, 2, 3, 3, 4, 4, 5)
NARROW = SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes)
HEADS = {"objects": 5, "scenes": 3}
LABELS = ("objects", "scenes")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sum in the same order here and in the processes that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw_distributions(generator, steps, categories):
    return generator.dirichlet(np.full(categories, 0.3), steps).astype(np.float32)


def write_sound(path, seconds, hertz):
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = 0.4 * np.sin(2 * np.pi * hertz * t) + 0.05 * np.random.default_rng(hertz).standard_normal(
        len(t)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"format": "MP3"} if path.suffix == ".mp3" else {"subtype": "PCM_16"}
    soundfile.write(path, samples.astype(np.float32), SAMPLE_RATE, **kind)


def write_manifest(folder, steps=(1, 2, 4, 1, 3), heads=None, short=1.0):
    """Write small sounds, each `short` seconds shorter than its label steps, and return their manifest."""
    heads = heads or HEADS
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(["sound", *heads])]
    for i, count in enumerate(steps):
        write_sound(folder / f"{i}.wav", 5 * count - short, 200 * (i + 1))
        cells = [f"{i}.wav"]
        for column, categories in heads.items():
            cells.append(f"{i}.{column.replace(':', '-')}.npy")
            np.save(folder / cells[-1], draw_distributions(generator, count, categories))
        lines.append("\t".join(cells))
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.tsv"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("clips"))


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the numbers of a step -------------------------------------------------------------------


class ReferenceNetwork:
    """Forward and backward pass of SoundNet in training mode, in float64, tap by tap and frame by frame."""

    def __init__(self, architecture, state):
        self.architecture = architecture
        self.state = {name: tensor.double().numpy() for name, tensor in state.items()}
        self.running = {}

    def convolution(self, name, row, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        x = np.pad(x, ((0, 0), (0, 0), (row.padding, row.padding)))
        frames = (x.shape[2] - row.kernel) // row.stride + 1
        y = np.zeros((len(x), len(weight), frames)) + bias[:, None]
        for k in range(row.kernel):
            y += np.einsum("oi,bit->bot", weight[:, :, k], x[:, :, k : k + row.stride * frames : row.stride])
        return y, x

    def convolution_backward(self, name, row, padded, dy, grads):
        weight, frames = self.state[f"{name}.weight"], dy.shape[2]
        dweight, dx = np.zeros_like(weight), np.zeros_like(padded)
        for k in range(row.kernel):
            seen = slice(k, k + row.stride * frames, row.stride)
            dweight[:, :, k] = np.einsum("bot,bit->oi", dy, padded[:, :, seen])
            dx[:, :, seen] += np.einsum("oi,bot->bit", weight[:, :, k], dy)
        grads[f"{name}.weight"], grads[f"{name}.bias"] = dweight, dy.sum((0, 2))
        return dx[:, :, row.padding : dx.shape[2] - row.padding]

    def step(self, waveform, targets, balance):
        """Return (loss, gradients) of a batch; the running statistics are in `running`."""
        x, kept = waveform[:, None], []
        for block in self.architecture.blocks:
            y, padded = self.convolution(block.name, block, x)
            count = y.shape[0] * y.shape[2]
            mean, variance = y.mean((0, 2)), y.var((0, 2))
            for field, now in (("mean", mean), ("var", variance * count / (count - 1))):  # unbiased
                name = f"{block.norm}.running_{field}"
                self.running[name] = 0.9 * self.state[name] + 0.1 * now
            inverse = 1 / np.sqrt(variance + 1e-5)
            normal = (y - mean[:, None]) * inverse[:, None]
            x = (
                normal * self.state[f"{block.norm}.weight"][:, None]
                + self.state[f"{block.norm}.bias"][:, None]
            )
            relu = x > 0
            x = x * relu
            best = None
            if block.pool:
                pooled = x.shape[2] // block.pool
                windows = x[:, :, : pooled * block.pool].reshape(*x.shape[:2], pooled, block.pool)
                best, x = windows.argmax(3), windows.max(3)
            kept.append((padded, normal, inverse, relu, best))
        loss, grads, dx = 0.0, {}, 0.0
        for head in self.architecture.heads:
            y, padded = self.convolution(head.name, head, x)
            y = y - y.max(1, keepdims=True)
            p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
            dy = np.zeros_like(y)
            for teacher, weight in targets[head.name]:
                t = teacher.transpose(0, 2, 1)
                # nn.DistKLDivCriterion for every step, the mean over heads x steps, times lambda
                for step in range(t.shape[2]):
                    target, q = t[:, :, step], p[:, :, step]
                    terms = np.where(
                        target > 0, target * (np.log(np.where(target > 0, target, 1)) - np.log(q)), 0
                    )
                    loss += weight * balance / (2 * t.shape[2]) * terms.sum() / target.size
                    slope = q * target.sum(1, keepdims=True) - target
                    dy[:, :, step] += weight * balance / (2 * t.shape[2]) / target.size * slope
            dx = dx + self.convolution_backward(head.name, head, padded, dy, grads)
        for block, (padded, normal, inverse, relu, best) in zip(
            reversed(self.architecture.blocks), reversed(kept), strict=True
        ):
            if best is not None:
                spread = np.zeros((*best.shape, block.pool))
                np.put_along_axis(spread, best[..., None], dx[..., None], 3)
                dx = np.zeros_like(normal)
                dx[:, :, : best.shape[2] * block.pool] = spread.reshape(*best.shape[:2], -1)
            g = dx * relu
            gain = self.state[f"{block.norm}.weight"]
            grads[f"{block.norm}.weight"] = (g * normal).sum((0, 2))
            grads[f"{block.norm}.bias"] = g.sum((0, 2))
            g = g * gain[:, None]
            dy = g - g.mean((0, 2))[:, None] - normal * (g * normal).mean((0, 2))[:, None]
            dx = self.convolution_backward(block.name, block, padded, dy * inverse[:, None], grads)
        return loss, grads


@pytest.mark.parametrize("template", [SOUNDNET8, SOUNDNET5], ids=lambda a: a.name)
def test_a_training_step_matches_the_reference_network(template):
    architecture = template.resized((2, 3, 2, 3, 2, 3, 4)[: len(template.blocks)], HEADS)
    generator = np.random.default_rng(5)
    model = SoundNet(architecture)
    for name, tensor in model.state_dict().items():
        if "num_batches" not in name:
            values = generator.normal(0, 0.3, tuple(tensor.shape))
            if name.startswith("bn"):  # gains of both signs; running statistics are only moved
                values += generator.choice([-1, 1], values.shape) if name.endswith("weight") else 0
                values = np.abs(values) if name.endswith("var") else values
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    samples = 280_000
    frames = architecture.frames("objects", samples)
    waveform = generator.normal(0, 20, (2, samples)).astype(np.float32)
    columns = {"objects": 1.0, "objects:other": 3.0, "scenes": 1.0}
    targets = {
        column: np.stack(
            [draw_distributions(generator, frames, HEADS[column.partition(":")[0]]) for _ in range(2)]
        )
        for column in columns
    }
    targets["scenes"][0, 0] = [0, 1, 0]  # 0 log 0 is 0
    config = TrainConfig(teachers=columns)

    reference = ReferenceNetwork(architecture, model.state_dict())
    by_head = {
        "objects": [(targets["objects"].astype(float), 0.25), (targets["objects:other"].astype(float), 0.75)],
        "scenes": [(targets["scenes"].astype(float), 1.0)],
    }
    expected, gradients = reference.step(waveform.astype(np.float64), by_head, 250.0)

    # float64 goes through the modules: rounding alone. float32, as it is trained: sums over up to
    # 280,000 frames; measured 7e-6.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        model.load_state_dict(state)
        model.to(dtype).train().zero_grad()
        logits = model(torch.from_numpy(waveform).to(dtype))
        tensors = {column: torch.from_numpy(rows).to(dtype) for column, rows in targets.items()}
        loss, _ = distillation_loss(logits, tensors, config)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=max(tolerance / 10, 1e-9))
        parameters = dict(model.named_parameters())
        assert parameters.keys() == gradients.keys()
        for name, parameter in parameters.items():
            # batch norm takes away what a convolution's bias adds: its gradient is rounding alone
            bias = name.startswith("conv") and name.endswith("bias")
            largest = np.abs(gradients[name.replace("conv", "bn") if bias else name]).max()
            error = np.abs(parameter.grad.double().numpy() - gradients[name]).max()
            assert error <= tolerance * largest, f"{name}: {error / largest:.1e}"
        for name, running in reference.running.items():
            ours = model.state_dict()[name].double().numpy()
            assert np.abs(ours - running).max() <= tolerance / 10 * np.abs(running).max(), name


def test_adam_is_torch7s():
    """optim.adam: eps is added to sqrt(v) as it is. Gradients of 1e-7 make that show."""
    config = TrainConfig()
    generator = np.random.default_rng(1)
    x = generator.normal(size=50)
    layer = torch.nn.Linear(50, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(x))
    initial = x = layer.weight[0].detach().double().numpy()
    optimizer = create_adam(layer, config)
    m, v = np.zeros(50), np.zeros(50)
    for t in range(1, 5):
        g = generator.normal(0, 1e-7, 50)
        layer.weight.grad = torch.from_numpy(g[None].astype(np.float32))
        set_torch7_eps(optimizer, config, t)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        x = x - 0.001 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    # float32 holds numbers near 1 to 6e-8; the parameters have moved by 1e-3
    assert np.abs(layer.weight[0].detach().numpy() - x).max() < 5e-7
    assert np.abs(x - initial).max() > 5e-4


def test_temperature_softens_both_sides():
    generator = np.random.default_rng(2)
    scores = {head: torch.from_numpy(generator.normal(size=(2, n, 4))) for head, n in HEADS.items()}
    targets = {
        head: torch.from_numpy(
            np.stack([draw_distributions(generator, 4, n).astype(float) for _ in range(2)])
        )
        for head, n in HEADS.items()
    }
    softened = {head: torch.softmax(rows.log() / 3, 2) for head, rows in targets.items()}
    divided = Logits(**{head: rows / 3 for head, rows in scores.items()})
    loss, _ = distillation_loss(Logits(**scores), targets, TrainConfig(temperature=3.0))
    expected, _ = distillation_loss(divided, softened, TrainConfig(balance=250.0 * 9))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_initial_values_are_the_originals():
    model = SoundNet(SOUNDNET5.resized((8, 16, 32, 32), {"objects": 20, "scenes": 10}))
    initialize(model, derive_rng(0))
    weight = model.conv3.weight.detach()  # 8,192 numbers: their deviation is known to 1 %
    assert float(weight.std()) == pytest.approx(0.01, rel=0.03)
    assert abs(float(weight.mean())) < 5e-4
    assert float(model.bn4.weight.detach().mean()) == pytest.approx(1, abs=0.02)
    assert 0.01 < float(model.bn4.weight.detach().std()) < 0.03
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            assert not tensor.any(), name


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


def test_training_on_the_release_from_the_command_line(released, tmp_path, capsys):
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


# --- runs ------------------------------------------------------------------------------------


def run(data, folder, progress=None, **changes):
    """Run with validation, augmentation, a checkpoint every 3 steps and decoding in another process."""
    config = TrainConfig(
        iterations=changes.pop("iterations", 7),
        batch=2,
        seed=3,
        augmentation=Augmentation(gain=6, shift=0.5, mix=0.5),
    )
    options = {"workers": 1, "save_every": 3, "validate_every": 5, "validation": data} | changes
    return train(data, folder, weights=NARROW, config=config, device="cpu", progress=progress, **options)


def run_until_killed(data, folder):
    def kill(progress):
        if progress.done == 5:  # after a checkpoint and a validation
            os.kill(os.getpid(), signal.SIGKILL)

    run(data, folder, kill)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(clips, tmp_path):
    uninterrupted = run(clips, tmp_path / "uninterrupted")
    # CUDA cannot be used in a forked process, which starts at once
    start = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = start.Process(target=run_until_killed, args=(clips, tmp_path / "broken"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = read_log(tmp_path / "broken")
    assert load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["step"] == 3 < len(before) == 5
    resumed = run(clips, tmp_path / "broken")
    assert read_log(tmp_path / "broken")[:5] == before
    for name in ("log.csv", "weights.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (
            tmp_path / "uninterrupted" / name
        ).read_bytes(), name
    assert (resumed.step, resumed.best, resumed.validation) == (
        uninterrupted.step,
        uninterrupted.best,
        uninterrupted.validation,
    )


def test_an_interrupted_run_resumes_to_more_iterations(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "_LOG_EVERY", 3)

    def interrupt(progress):
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"validation": None, "workers": 0, "save_every": 1000}
    stopped = run(clips, tmp_path / "run", interrupt, **options)
    assert stopped.interrupted
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == stopped.step < 7
    longer = run(clips, tmp_path / "run", iterations=8, **options)
    run(clips, tmp_path / "uninterrupted", iterations=8, **options)
    assert (longer.step, longer.interrupted) == (8, False)
    assert (tmp_path / "run" / "log.csv").read_bytes() == (
        tmp_path / "uninterrupted" / "log.csv"
    ).read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK nothing")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: damaged"):
        run(clips, tmp_path / "run", **options)


def test_a_small_network_memorizes_a_few_clips(tmp_path):
    data = write_manifest(tmp_path, steps=(1, 1), short=0.0)
    architecture = SOUNDNET8.resized((2, 4, 8, 8, 8, 8, 32), SOUNDNET8.head_sizes)
    result = train(
        data,
        tmp_path / "run",
        weights=architecture,
        config=TrainConfig(iterations=25, batch=2, lr=0.03),
        device="cpu",
    )
    first, last = (read_log(tmp_path / "run")[i] for i in (0, -1))
    assert float(last["objects"]) < 0.05 < 0.4 < float(first["objects"])
    assert float(last["scenes"]) < 0.05
    assert result.loss == float(last["loss"])


def test_validation_figures_are_those_of_the_written_weights(clips, tmp_path):
    """Compute them from the weights in evaluation mode, in numpy."""
    result = run(clips, tmp_path, iterations=3, validate_every=2, workers=0)
    architecture, state, _ = read_weights(result.weights)
    model = SoundNet(architecture)
    model.load_state_dict(state, strict=False)
    model.use_engine = False
    data = open_distillation_data(clips)
    examples = DistillationExamples(data, None)
    divergence = {head: [] for head in LABELS}
    top1 = []
    for i in range(5):
        example = examples[0, i]
        with torch.no_grad():
            logits = model.eval()(example["waveform"])
        for head in LABELS:
            p = torch.softmax(getattr(logits, head)[0].double(), 0).numpy().T
            t = example["targets"][head].double().numpy()
            divergence[head].append((t * np.log(np.where(t > 0, t / p, 1))).sum(1).mean())
            if head == "objects":
                top1.append((p.argmax(1) == t.argmax(1)).mean())
    for head in LABELS:
        assert result.validation[head] == pytest.approx(np.mean(divergence[head]), rel=1e-4)
    assert result.validation["objects top 1"] == pytest.approx(np.mean(top1))


@pytest.fixture(scope="module")
def two_processes(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    config = TrainConfig(iterations=3, batch=4, seed=2)
    train(clips, folder, weights=NARROW, config=config, device="cpu", devices=2, save_every=2)
    return folder


def test_torchruns_processes_do_the_same_and_one_reports(clips, two_processes, tmp_path):
    """It starts the command in every process, and numbers them in the environment."""
    command = f"train {clips} -o {tmp_path / 'run'} --iterations 3 --batch 4 --seed 2 --save-every 2"
    settings = f"--widths {','.join(map(str, WIDTHS))} --device cpu --devices 2"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environments = [
        rendezvous
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a", "GROUP_RANK": "0"}
        for rank in range(2)
    ]
    outputs = [tmp_path / "first", tmp_path / "second"]
    codes = run_at_once([[*command.split(), *settings.split()]] * 2, outputs, environments)
    texts = [path.read_text() for path in outputs]
    assert codes == [0, 0], texts
    assert (tmp_path / "run" / "log.csv").read_bytes() == (two_processes / "log.csv").read_bytes()
    assert ["weights.safetensors: step 3 of 3" in text for text in texts] == [True, False]


def test_two_processes_equal_one_that_averages_the_gradients_of_two_halves(clips, two_processes):
    """With batch-norm statistics of each half; the running ones are those of the first process."""
    config = TrainConfig(iterations=3, batch=4, seed=2)
    data = open_distillation_data(clips)
    examples = DistillationExamples(data, config)
    model = SoundNet(NARROW.resized(WIDTHS, HEADS))
    model.fast_gradients = True  # as the processes compute
    initialize(model, derive_rng(2, INITIALIZATION))
    model.train()
    optimizer = create_adam(model, config)
    losses = []
    for step, batch in enumerate(ResumableBatchSampler(5, config), 1):
        optimizer.zero_grad()
        running, loss = None, 0.0
        for half in (batch[:2], batch[2:]):
            batch_examples = [examples[key] for key in half]
            targets = {
                head: torch.stack([example["targets"][head] for example in batch_examples]) for head in LABELS
            }
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            waveforms = torch.stack([example["waveform"] for example in batch_examples])
            half_loss, _ = distillation_loss(model(waveforms), targets, config)
            (half_loss / 2).backward()
            loss += half_loss.item() / 2
            if running is None:
                running = {name: buffer.clone() for name, buffer in model.named_buffers()}
                model.load_state_dict(buffers, strict=False)
        model.load_state_dict(running, strict=False)
        set_torch7_eps(optimizer, config, step)
        optimizer.step()
        losses.append(loss)
    # float32 sums in another order; Adam's first steps divide gradients by their own size
    assert [float(row["loss"]) for row in read_log(two_processes)] == pytest.approx(losses, rel=1e-4)
    _, state, _ = read_weights(two_processes / "weights.safetensors")
    for name, tensor in state.items():
        largest = float(model.state_dict()[name].abs().max())
        if not (name.startswith("conv") and name.endswith("bias")):  # gradients of rounding alone
            assert float((tensor - model.state_dict()[name]).abs().max()) <= 1e-3 * largest, name


def test_invalid_options_are_refused_in_a_line(clips, tmp_path, capsys):
    begin = ["train", str(clips), "-o", str(tmp_path / "run"), "--device", "cpu"]
    for extra, message in (
        ("--batch 0", "batch must be at least 1"),
        ("--lr nan", "lr must be"),
        ("--widths 3,4", "soundnet8 has 7 blocks"),
        ("--widths a", "--widths"),
        ("--teacher things=2", "no teacher things"),
        ("--precision 7", "unknown precision"),
        ("--gain -3", "gain must be"),
        ("--weights nowhere", "no weights named"),
        ("--weights x --architecture soundnet5", "leave out --architecture"),
        ("--devices 2 --batch 3", "cannot be shared by 2 devices"),
        ("--validation nowhere.tsv", "nowhere.tsv: no such file"),
    ):
        assert main([*begin, *extra.split()]) == 2, extra
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_starts_from_weights_and_heads_of_other_sizes_start_anew(clips, tmp_path):
    first = run(clips, tmp_path / "first", iterations=2, workers=0)
    others = write_manifest(tmp_path / "others", steps=(1, 1), heads={"objects": 5, "scenes": 4})
    started = tmp_path / "second"
    train(
        others,
        started,
        weights=first.weights,
        config=TrainConfig(iterations=1, batch=2, lr=1e-9),
        device="cpu",
    )
    _, before, _ = read_weights(first.weights)
    architecture, after, _ = read_weights(started / "weights.safetensors")
    assert architecture.head_sizes == {"objects": 5, "scenes": 4}
    assert architecture.widths == WIDTHS
    for name in ("conv1.weight", "bn7.weight", "objects.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6), name


def test_a_network_its_weights_file_and_its_architecture_are_all_initial_weights(clips, tmp_path):
    result = run(clips, tmp_path / "first", iterations=1, workers=0, validation=None)
    model = sp.load_pretrained(result.weights)
    config = TrainConfig(iterations=1, batch=2)
    one, two, other = (
        train(clips, tmp_path / name, weights=weights, config=config, device="cpu").weights
        for name, weights in (("file", result.weights), ("model", model), ("random", model.architecture))
    )
    assert one.read_bytes() == two.read_bytes()
    assert read_metadata(one)["training"]["start"] == read_metadata(result.weights)["sha256"]
    assert read_metadata(other)["training"]["start"] is None
    with pytest.raises(TrainingError, match="no heads objects and scenes"):
        train(clips, tmp_path / "classes", weights=NARROW.with_classes(3, "conv7"), device="cpu")


def test_training_leaves_the_callers_process_as_it_is(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "keep_freed_memory", lambda: pytest.fail("called"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(clips, tmp_path, iterations=2, validate_every=1)
    assert torch.equal(torch.rand(3), expected)


def test_progress_has_losses_and_messages_worth_keeping(clips, tmp_path):
    data = open_distillation_data(clips)
    data._rows[0][0] = tmp_path / "missing.wav"
    reports = []
    run(data, tmp_path / "run", reports.append, iterations=4, workers=0, validate_every=2, save_every=2)
    assert {(report.total, report.unit) for report in reports} == {(4, "step")}
    assert [report.done for report in reports if report.validation] == [2, 4]
    for report in reports:
        assert report.note == ("" if report.loss is None else f"loss {report.loss:.5g}")
        if report.validation:
            assert report.message.startswith(f"step {report.done}: {report.note}; validation loss ")
    (message,) = [report.message for report in reports if "silence" in report.message]
    assert message.startswith(f"{tmp_path / 'missing.wav'}: ")
    assert message.endswith("; it is silence in this training")
