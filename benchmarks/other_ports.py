"""Measure what the mistakes of other ports do to the numbers: the table in docs/other-ports.md.

Usage: other_ports.py [WEIGHTS [SOUND]]. Without arguments on the released network and the three example
sounds in sequence, each three times, so that anybody can reproduce the table. One mistake at a time; all else
is correct. Edge frames are left out, except in the row about them.
"""

import copy
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port import SAMPLE_RATE, SoundNet, load_audio, load_pretrained
from soundnet_port.audio.examples import medley
from soundnet_port.inference.prediction import min_samples

CLIP = 5 * SAMPLE_RATE
COLUMNS = ("mistake", "pool5", "pool5, mean", "conv7", "conv7, mean", "probability moved", "top object")


class Outputs(NamedTuple):
    """A port's outputs for a sound: (channels, frames) each, the heads as logits."""

    pool5: Tensor
    conv7: Tensor
    objects: Tensor
    scenes: Tensor


def run(
    model: SoundNet, wave: Tensor, *, pool_step: int = 0, pad_after: bool = False, edge: bool = False
) -> Outputs:
    """Run the network layer by layer, with mistakes in its geometry if requested."""
    x, layers = wave[None, None], {}
    for block in model.architecture.blocks:
        conv = model.get_submodule(block.name)
        padding = 0 if pad_after else block.padding
        x = F.conv1d(x, conv.weight, conv.bias, block.stride, padding)
        if pad_after:
            x = F.pad(x, (block.padding, block.padding))
        x = F.relu(model.get_submodule(block.norm)(x))
        layers[block.name] = x[0]
        if block.pool:
            x = F.max_pool1d(x, block.pool, pool_step or block.pool)
            layers[block.pool_layer] = x[0]
    if not edge:
        x = x[..., :-1]
        layers["conv7"] = x[0]
    heads = (model.head(head.name, x)[0] for head in model.architecture.heads)
    return Outputs(layers["pool5"], layers["conv7"], *heads)


def with_mistake(model: SoundNet, mistake: str) -> SoundNet:
    """Return a copy with one mistake in its batch norms."""
    model = copy.deepcopy(model)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        if mistake in ("statistics", "batch norms"):
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
        if mistake == "batch norms":
            norm.weight.fill_(1)
            norm.bias.zero_()
        if mistake == "training":
            norm.train()
        if mistake == "eps":
            norm.eps = 1e-3
    return model


def resample(wave: Tensor, rate: int) -> Tensor:
    return torch.from_numpy(soxr.resample(wave.numpy(), SAMPLE_RATE, rate, quality="HQ"))


