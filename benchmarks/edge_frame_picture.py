"""Draw conv7's norm over time for the example sounds: docs/static/edge-frames.png.

python benchmarks/edge_frame_picture.py [-w soundnet8]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES
from soundnet_port.files import atomic_write

TARGET = Path(__file__).parent.parent / "docs" / "static" / "edge-frames.png"
SECONDS = 20  # as in training


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-w", "--weights", default="soundnet8")
    model = sp.load_pretrained(parser.parse_args().weights)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, color in zip(EXAMPLES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        wave = sp.load_audio(sp.example(name)).repeat(4)[: SECONDS * sp.SAMPLE_RATE]
        with torch.no_grad():
            norms = model.extract(wave, ["conv7"])["conv7"][0].norm(dim=0).numpy()
        centers = model.frame_times("conv7", len(norms))[:, 1].numpy()
        edge = model.edge_frames("conv7", len(wave))
        ordinary = np.median(norms[:-edge])
        times = norms[-1] / ordinary
        print(f"{name}: edge frame {norms[-1]:.1f}, median of the others {ordinary:.2f}, {times:.0f} times")
        axes.plot(centers[:-edge], norms[:-edge], "o-", color=color, label=name)
        axes.plot(centers[-edge:], norms[-edge:], "X", color=color, markersize=10, markeredgecolor="black")
    axes.axvline(SECONDS, color="gray", linestyle=":")
    axes.text(SECONDS + 0.1, 0.35, "end of the sound", rotation=90, color="gray", fontsize=8)
    axes.annotate(
        "edge frames",
        (centers[-1], norms[-1]),
        (-110, -6),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set_yscale("log")
    axes.set_xlim(-1.5, SECONDS + 2)
    axes.set_xlabel("center of what the frame hears (s)")
    axes.set_ylabel("norm of conv7")
    axes.legend(loc="center left")
    with atomic_write(TARGET) as aside:
        figure.savefig(aside, format="png", dpi=110)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
