r"""What edge frames do to the features of the released network: tables with and without them, on ESC-10.

    python benchmarks/edge_frames.py ESC-10 [PART ...]

Parts, all by default: `scenes`, `evaluate`, `clock`, `finetune`. The weights are `soundnet8`, by name.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import soundnet_port as sp
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.alignment import align
from soundnet_port.interop.hear import HearModel, get_scene_embeddings
from soundnet_port.learning.labeled_sounds import LabeledSounds
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.model import SoundNet

CASES = (("conv7", True), ("conv7", False), ("pool5", False))  # layer, with edge frames; pool5 has none
TR = 1.5  # seconds
RECORDING = 12  # clips, one after the other, of `clock`
FOLD = "5"  # held out by `finetune`
EPOCHS = 10


def name_of(layer: str, edge_frames: bool) -> str:
    """A row's label."""
    return f"{layer}, with edge frames" if edge_frames else layer


def row(label: str, *cells: str) -> None:
    """Print a row of a table."""
    print(f"  {label:34}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def scenes(network: SoundNet, data: LabeledSounds) -> None:
    """Mean-pooled HEAR scene embeddings: cosines within and between classes, and two classifiers."""
    sounds = [sp.load_audio(sound.path) for sound in data.sounds]
    targets = np.array(data.targets)
    pairs = ~np.eye(len(targets), dtype=bool)
    same = targets[:, None] == targets
    row("HEAR scene embeddings, mean", "within", "between", "1-NN", "linear")
    for layer, edge_frames in CASES:
        model = HearModel(network, scene_layer=layer, edge_frames=edge_frames)
        vectors = np.concatenate([get_scene_embeddings(wave[None] / FULL_SCALE, model) for wave in sounds])
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = unit @ unit.T
        nearest, linear = [], []
        for split in data.splits:
            train, test = list(split.train), list(split.test)
            found = targets[train][cosines[np.ix_(test, train)].argmax(1)]
            nearest.append((found == targets[test]).mean())
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
            classifier.fit(vectors[train], targets[train])
            linear.append(classifier.score(vectors[test], targets[test]))
        within, between = cosines[same & pairs].mean(), cosines[~same].mean()
        figures = f"{within:.3f}", f"{between:.3f}", f"{np.mean(nearest):.1%}", f"{np.mean(linear):.1%}"
        row(name_of(layer, edge_frames), *figures)


def evaluate(network: SoundNet, data: LabeledSounds) -> None:
    """`soundnet-port evaluate --protocol modern`, fold by fold."""
    row("evaluate, modern", *(f"fold {split.fold}" for split in data.splits), "mean", "std")
    for pool in ("mean", "mean+std"):
        for layer, edge_frames in CASES:
            made = sp.evaluate(network, data, layers=[layer], pool=pool, edge_frames=edge_frames)
            figures = [f"{accuracy:.1%}" for accuracy in (*made.accuracies, made.accuracy, made.std)]
            row(f"{name_of(layer, edge_frames)}, {pool}", *figures)


def clock(network: SoundNet, data: LabeledSounds) -> None:
    """Rows of conv7 on a stimulus clock, columns z-scored: norms of the last row and of the others."""
    step = len(data.sounds) // RECORDING
    recording = torch.cat([sp.load_audio(sound.path) for sound in data.sounds[::step][:RECORDING]])
    seconds = len(recording) / SAMPLE_RATE
    row(f"rows of {TR} s of {seconds:.0f} s, z-scored", "last", "median", "largest other")
    for edge_frames in (True, False):
        frames = compute_activations(network, recording, ["conv7"], edge_frames=edge_frames).activations[
            "conv7"
        ]
        rows = align(network, "conv7", frames, seconds, tr=TR)[0].numpy()
        norms = np.linalg.norm((rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-9), axis=1)
        others = norms[:-1]
        figures = f"{norms[-1]:.1f}", f"{np.median(others):.1f}", f"{others.max():.1f}"
        row(name_of("conv7", edge_frames), *figures)


def finetune(network: SoundNet, data: LabeledSounds) -> None:
    """A head on conv7, everything below frozen, one fold held out."""
    row(f"finetune, fold {FOLD} held out, {EPOCHS} epochs", "accuracy", "seconds")
    for kernel in (1, 4):  # frames that the head sees; the original's is 4
        for edge_frames in (True, False):
            with TemporaryDirectory() as folder:
                made = sp.finetune(
                    data,
                    Path(folder),
                    weights=network,
                    layer="conv7",
                    kernel=kernel,
                    frozen="conv7",
                    test=FOLD,
                    device="cpu",
                    config=sp.FinetuneConfig(epochs=EPOCHS, edge_frames=edge_frames),
                )
            label = f"{name_of('conv7', edge_frames)}, kernel {kernel}"
            row(label, f"{made.accuracy or 0:.1%}", f"{made.seconds:.0f}")


PARTS: dict[str, Callable[[SoundNet, LabeledSounds], None]] = {
    part.__name__: part for part in (scenes, evaluate, clock, finetune)
}


def main(esc10: str, *parts: str) -> None:
    """Print the tables of these parts, or of all."""
    network, data = sp.load_pretrained("soundnet8"), sp.read_labeled(esc10)
    for part in parts or PARTS:
        PARTS[part](network, data)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