def mistakes(model: SoundNet, wave: Tensor, other: Tensor) -> Iterator[tuple[str, Outputs, Outputs]]:
    """Yield (mistake, correct outputs, outputs with the mistake)."""
    correct = run(model, wave)
    yield "batch-norm statistics not copied", correct, run(with_mistake(model, "statistics"), wave)
    yield "batch norms not copied at all", correct, run(with_mistake(model, "batch norms"), wave)
    yield "left in training mode", correct, run(with_mistake(model, "training"), wave)
    yield "samples within +-1", correct, run(model, wave / 256)
    yield "samples within +-32,768", correct, run(model, wave * 128)
    yield "two channels mixed", correct, run(model, (wave + other) / 2)
    yield "edge frames taken in", correct, run(model, wave, edge=True)
    yield "eps 1e-3", correct, run(with_mistake(model, "eps"), wave)
    raw = model.extract(wave, [22, 23])
    yield "conv7 before batch norm and ReLU (module 22)", correct, correct._replace(conv7=raw[22][0, :, :-1])
    yield "conv7 before ReLU (module 23)", correct, correct._replace(conv7=raw[23][0, :, :-1])
    yield "pooling with stride 1", correct, run(model, wave, pool_step=1)
    yield "padding after the convolution", correct, run(model, wave, pad_after=True)
    yield "sound at 22,000 Hz", correct, run(model, resample(wave, 22_000))
    yield "sound at 44,100 Hz, as it is", correct, run(model, resample(wave, 44_100))
    clip, times = wave[:CLIP], -(-min_samples(model) // CLIP)
    heads = run(model, clip.repeat(times))
    alone = model.extract(clip, ["pool5", "conv7"])
    short = heads._replace(pool5=alone["pool5"][0], conv7=alone["conv7"][0, :, :-1])
    yield "a clip of 5 s repeated to 20 s", short, run(model, clip.repeat(4))


def differences(correct: Tensor, wrong: Tensor) -> tuple[str, str]:
    """Return relative differences: frame by frame, if the frames are as many, and of the means."""
    means = correct.mean(1), wrong.mean(1)
    mean_difference = percent((means[1] - means[0]).norm() / means[0].norm())
    if correct.shape != wrong.shape:
        return f"{wrong.shape[1]:,} for {correct.shape[1]:,}", mean_difference
    return percent((wrong - correct).norm() / correct.norm()), mean_difference


def percent(share: Tensor | float) -> str:
    share = 100 * float(share)
    if share == 0:
        return "0"
    if share >= 1e7:
        return f"10^{math.log10(share / 100):.0f}-fold"
    if share >= 1000:
        return f"{share / 100:,.0f}-fold"
    return f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def rows(model: SoundNet, wave: Tensor, other: Tensor) -> Iterator[tuple[str, ...]]:
    """Yield the table's cells."""
    for name, correct, wrong in mistakes(model, wave, other):
        before, after = (torch.softmax(outputs.objects, 0).mean(1) for outputs in (correct, wrong))
        moved = (after - before).abs().sum() / 2
        top = before.argmax(), after.argmax()
        yield (
            name,
            *differences(correct.pool5, wrong.pool5),
            *differences(correct.conv7, wrong.conv7),
            percent(moved),
            "same" if top[0] == top[1] else "another",
        )


def heads(model: SoundNet, wave: Tensor) -> Iterator[str]:
    """Yield sentences about the mistakes that do not change the trunk."""
    correct = run(model, wave)
    scenes = torch.softmax(correct.scenes, 0)
    lost = scenes[365:].sum(0)
    fewer = torch.softmax(correct.scenes[:365], 0)
    yield (
        f"scenes cut to the first 365: the others hold {percent(lost.mean())} of the probability; the top "
        f"scene is another in {int((fewer.argmax(0) != scenes.argmax(0)).sum())} of {scenes.shape[1]} frames"
    )
    logits = correct.objects
    negative = percent((logits < 0).float().mean())
    yield (
        f"logits of the objects: {logits.min():.1f} to {logits.max():.1f}, {negative} of them negative; "
        f"a frame's sum is {logits.sum(0).min():.1f} to {logits.sum(0).max():.1f}"
    )
    by_logits, by_probability = logits.mean(1), torch.softmax(logits, 0).mean(1)
    top = [set(ranking.topk(10).indices.tolist()) for ranking in (by_logits, by_probability)]
    yield (
        "logits averaged over frames: the top object is "
        f"{'the same' if by_logits.argmax() == by_probability.argmax() else 'another'}, "
        f"{len(top[0] & top[1])} of the top ten are the same"
    )
    conv7 = model.extract(wave[:CLIP], ["conv7"])["conv7"]
    yield f"a clip of 5 s as it is: {conv7.shape[2]} frames of conv7, the heads' kernel takes 8"
    for number in (22, 23):
        values = model.extract(wave, [number])[number]
        yield f"module {number}: {percent((values < 0).float().mean())} of the values are negative"


def main(weights: str = "soundnet8", sound: str = "") -> None:
    """Print the table and the sentences."""
    model = load_pretrained(weights)
    wave = load_audio(sound) if sound else medley()
    other = wave.roll(len(wave) // 2)  # a second channel with another sound, as loud as the first
    with torch.no_grad():
        outputs, layers = run(model, wave, edge=True), model.extract(wave, list(Outputs._fields))
        for name, values in outputs._asdict().items():
            np.testing.assert_allclose(values, layers[name][0], atol=1e-5 * float(values.abs().max()))
        print(f"| {' | '.join(COLUMNS)} |\n|---{'|---:' * (len(COLUMNS) - 2)}|---|")
        for row in rows(model, wave, other):
            print(f"| {' | '.join(row)} |")
        print()
        for sentence in heads(model, wave):
            print(f"- {sentence}")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
