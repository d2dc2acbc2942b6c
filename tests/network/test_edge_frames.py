"""Edge frames: which they are, from the geometry alone, held against literal computations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from torch.nn import functional as F

import soundnet_port as sp
from soundnet_port import SOUNDNET5, SOUNDNET8


def literal_edge_frames(architecture, layer, samples):
    """Count them by marking every frame whose window reaches past the end, one by one."""
    frames = samples
    *before, last = architecture.blocks
    for block in before:
        frames = len(
            [t for t in range(frames) if t * block.stride + block.kernel <= frames + 2 * block.padding]
        )
        frames = frames // block.pool if block.pool else frames
    edge = []
    t = 0
    while t * last.stride + last.kernel <= frames + 2 * last.padding:
        first = t * last.stride - last.padding
        edge.append(any(at >= frames for at in range(first, first + last.kernel)))
        t += 1
    head = next((h for h in architecture.heads if h.name == layer), None)
    if head is None:
        return sum(edge)
    looks = []
    t = 0
    room = max(len(edge) + 2 * head.padding, head.kernel if head.padding else 0)  # Torch7's overhang
    while edge and t * head.stride + head.kernel <= room:
        first = t * head.stride - head.padding
        looks.append(any(at >= len(edge) or edge[at] for at in range(max(first, 0), first + head.kernel)))
        t += 1
    return sum(looks)


@settings(max_examples=budget(150), deadline=None)
@given(
    which=st.sampled_from(
        [
            (SOUNDNET8, "conv7"),
            (SOUNDNET8, "objects"),
            (SOUNDNET5, "conv4"),
            (SOUNDNET5, "scenes"),
            (SOUNDNET8.with_classes(3, "conv7", 4), "classes"),
            (SOUNDNET8.resized((1, 2, 3, 4, 5, 6, 7), {"objects": 2, "scenes": 2}), "scenes"),
            (SOUNDNET5.with_classes(3, "conv4", 1), "classes"),
        ]
    ),
    samples=st.integers(1, 700_000),
)
def test_edge_frames_are_those_whose_window_reaches_past_the_end(which, samples):
    architecture, layer = which
    total = architecture.frames(layer, samples)
    edge = architecture.edge_frames(layer, samples)
    assert 0 <= edge <= total
    if total:
        assert edge == literal_edge_frames(architecture, layer, samples)
    assert (total - edge > 0) == (samples >= architecture.shortest_ordinary(layer))


def test_the_rule_as_it_was_measured():
    """8 layers: conv7's last frame, exactly one at every length; 5 layers: conv4's last two."""
    for samples in range(12_766, 400_000, 3_331):
        assert SOUNDNET8.edge_frames("conv7", samples) == 1
        assert [SOUNDNET8.edge_frames(module, samples) for module in (21, 22, 23, 24)] == [0, 1, 1, 1]
        assert SOUNDNET8.edge_frames("objects", samples) == (
            SOUNDNET8.frames("objects", samples) > 0 and SOUNDNET8.frames("conv7", samples) % 2 == 0
        )
    assert SOUNDNET5.edge_frames("conv4", 20 * 22_050) == 2
    assert SOUNDNET5.edge_frames("objects", 20 * 22_050) == 0  # what training's loss saw


@pytest.mark.parametrize("layer", ["pool5", "conv6"])
def test_a_trunk_that_ends_earlier_has_none(layer):
    architecture = SOUNDNET8.with_classes(3, layer, 4)
    assert all(architecture.edge_frames(name, 200_000) == 0 for name in architecture.layers)
    assert architecture.shortest_ordinary("classes") == architecture.layer("classes").shortest


def test_what_is_marked_as_an_edge_frame_is_all_that_hears_the_padding(model):
    """Values far from zero in place of the zeros behind conv6 change the edge frames and no others."""
    samples = 150_000
    x = torch.randn(samples) * 20
    outputs = dict(model.trunk(x[None, None]))
    block = model.architecture.blocks[-1]
    padded = F.pad(outputs[21], (block.padding, 0))
    elsewhere = F.pad(padded, (0, block.padding), value=100.0)
    conv = model.conv7
    changed = F.conv1d(elsewhere, conv.weight, conv.bias, conv.stride)
    differs = (changed - outputs[22]).abs().amax((0, 1)) > 1e-3
    edge = model.edge_frames("conv7", samples)
    assert differs.tolist() == [False] * (len(differs) - edge) + [True] * edge


def test_streams_know_their_edge_frames_at_the_end(model):
    waveform = torch.randn(300_000) * 20
    features = sp.stream(model, ["pool5", "conv7", "objects"])
    for piece in waveform.split(70_000):
        features.push(piece)
        assert features.edge_frames == {"pool5": 0, "conv7": 0, "objects": 0}
    rest = features.finish()
    assert features.edge_frames == {
        layer: model.edge_frames(layer, len(waveform)) for layer in ("pool5", "conv7", "objects")
    }
    assert all(rest[layer].shape[-1] >= count for layer, count in features.edge_frames.items())
